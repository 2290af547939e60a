"""Skip backward passes: predict what a gradient, or an optimizer's update, would have been.

A true gradient enters; it leaves as it came (or as the wrapped optimizer's update), and is recorded. In PREDICT
whatever enters is ignored, and what the records predict leaves in its place. State cost: 2 W + 2 times the parameters
with the secants through W changes, W + 1 times with a window of W records, 3 times with the recursion.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vsa_optax.codecs.codec import Codec
from vsa_optax.core import checks
from vsa_optax.prediction.guard import DEFAULT_TOLERANCE, Guard
from vsa_optax.prediction.machine import PhaseSchedule
from vsa_optax.prediction.predictors.factory import Domain, HistoryKind, make_predictor
from vsa_optax.prediction.update import switched


def predict_gradients(
    *,
    warmup_steps: int = 10,
    full_steps: int = 5,
    predict_steps: int = 20,
    correct_every: int = 5,
    history: HistoryKind | None = None,
    history_window: int | None = None,
    history_decay: float = 0.95,
    history_dtype: jax.typing.DTypeLike | None = None,
    history_codec: Codec | None = None,
    residual: bool | None = None,
    residual_decay: float = 0.95,
    adaptive: bool = False,
    loss_threshold: float = 0.1,
    calibrate: bool | None = None,
    guard: bool = True,
    guard_tolerance: float = DEFAULT_TOLERANCE,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradients of PREDICT steps by predictions; heads an ``optax.chain``.

    In WARMUP, FULL and CORRECT gradients pass through unchanged and are recorded. In PREDICT the incoming gradients are
    ignored, so they need not be computed: `vsa_optax.value_and_grad_by_phase` skips them. The optimizer behind this
    link runs at every step.

    By default a guard decides when to predict and for how long. It compares each true gradient with its prediction, and
    predicts as many steps as keep the error within ``guard_tolerance``; on mini-batches that is none. Without it, the
    phases are a fixed cycle, and a line through the last gradients is followed wherever it leads.

    A gradient with a NaN or an infinity is neither recorded nor passed on: zeros leave in its place, and the state's
    ``nonfinite_count`` goes up (with ``predict_steps=0`` it is counted, but passes). Predictions saturate at their
    dtype's largest finite value.

    Args:
        warmup_steps: true gradients to record before the first FULL phase, ``>= 2``.
        full_steps: steps of a FULL phase, ``>= 1``; with the guard it lasts until that wants to predict.
        predict_steps: steps of a PREDICT phase, its corrections included, ``>= 0``; with the guard, at most so many. 0
            never predicts and allocates no history.
        correct_every: in PREDICT, a true gradient is taken when the step within the phase is a positive multiple of
            this, ``>= 1``. Not with the guard, where the FULL step after the phase corrects.
        history: ``"secant"`` (from the last W changes of parameters and gradients, what the gradient is at the present
            parameters: see `prediction.fits.secant_fit`), ``"window"`` (a line in time, least squares over the last W
            records) or ``"recursive"`` (over all records with exponentially fading weights, the same work and memory
            whatever the decay). None takes secants if there is a guard, and a window if there is none or if something
            is asked for that only a line has: a codec, ``calibrate=True``, ``residual=True``, ``predict_in="update"``.
        history_window: W, ``>= 2``; None takes 16 for secants and 8 for a window.
        history_decay: of a line, weight of a record relative to the next newer one, in ``(0, 1]``.
        history_dtype: float16, bfloat16, float32 or float64 of records and residual; None keeps each leaf's own. A
            complex leaf is kept in complex64 or complex128. Of secants, the newest parameters keep their own.
        history_codec: a codec, such as `vsa_optax.TritCodec`, that keeps the window's records; None keeps them as they
            are. The residual is coded likewise, and ``history_dtype`` has no effect. Needs a window. A prediction then
            costs one decoding, whatever W, and the residual's.
        residual: of a line, whether to add the averaged error of past predictions, measured at CORRECT steps (with the
            guard, at all true steps); None adds it unless predictions are calibrated, where it must not be True.
        residual_decay: γ, both the average's decay and the residual's fading a step, in ``[0, 1]``.
        adaptive: whether phase lengths follow the loss: FULL grows and PREDICT shrinks while it rises, the reverse
            while it falls. Needs ``value=`` at every update, and ``guard=False``.
        loss_threshold: relative rise of the loss that counts as worse, ``>= 0``.
        calibrate: of a line, whether each leaf weighs the records' mean, the slope and, with a window, the newest
            record by what they were worth in predictions so far: out of sample, in closed form, see
            `prediction.fits.calibration`. None does. Secants always learn from their errors, and take no True.
        guard: whether the phases' lengths follow the errors of the predictions: see `prediction.guard`.
        guard_tolerance: τ, in ``(0, 1]``: the guard predicts as many steps as keep ``||x - x̂||² / ||x||²`` at that.
            Of no effect without a guard.

    Returns:
        A transformation that takes the loss as the optional extra argument ``value``.

    State cost:
        for parameters of P bytes (in the history's dtype, or as ``history_codec.nbytes`` counts them), secants
        ``(2 * W + 2) * P`` bytes, ``4 * (W**2 + 1)`` a leaf, and ``4 * W**2``; a window ``W * P`` and the recursion
        ``2 * P``, and the residual ``P`` or, calibrated, ``4 * (W**2 + 14)`` bytes a leaf with a window, 32 with the
        recursion and 56 with a codec. Besides, less than 150 bytes of scalars, 412 more when adaptive.

    Raises:
        ValueError: an argument outside its range, where the transformation is made; at ``update``, gradients whose
            structure or shapes are not those given to ``init``, secants without ``params``, or ``adaptive=True``
            without ``value``.
        TypeError: at ``init``, a leaf that is not floating point or complex.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> opt = optax.chain(
        ...     vsa_optax.predict_gradients(
        ...         warmup_steps=2, full_steps=1, predict_steps=2, calibrate=False, guard=False),
        ...     optax.sgd(1.0))
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
        guard=_check_guard(guard, adaptive),
        predict_in=None,
    )
    identity = optax.with_extra_args_support(optax.identity())
    watcher = _make_guard(guard, guard_tolerance, schedule)
    return switched(identity, schedule, predictor, guard=watcher, predicts_updates=True, learning_rate=None)


def phase_switched(
    opt: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    predict_in: Domain | None = None,
    warmup_steps: int = 10,
    full_steps: int = 5,
    predict_steps: int = 20,
    correct_every: int = 5,
    history: HistoryKind | None = None,
    history_window: int | None = None,
    history_decay: float = 0.95,
    history_dtype: jax.typing.DTypeLike | None = None,
    history_codec: Codec | None = None,
    residual: bool | None = None,
    residual_decay: float = 0.95,
    adaptive: bool = False,
    loss_threshold: float = 0.1,
    calibrate: bool | None = None,
    guard: bool = True,
    guard_tolerance: float = DEFAULT_TOLERANCE,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that PREDICT steps need no gradient.

    With ``predict_in="gradient"`` the records are gradients, and ``opt`` runs at every step, on the predicted gradient
    in PREDICT. With ``predict_in="update"`` they are what ``opt`` emitted; in PREDICT their extrapolation is emitted,
    and ``opt`` neither runs nor changes its state. That needs a line in time: of the parameters only the gradient is a
    function.

    **Learning-rate schedules.** With ``predict_in="update"`` whatever ``opt`` counts, a schedule inside it included,
    advances with true gradients only: a cosine over 1000 steps would reach a third of its way in 1000 steps. Give the
    rate to ``learning_rate`` instead and build ``opt`` at rate 1 (``optax.adamw(1.0)``): directions are recorded
    unscaled, and the rate of step t, counted over all steps, multiplies what leaves in every phase.

    A step whose gradient, or ``opt``'s answer to it, holds a NaN or an infinity leaves ``opt``'s state as it was and
    emits zeros; ``nonfinite_count`` goes up, and nothing that is not finite is recorded. The phase advances, except in
    WARMUP. What is inside ``opt``'s state is its own: a gradient of 1e30 overflows Adam's second moment, silently.

    With ``predict_steps=0`` this is ``opt`` and a few counters: parameters equal those of ``opt`` alone bit for bit,
    and a NaN is counted but treated as ``opt`` treats it. Any select that kept it out made XLA contract multiply-adds
    of Adam, momentum or norm clipping differently, on every release tried; ``optax.apply_if_finite`` keeps it out.

    Leaves that ``optax.masked`` keeps *from* this wrapper receive the zero gradients of a skipped step: put the mask
    inside, ``phase_switched(optax.masked(...))``. Under ``jax.vmap`` a conditional becomes a select, and both sides
    run: nothing is skipped there.

    **Inside jax.shard_map** devices that share the state decide together. A gradient that is not finite on one is
    skipped on all; a loss that differs is averaged, and in PREDICT, where nothing is communicated, it is the last one
    known (with ``adaptive=True`` each is averaged). What is recorded must be the same on all devices: average gradients
    before, or let ``opt`` do it and predict its updates, as in ``phase_switched(optax.chain(compressed_pmean(...),
    optax.adamw(1.0)), predict_in="update")``, where devices communicate in true steps only.

    Args:
        opt: the optimizer. Line searches, ``optax.MultiSteps`` and a second phase machine are refused.
        learning_rate: a number or a schedule over all steps; None leaves what is emitted unscaled. May be injected with
            ``optax.inject_hyperparams(lambda learning_rate: phase_switched(opt, learning_rate=learning_rate))``.
        predict_in: ``"update"`` or ``"gradient"``; None takes what suits the history, the gradient of secants and the
            update of lines.
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
        guard: see `predict_gradients`.
        guard_tolerance: see `predict_gradients`.

    Returns:
        A transformation that takes the loss as the optional extra argument ``value`` and forwards it, like every other
        extra argument, to ``opt``. Updates have the dtype that ``opt`` gives them.

    State cost:
        that of `predict_gradients` and ``opt``'s own.

    Raises:
        ValueError: as `predict_gradients`; for an ``opt`` that is refused; and for gradients, or updates, that are to
            be recorded and differ between devices.
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
        >>> bool(vsa_optax.phase_stats(state).predict_steps > 70), bool(loss(params) < 0.01 * loss(jnp.zeros(4)))
        (True, True)
    """
    if isinstance(opt, optax.MultiSteps):
        raise ValueError("opt must not be optax.MultiSteps: wrap the other way round, MultiSteps(phase_switched(...))")
    if not (hasattr(opt, "init") and hasattr(opt, "update")):
        raise ValueError(f"opt must be an optax.GradientTransformation, got {opt!r}")
    opt = optax.with_extra_args_support(opt)
    _check_learning_rate(learning_rate)
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
        guard=_check_guard(guard, adaptive),
        predict_in=predict_in,
    )
    if predict_in is None:
        predict_in = "gradient" if predictor.reads_params else "update"
    # Without predictions both domains are opt itself.
    predicts_updates = predict_in == "update" or not schedule.ever_predicts
    watcher = _make_guard(guard, guard_tolerance, schedule)
    return switched(
        opt, schedule, predictor, guard=watcher, predicts_updates=predicts_updates, learning_rate=learning_rate
    )


def _check_guard(guard: bool, adaptive: bool) -> bool:
    if checks.check_bool("guard", guard) and checks.check_bool("adaptive", adaptive):
        raise ValueError("adaptive must be False with guard=True, which sets the phases' lengths itself, got True")
    return guard


def _make_guard(guard: bool, tolerance: float, schedule: PhaseSchedule) -> Guard | None:
    tolerance = checks.check_real("guard_tolerance", tolerance, low=0.0, high=1.0, low_open=True)
    return Guard(schedule.predict_steps, tolerance) if guard and schedule.ever_predicts else None


def _check_learning_rate(learning_rate: optax.ScalarOrSchedule | None) -> None:
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
