"""The parts of a leap that read arrays of the parameters' size, for one leaf: sums over secants, and the step.

On one GPU, for bfloat16 records of a large leaf, each part is one pass of `kernels.gpu.secant_kernels` over the
records. Everywhere else XLA computes them, and partitions the work for sharded arrays.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from vsa_optax.kernels import inner_products, numerics, platforms

EPSILON = 1e-8  # Added to the root mean square of gradients.
_LEAST_SIZE = 2**16  # The smallest leaf for which a custom kernel is faster.


class Secants(NamedTuple):
    """The secants, gradient and optimizer's step of one leaf.

    Attributes:
        rms: ``[*shape]``, the root mean square of gradients; D⁻¹ without `EPSILON`.
        diff_params: ``[W, *shape]``, s, the changes of the parameters.
        diff_gradients: ``[W, *shape]``, y, the changes of the gradient.
        gradient: ``[*shape]``, g, the gradient.
        base: ``[*shape]``, b, the optimizer's step.
    """

    rms: jax.Array
    diff_params: jax.Array
    diff_gradients: jax.Array
    gradient: jax.Array
    base: jax.Array


class Evaluated(NamedTuple):
    """A new gradient of one leaf, with the secants and the gradient before it.

    Attributes:
        rms: ``[*shape]``, the root mean square of gradients; D⁻¹ without `EPSILON`.
        diff_gradients: ``[W, *shape]``, y, the changes of the gradient.
        new: ``[*shape]``, g, the new gradient.
        old: ``[*shape]``, the gradient at the start of the leap.
    """

    rms: jax.Array
    diff_gradients: jax.Array
    new: jax.Array
    old: jax.Array


Arrays = TypeVar("Arrays", Secants, Evaluated)


class Coefficients(NamedTuple):
    """The coefficients of a step.

    Attributes:
        inside: ``[W]``, coefficients of s: the part of the step in the span.
        change: ``[W]``, coefficients of y: the change of the gradient by that part.
        gradient: ``[W]``, coefficients of s: the part in the span of D times the changed gradient.
        step: ``[W]``, coefficients of s: the part of b in the span.
        of_base: ``[]``, the coefficient of the part of b outside the span.
        of_gradient: ``[]``, the coefficient of minus the part of D times the changed gradient outside the span.
        is_base: ``[] bool``, whether the step is b itself.
    """

    inside: jax.Array
    change: jax.Array
    gradient: jax.Array
    step: jax.Array
    of_base: jax.Array
    of_gradient: jax.Array
    is_base: jax.Array


def metric(rms: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """D⁻¹, the metric of displacements."""
    return (wide(rms) + EPSILON).astype(dtype)


def squared_norm(gradient: jax.Array, rms: jax.Array) -> jax.Array:
    """The squared norm of a gradient, ``[]``: ``g'Dg``."""
    squared = _squared(wide(gradient))
    return jnp.sum(squared / metric(rms, squared.dtype))


def wide(x: jax.Array) -> jax.Array:
    """Casts ``x`` to at least f32."""
    return x.astype(numerics.promoted(x.dtype, jnp.float32))


def combined(coefficients: jax.Array, records: jax.Array) -> jax.Array:
    """``[*shape]``: the weighted sum of the records."""
    window = records.shape[0]
    return numerics.linear_combination([coefficients[i] for i in range(window)], [records[i] for i in range(window)])


def products(leaf: Secants) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """``[W, W]`` of ``s_i' D⁻¹ s_j`` and ``s_i' y_j``, ``[W]`` of ``s_i' g`` and ``s_i' D⁻¹ b``; in at least f32."""
    if not _suits_gpu(leaf):
        return _products(leaf)
    return platforms.on_gpu_or_anywhere(_products_in_one_pass, _products, leaf)


def step(leaf: Secants, of: Coefficients) -> tuple[jax.Array, jax.Array]:
    """The step, ``[*shape]`` in at least f32, and the squared length ``[]`` of its part outside the span."""
    if not _suits_gpu(leaf):
        return _step(leaf, of)
    return platforms.on_gpu_or_anywhere(_step_in_one_pass, _step, leaf, of)


def missed(evaluated: Evaluated, change: jax.Array) -> jax.Array:
    """``[]``, ``||g - ĝ||²``, where the coefficients ``change``, ``[W]``, of y predicted the gradient's change."""
    if not _suits_gpu(evaluated):
        return _missed(evaluated, change)
    return platforms.on_gpu_or_anywhere(_missed_in_one_pass, _missed, evaluated, change)


