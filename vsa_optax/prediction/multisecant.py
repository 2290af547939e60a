"""Fewer evaluations on losses without noise: leap to where the predicted gradient vanishes, then look.

Each step takes one true gradient. What the last few moves say of the loss (`prediction.fits.multisecant_fit`) is solved
for its minimum, near the optimizer's own step or far from it, as far as it has been right so far. There is no line
search and no control flow: what is accepted, rejected or left out is chosen by selects.

A leap is judged by the next evaluation. It is accepted if the loss is not above the largest of the last few accepted
ones; otherwise the next leap starts again from the accepted parameters, damped more, and knows one more secant. The
damping falls while the gradient comes as predicted, and rises where it does not and the loss rises. At its bound the
step is the optimizer's, bit for bit, and always accepted: so it is where the gradient has noise.

References:
    L. Grippo, F. Lampariello and S. Lucidi, "A nonmonotone line search technique for Newton's method", SIAM Journal on
    Numerical Analysis 23 (1986): acceptance by the largest of the last M losses. There a line search follows a
    rejection; here it is damping.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax.core import checks
from vsa_optax.core.axis_names import with_axis_in_front
from vsa_optax.core.mesh import varying_axes
from vsa_optax.core.trees import all_finite, map_leaves, tree_where
from vsa_optax.core.types import Tree
from vsa_optax.kernels import inner_products, numerics
from vsa_optax.prediction import unsuited
from vsa_optax.prediction.fits.multisecant_fit import Leap, Products, solve
from vsa_optax.prediction.learning_rate import check_learning_rate, check_one_rate
from vsa_optax.prediction.predictors.base import check_settings, zeros_as_stored
from vsa_optax.prediction.stats import unwrapped

# All chosen by hand, on digits, PINNs and a neural field; no log has the others.
_NUM_LOSSES = 8  # M, accepted ones that a new one is compared with.
_LEAST_DAMPING, _FIRST_DAMPING, _MOST_DAMPING = 1e-6, 1.0, 100.0
# What damping is multiplied by: with a gradient as predicted; without, where the loss rose; on a rejection.
_LESS, _MORE, _MUCH_MORE = 0.5, 1.5, 4.0
# Of ||g - ĝ||² / ||g before||²: below it a gradient came as predicted. Stricter where the loss rose: noise passes 1.
_WORST_ERROR, _WORST_IF_IT_ROSE = 1.0, 0.3
_METRIC_DECAY = 0.98  # Of the average of squared gradients.
_EPSILON = 1e-8
# Of what is missed of a gradient: all of it, as if it were curvature outside of the span, would be too much.
_CURVATURE_SHARE = 0.3
_CURVATURE_DECAY = 0.5  # Of the average of its logarithm.
_LEAST_OUTSIDE = 1e-6  # Of the squared length of the leap inside of the span; less is what rounding left.
_MOST_LOGARITHM = 80.0  # Exponentials of both signs stay in f32's range.


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
    num_evaluations: jax.Array
    num_accepted: jax.Array
    num_secants: jax.Array
    nonfinite_count: jax.Array


class MultisecantStats(NamedTuple):
    """What a run has done so far; all are scalar arrays.

    Attributes:
        evaluations: int32, gradients seen.
        accepted: int32, those whose parameters the next step started from.
        rejected: int32, those that it went back from; evaluations that were not finite among them.
        nonfinite_count: int32, evaluations whose loss or gradient had a NaN or an infinity.
        damping: float32, λ of the coming step: 100 or more for the optimizer's own, towards 0 for Newton's.
        dimension: int32, of the span of the secants in the last leap.
        prediction_error: float32, ``||g - ĝ|| / ||g before||`` at the end of the last leap.
    """

    evaluations: jax.Array
    accepted: jax.Array
    rejected: jax.Array
    nonfinite_count: jax.Array
    damping: jax.Array
    dimension: jax.Array
    prediction_error: jax.Array


def multisecant(
    opt: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    history_window: int = 8,
    history_dtype: jax.typing.DTypeLike | None = jnp.bfloat16,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that a loss without noise needs several times fewer gradients.

    For full batches, simulations, inverse problems and physics-informed networks: on the three small tasks of
    ``benchmarks/noiseless.log`` re-tuned Adam needs two to eight times as many. With mini-batches it becomes ``opt``.

    The loss is required: ``update(grads, state, params, value=loss)``. Both are those of ``params``, as
    ``jax.value_and_grad`` gives them. An evaluation may be rejected; then the update leads from there to a new point
    near the last accepted one, which is ``state.params``. Inside ``jax.shard_map``, gradients and loss must be averaged
    over the devices, and the parameters whole on each.

    Args:
        opt: the optimizer, which gives the first steps, the direction where secants know nothing, and a step to fall
            back on. It runs at each evaluation, with the gradient at the accepted parameters: schedules count
            evaluations.
        learning_rate: a number ``>= 0`` or a schedule over evaluations, for an ``opt`` at rate 1; None multiplies
            nothing.
        history_window: W >= 1, secants kept.
        history_dtype: of the secants; None for the parameters' own.

    Returns:
        A transformation that forwards extra arguments to ``opt``, with the accepted point's loss as ``value``. Updates
        have the dtype that ``opt`` gives them.

    State cost:
        ``opt``'s own, twice the parameters, ``2 * W + 1`` times them in ``history_dtype``, and ``4 * W + 76`` bytes:
        42 bytes a float32 parameter with the defaults.

    Raises:
        ValueError: a setting out of range; an ``opt`` with a line search, or that emits rarely, such as
            ``optax.MultiSteps``; two rates that would multiply; at ``update``, no ``value`` or no ``params``, what
            differs between devices, or gradients of another structure or shape than those given to ``init``.
        TypeError: at ``init``, a leaf that is not floating point or complex.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> scales = jnp.array([1.0, 10.0, 100.0, 1000.0])
        >>> loss = lambda params: jnp.sum(scales * (params - 3.0) ** 2)
        >>> opt = vsa_optax.multisecant(optax.adam(0.1))
        >>> @jax.jit
        ... def step(params, state):
        ...     value, grads = jax.value_and_grad(loss)(params)
        ...     updates, state = opt.update(grads, state, params, value=value)
        ...     return optax.apply_updates(params, updates), state
        >>> params, state = jnp.zeros(4), opt.init(jnp.zeros(4))
        >>> for _ in range(40):
        ...     params, state = step(params, state)
        >>> float(loss(state.params)) < 1e-6
        True
    """
    if not (hasattr(opt, "init") and hasattr(opt, "update")):
        raise ValueError(f"opt must be an optax.GradientTransformation, got {opt!r}")
    check_learning_rate(learning_rate)
    window = checks.check_integer("history_window", history_window, 1)
    dtype = checks.check_float_dtype("history_dtype", history_dtype)
    opt = optax.with_extra_args_support(opt)

    def init_fn(params: optax.Params) -> MultisecantState:
        checks.check_inexact_leaves(params)
        inner_state = opt.init(params)
        _check_inner_state(inner_state)
        check_one_rate(inner_state, learning_rate, rests=False)
        # Arrays of their own: a buffer cannot be donated twice.
        number = functools.partial(_zeros, dtype=_scalar_dtype(params))
        count = functools.partial(_zeros, dtype=jnp.int32)
        return MultisecantState(
            inner_state=inner_state,
            params=jax.tree.map(_copied, params),
            gradient=zeros_as_stored(params, None),
            gradient_rms=jax.tree.map(lambda x: jnp.zeros_like(x.real), zeros_as_stored(params, dtype)),
            diff_params=_rings(params, window, dtype),
            diff_gradients=_rings(params, window, dtype),
            leap=LeapState(number(window), number(), number(), count()),
            losses=number(_NUM_LOSSES) - jnp.inf,
            loss=number() + jnp.inf,
            damping=number() + _FIRST_DAMPING,
            log_curvature=number(),
            prediction_error=number(),
            num_evaluations=count(),
            num_accepted=count(),
            num_secants=count(),
            nonfinite_count=count(),
        )

    def update_fn(
        updates: optax.Updates, state: MultisecantState, params: optax.Params | None = None, **extra_args: object
    ) -> tuple[optax.Updates, MultisecantState]:
        if params is None:
            raise ValueError("params must be given: update(grads, state, params, value=loss); got None")
        if extra_args.get("value") is None:
            raise ValueError(
                "value must be given, the loss at params: update(grads, state, params, value=loss); got None. "
                "TrainState.apply_gradients does not forward it: call tx.update; nnx.Optimizer.update(model, grads, "
                "value=loss) does"
            )
        _check_state(state, window)
        _check_agreement(updates, extra_args["value"], state)
        checks.check_same_tree(state.gradient, updates, what="gradients")
        checks.check_same_tree(state.gradient, params, what="params")
        value = checks.check_scalar("value", extra_args["value"]).astype(state.loss.dtype)

        count, state = state.num_evaluations, _judged(state, updates, value, params)
        has_point = state.num_accepted > 0
        extra_args["value"] = state.loss
        base, inner_state = opt.update(state.gradient, state.inner_state, state.params, **extra_args)
        inner_state = tree_where(has_point, inner_state, state.inner_state)
        if learning_rate is not None:
            rate = learning_rate(count) if callable(learning_rate) else learning_rate
            base = jax.tree.map(lambda b: jnp.asarray(rate, b.dtype) * b, base)
        step, leap = _leap(state, base)

        def emitted(base: jax.Array, accepted: jax.Array, given: jax.Array, step: jax.Array) -> jax.Array:
            # Where the point was accepted both are the same, and what leaves is the step.
            update = (accepted.astype(step.dtype) - given.astype(step.dtype)) + step
            return jnp.where(has_point, update, 0).astype(base.dtype)

        emissions = map_leaves(emitted, base, state.params, params, step)
        return emissions, state._replace(inner_state=inner_state, leap=leap)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def multisecant_stats(opt_state: Tree) -> MultisecantStats:
    """Counts and damping of the run so far, as `MultisecantStats`; traced under jit.

    Args:
        opt_state: an optimizer state with one `multisecant` anywhere inside.

    Raises:
        ValueError: there is none, or more than one.

    Example:
        >>> import jax.numpy as jnp, optax, vsa_optax
        >>> opt = vsa_optax.multisecant(optax.adam(1e-3))
        >>> int(vsa_optax.multisecant_stats(opt.init({"w": jnp.ones(3)})).evaluations)
        0
    """
    found = _states_in(opt_state)
    if len(found) != 1:
        raise ValueError(f"expected one state of multisecant in the optimizer state, found {len(found)}")
    state: MultisecantState = unwrapped(found[0])
    return MultisecantStats(
        evaluations=state.num_evaluations,
        accepted=state.num_accepted,
        rejected=state.num_evaluations - state.num_accepted,
        nonfinite_count=state.nonfinite_count,
        damping=state.damping.astype(jnp.float32),
        dimension=state.leap.dimension,
        prediction_error=state.prediction_error.astype(jnp.float32),
    )


