"""The functions of `kernels.secants` in one pass over the records each, for bfloat16 records on one GPU.

A program takes some columns of all records at a time. Matrix products run on tensor cores, whose products of
bfloat16 numbers are exact and summed in f32. A vector in f32 enters such a product as the sum of two bfloat16 vectors,
which hold 16 of its 24 bits. Each program writes its own sums, which are added afterwards. There is no atomic addition,
so the bits are the same in every run.

Axes: W records, padded to a power of two by repeating the first ones; N columns, a multiple of `COLUMNS`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

Ref = Any  # Memory of the GPU; Pallas has no public type for it.

COLUMNS = 1024  # The number of columns must be a multiple of this.
BLOCK, WIDE_BLOCK = 128, 1024  # The columns of an iteration of `products`, and of a program of the others.
_PROGRAMS = 132 * 8  # The largest number of programs of `products`: eight for each multiprocessor of an H100.
# For `products`; with its block, the fastest on an H100 of 128 to 512 columns, 2 to 8 warps, and 1 or 3 stages. No log.
_WARPS, _STAGES = 2, 3
_WIDE_WARPS = 4
_LEAST_ROWS = 16  # The smallest number of rows of a tensor core's operand.


def products(
    rms: jax.Array,
    diff_params: jax.Array,
    diff_gradients: jax.Array,
    gradient: jax.Array,
    base: jax.Array,
    *,
    epsilon: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The Gram matrix, the cross products, and the products with gradient and step.

    Args:
        rms: ``[N]``, D⁻¹ without epsilon.
        diff_params: ``[W, N] bfloat16``, s.
        diff_gradients: ``[W, N] bfloat16``, y.
        gradient: ``[N]``, g.
        base: ``[N]``, b.
        epsilon: the term that D⁻¹ adds to ``rms``.
        interpret: whether to run without a GPU, for tests.

    Returns:
        ``[W, W]`` ``s_i' D⁻¹ s_j`` and ``s_i' y_j``, ``[W]`` ``s_i' g`` and ``s_i' D⁻¹ b``, all float32.
    """
    window, size = diff_params.shape
    rows = max(_LEAST_ROWS, pl.next_power_of_2(window))
    num_blocks = size // BLOCK
    programs = min(_PROGRAMS, num_blocks)
    tables, vectors = pl.pallas_call(
        functools.partial(
            _products_kernel, epsilon=epsilon, window=window, rows=rows, num_blocks=num_blocks, programs=programs
        ),
        grid=(programs,),
        out_shape=[
            jax.ShapeDtypeStruct((programs, 2, rows, rows), jnp.float32),
            jax.ShapeDtypeStruct((programs, rows, rows), jnp.float32),
        ],
        name="secant_products",
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
    )(rms, diff_params, diff_gradients, gradient, base)
    gram, cross = jnp.sum(tables, axis=0)[:, :window, :window]
    vectors = jnp.sum(vectors, axis=0)[:window]
    return gram, cross, vectors[:, 0] + vectors[:, 1], vectors[:, 2] + vectors[:, 3]


