"""Skip backward passes: predict what a gradient, or an optimizer's update, would have been.

A true gradient enters; it leaves as it came (or as the wrapped optimizer's update), and is recorded. In PREDICT
whatever enters is ignored, and what the records predict leaves in its place. State cost: (W + 1) times the parameters
with a window of W records, 3 times with the recursion; one less without the residual.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vsa_optax import checks
from vsa_optax.codecs.codec import Codec
from vsa_optax.transforms import phases, queries
from vsa_optax.transforms.conditional import when
from vsa_optax.transforms.finite import all_finite, select
from vsa_optax.transforms.guard import Guard
from vsa_optax.transforms.history import describe_state
from vsa_optax.transforms.phase_step import PhaseStep
from vsa_optax.transforms.phases import Phase, PhaseMachineState, PhaseSchedule
from vsa_optax.transforms.predictor import Predictor, make_predictor
from vsa_optax.transforms.step_result import StepResult


class PhaseSwitchedState(NamedTuple):
    """State of `predict_gradients` and `phase_switched`.

    Attributes:
        machine: `PhaseMachineState`, scalars.
        history: `WindowHistoryState`, `CodedWindowHistoryState` or `RecursiveHistoryState`; None with
            ``predict_steps=0``.
        residual: tree of ``[*shape]`` in the history's dtype, the averaged prediction error, or a codec's payload of
            it; None if switched off.
        inner_state: the wrapped optimizer's state.
    """

    machine: PhaseMachineState
    history: Any
    residual: Any
    inner_state: Any


def predict_gradients(
    *,
    warmup_steps: int = 10,
    full_steps: int = 5,
    predict_steps: int = 20,
    correct_every: int = 5,
    history: str = "window",
    history_window: int = 8,
    history_decay: float = 0.95,
    history_dtype: jax.typing.DTypeLike | None = None,
    history_codec: Codec | None = None,
    residual: bool | None = None,
    residual_decay: float = 0.95,
    adaptive: bool = False,
    loss_threshold: float = 0.1,
    calibrate: bool = False,
    guard: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradients of PREDICT steps by their extrapolation; heads an ``optax.chain``.

    In WARMUP, FULL and CORRECT gradients pass through unchanged and are recorded. In PREDICT the incoming gradients are
    ignored, so they need not be computed: `vsa_optax.value_and_grad_by_phase` skips them. The optimizer behind this
    link runs at every step.

    A gradient with a NaN or an infinity is neither recorded nor passed on: zeros leave in its place, and the state's
    ``nonfinite_count`` goes up (with ``predict_steps=0`` it is counted, but passes). Predictions saturate at their
    dtype's largest finite value.

    Args:
        warmup_steps: true gradients to record before the first FULL phase, ``>= 2``.
        full_steps: steps of a FULL phase, ``>= 1``.
        predict_steps: steps of a PREDICT phase, its corrections included, ``>= 0``; 0 never predicts and allocates no
            history.
        correct_every: in PREDICT, a true gradient is taken when the step within the phase is a positive multiple of
            this, ``>= 1``.
        history: ``"window"`` (least squares over the last ``history_window`` records, exact) or ``"recursive"`` (over
            all records with exponentially fading weights, the same work and memory whatever the decay).
        history_window: records W kept by the window, ``>= 2``.
        history_decay: weight of a record relative to the next newer one, in ``(0, 1]``.
        history_dtype: float16, bfloat16, float32 or float64 of records and residual; None keeps each leaf's own. A
            complex leaf is kept in complex64 or complex128.
        history_codec: a codec, such as `vsa_optax.TritCodec`, that keeps the window's records; None keeps them as they
            are. The residual is coded likewise, and ``history_dtype`` has no effect. Needs ``history="window"``. A
            prediction then costs one decoding, whatever W, and the residual's.
        residual: whether to add the averaged error of past predictions, measured at CORRECT steps; None adds it unless
            predictions are calibrated, where it must not be True.
        residual_decay: γ, both the average's decay and the residual's fading a step, in ``[0, 1]``.
        adaptive: whether phase lengths follow the loss: FULL grows and PREDICT shrinks while it rises, the reverse
            while it falls. Needs ``value=`` at every update.
        loss_threshold: relative rise of the loss that counts as worse, ``>= 0``.
        calibrate: whether each leaf weighs the records' mean, the slope and, with a window, the newest record by what
            they were worth in predictions so far: out of sample, in closed form, see `kernels.calibration`.
        guard: whether the phases' lengths follow what predicting gains, as seen in ``value=``, from no prediction at
            all to ``predict_steps``, with FULL phases of one or two steps: see `transforms.guard`. Without ``value=``
            it goes by the calibration's errors. Needs ``calibrate=True`` and ``adaptive=False``.

    Returns:
        A transformation that takes the loss as the optional extra argument ``value``.

    State cost:
        ``(W + 1) * P`` bytes with the window and ``3 * P`` with the recursion, for parameters of P bytes (in the
        history's dtype, or as ``history_codec.nbytes`` counts them); ``P`` less without the residual; and less than 100
        bytes of scalars (412 more when adaptive, 65 with the guard). Calibrated there is no residual, but
        ``4 * (W**2 + 14)`` bytes a leaf with the window, 32 with the recursion and 56 with a codec.

    Raises:
        ValueError: an argument outside its range, where the transformation is made; at ``update``, gradients whose
            structure or shapes are not those given to ``init``, or ``adaptive=True`` without ``value``.
        TypeError: at ``init``, a leaf that is not floating point or complex.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> opt = optax.chain(
        ...     vsa_optax.predict_gradients(warmup_steps=2, full_steps=1, predict_steps=2), optax.sgd(1.0))
        >>> params = jnp.zeros(2)
        >>> state, moves = opt.init(params), []
        >>> for step in range(5):
        ...     needs = bool(vsa_optax.needs_backward(state))
        ...     gradient = jnp.array([1.0, 2.0]) * step if needs else jnp.zeros(2)
        ...     updates, state = opt.update(gradient, state, params)
        ...     moves.append((needs, round(float(-updates[1]), 5)))
        >>> moves
        [(True, 0.0), (True, 2.0), (True, 4.0), (False, 6.0), (False, 8.0)]

    References:
        The phases and the weighted fit are those of the Rust crate vsa-optim-rs 0.1.1, whose window holds two records
        more, whose residual is measured without itself and starts to fade one step later, and which has two further
        triggers for a correction.
    """
    return phase_switched(
        optax.identity(),
        predict_in="gradient",
        warmup_steps=warmup_steps,
        full_steps=full_steps,
        predict_steps=predict_steps,
        correct_every=correct_every,
        history=history,
        history_window=history_window,
        history_decay=history_decay,
        history_dtype=history_dtype,
        history_codec=history_codec,
        residual=residual,
        residual_decay=residual_decay,
        adaptive=adaptive,
        loss_threshold=loss_threshold,
        calibrate=calibrate,
        guard=guard,
    )