def _judged(
    state: MultisecantState, gradient: optax.Updates, value: jax.Array, params: optax.Params
) -> MultisecantState:
    """The state after an evaluation: what it taught, and from which point to go on."""
    is_finite = jnp.isfinite(value) & all_finite(gradient)
    is_first = state.num_accepted == 0
    is_leap = is_finite & ~is_first
    is_bound = state.damping >= _MOST_DAMPING
    is_accepted = is_finite & (is_first | is_bound | (value <= jnp.max(state.losses)))
    missed = _missed(state, gradient)
    squared_error = _ratio(missed, state.leap.squared_gradient)
    # A loss that rises although the gradient came as predicted is the doing of the optimizer's step in the leap.
    fell = value <= state.loss
    is_foreseen = squared_error < jnp.where(fell, _WORST_ERROR, _WORST_IF_IT_ROSE)
    factor = jnp.where(is_accepted, jnp.where(is_foreseen, _LESS, jnp.where(fell, 1, _MORE)), _MUCH_MORE)
    damping = jnp.clip(state.damping * factor.astype(state.damping.dtype), _LEAST_DAMPING, _MOST_DAMPING)

    curvature = _CURVATURE_SHARE * jnp.sqrt(_ratio(missed, state.leap.squared_outside))
    is_measured = is_leap & (state.leap.squared_outside > 0) & (curvature > 0) & jnp.isfinite(curvature)
    log_curvature = jnp.clip(jnp.log(jnp.where(is_measured, curvature, 1)), -_MOST_LOGARITHM, _MOST_LOGARITHM)
    # The first is no average.
    kept = jnp.where(state.log_curvature == 0, 0, _CURVATURE_DECAY).astype(curvature.dtype)
    log_curvature = kept * state.log_curvature + (1 - kept) * log_curvature

    slot = state.num_secants % state.leap.change.size
    record = functools.partial(_recorded, slot=slot, is_recorded=is_leap)
    num_evaluations = optax.safe_increment(state.num_evaluations)
    forgotten = _METRIC_DECAY ** num_evaluations.astype(value.dtype)
    # Of an average without the bias of its start; rounding may make more than 1 of the first.
    share = jnp.minimum((1 - _METRIC_DECAY) / (1 - forgotten), 1)
    accepted_gradient = tree_where(is_accepted, map_leaves(_as_kept, state.gradient, gradient), state.gradient)
    newest = state.num_accepted % _NUM_LOSSES
    return state._replace(
        params=tree_where(is_accepted, params, state.params),
        gradient=accepted_gradient,
        gradient_rms=map_leaves(functools.partial(_averaged, share=share), state.gradient_rms, accepted_gradient),
        diff_params=map_leaves(record, state.diff_params, params, state.params),
        diff_gradients=map_leaves(record, state.diff_gradients, gradient, state.gradient),
        losses=jnp.where(is_accepted, state.losses.at[newest].set(value), state.losses),
        loss=jnp.where(is_accepted, value, state.loss),
        damping=jnp.where(is_first, state.damping, damping),
        log_curvature=jnp.where(is_measured, log_curvature, state.log_curvature),
        prediction_error=jnp.where(is_leap, jnp.sqrt(squared_error), state.prediction_error),
        num_evaluations=num_evaluations,
        num_accepted=_count_if(is_accepted, state.num_accepted),
        num_secants=_count_if(is_leap, state.num_secants),
        nonfinite_count=_count_if(~is_finite, state.nonfinite_count),
    )


