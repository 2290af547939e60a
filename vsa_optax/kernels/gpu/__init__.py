"""Kernels for one GPU, by Pallas and Triton; the functions that choose them are in `vsa_optax.kernels`."""
