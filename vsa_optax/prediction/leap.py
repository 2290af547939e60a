"""What `multisecant` does with an evaluation: it judges the leap that led there, and makes the next one.

All is chosen by selects, without control flow, except on a CPU. There nothing is computed of the secants while the
optimizer's own step is taken and no look at the prediction is due, and new secants are written in place.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from vsa_optax.core.conditional import in_place_if
from vsa_optax.core.trees import all_finite, map_leaves, tree_where
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics, secants
from vsa_optax.kernels.secants import Coefficients, Evaluated, Secants
from vsa_optax.prediction.fits.multisecant_fit import Products, solve

Result = TypeVar("Result")

# All chosen by hand, on digits, PINNs and a neural field; no log has the others.
NUM_LOSSES = 8  # M, accepted ones that a new one is compared with.
LEAST_DAMPING, FIRST_DAMPING, MOST_DAMPING = 1e-6, 1.0, 100.0
# What damping is multiplied by: with a gradient as predicted; without, where the loss rose; on a rejection.
LESS, MORE, MUCH_MORE = 0.5, 1.5, 4.0
# Of ||g - ĝ||² / ||g before||²: below it a gradient came as predicted. Stricter where the loss rose: noise passes 1.
WORST_ERROR, WORST_IF_IT_ROSE = 1.0, 0.3
METRIC_DECAY = 0.98  # Of the average of squared gradients.
# Of what is missed of a gradient: all of it, as if it were curvature outside of the span, would be too much.
CURVATURE_SHARE = 0.3
CURVATURE_DECAY = 0.5  # Of the average of its logarithm.
LEAST_OUTSIDE = 1e-6  # Of the squared length of the leap inside of the span; less is what rounding left.
MOST_LOGARITHM = 80.0  # Exponentials of both signs stay in f32's range.
MOST_REST = 64  # Steps between two looks, with the damping at its bound.


class LeapState(NamedTuple):
    """What is remembered of a leap.

    Attributes:
        change: ``[W]``, coefficients of ``diff_gradients`` in the change of the gradient that it predicts.
        squared_gradient: ``[]``, ``||g||²`` where it starts.
        squared_outside: ``[]``, squared length of its part outside of the span; 0 where that is but rounding.
        dimension: ``[] int32``, of the span.
    """

    change: jax.Array
    squared_gradient: jax.Array
    squared_outside: jax.Array
    dimension: jax.Array


class MultisecantState(NamedTuple):
    """State of `multisecant`.

    Attributes:
        inner_state: the wrapped optimizer's.
        params: tree of ``[*shape]``, the accepted parameters.
        gradient: tree of ``[*shape]``, there.
        gradient_rms: tree of ``[*shape]`` in the history's dtype, root of the average of squared gradients.
        diff_params: tree of ``[W, *shape]``, moves from accepted parameters to those evaluated next, in a ring.
        diff_gradients: tree of ``[W, *shape]``, how the gradient changed by them.
        leap: the last one, by which the next gradient is judged.
        losses: ``[8]``, the last accepted ones, in a ring; minus infinity before any.
        loss: ``[]``, at the accepted parameters.
        damping: ``[]``, λ.
        log_curvature: ``[]``, logarithm of the curvature outside of the span, averaged; exactly 0 before it is known.
        prediction_error: ``[]``, ``||g - ĝ|| / ||g before||`` of the last finite evaluation.
        rest: ``[] int32``, evaluations to come before the next look; 0 unless damping is at its bound.
        rest_length: ``[] int32``, of the last such rest.
        num_evaluations: ``[] int32``.
        num_accepted: ``[] int32``.
        num_secants: ``[] int32``, so far; the next goes to slot ``num_secants % W``.
        nonfinite_count: ``[] int32``, evaluations whose loss or gradient was not finite.
    """

    inner_state: Tree
    params: Tree
    gradient: Tree
    gradient_rms: Tree
    diff_params: Tree
    diff_gradients: Tree
    leap: LeapState
    losses: jax.Array
    loss: jax.Array
    damping: jax.Array
    log_curvature: jax.Array
    prediction_error: jax.Array
    rest: jax.Array
    rest_length: jax.Array
    num_evaluations: jax.Array
    num_accepted: jax.Array
    num_secants: jax.Array
    nonfinite_count: jax.Array


def judged(
    state: MultisecantState, gradient: optax.Updates, value: jax.Array, params: optax.Params
) -> MultisecantState:
    """The state after an evaluation: what it taught, and from which point to go on."""
    is_finite = jnp.isfinite(value) & all_finite(gradient)
    is_first = state.num_accepted == 0
    is_leap = is_finite & ~is_first
    is_resting = state.rest > 0  # Then nothing was predicted.
    is_bound = state.damping >= MOST_DAMPING
    is_accepted = is_finite & (is_first | is_bound | (value <= jnp.max(state.losses)))
    missed = _unless(is_resting, jnp.zeros_like(state.loss), _missed, state, gradient)
    squared_error = _ratio(missed, state.leap.squared_gradient)
    # A loss that rises although the gradient came as predicted is the doing of the optimizer's step in the leap.
    fell = value <= state.loss
    is_foreseen = squared_error < jnp.where(fell, WORST_ERROR, WORST_IF_IT_ROSE)
    factor = jnp.where(is_accepted, jnp.where(is_foreseen, LESS, jnp.where(fell, 1, MORE)), MUCH_MORE)
    damping = jnp.clip(state.damping * factor.astype(state.damping.dtype), LEAST_DAMPING, MOST_DAMPING)
    damping = jnp.where(is_first | is_resting, state.damping, damping)
    # Looks that find no reason to leave the bound come ever more rarely.
    is_in_vain = is_bound & ~is_resting & (damping >= MOST_DAMPING)
    longer = jnp.clip(2 * state.rest_length, 1, MOST_REST)
    rest_length = jnp.where(is_in_vain, longer, jnp.where(damping >= MOST_DAMPING, state.rest_length, 0))

    curvature = CURVATURE_SHARE * jnp.sqrt(_ratio(missed, state.leap.squared_outside))
    is_measured = is_leap & (state.leap.squared_outside > 0) & (curvature > 0) & jnp.isfinite(curvature)
    log_curvature = jnp.clip(jnp.log(jnp.where(is_measured, curvature, 1)), -MOST_LOGARITHM, MOST_LOGARITHM)
    # The first is no average.
    kept = jnp.where(state.log_curvature == 0, 0, CURVATURE_DECAY).astype(curvature.dtype)
    log_curvature = kept * state.log_curvature + (1 - kept) * log_curvature

    # Behind what was missed, which reads the records as they were: else XLA copies them. Nothing missed is below 0.
    slot = state.num_secants % state.leap.change.size + (missed < 0).astype(jnp.int32)
    record = functools.partial(_recorded, slot=slot, is_recorded=is_leap)
    num_evaluations = optax.safe_increment(state.num_evaluations)
    forgotten = METRIC_DECAY ** num_evaluations.astype(value.dtype)
    # Of an average without the bias of its start; rounding may make more than 1 of the first.
    share = jnp.minimum((1 - METRIC_DECAY) / (1 - forgotten), 1)
    accepted_gradient = tree_where(is_accepted, map_leaves(_as_kept, state.gradient, gradient), state.gradient)
    newest = state.num_accepted % NUM_LOSSES
    return state._replace(
        params=tree_where(is_accepted, params, state.params),
        gradient=accepted_gradient,
        gradient_rms=map_leaves(functools.partial(_averaged, share=share), state.gradient_rms, accepted_gradient),
        diff_params=map_leaves(record, state.diff_params, params, state.params),
        diff_gradients=map_leaves(record, state.diff_gradients, gradient, state.gradient),
        losses=jnp.where(is_accepted, state.losses.at[newest].set(value), state.losses),
        loss=jnp.where(is_accepted, value, state.loss),
        damping=damping,
        log_curvature=jnp.where(is_measured, log_curvature, state.log_curvature),
        prediction_error=jnp.where(is_leap & ~is_resting, jnp.sqrt(squared_error), state.prediction_error),
        rest=jnp.where(is_in_vain, rest_length, jnp.maximum(state.rest - 1, 0)),
        rest_length=rest_length,
        num_evaluations=num_evaluations,
        num_accepted=_count_if(is_accepted, state.num_accepted),
        num_secants=_count_if(is_leap, state.num_secants),
        nonfinite_count=_count_if(~is_finite, state.nonfinite_count),
    )


def leap(state: MultisecantState, base: optax.Updates) -> tuple[Tree, LeapState]:
    """The step from the accepted parameters, a tree in at least f32, and what to judge it by."""

    def widened(gradient: jax.Array, base: jax.Array) -> jax.Array:
        return base.astype(numerics.promoted(gradient.dtype, base.dtype, jnp.float32))

    unpredicted = map_leaves(widened, state.gradient, base), jax.tree.map(jnp.zeros_like, state.leap)
    return _unless(state.rest > 0, unpredicted, _leap, state, base)


def _unless(is_skipped: jax.Array, skipped: Result, compute: Callable[..., Result], *operands: Tree) -> Result:
    """``compute(*operands)``, or what stands for it; a GPU would wait for the host to decide."""
    compute = jax.jit(compute)  # Traced once for both.

    def decided(is_skipped: jax.Array, skipped: Result, *operands: Tree) -> Result:
        return jax.lax.cond(is_skipped, lambda *_: skipped, compute, *operands)

    def selected(is_skipped: jax.Array, skipped: Result, *operands: Tree) -> Result:
        return tree_where(is_skipped, skipped, compute(*operands))

    return jax.lax.platform_dependent(is_skipped, skipped, *operands, cpu=decided, default=selected)


def _leap(state: MultisecantState, base: optax.Updates) -> tuple[Tree, LeapState]:
    trees = state.gradient_rms, state.diff_params, state.diff_gradients, state.gradient, base
    leaves = [Secants(*leaf) for leaf in zip(*map(jax.tree.leaves, trees), strict=True)]
    window, dtype = state.leap.change.size, state.loss.dtype
    zero, table, row = jnp.zeros([], dtype), jnp.zeros([window, window], dtype), jnp.zeros([window], dtype)
    products, squared_gradient, squared_outside = Products(table, table, row, row), zero, zero
    for leaf in leaves:
        products = Products(*(x + more.astype(dtype) for x, more in zip(products, secants.products(leaf), strict=True)))
        squared_gradient = squared_gradient + secants.squared_norm(leaf.gradient, leaf.rms).astype(dtype)

    is_base = (state.damping >= MOST_DAMPING) | (state.num_secants == 0)
    damping, curvature = jnp.where(is_base, jnp.inf, state.damping), jnp.exp(state.log_curvature)
    solved = solve(products, curvature, damping)
    coefficients = Coefficients(
        solved.inside,
        solved.change,
        solved.gradient,
        solved.step,
        of_base=jnp.where(is_base, 1, damping / (1 + damping)),
        of_gradient=1 / (curvature * (1 + damping)),
        is_base=is_base,
    )
    steps = []
    for leaf in leaves:
        step, squared = secants.step(leaf, coefficients)
        steps.append(step)
        squared_outside = squared_outside + squared.astype(dtype)
    squared_inside = jnp.sum(solved.inside[:, None] * products.gram * solved.inside[None])
    squared_outside = jnp.where(squared_outside > LEAST_OUTSIDE * squared_inside, squared_outside, 0)
    made = LeapState(solved.change, squared_gradient, squared_outside, solved.dimension)
    return jax.tree.unflatten(jax.tree.structure(base), steps), made


def _missed(state: MultisecantState, gradient: optax.Updates) -> jax.Array:
    """``||g - ĝ||²``: of the new gradient, by the secants, in the metric of the leap."""
    missed = jnp.zeros_like(state.loss)
    trees = state.gradient_rms, state.diff_gradients, gradient, state.gradient
    for leaf in zip(*map(jax.tree.leaves, trees), strict=True):
        missed = missed + secants.missed(Evaluated(*leaf), state.leap.change).astype(missed.dtype)
    return missed


def _recorded(
    records: jax.Array, new: jax.Array, old: jax.Array, *, slot: jax.Array, is_recorded: jax.Array
) -> jax.Array:
    change = numerics.saturating_cast(_difference(new, old), records.dtype)
    return jax.lax.platform_dependent(is_recorded, records, change, slot, cpu=_written_if, default=_written_or_same)


def _written(records: jax.Array, change: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(records, change, slot, 0)


# A CPU makes bfloat16 of all records anew where one is read to be written.
_written_if = in_place_if(_written)


def _written_or_same(is_recorded: jax.Array, records: jax.Array, change: jax.Array, slot: jax.Array) -> jax.Array:
    return _written(records, jnp.where(is_recorded, change, records[slot]), slot)


def _as_kept(old: jax.Array, new: jax.Array) -> jax.Array:
    return new if new.dtype == old.dtype else numerics.saturating_cast(new, old.dtype)


def _averaged(rms: jax.Array, gradient: jax.Array, *, share: jax.Array) -> jax.Array:
    """The root of the average with one more square in it; no square leaves the range."""
    new = jnp.abs(secants.wide(gradient))
    of_old, of_new = jnp.sqrt(1 - share).astype(new.dtype), jnp.sqrt(share).astype(new.dtype)
    return numerics.saturating_cast(jnp.hypot(of_old * rms.astype(new.dtype), of_new * new), rms.dtype)


def _count_if(condition: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(condition, optax.safe_increment(count), count)


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    return x / jnp.where(y > 0, y, 1)


def _difference(new: jax.Array, old: jax.Array) -> jax.Array:
    dtype = numerics.promoted(new.dtype, old.dtype, jnp.float32)
    return new.astype(dtype) - old.astype(dtype)