def _leap(state: MultisecantState, base: optax.Updates) -> tuple[Tree, LeapState]:
    """The step from the accepted parameters, a tree in at least f32, and what to judge it by."""
    trees = state.gradient, state.gradient_rms, state.diff_params, state.diff_gradients, base
    rows = list(zip(*map(jax.tree.leaves, trees), strict=True))
    window, wide = state.leap.change.size, state.loss.dtype
    zero, table = jnp.zeros([], wide), jnp.zeros([window, window], wide)
    products = Products(table, table, jnp.zeros([window], wide), jnp.zeros([window], wide))
    squared_gradient = squared_outside = zero
    for row in rows:
        products = jax.tree.map(lambda total, x: total + x.astype(wide), products, _products(*row))
        squared_gradient = squared_gradient + _squared_norm(row[0], row[1]).astype(wide)

    is_base = (state.damping >= _MOST_DAMPING) | (state.num_secants == 0)
    damping, curvature = jnp.where(is_base, jnp.inf, state.damping), jnp.exp(state.log_curvature)
    solved = solve(products, curvature, damping)
    # Outside of the span: of the optimizer's step, and of minus the gradient.
    of_base, of_gradient = jnp.where(is_base, 1, damping / (1 + damping)), 1 / (curvature * (1 + damping))
    steps = []
    for row in rows:
        step, squared = _step(*row, solved=solved, is_base=is_base, of_base=of_base, of_gradient=of_gradient)
        steps.append(step)
        squared_outside = squared_outside + squared.astype(wide)
    squared_inside = jnp.sum(solved.inside[:, None] * products.gram * solved.inside[None])
    squared_outside = jnp.where(squared_outside > _LEAST_OUTSIDE * squared_inside, squared_outside, 0)
    leap = LeapState(solved.change, squared_gradient, squared_outside, solved.dimension)
    return jax.tree.unflatten(jax.tree.structure(base), steps), leap