def phase_switched(
    opt: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    predict_in: str = "update",
    warmup_steps: int = 10,
    full_steps: int = 5,
    predict_steps: int = 20,
    correct_every: int = 5,
    history: str = "window",
    history_window: int = 8,
    history_decay: float = 0.95,
    history_dtype: jax.typing.DTypeLike | None = None,
    history_codec: Codec | None = None,
    residual: bool | None = None,
    residual_decay: float = 0.95,
    adaptive: bool = False,
    loss_threshold: float = 0.1,
    calibrate: bool = False,
    guard: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that PREDICT steps need no gradient.

    With ``predict_in="update"`` the records are what ``opt`` emitted; in PREDICT their extrapolation is emitted, and
    ``opt`` neither runs nor changes its state. With ``predict_in="gradient"`` the records are gradients, and ``opt``
    runs at every step, on the predicted gradient in PREDICT.

    **Learning-rate schedules.** With ``predict_in="update"`` whatever ``opt`` counts, a schedule inside it included,
    advances with true gradients only: a cosine over 1000 steps would reach a third of its way in 1000 steps. Give the
    rate to ``learning_rate`` instead and build ``opt`` at rate 1 (``optax.adamw(1.0)``): directions are recorded
    unscaled, and the rate of step t, counted over all steps, multiplies what leaves in every phase.

    A step whose gradient, or ``opt``'s answer to it, holds a NaN or an infinity leaves ``opt``'s state as it was and
    emits zeros; ``nonfinite_count`` goes up, and nothing that is not finite is recorded. The phase advances, except in
    WARMUP. What is inside ``opt``'s state is its own: a gradient of 1e30 overflows Adam's second moment, silently.

    With ``predict_steps=0`` this is ``opt`` and a few counters: parameters equal those of ``opt`` alone bit for bit,
    and a NaN is counted but treated as ``opt`` treats it. Any select that kept it out made XLA contract multiply-adds
    of Adam, momentum or norm clipping differently, on JAX 0.6 and on 0.10; ``optax.apply_if_finite`` keeps it out.

    Leaves that ``optax.masked`` keeps *from* this wrapper receive the zero gradients of a skipped step: put the mask
    inside, ``phase_switched(optax.masked(...))``. Under ``jax.vmap`` a conditional becomes a select, and both sides
    run: nothing is skipped there.

    Args:
        opt: the optimizer. Line searches, ``optax.MultiSteps`` and a second phase machine are refused.
        learning_rate: a number or a schedule over all steps; None leaves what is emitted unscaled. May be injected with
            ``optax.inject_hyperparams(lambda learning_rate: phase_switched(opt, learning_rate=learning_rate))``.
        predict_in: ``"update"`` or ``"gradient"``.
        warmup_steps: as in `predict_gradients`, and so are the arguments that follow.
        full_steps: see `predict_gradients`.
        predict_steps: see `predict_gradients`; with 0 the parameters are those of ``opt`` alone, bit for bit.
        correct_every: see `predict_gradients`.
        history: see `predict_gradients`.
        history_window: see `predict_gradients`.
        history_decay: see `predict_gradients`.
        history_dtype: see `predict_gradients`.
        history_codec: see `predict_gradients`.
        residual: see `predict_gradients`.
        residual_decay: see `predict_gradients`.
        adaptive: see `predict_gradients`.
        loss_threshold: see `predict_gradients`.
        calibrate: see `predict_gradients`.
        guard: see `predict_gradients`. With ``predict_in="update"`` it also takes a leap back, that is all predictions
            since the last true step, if the loss rose, and lengthens predictions, by at most 2, while they pay.

    Returns:
        A transformation that takes the loss as the optional extra argument ``value`` and forwards it, like every other
        extra argument, to ``opt``. Updates have the dtype that ``opt`` gives them.

    State cost:
        that of `predict_gradients` and ``opt``'s own.

    Raises:
        ValueError: as `predict_gradients`; and for an ``opt`` that is refused.
        TypeError: as `predict_gradients`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> schedule = optax.cosine_decay_schedule(0.1, 100)
        >>> opt = vsa_optax.phase_switched(optax.adamw(1.0), learning_rate=schedule)
        >>> loss = lambda params: jnp.sum((params - 3.0) ** 2)
        >>> @jax.jit
        ... def step(params, state):
        ...     value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
        ...     updates, state = opt.update(grads, state, params, value=value)
        ...     return optax.apply_updates(params, updates), state
        >>> params = jnp.zeros(4)
        >>> state = opt.init(params)
        >>> for _ in range(100):
        ...     params, state = step(params, state)
        >>> int(vsa_optax.phase_stats(state).predict_steps), bool(loss(params) < 0.1 * loss(jnp.zeros(4)))
        (57, True)
    """
    if isinstance(opt, optax.MultiSteps):
        raise ValueError("opt must not be optax.MultiSteps: wrap the other way round, MultiSteps(phase_switched(...))")
    if not (hasattr(opt, "init") and hasattr(opt, "update")):
        raise ValueError(f"opt must be an optax.GradientTransformation, got {opt!r}")
    opt = optax.with_extra_args_support(opt)
    _check_learning_rate(learning_rate)
    checks.check_choice("predict_in", predict_in, ("update", "gradient"))
    schedule = PhaseSchedule(warmup_steps, full_steps, predict_steps, correct_every, adaptive, loss_threshold)
    predictor = make_predictor(
        history=history,
        history_window=history_window,
        history_decay=history_decay,
        history_dtype=history_dtype,
        history_codec=history_codec,
        residual=residual,
        residual_decay=residual_decay,
        calibrate=calibrate,
    )
    if checks.check_bool("guard", guard) and not calibrate:
        raise ValueError("guard=True needs calibrate=True: it judges by what the calibration measures")
    if guard and adaptive:
        raise ValueError("adaptive must be False with guard=True, which sets the phases' lengths itself, got True")
    # Without predictions both domains are opt itself.
    predicts_updates = predict_in == "update" or not schedule.ever_predicts
    recorded = opt if predicts_updates else optax.with_extra_args_support(optax.identity())
    watcher = Guard(full_steps, predict_steps, undoes=predicts_updates) if guard else None
    run = PhaseStep(recorded, predictor)
    record = when(predictor.history.record)

    def init_fn(params: optax.Params) -> PhaseSwitchedState:
        checks.check_inexact_leaves(params)
        inner_state = opt.init(params)
        _check_inner_state(inner_state)
        machine = phases.init(schedule)
        if schedule.ever_predicts:
            calibration = predictor.init_calibration(params)
            machine = machine._replace(
                calibration=calibration,
                guard=watcher.init(predictor.history.num_features()) if watcher and calibration is not None else None,
            )
        return PhaseSwitchedState(
            machine=machine,
            history=predictor.history.init(params) if schedule.ever_predicts else None,
            residual=predictor.init_residual(params) if schedule.ever_predicts else None,
            inner_state=inner_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: PhaseSwitchedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PhaseSwitchedState]:
        value = extra_args.get("value")
        if value is not None:
            extra_args["value"] = checks.check_scalar("value", value)
        elif adaptive:
            raise ValueError("adaptive=True needs the loss at every step: update(..., value=loss), got value=None")
        _check_state(state, schedule, predictor, guard)
        if schedule.ever_predicts:
            tree, leading = predictor.history.example(state.history)
            checks.check_same_tree(tree, updates, what="gradients", leading_axes=leading)
        elif params is not None:
            checks.check_same_tree(params, updates, what="gradients")

        machine, memory, averaged_error = state.machine, state.history, state.residual
        step = phases.total_steps(machine)
        recorded_state = state.inner_state if predicts_updates else optax.EmptyState()
        if schedule.ever_predicts:
            # The history is read in one conditional and written in a later one, so that XLA writes it in place.
            scalars = predictor.scalars(memory, step)
            is_predict = machine.phase == Phase.PREDICT
            emits_prediction, weights = is_predict, None
            if machine.calibration is not None:
                weights = predictor.weights(machine.calibration, scalars)
            if machine.guard is not None:
                assert watcher is not None
                assert weights is not None
                loss = extra_args.get("value")
                is_taken_back = watcher.takes_back(machine.guard, ~is_predict, loss)
                emits_prediction |= is_taken_back
                weights = watcher.emitted(machine.guard, is_taken_back, weights, scalars.reach)
            result = run(
                updates,
                recorded_state,
                params,
                extra_args,
                machine.phase,
                memory,
                averaged_error,
                scalars,
                machine.calibration,
                weights,
                emits_prediction,
            )
            is_recorded = ~emits_prediction & result.is_finite
            assert result.error is not None
            assert result.is_measured is not None
            is_after_leap = (scalars.horizon > 1) | (machine.phase == Phase.CORRECT)
            machine = phases.note_prediction_error(machine, result.error, result.is_measured & is_after_leap)
            machine = machine._replace(calibration=result.calibration)
            averaged_error = result.residual
            memory = record(is_recorded, memory, result.target, step, scalars)
        else:
            target, inner_state = opt.update(updates, state.inner_state, params, **extra_args)
            result = StepResult(target, inner_state, None, all_finite(updates))

        is_finite = result.is_finite
        if predicts_updates:
            new_updates, inner_state = result.target, result.inner_state
        else:
            new_updates, inner_state = opt.update(result.target, state.inner_state, params, **extra_args)
            is_finite &= all_finite(new_updates)
            inner_state = select(is_finite, inner_state, state.inner_state)
        if schedule.ever_predicts:  # Else nothing stands between opt and the caller: a select would move its last bits.
            new_updates = select(is_finite, new_updates, optax.tree.zeros_like(new_updates))
        rate: Any = None
        if learning_rate is not None:
            rate = learning_rate(step) if callable(learning_rate) else learning_rate
        plan = None
        if machine.guard is not None:
            assert watcher is not None
            # What is taken back was scaled when it was emitted.
            given = jnp.asarray(1.0 if rate is None else rate, jnp.float32)
            rate = None if rate is None else jnp.where(is_taken_back, 1.0, given)
            is_warm = machine.phase != Phase.WARMUP
            watched = watcher.after(machine.guard, is_predict, is_taken_back, given * scalars.reach, loss, result)
            watched, plan = watcher.plan(watched, ~is_predict, is_warm, is_taken_back)
            machine = machine._replace(guard=watched)
        if rate is not None:
            new_updates = jax.tree.map(lambda u: jnp.asarray(rate, u.dtype) * u, new_updates)
        machine = phases.advance(schedule, machine, is_finite=is_finite, value=value, plan=plan)
        return new_updates, PhaseSwitchedState(machine, memory, averaged_error, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_learning_rate(learning_rate: Any) -> None:
    if learning_rate is None or callable(learning_rate):
        return
    if isinstance(learning_rate, jax.Array | np.ndarray | np.generic):
        if jnp.shape(learning_rate) != () or not jnp.issubdtype(learning_rate.dtype, jnp.floating):
            raise ValueError(
                "learning_rate must be a schedule, a number >= 0 or a floating-point scalar array, got an array of "
                f"shape {jnp.shape(learning_rate)} and dtype {learning_rate.dtype}"
            )
        if isinstance(learning_rate, jax.core.Tracer):  # Of inject_hyperparams, say: its value is not known.
            return
        learning_rate = float(learning_rate)
    checks.check_real("learning_rate", learning_rate, low=0.0, high=float(np.finfo(np.float32).max))


def _check_inner_state(inner_state: Any) -> None:
    if queries.contains_machine(inner_state):
        raise ValueError(
            "opt must not contain a phase machine of its own: use predict_gradients or phase_switched once"
        )
    refused = {
        optax.MultiStepsState: "optax.MultiSteps: wrap the other way round, MultiSteps(phase_switched(...))",
        optax.ScaleByBacktrackingLinesearchState: "a line search: it evaluates the loss itself at every step",
        optax.ScaleByZoomLinesearchState: "a line search: it evaluates the loss itself at every step",
    }
    types = tuple(refused)
    for leaf in jax.tree.leaves(inner_state, is_leaf=lambda x: isinstance(x, types)):
        for kind, reason in refused.items():
            if isinstance(leaf, kind):
                raise ValueError(f"opt must not contain {reason}")


def _check_state(state: Any, schedule: PhaseSchedule, predictor: Predictor, guard: bool) -> None:
    """``ValueError`` if the state was made by a transformation with other settings."""
    if not isinstance(state, PhaseSwitchedState):
        raise ValueError(f"state must be what init returned, a PhaseSwitchedState, got {type(state).__name__}")
    wanted = predictor.history.describe() if schedule.ever_predicts else "none"
    given = "none" if state.history is None else describe_state(state.history)
    _check_setting("history", given, wanted)
    if schedule.ever_predicts and jax.tree.leaves(predictor.history.example(state.history)[0]):
        _check_setting("calibrate", state.machine.calibration is not None, predictor.calibrates)
        _check_setting("guard", state.machine.guard is not None, guard)
    _check_setting("adaptive", state.machine.adaptive is not None, schedule.adaptive)
    if schedule.ever_predicts and predictor.history.example(state.history)[0] is not None:  # A tree may be None itself.
        _check_setting("residual", state.residual is not None, predictor.has_residual)


def _check_setting(name: str, given: Any, wanted: Any) -> None:
    if given != wanted:
        raise ValueError(f"state was made with other settings: {name} is {given!r}, here {wanted!r}")
