"""The coded sum as an accumulator of ``optax.microbatching``, for micro-batches inside one step without an f32 sum."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax.accumulation.ternary_sum import Rounding, make_ternary_sum
from vsa_optax.codecs import codec as codecs
from vsa_optax.core import checks
from vsa_optax.core.mesh import as_varying, varying_axes, varying_like
from vsa_optax.core.trees import tree_where
from vsa_optax.core.types import Tree


class TernaryAccumulatorState(NamedTuple):
    """State of `ternary_accumulator` between micro-batches.

    Attributes:
        nonfinite_count: ``[] int32``, the number of micro-batches left out because of a NaN or an infinity.
        acc_grads: tree like the gradients, with a coded sum for each.
        specs: static, tree like the gradients, with a `LeafSpec` for each.
        num_seen: ``[] int32``, the number of micro-batches so far, including those left out.
    """

    nonfinite_count: jax.Array
    acc_grads: Tree
    specs: Tree
    num_seen: jax.Array


def ternary_accumulator(
    num_microbatches: int,
    *,
    trits: checks.NumTrits | None = None,
    rounding: Rounding = "nearest",
    block_size: int = 1024,
    use_grad_mean: bool = True,
    seed: int = 0,
) -> optax.microbatching.Accumulator:
    """An ``optax.microbatching.Accumulator`` that keeps the running sum of gradients in trits.

    Only the coded sum is kept between micro-batches, so the last one is also quantised, and the error of the mean is
    larger than with `vsa_optax.accumulate_ternary`. The table has its relative squared error for gradients of pure
    noise, the worst case. In parentheses is ``v (K + 1) / 2``, which the error follows while it is small; v is the
    error of one quantisation:

    ==========  ======  ===================  ===================  ===================
    ``trits``   bits    K = 2                K = 8                K = 32
    ==========  ======  ===================  ===================  ===================
    1           1.62    0.26 (0.29)          0.48 (0.86)          0.72 (3.1)
    2           3.22    0.041 (0.042)        0.107 (0.125)        0.31 (0.46)
    3           4.82    0.0052 (0.0052)      0.015 (0.016)        0.052 (0.057)
    ==========  ======  ===================  ===================  ===================

    The rotation is the same in every step; each ``seed`` has its own.

    **Number of micro-batches.** ``optax.microbatch`` does not pass a number to its accumulator, so the mean is that of
    the micro-batches received. With ``num_real_microbatches=`` it is the mean of that number, as with
    ``AccumulationType.RUNNING_MEAN``. Another number than ``num_microbatches`` is not an error, but the default of
    ``trits``, which is chosen for the latter, may be poor.

    **Non-finite values.** A micro-batch with a NaN or an infinity is left out, and the mean is that of the others. If
    no micro-batch remains, the mean is NaN.

    Args:
        num_microbatches: the expected number of micro-batches in a step, ``>= 1``; it decides the default of ``trits``.
        trits: the number of trits per coordinate, 1, 2 or 3; None takes two for up to 8 micro-batches, and three for
            more.
        rounding: ``"nearest"``, or ``"stochastic"``, which is unbiased over seeds but has a larger error.
        block_size: the number of coordinates that share a scale, a power of two from 2 to 65536. Leaves with fewer
            coordinates are summed in f32.
        use_grad_mean: whether to return the mean instead of the sum.
        seed: the seed of the random rotation, ``>= 0``.

    Returns:
        An ``optax.microbatching.Accumulator`` for a tree of gradients, whose dtypes the result keeps. For a function
        with other outputs, put it in a tree, such as ``(AccumulationType.MEAN, ternary_accumulator(8))`` for
        ``jax.value_and_grad``.

    State cost:
        that of `vsa_optax.accumulate_ternary` inside the step; none between steps.

    Raises:
        ValueError: if an argument is outside its range; at its use, if structure or shapes of the gradients change.
        TypeError: at its use, if a leaf is neither floating point nor complex, or alternates between both.

    Warns:
        UserWarning: if there are more than 32 micro-batches in one trit.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> def loss(params, batch):
        ...     return jnp.mean((batch @ params - 1.0) ** 2)
        >>> batch, params = jax.random.normal(jax.random.key(0), (32, 2048)), jnp.zeros(2048)
        >>> accumulator = vsa_optax.ternary_accumulator(8)
        >>> in_pieces = optax.microbatching.microbatch(jax.grad(loss), 1, 4, accumulator)  # 8 of 4 examples.
        >>> exact, error = jax.grad(loss)(params, batch), in_pieces(params, batch) - jax.grad(loss)(params, batch)
        >>> bool(jnp.sum(error**2) < 0.13 * jnp.sum(exact**2))
        True
    """
    num = checks.check_integer("num_microbatches", num_microbatches, 1)
    total = make_ternary_sum(num, trits=trits, rounding=rounding, block_size=block_size, seed=seed)
    checks.check_bool("use_grad_mean", use_grad_mean)
    window = jnp.int32(0)

    def init(like: optax.Updates) -> TernaryAccumulatorState:
        checks.check_inexact_leaves(like)
        # Inside shard_map, the count varies over the devices if the gradients do.
        own = as_varying(jnp.zeros([], jnp.int32), varying_axes(like))
        acc_grads, specs = varying_like(total.zeros(like), like), jax.tree.map(codecs.spec_of, like)
        return TernaryAccumulatorState(own, acc_grads, specs, jnp.zeros([], jnp.int32))

    def update(carry: TernaryAccumulatorState, value: optax.Updates, index: int | jax.Array) -> TernaryAccumulatorState:
        # The coded sum does not show the shapes.
        checks.check_same_leaves(codecs.shapes_of(carry.specs), value, what="gradients")
        total.check_same(carry.acc_grads, value)
        grown, is_finite = total.add(carry.acc_grads, value, window, jnp.asarray(index, jnp.int32))
        acc_grads = tree_where(is_finite, grown, carry.acc_grads)
        nonfinite_count = carry.nonfinite_count + (~is_finite).astype(jnp.int32)
        return TernaryAccumulatorState(nonfinite_count, acc_grads, carry.specs, carry.num_seen + 1)

    def finalize(carry: TernaryAccumulatorState) -> optax.Updates:
        nothing = jax.tree.map(codecs.zeros_of, carry.specs, is_leaf=codecs.is_spec)
        nothing = jax.tree.map(lambda x, part: as_varying(x, varying_axes(part)), nothing, carry.acc_grads)
        # Optax does not pass the number of micro-batches, so they are counted.
        left = carry.num_seen - carry.nonfinite_count
        return total.finish(nothing, carry.acc_grads, window, left if use_grad_mean else jnp.minimum(left, 1))

    def aggregate(values: optax.Updates) -> optax.Updates:
        return jax.tree.map(lambda x: jnp.mean(x, axis=0) if use_grad_mean else jnp.sum(x, axis=0), values)

    return optax.microbatching.Accumulator(init, update, finalize, aggregate)
