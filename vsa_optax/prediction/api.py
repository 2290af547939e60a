"""Skips backward passes: predicts a gradient, or an optimizer's update, instead of computing it.

A true gradient is recorded and passed on unchanged (or as the wrapped optimizer's update). In PREDICT the incoming
gradient is ignored, and a prediction from the records is emitted instead. One object says how to predict
(`prediction.predictors.factory`), another says when (`prediction.phases`).
"""

from typing import TypeVar, get_args

import optax

from vsa_optax.prediction.learning_rate import check_learning_rate
from vsa_optax.prediction.machine import ever_predicts
from vsa_optax.prediction.phases import AdaptiveCycle, Cycle, Guarded, QualityCycle
from vsa_optax.prediction.predictors.factory import (
    Momentum,
    PredictorSettings,
    Recursive,
    Secants,
    Window,
    make_predictor,
)
from vsa_optax.prediction.update import switched

_PREDICTORS: tuple[type, ...] = get_args(PredictorSettings)
_PHASES: tuple[type, ...] = (Guarded, Cycle, AdaptiveCycle)
_Settings = TypeVar("_Settings")


def predict_gradients(
    *, predictor: Secants | Window | Recursive | Momentum = Secants(), phases: Guarded | Cycle | None = Guarded()
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradients of PREDICT steps with predictions, as the first link of an ``optax.chain``.

    True gradients pass through unchanged and are recorded. In PREDICT the incoming gradients are ignored, so they need
    not be computed: `vsa_optax.value_and_grad_by_phase` skips them. The optimizer that follows runs at every step.

    A gradient with a NaN or an infinity is neither recorded nor passed on. Zeros are emitted instead, and the state's
    ``nonfinite_count`` is incremented (with ``phases=None`` it is counted, but passed on). Predictions saturate at
    the largest finite value of their dtype.

    Args:
        predictor: how gradients are predicted. `vsa_optax.Secants` uses the last changes of parameters and gradients.
            With ``predicts="gradient"``, `vsa_optax.Window` and `vsa_optax.Recursive` extrapolate a line in time, and
            `vsa_optax.Momentum` extrapolates the last difference.
        phases: when steps are predicted. `vsa_optax.Guarded` predicts while the measured error is within a tolerance.
            `vsa_optax.Cycle` alternates fixed numbers of true and predicted steps, and `vsa_optax.AdaptiveCycle` lets
            these numbers follow the loss. `vsa_optax.momentum_predictor` returns two legacy cycles. None never
            predicts.

    Returns:
        A transformation that takes the loss as the optional extra argument ``value``.

    State cost:
        that of the predictor and of the phases, and less than 150 bytes of scalars. With ``phases=None`` the state
        holds the scalars alone.

    Raises:
        ValueError: if ``predictor`` or ``phases`` has another type, or if the predictor predicts updates; at
            ``update``, if structure or shapes of the gradients differ from those given to ``init``, or if ``params``
            or ``value`` is missing although the settings need it.
        TypeError: at ``init``, if a leaf is neither floating point nor complex.

    Example:
        >>> import jax.numpy as jnp, optax, vsa_optax
        >>> line = vsa_optax.Window(predicts="gradient", calibrate=False)
        >>> cycle = vsa_optax.Cycle(warmup_steps=2, full_steps=1, predict_steps=2)
        >>> opt = optax.chain(vsa_optax.predict_gradients(predictor=line, phases=cycle), optax.sgd(1.0))
        >>> params = jnp.zeros(2)
        >>> state, moves = opt.init(params), []
        >>> for step in range(5):
        ...     needs = bool(vsa_optax.needs_backward(state))
        ...     gradient = jnp.array([1.0, 2.0]) * step if needs else jnp.zeros(2)
        ...     updates, state = opt.update(gradient, state, params)
        ...     moves.append((needs, round(float(-updates[1]), 5)))
        >>> moves
        [(True, 0.0), (True, 2.0), (True, 4.0), (False, 6.0), (False, 8.0)]
    """
    predictor = _check_settings("predictor", predictor, _PREDICTORS)
    if predictor.predicts != "gradient":
        raise ValueError(
            f"predict_gradients predicts gradients: use {type(predictor).__name__}(predicts='gradient'), got "
            f"predictor={predictor!r}"
        )
    identity = optax.with_extra_args_support(optax.identity())
    return switched(
        identity,
        _check_phases(phases, predictor),
        make_predictor(predictor),
        predicts_updates=True,
        learning_rate=None,
        emits_moves=False,
    )


def phase_switched(
    opt: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    predictor: Secants | Window | Recursive | Momentum = Secants(),
    phases: Guarded | Cycle | None = Guarded(),
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that PREDICT steps need no gradient.

    With the defaults, gradients are predicted and ``opt`` runs at every step, so a schedule inside ``opt`` counts all
    steps. ``Window`` and ``Recursive`` predict the updates of ``opt`` instead. Then ``opt`` does not run in PREDICT,
    and a schedule must be given as ``learning_rate``, which counts all steps.

    Args:
        opt: the optimizer to wrap. It must not contain a line search, a second phase machine, or a transformation that
            emits only every few steps, such as ``optax.MultiSteps`` or `vsa_optax.ternary_multi_steps`.
        learning_rate: a number ``>= 0`` or a schedule over all steps, for an ``opt`` that was built at rate 1. It
            multiplies the emitted updates in every phase. None leaves them as they are.
        predictor: how gradients or updates are predicted. `vsa_optax.Secants` predicts gradients from the last changes
            of parameters and gradients. `vsa_optax.Window` extrapolates a line fitted to the last records (by default,
            updates), and `vsa_optax.Recursive` one fitted to all records. `vsa_optax.Momentum` extrapolates the last
            difference between records (by default, gradients).
        phases: when steps are predicted. `vsa_optax.Guarded` predicts while the measured error is within a tolerance.
            `vsa_optax.Cycle` alternates fixed numbers of true and predicted steps; `vsa_optax.AdaptiveCycle` adapts
            them to the loss. `vsa_optax.momentum_predictor` has two more. None never predicts: this is ``opt`` itself.

    Returns:
        A transformation that takes the loss as the optional extra argument ``value`` and forwards it, like every other
        extra argument, to ``opt``. Updates keep the dtype that ``opt`` gives them.

    State cost:
        that of ``opt``, of the predictor and of the phases, and less than 150 bytes of scalars.

    Raises:
        ValueError: if an argument is invalid; at ``init``, if two rates would multiply, or if ``opt`` holds a schedule
            but does not run in PREDICT and ``learning_rate`` is None; at ``update``, if structure or shapes of the
            gradients differ from those given to ``init``, if ``params`` or ``value`` is missing although the settings
            need it, or if gradients to be recorded differ between devices.
        TypeError: at ``init``, if a leaf is neither floating point nor complex.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.adamw(optax.cosine_decay_schedule(0.1, 100)))
        >>> loss = lambda params: jnp.sum((params - 3.0) ** 2)
        >>> @jax.jit
        ... def step(params, state):
        ...     value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
        ...     updates, state = opt.update(grads, state, params, value=value)
        ...     return optax.apply_updates(params, updates), state
        >>> params, state = jnp.zeros(4), opt.init(jnp.zeros(4))
        >>> for _ in range(100):
        ...     params, state = step(params, state)
        >>> int(vsa_optax.phase_stats(state).predict_steps) > 70, float(loss(params)) < 0.4
        (True, True)
    """
    if isinstance(opt, optax.MultiSteps):
        raise ValueError("opt must not be optax.MultiSteps: wrap the other way round, MultiSteps(phase_switched(...))")
    if not (hasattr(opt, "init") and hasattr(opt, "update")):
        raise ValueError(f"opt must be an optax.GradientTransformation, got {opt!r}")
    check_learning_rate(learning_rate)
    predictor = _check_settings("predictor", predictor, _PREDICTORS)
    phases = _check_phases(phases, predictor)
    return switched(
        optax.with_extra_args_support(opt),
        phases,
        make_predictor(predictor),
        # Without predictions, both choices are opt itself.
        predicts_updates=predictor.predicts == "update" or not ever_predicts(phases),
        learning_rate=learning_rate,
    )


def _check_phases(phases: Guarded | Cycle | None, predictor: PredictorSettings) -> Guarded | Cycle:
    """The checked settings; None becomes a cycle that never predicts."""
    if isinstance(phases, QualityCycle) and not isinstance(predictor, Momentum):
        raise ValueError(
            "phases must be a Guarded, Cycle or AdaptiveCycle unless predictor is a Momentum, which keeps the errors "
            f"that QualityCycle decides by: use predictor=Momentum(), got {predictor!r}"
        )
    return Cycle(predict_steps=0) if phases is None else _check_settings("phases", phases, _PHASES)


def _check_settings(name: str, settings: _Settings, kinds: tuple[type, ...]) -> _Settings:
    """Returns ``settings``, or raises ``ValueError`` unless they are an instance of one of ``kinds``."""
    if isinstance(settings, kinds):
        return settings
    names = [kind.__name__ for kind in kinds]
    if isinstance(settings, type) and issubclass(settings, kinds):
        raise ValueError(
            f"{name} must be an object, but {settings.__name__} is its class: call it, {name}={settings.__name__}()"
        )
    default = "" if name == "predictor" else ", or None"
    raise ValueError(
        f"{name} must be a {', '.join(names[:-1])} or {names[-1]}, such as {names[0]}(){default}, got {settings!r}"
    )