def _suits_gpu(arrays: Secants | Evaluated) -> bool:
    shape = arrays.rms.shape
    records = [x for x in arrays if x.shape != shape]
    return (
        arrays.rms.size >= _LEAST_SIZE
        and all(x.dtype == jnp.bfloat16 for x in records)
        and all(x.dtype in (jnp.float32, jnp.float16, jnp.bfloat16) for x in arrays)
        and platforms.has_kernels()
    )


def _products(leaf: Secants) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    base, records = wide(leaf.base), wide(leaf.diff_params)
    # With a square root of the metric on either side, rounding cannot make an eigenvalue of the Gram matrix negative.
    scaled = numerics.saturating_cast(records * jnp.sqrt(metric(leaf.rms, records.dtype))[None], leaf.diff_params.dtype)
    return (
        inner_products.inner_of_all_records(scaled, scaled),
        inner_products.inner_of_all_records(leaf.diff_params, leaf.diff_gradients),
        inner_products.inner_of_each(leaf.diff_params, leaf.gradient),
        inner_products.inner_of_each(leaf.diff_params, base * metric(leaf.rms, base.dtype)),
    )


def _step(leaf: Secants, of: Coefficients) -> tuple[jax.Array, jax.Array]:
    dtype = numerics.promoted(leaf.gradient.dtype, leaf.base.dtype, jnp.float32)
    base = leaf.base.astype(dtype)

    def sum_of(coefficients: jax.Array, records: jax.Array) -> jax.Array:
        return combined(coefficients, records).astype(dtype)

    changed = leaf.gradient.astype(dtype) + sum_of(of.change, leaf.diff_gradients)
    base_outside = base - sum_of(of.step, leaf.diff_params)
    gradient_outside = changed / metric(leaf.rms, dtype) - sum_of(of.gradient, leaf.diff_params)
    outside = of.of_base.astype(dtype) * base_outside - of.of_gradient.astype(dtype) * gradient_outside
    found = jnp.where(of.is_base, base, sum_of(of.inside, leaf.diff_params) + outside)
    squared = _squared(outside)
    return found, jnp.sum(squared * metric(leaf.rms, squared.dtype))


def _missed(evaluated: Evaluated, change: jax.Array) -> jax.Array:
    rms, diff_gradients, new, old = evaluated
    dtype = numerics.promoted(new.dtype, old.dtype, jnp.float32)
    error = new.astype(dtype) - old.astype(dtype) - combined(change, diff_gradients).astype(dtype)
    return squared_norm(error, rms)


def _products_in_one_pass(leaf: Secants) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    from vsa_optax.kernels.gpu import secant_kernels  # It imports Pallas, which few users need.

    most, rest = _divided(leaf, secant_kernels.COLUMNS)
    found = secant_kernels.products(*most, epsilon=EPSILON)
    return found if rest is None else jax.tree.map(jnp.add, found, _products(rest))


def _step_in_one_pass(leaf: Secants, of: Coefficients) -> tuple[jax.Array, jax.Array]:
    from vsa_optax.kernels.gpu import secant_kernels  # It imports Pallas, which few users need.

    most, rest = _divided(leaf, secant_kernels.COLUMNS)
    coefficients = jnp.stack([of.inside, of.change, of.gradient, of.step]).astype(jnp.float32)
    numbers = jnp.stack([x.astype(jnp.float32) for x in (of.of_base, of.of_gradient, of.is_base)])
    found, squared = secant_kernels.step(*most, coefficients, numbers, epsilon=EPSILON)
    if rest is not None:
        of_rest, squared_of_rest = _step(rest, of)
        found, squared = jnp.concatenate([found, of_rest]), squared + squared_of_rest
    return found.reshape(leaf.base.shape), squared


def _missed_in_one_pass(evaluated: Evaluated, change: jax.Array) -> jax.Array:
    from vsa_optax.kernels.gpu import secant_kernels  # It imports Pallas, which few users need.

    most, rest = _divided(evaluated, secant_kernels.COLUMNS)
    found = secant_kernels.missed(*most, change.astype(jnp.float32), epsilon=EPSILON)
    return found if rest is None else found + _missed(rest, change)


def _divided(arrays: Arrays, columns: int) -> tuple[Arrays, Arrays | None]:
    """Flattens the arrays and splits them into a multiple of ``columns`` coordinates and the remainder."""
    shape, size = arrays.rms.shape, arrays.rms.size
    most = size // columns * columns
    flat = [x.reshape(size) if x.shape == shape else x.reshape(x.shape[0], size) for x in arrays]
    if most == size:
        return type(arrays)(*flat), None
    return type(arrays)(*(x[..., :most] for x in flat)), type(arrays)(*(x[..., most:] for x in flat))


def _squared(x: jax.Array) -> jax.Array:
    return (x.conj() * x).real