def _products(
    gradient: jax.Array, rms: jax.Array, diff_params: jax.Array, diff_gradients: jax.Array, base: jax.Array
) -> Products:
    """Those of one leaf."""
    wide, wide_base = _wide(diff_params), _wide(base)
    # By a root on either side the Gram matrix has no negative eigenvalue, rounded or not.
    measured = numerics.saturating_cast(wide * jnp.sqrt(_metric(rms, wide.dtype))[None], diff_params.dtype)
    return Products(
        gram=inner_products.inner_of_all_records(measured, measured),
        cross=inner_products.inner_of_all_records(diff_params, diff_gradients),
        gradient=inner_products.inner_of_each(diff_params, gradient),
        step=inner_products.inner_of_each(diff_params, wide_base * _metric(rms, wide_base.dtype)),
    )


def _step(
    gradient: jax.Array,
    rms: jax.Array,
    diff_params: jax.Array,
    diff_gradients: jax.Array,
    base: jax.Array,
    *,
    solved: Leap,
    is_base: jax.Array,
    of_base: jax.Array,
    of_gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The step of one leaf, and the squared length of its part outside of the span; one pass over the records."""
    dtype = numerics.promoted(gradient.dtype, base.dtype, jnp.float32)
    wide_base = base.astype(dtype)

    def combined(coefficients: jax.Array, records: jax.Array) -> jax.Array:
        return _combined(coefficients, records).astype(dtype)

    base_outside = wide_base - combined(solved.step, diff_params)
    changed = gradient.astype(dtype) + combined(solved.change, diff_gradients)
    gradient_outside = changed / _metric(rms, dtype) - combined(solved.gradient, diff_params)
    outside = of_base.astype(dtype) * base_outside - of_gradient.astype(dtype) * gradient_outside
    step = jnp.where(is_base, wide_base, combined(solved.inside, diff_params) + outside)
    squared = _squared(outside)
    return step, jnp.sum(squared * _metric(rms, squared.dtype))


def _missed(state: MultisecantState, gradient: optax.Updates) -> jax.Array:
    """``||g - ĝ||²``: of the new gradient, by the secants, in the metric of the leap."""
    missed = jnp.zeros([], state.loss.dtype)
    trees = gradient, state.gradient, state.gradient_rms, state.diff_gradients
    for new, old, rms, records in zip(*map(jax.tree.leaves, trees), strict=True):
        change = _difference(new, old)
        error = change - _combined(state.leap.change, records).astype(change.dtype)
        missed = missed + _squared_norm(error, rms).astype(missed.dtype)
    return missed


def _recorded(
    records: jax.Array, new: jax.Array, old: jax.Array, *, slot: jax.Array, is_recorded: jax.Array
) -> jax.Array:
    change = numerics.saturating_cast(_difference(new, old), records.dtype)
    return records.at[slot].set(jnp.where(is_recorded, change, records[slot]))


def _as_kept(old: jax.Array, new: jax.Array) -> jax.Array:
    return new if new.dtype == old.dtype else numerics.saturating_cast(new, old.dtype)


def _averaged(rms: jax.Array, gradient: jax.Array, *, share: jax.Array) -> jax.Array:
    """The root of the average with one more square in it; no square leaves the range."""
    new = jnp.abs(_wide(gradient))
    of_old, of_new = jnp.sqrt(1 - share).astype(new.dtype), jnp.sqrt(share).astype(new.dtype)
    return numerics.saturating_cast(jnp.hypot(of_old * rms.astype(new.dtype), of_new * new), rms.dtype)


def _count_if(condition: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(condition, optax.safe_increment(count), count)


def _metric(rms: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """D⁻¹: by it displacements are measured."""
    return (_wide(rms) + _EPSILON).astype(dtype)


def _squared_norm(gradient: jax.Array, rms: jax.Array) -> jax.Array:
    """``[]``, ``g'Dg``."""
    squared = _squared(_wide(gradient))
    return jnp.sum(squared / _metric(rms, squared.dtype))


def _combined(coefficients: jax.Array, records: jax.Array) -> jax.Array:
    window = records.shape[0]
    return numerics.linear_combination([coefficients[i] for i in range(window)], [records[i] for i in range(window)])


def _squared(x: jax.Array) -> jax.Array:
    return (x.conj() * x).real


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    return x / jnp.where(y > 0, y, 1)


def _difference(new: jax.Array, old: jax.Array) -> jax.Array:
    dtype = numerics.promoted(new.dtype, old.dtype, jnp.float32)
    return new.astype(dtype) - old.astype(dtype)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(numerics.promoted(x.dtype, jnp.float32))


def _copied(leaf: jax.Array) -> jax.Array:
    """A copy, so that parameters and state can both be donated; zeros where only the shape is given."""
    return jnp.zeros_like(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf)


def _zeros(*shape: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jnp.zeros(shape, dtype)


def _rings(params: optax.Params, window: int, dtype: jnp.dtype | None) -> Tree:
    """Zeros ``[W, *shape]``, laid out on the devices as the parameters are."""
    zeros = zeros_as_stored(params, dtype)
    return with_axis_in_front(jax.tree.map(lambda x: jnp.broadcast_to(x[None], (window, *x.shape)), zeros))


def _scalar_dtype(params: optax.Params) -> jnp.dtype:
    return numerics.promoted(jnp.float32, *(jnp.finfo(leaf.dtype).dtype for leaf in jax.tree.leaves(params)))


def _states_in(tree: Tree) -> list[MultisecantState]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, MultisecantState))
    return [leaf for leaf in leaves if isinstance(leaf, MultisecantState)]


def _check_inner_state(inner_state: optax.OptState) -> None:
    if _states_in(inner_state):
        raise ValueError("opt must not contain a multisecant of its own: use it once")
    unsuited.check_no_line_search(inner_state)
    for name in unsuited.rare_emitters(inner_state):
        raise ValueError(
            f"opt must not contain {name}, which emits rarely: most of its steps are none. Average gradients and "
            "losses of micro-batches before update, with optax.microbatching say"
        )


def _check_agreement(gradients: optax.Updates, value: object, state: MultisecantState) -> None:
    """``ValueError`` if what enters differs between devices that share the state: they would go apart."""
    for what, tree in (("gradients", gradients), ("value", value)):
        axes = varying_axes(tree) - varying_axes(state.damping)
        if axes:
            raise ValueError(
                f"{what} must be the same on all devices along {sorted(axes)}, which share the state: average with "
                "jax.lax.pmean before update, gradients and loss"
            )


def _check_state(state: optax.OptState, window: int) -> None:
    """``ValueError`` if the state was made by another transformation or with other settings."""
    if not isinstance(state, MultisecantState):
        raise ValueError(f"state must be what init returned, a MultisecantState, got {type(state).__name__}")
    check_settings(history_window=(state.leap.change.shape[0], window))
