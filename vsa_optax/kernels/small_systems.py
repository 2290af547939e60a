"""Solves a few small positive definite systems of linear equations."""

import jax
import jax.numpy as jnp

from vsa_optax.kernels import platforms


def solve(matrices: jax.Array, right: jax.Array) -> jax.Array:
    """``[B, W] float32``: the solutions of B systems ``[B, W, W] float32`` with the right sides ``[B, W] float32``.

    They may hold NaN or infinities if a matrix is not positive definite in floating point.
    """
    return platforms.on_each_gpu_or_anywhere(_on_gpu, _anywhere, matrices, right)


def _on_gpu(matrices: jax.Array, right: jax.Array) -> jax.Array:
    from vsa_optax.kernels.gpu import elimination  # It imports Pallas, which few users need.

    return elimination.solve(matrices, right)


def _anywhere(matrices: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.linalg.solve(matrices, right[..., None])[..., 0]
