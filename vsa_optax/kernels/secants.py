"""What a leap needs of arrays as long as the parameters: sums over secants, and the step; of one leaf.

On one GPU, for records in bfloat16 of a large leaf, each is one pass of `kernels.gpu.secant_kernels` over the records.
Everywhere else XLA makes them, which also divides the work of arrays that are laid out over several devices.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from vsa_optax.kernels import inner_products, numerics, platforms

EPSILON = 1e-8  # Added to the root mean square of gradients.
_LEAST_SIZE = 2**16  # Of a leaf, for which a kernel of its own pays.


class Secants(NamedTuple):
    """What is known of one leaf.

    Attributes:
        rms: ``[*shape]``, root mean square of gradients; D⁻¹ but for `EPSILON`.
        diff_params: ``[W, *shape]``, s.
        diff_gradients: ``[W, *shape]``, y.
        gradient: ``[*shape]``, g.
        base: ``[*shape]``, b, the optimizer's step.
    """

    rms: jax.Array
    diff_params: jax.Array
    diff_gradients: jax.Array
    gradient: jax.Array
    base: jax.Array


class Evaluated(NamedTuple):
    """A new gradient of one leaf, and what was known before.

    Attributes:
        rms: ``[*shape]``, as in `Secants`.
        diff_gradients: ``[W, *shape]``, y.
        new: ``[*shape]``, g.
        old: ``[*shape]``, the gradient where the leap began.
    """

    rms: jax.Array
    diff_gradients: jax.Array
    new: jax.Array
    old: jax.Array


Arrays = TypeVar("Arrays", Secants, Evaluated)


class Coefficients(NamedTuple):
    """What a step is made of.

    Attributes:
        inside: ``[W]``, of s: the part in the span.
        change: ``[W]``, of y: how the gradient changes by it.
        gradient: ``[W]``, of s: D times the part in the span of the gradient so changed.
        step: ``[W]``, of s: the part of b in the span.
        of_base: ``[]``, of what b has outside of the span.
        of_gradient: ``[]``, of minus what D times the changed gradient has outside.
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
    """D⁻¹, by which displacements are measured."""
    return (wide(rms) + EPSILON).astype(dtype)


def squared_norm(gradient: jax.Array, rms: jax.Array) -> jax.Array:
    """``[]``, ``g'Dg``."""
    squared = _squared(wide(gradient))
    return jnp.sum(squared / metric(rms, squared.dtype))


def wide(x: jax.Array) -> jax.Array:
    """In at least f32."""
    return x.astype(numerics.promoted(x.dtype, jnp.float32))


def combined(coefficients: jax.Array, records: jax.Array) -> jax.Array:
    """``[*shape]``: the records' sum with these weights."""
    window = records.shape[0]
    return numerics.linear_combination([coefficients[i] for i in range(window)], [records[i] for i in range(window)])


def products(leaf: Secants) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """``[W, W]`` of ``s_i' D⁻¹ s_j`` and ``s_i' y_j``, ``[W]`` of ``s_i' g`` and ``s_i' D⁻¹ b``; in at least f32."""
    if not _suits_gpu(leaf):
        return _products(leaf)
    return platforms.on_gpu_or_anywhere(_products_in_one_pass, _products, leaf)


def step(leaf: Secants, of: Coefficients) -> tuple[jax.Array, jax.Array]:
    """``[*shape]`` in at least f32, and ``[]``, the squared length of what of it is outside of the span."""
    if not _suits_gpu(leaf):
        return _step(leaf, of)
    return platforms.on_gpu_or_anywhere(_step_in_one_pass, _step, leaf, of)


def missed(evaluated: Evaluated, change: jax.Array) -> jax.Array:
    """``[]``, ``||g - ĝ||²``, where ``change``, ``[W]`` of y, was predicted of the gradient's."""
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
    # By a root on either side the Gram matrix has no negative eigenvalue, rounded or not.
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
    from vsa_optax.kernels.gpu import secant_kernels  # Pallas with it, which few need.

    most, rest = _divided(leaf, secant_kernels.COLUMNS)
    found = secant_kernels.products(*most, epsilon=EPSILON)
    return found if rest is None else jax.tree.map(jnp.add, found, _products(rest))


def _step_in_one_pass(leaf: Secants, of: Coefficients) -> tuple[jax.Array, jax.Array]:
    from vsa_optax.kernels.gpu import secant_kernels  # Pallas with it, which few need.

    most, rest = _divided(leaf, secant_kernels.COLUMNS)
    coefficients = jnp.stack([of.inside, of.change, of.gradient, of.step]).astype(jnp.float32)
    numbers = jnp.stack([x.astype(jnp.float32) for x in (of.of_base, of.of_gradient, of.is_base)])
    found, squared = secant_kernels.step(*most, coefficients, numbers, epsilon=EPSILON)
    if rest is not None:
        of_rest, squared_of_rest = _step(rest, of)
        found, squared = jnp.concatenate([found, of_rest]), squared + squared_of_rest
    return found.reshape(leaf.base.shape), squared


def _missed_in_one_pass(evaluated: Evaluated, change: jax.Array) -> jax.Array:
    from vsa_optax.kernels.gpu import secant_kernels  # Pallas with it, which few need.

    most, rest = _divided(evaluated, secant_kernels.COLUMNS)
    found = secant_kernels.missed(*most, change.astype(jnp.float32), epsilon=EPSILON)
    return found if rest is None else found + _missed(rest, change)


def _divided(arrays: Arrays, columns: int) -> tuple[Arrays, Arrays | None]:
    """Flat arrays: a multiple of so many columns, and those left over."""
    shape, size = arrays.rms.shape, arrays.rms.size
    most = size // columns * columns
    flat = [x.reshape(size) if x.shape == shape else x.reshape(x.shape[0], size) for x in arrays]
    if most == size:
        return type(arrays)(*flat), None
    return type(arrays)(*(x[..., :most] for x in flat)), type(arrays)(*(x[..., most:] for x in flat))


def _squared(x: jax.Array) -> jax.Array:
    return (x.conj() * x).real
