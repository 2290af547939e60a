"""Solves small positive definite systems in one launch, each in the registers of its own program; for one GPU.

``jnp.linalg.solve`` takes some ten launches there, three of them of library functions, which also divide a program's
command buffer. A step that predicts has little else to do.

Axes: B systems, W unknowns.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vsa_optax.kernels import platforms

Ref = Any  # Memory of the GPU; Pallas has no public type for it.

_LEAST = 16  # The smallest padded number of unknowns, a size of tiles that Triton handles well.


def solve(matrices: jax.Array, right: jax.Array, *, interpret: bool = False) -> jax.Array:
    """``[B, W] float32``: the solutions x of ``A x = b``, by Gauss-Jordan elimination without exchanges of rows.

    A positive definite matrix needs no exchanges. For other matrices the result may not be finite.

    Args:
        matrices: ``[B, W, W] float32``, A, symmetric and positive definite.
        right: ``[B, W] float32``, b.
        interpret: whether to run without a GPU, for tests.
    """
    num, size = right.shape
    width = max(_LEAST, pl.next_power_of_2(size))
    pad = width - size
    # The padding is a system of its own, with the solution 0.
    unit = jnp.diag((jnp.arange(width) >= size).astype(jnp.float32))
    padded = jnp.pad(matrices, ((0, 0), (0, pad), (0, pad))) + unit
    (solved,) = pl.pallas_call(
        _kernel,
        grid=(num,),
        out_shape=[platforms.shape_like((num, width), jnp.float32, [matrices, right])],
        name="eliminate",
        compiler_params=triton.CompilerParams(num_warps=1 if width <= 32 else 4, num_stages=1),
        interpret=interpret,
    )(padded, jnp.pad(right, ((0, 0), (0, pad))))
    return solved[:, :size]


def _kernel(matrices: Ref, right: Ref, solved: Ref) -> None:
    i = pl.program_id(0)
    matrix, values = matrices[i], right[i]
    width = values.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, (width, width), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (width, width), 1)
    number = jax.lax.broadcasted_iota(jnp.int32, (width,), 0)

    def eliminate(k: jax.Array, system: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Removes unknown ``k`` from all rows but its own, which is divided by its pivot."""
        matrix, values = system
        of_column = jnp.sum(jnp.where(column == k, matrix, 0.0), axis=1)
        pivot = jnp.sum(jnp.where(number == k, of_column, 0.0))
        of_row = jnp.sum(jnp.where(row == k, matrix, 0.0), axis=0) / pivot
        value = jnp.sum(jnp.where(number == k, values, 0.0)) / pivot
        factors = jnp.where(number == k, 0.0, of_column)
        matrix = jnp.where(row == k, of_row[None], matrix - factors[:, None] * of_row[None])
        return matrix, jnp.where(number == k, value, values - factors * value)

    solved[i] = jax.lax.fori_loop(0, width, eliminate, (matrix, values))[1]
