"""Needs fewer evaluations on losses without noise: it leaps to where the predicted gradient vanishes, then evaluates.

Each step takes one true gradient. The secants of the last few moves give a model of the loss
(`prediction.fits.multisecant_fit`). A leap goes to the damped minimum of this model. The damping keeps the leap near
the optimizer's own step unless the model has been accurate so far. There is no line search: selects choose what is
accepted and what is rejected.

The next evaluation judges a leap. The leap is accepted if the loss is not above the largest of the last few accepted
losses. Otherwise the next leap starts again from the accepted parameters, with more damping and one more secant. The
damping falls while the gradient is as predicted, and rises where it is not and the loss rises. At the damping's upper
bound the step is the optimizer's own, bit for bit, and is always accepted; noise in the gradient leads there. From
then on the predicted gradient is checked ever more rarely, up to 64 evaluations apart.

References:
    L. Grippo, F. Lampariello and S. Lucidi, "A nonmonotone line search technique for Newton's method", SIAM Journal on
    Numerical Analysis 23 (1986): acceptance by the largest of the last M losses. There, a line search follows a
    rejection; here, more damping does.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax.core import checks
from vsa_optax.core.axis_names import with_axis_in_front
from vsa_optax.core.mesh import varying_axes
from vsa_optax.core.trees import map_leaves, tree_where
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics
from vsa_optax.prediction import unsuited
from vsa_optax.prediction.leap import FIRST_DAMPING, NUM_LOSSES, LeapState, MultisecantState, judged, leap
from vsa_optax.prediction.learning_rate import check_learning_rate, check_one_rate
from vsa_optax.prediction.predictors.base import check_settings, zeros_as_stored
from vsa_optax.prediction.stats import unwrapped


class MultisecantStats(NamedTuple):
    """Counts and damping of a run so far; all fields are scalar arrays.

    Attributes:
        evaluations: int32, the number of gradients received.
        accepted: int32, the number of evaluations whose parameters the next step started from.
        rejected: int32, the number of evaluations whose parameters were given up, including non-finite evaluations.
        nonfinite_count: int32, the number of evaluations whose loss or gradient had a NaN or an infinity.
        damping: float32, λ of the coming step. At 100 or more the step is the optimizer's own; towards 0 it is
            Newton's.
        dimension: int32, the dimension of the span of the secants in the last leap.
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

    It is meant for full batches, simulations, inverse problems and physics-informed networks. There, re-tuned Adam
    needs 1.3 to 13 times as many gradients, mostly 3 times or more, and on a quantum circuit 1.1 to 1.6 times
    (``benchmarks/noiseless.log`` and ``noiseless_gpu.log``). With mini-batches it becomes ``opt``.

    ``update(grads, state, params, value=loss)`` requires the loss. Gradients and loss belong to ``params``, as
    ``jax.value_and_grad`` returns them. If an evaluation is rejected, the update leads from ``params`` to a new point
    near the last accepted one, which is ``state.params``. Inside ``jax.shard_map``, average gradients and loss over
    the devices, and keep the whole parameters on each device.

    Args:
        opt: the optimizer to wrap. It gives the first steps, the direction outside the span of the secants, and a step
            to fall back on. It runs at each evaluation with the gradient at the accepted parameters, so its schedules
            count evaluations.
        learning_rate: a number ``>= 0`` or a schedule over evaluations, for an ``opt`` that was built at rate 1. It
            multiplies the updates of ``opt``. None leaves them as they are.
        history_window: W, the number of secants kept, ``>= 1``.
        history_dtype: the dtype of the secants: float16, bfloat16, float32 or float64. None keeps each parameter's
            own.

    Returns:
        A transformation that forwards extra arguments to ``opt``, with the accepted point's loss as ``value``. Updates
        keep the dtype that ``opt`` gives them.

    State cost:
        the state of ``opt``, twice the parameters, ``2 * W + 1`` copies of them in ``history_dtype``, and
        ``4 * W + 84`` bytes: 42 bytes per float32 parameter with the defaults, without the state of ``opt``.

    Raises:
        ValueError: if a setting is out of range; at ``init``, if ``opt`` contains a line search, a `multisecant` or a
            transformation that emits only every few steps, such as ``optax.MultiSteps``, or if two rates would
            multiply; at ``update``, if ``value`` or ``params`` is missing, if gradients or loss differ between
            devices, or if structure or shapes of the gradients differ from those given to ``init``.
        TypeError: at ``init``, if a leaf is neither floating point nor complex.

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
        # Each field gets its own array: a buffer cannot be donated twice.
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
            losses=number(NUM_LOSSES) - jnp.inf,
            loss=number() + jnp.inf,
            damping=number() + FIRST_DAMPING,
            log_curvature=number(),
            prediction_error=number(),
            rest=count(),
            rest_length=count(),
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

        count, state = state.num_evaluations, judged(state, updates, value, params)
        has_point = state.num_accepted > 0
        extra_args["value"] = state.loss
        base, inner_state = opt.update(state.gradient, state.inner_state, state.params, **extra_args)
        inner_state = tree_where(has_point, inner_state, state.inner_state)
        if learning_rate is not None:
            rate = learning_rate(count) if callable(learning_rate) else learning_rate
            base = jax.tree.map(lambda b: jnp.asarray(rate, b.dtype) * b, base)
        step, made = leap(state, base)

        def emitted(base: jax.Array, accepted: jax.Array, given: jax.Array, step: jax.Array) -> jax.Array:
            # At an accepted point both are equal, and the emitted update is the step.
            update = (accepted.astype(step.dtype) - given.astype(step.dtype)) + step
            return jnp.where(has_point, update, 0).astype(base.dtype)

        emissions = map_leaves(emitted, base, state.params, params, step)
        return emissions, state._replace(inner_state=inner_state, leap=made)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def multisecant_stats(opt_state: Tree) -> MultisecantStats:
    """Returns counts and damping of the run so far as `MultisecantStats`; traced under jit.

    Args:
        opt_state: an optimizer state that contains exactly one `multisecant` state, at any depth.

    Raises:
        ValueError: if it contains none, or more than one.

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


def _copied(leaf: jax.Array) -> jax.Array:
    """A copy, so that parameters and state can both be donated; zeros if only the shape is given."""
    return jnp.zeros_like(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf)


def _zeros(*shape: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jnp.zeros(shape, dtype)


def _rings(params: optax.Params, window: int, dtype: jnp.dtype | None) -> Tree:
    """Zeros ``[W, *shape]`` with the parameters' sharding."""
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
            f"opt must not contain {name}, which emits rarely: most of its updates are zero. Average gradients and "
            "losses of micro-batches before update, for example with optax.microbatching"
        )


def _check_agreement(gradients: optax.Updates, value: object, state: MultisecantState) -> None:
    """``ValueError`` if gradients or loss differ between devices that share the state: the devices would diverge."""
    for what, tree in (("gradients", gradients), ("value", value)):
        axes = varying_axes(tree) - varying_axes(state.damping)
        if axes:
            raise ValueError(
                f"{what} must be the same on all devices along {sorted(axes)}, which share the state: average with "
                "jax.lax.pmean before update, gradients as well as loss"
            )


def _check_state(state: optax.OptState, window: int) -> None:
    """``ValueError`` if the state is another transformation's, or was made with other settings."""
    if not isinstance(state, MultisecantState):
        raise ValueError(f"state must be what init returned, a MultisecantState, got {type(state).__name__}")
    check_settings(history_window=(state.leap.change.shape[0], window))
