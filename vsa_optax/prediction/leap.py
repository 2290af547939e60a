"""The two halves of a `multisecant` step: judge the leap that led to an evaluation, and make the next leap.

Selects make all choices, without control flow, except on a CPU. There, the secants are not read while the optimizer's
own step is taken and no check of the prediction is due, and new secants are written in place.
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

# All are chosen by hand, on digits, PINNs and a neural field; no log has other values.
NUM_LOSSES = 8  # M, the number of accepted losses that a new loss is compared with.
LEAST_DAMPING, FIRST_DAMPING, MOST_DAMPING = 1e-6, 1.0, 100.0
# The factors of the damping: the gradient is as predicted; it is not, and the loss rose; the leap is rejected.
LESS, MORE, MUCH_MORE = 0.5, 1.5, 4.0
# The bounds of ||g - ĝ||² / ||g before||² for a gradient as predicted. After a rise of the loss the bound is stricter,
# since noise reaches errors below 1.
WORST_ERROR, WORST_IF_IT_ROSE = 1.0, 0.3
METRIC_DECAY = 0.98  # The decay of the average of squared gradients.
# The share of a gradient's error that counts as curvature outside the span; all of it would be too much.
CURVATURE_SHARE = 0.3
CURVATURE_DECAY = 0.5  # The decay of the average of the curvature's logarithm.
LEAST_OUTSIDE = 1e-6  # Relative to the squared length of the leap inside the span; smaller values are rounding.
MOST_LOGARITHM = 80.0  # Exponentials of both signs stay in f32's range.
MOST_REST = 64  # The largest number of steps between two checks of the prediction with the damping at its bound.


class LeapState(NamedTuple):
    """The quantities by which a leap is judged.

    Attributes:
        change: ``[W]``, the coefficients of ``diff_gradients`` in the predicted change of the gradient.
        squared_gradient: ``[]``, ``||g||²`` at the start of the leap.
        squared_outside: ``[]``, the squared length of its part outside the span; 0 if that is only rounding.
        dimension: ``[] int32``, the dimension of the span.
    """

    change: jax.Array
    squared_gradient: jax.Array
    squared_outside: jax.Array
    dimension: jax.Array


class MultisecantState(NamedTuple):
    """State of `multisecant`.

    Attributes:
        inner_state: the state of the wrapped optimizer.
        params: tree of ``[*shape]``, the accepted parameters.
        gradient: tree of ``[*shape]``, the gradient at the accepted parameters.
        gradient_rms: tree of ``[*shape]`` in the history's dtype, the square root of the average of squared gradients.
        diff_params: tree of ``[W, *shape]``, a ring of moves from accepted parameters to those evaluated next.
        diff_gradients: tree of ``[W, *shape]``, the changes of the gradient by these moves.
        leap: the last leap, by which the next gradient is judged.
        losses: ``[8]``, a ring of the last accepted losses; minus infinity before any.
        loss: ``[]``, the loss at the accepted parameters.
        damping: ``[]``, λ.
        log_curvature: ``[]``, the average logarithm of the curvature outside the span; exactly 0 before any
            measurement.
        prediction_error: ``[]``, ``||g - ĝ|| / ||g before||`` of the last finite evaluation.
        rest: ``[] int32``, the number of evaluations before the next check; 0 unless damping is at its bound.
        rest_length: ``[] int32``, the length of the last such pause.
        num_evaluations: ``[] int32``, the number of evaluations so far.
        num_accepted: ``[] int32``, the number of accepted evaluations so far.
        num_secants: ``[] int32``, the number of secants so far; the next goes to slot ``num_secants % W``.
        nonfinite_count: ``[] int32``, the number of evaluations whose loss or gradient was not finite.
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
    """The state after an evaluation: the leap is accepted or rejected, and damping, curvature and secants updated."""
    is_finite = jnp.isfinite(value) & all_finite(gradient)
    is_first = state.num_accepted == 0
    is_leap = is_finite & ~is_first
    is_resting = state.rest > 0  # Nothing was predicted then.
    is_bound = state.damping >= MOST_DAMPING
    is_accepted = is_finite & (is_first | is_bound | (value <= jnp.max(state.losses)))
    missed = _unless(is_resting, jnp.zeros_like(state.loss), _missed, state, gradient)
    squared_error = _ratio(missed, state.leap.squared_gradient)
    # If the loss rises although the gradient is as predicted, the optimizer's part of the leap has raised it.
    fell = value <= state.loss
    is_foreseen = squared_error < jnp.where(fell, WORST_ERROR, WORST_IF_IT_ROSE)
    factor = jnp.where(is_accepted, jnp.where(is_foreseen, LESS, jnp.where(fell, 1, MORE)), MUCH_MORE)
    damping = jnp.clip(state.damping * factor.astype(state.damping.dtype), LEAST_DAMPING, MOST_DAMPING)
    damping = jnp.where(is_first | is_resting, state.damping, damping)
    # Checks that find no reason to leave the bound become ever rarer.
    is_in_vain = is_bound & ~is_resting & (damping >= MOST_DAMPING)
    longer = jnp.clip(2 * state.rest_length, 1, MOST_REST)
    rest_length = jnp.where(is_in_vain, longer, jnp.where(damping >= MOST_DAMPING, state.rest_length, 0))

    curvature = CURVATURE_SHARE * jnp.sqrt(_ratio(missed, state.leap.squared_outside))
    is_measured = is_leap & (state.leap.squared_outside > 0) & (curvature > 0) & jnp.isfinite(curvature)
    log_curvature = jnp.clip(jnp.log(jnp.where(is_measured, curvature, 1)), -MOST_LOGARITHM, MOST_LOGARITHM)
    # The first measurement is not averaged with the initial 0.
    kept = jnp.where(state.log_curvature == 0, 0, CURVATURE_DECAY).astype(curvature.dtype)
    log_curvature = kept * state.log_curvature + (1 - kept) * log_curvature

    # The slot depends on the error, which reads the old records: otherwise XLA copies them. An error is never negative.
    slot = state.num_secants % state.leap.change.size + (missed < 0).astype(jnp.int32)
    record = functools.partial(_recorded, slot=slot, is_recorded=is_leap)
    num_evaluations = optax.safe_increment(state.num_evaluations)
    forgotten = METRIC_DECAY ** num_evaluations.astype(value.dtype)
    # The weight of a new square in a bias-corrected average; rounding may bring the first above 1.
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
    """The step from the accepted parameters, a tree in at least f32, and the state by which it is judged."""

    def widened(gradient: jax.Array, base: jax.Array) -> jax.Array:
        return base.astype(numerics.promoted(gradient.dtype, base.dtype, jnp.float32))

    unpredicted = map_leaves(widened, state.gradient, base), jax.tree.map(jnp.zeros_like, state.leap)
    return _unless(state.rest > 0, unpredicted, _leap, state, base)


def _unless(is_skipped: jax.Array, skipped: Result, compute: Callable[..., Result], *operands: Tree) -> Result:
    """``compute(*operands)`` or ``skipped``; a GPU uses a select, since it would wait for the host at a conditional."""
    compute = jax.jit(compute)  # It is traced once for both.

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
    """``||g - ĝ||²``: the error of the predicted gradient in the metric of the leap."""
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


# If a record is read before it is written, a CPU converts all records to bfloat16 again.
_written_if = in_place_if(_written)


def _written_or_same(is_recorded: jax.Array, records: jax.Array, change: jax.Array, slot: jax.Array) -> jax.Array:
    return _written(records, jnp.where(is_recorded, change, records[slot]), slot)


def _as_kept(old: jax.Array, new: jax.Array) -> jax.Array:
    return new if new.dtype == old.dtype else numerics.saturating_cast(new, old.dtype)


def _averaged(rms: jax.Array, gradient: jax.Array, *, share: jax.Array) -> jax.Array:
    """The root mean square with one more gradient; no square exceeds the range."""
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
