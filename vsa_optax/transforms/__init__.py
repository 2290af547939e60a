"""Gradient transformations: pytrees and Optax states around the kernels."""