def _products_kernel(
    rms: Ref,
    diff_params: Ref,
    diff_gradients: Ref,
    gradient: Ref,
    base: Ref,
    tables: Ref,
    vectors: Ref,
    *,
    epsilon: float,
    window: int,
    rows: int,
    num_blocks: int,
    programs: int,
) -> None:
    program = pl.program_id(0)
    row = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0) % window
    number = jax.lax.broadcasted_iota(jnp.int32, (rows, BLOCK), 0)

    def turn(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        columns = pl.ds((program + i * programs) * BLOCK, BLOCK)
        s, y = diff_params[row, columns], diff_gradients[row, columns]
        d = rms[columns].astype(jnp.float32) + epsilon
        scaled = (s.astype(jnp.float32) * jnp.sqrt(d)[None]).astype(jnp.bfloat16)
        operands = [*_halves(gradient[columns]), *_halves(base[columns].astype(jnp.float32) * d)]
        stacked = jnp.zeros((rows, BLOCK), jnp.bfloat16)
        for place, operand in enumerate(operands):
            stacked = jnp.where(number == place, operand[None], stacked)
        found = _dot(scaled, scaled), _dot(s, y), _dot(s, stacked)
        return tuple(total + x for total, x in zip(sums, found, strict=True))

    zeros = jnp.zeros((rows, rows), jnp.float32)
    turns = (num_blocks - program + programs - 1) // programs
    gram, cross, of_vectors = jax.lax.fori_loop(0, turns, turn, (zeros, zeros, zeros))
    tables[program, 0] = gram
    tables[program, 1] = cross
    vectors[program] = of_vectors


def step(
    rms: jax.Array,
    diff_params: jax.Array,
    diff_gradients: jax.Array,
    gradient: jax.Array,
    base: jax.Array,
    coefficients: jax.Array,
    numbers: jax.Array,
    *,
    epsilon: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The step, and the squared length of its part outside the span.

    Args:
        rms: ``[N]``, D⁻¹ without epsilon.
        diff_params: ``[W, N] bfloat16``, s.
        diff_gradients: ``[W, N] bfloat16``, y.
        gradient: ``[N]``, g.
        base: ``[N]``, b.
        coefficients: ``[4, W] float32``, the coefficients of s in the part inside, of y, of s in the gradient, and of s
            in the step.
        numbers: ``[3] float32``, the factors of the optimizer's step and of the gradient outside; 1 if the step is the
            optimizer's, and 0 if not.
        epsilon: the term that D⁻¹ adds to ``rms``.
        interpret: whether to run without a GPU, for tests.

    Returns:
        The step, ``[N] float32``, and the squared length, ``[]``.
    """
    window, size = diff_params.shape
    programs = size // WIDE_BLOCK
    found, squared = pl.pallas_call(
        functools.partial(_step_kernel, epsilon=epsilon, window=window),
        grid=(programs,),
        out_shape=[jax.ShapeDtypeStruct((size,), jnp.float32), jax.ShapeDtypeStruct((programs,), jnp.float32)],
        name="secant_step",
        compiler_params=triton.CompilerParams(num_warps=_WIDE_WARPS, num_stages=1),
        interpret=interpret,
    )(rms, diff_params, diff_gradients, gradient, base, coefficients, numbers)
    return found, jnp.sum(squared)


def _step_kernel(
    rms: Ref,
    diff_params: Ref,
    diff_gradients: Ref,
    gradient: Ref,
    base: Ref,
    coefficients: Ref,
    numbers: Ref,
    found: Ref,
    squared: Ref,
    *,
    epsilon: float,
    window: int,
) -> None:
    program = pl.program_id(0)
    columns = pl.ds(program * WIDE_BLOCK, WIDE_BLOCK)
    d, b = rms[columns].astype(jnp.float32) + epsilon, base[columns].astype(jnp.float32)
    changed = gradient[columns].astype(jnp.float32)
    inside = of_gradient = of_base = jnp.zeros(WIDE_BLOCK, jnp.float32)
    for i in range(window):
        s, y = diff_params[i, columns].astype(jnp.float32), diff_gradients[i, columns].astype(jnp.float32)
        inside += coefficients[0, i] * s
        changed += coefficients[1, i] * y
        of_gradient += coefficients[2, i] * s
        of_base += coefficients[3, i] * s
    outside = numbers[0] * (b - of_base) - numbers[1] * (changed / d - of_gradient)
    found[columns] = jnp.where(numbers[2] > 0, b, inside + outside)
    squared[program] = jnp.sum(outside * outside * d)


def missed(
    rms: jax.Array,
    diff_gradients: jax.Array,
    new: jax.Array,
    old: jax.Array,
    change: jax.Array,
    *,
    epsilon: float,
    interpret: bool = False,
) -> jax.Array:
    """The squared error of a prediction, ``||g - ĝ||²``.

    Args:
        rms: ``[N]``, D⁻¹ without epsilon.
        diff_gradients: ``[W, N] bfloat16``, y.
        new: ``[N]``, the gradient g.
        old: ``[N]``, the gradient before it.
        change: ``[W] float32``, the coefficients of y in the predicted difference of both.
        epsilon: the term that D⁻¹ adds to ``rms``.
        interpret: whether to run without a GPU, for tests.

    Returns:
        ``[]``.
    """
    window, size = diff_gradients.shape
    squared = pl.pallas_call(
        functools.partial(_missed_kernel, epsilon=epsilon, window=window),
        grid=(size // WIDE_BLOCK,),
        out_shape=jax.ShapeDtypeStruct((size // WIDE_BLOCK,), jnp.float32),
        name="secant_missed",
        compiler_params=triton.CompilerParams(num_warps=_WIDE_WARPS, num_stages=1),
        interpret=interpret,
    )(rms, diff_gradients, new, old, change)
    return jnp.sum(squared)


def _missed_kernel(
    rms: Ref, diff_gradients: Ref, new: Ref, old: Ref, change: Ref, squared: Ref, *, epsilon: float, window: int
) -> None:
    program = pl.program_id(0)
    columns = pl.ds(program * WIDE_BLOCK, WIDE_BLOCK)
    error = new[columns].astype(jnp.float32) - old[columns].astype(jnp.float32)
    for i in range(window):
        error -= change[i] * diff_gradients[i, columns].astype(jnp.float32)
    squared[program] = jnp.sum(error * error / (rms[columns].astype(jnp.float32) + epsilon))


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x y'``, summed in f32."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bfloat16 arrays whose sum is x, except for its last 8 bits."""
    x = x.astype(jnp.float32)
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
