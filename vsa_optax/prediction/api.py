"""Skip backward passes: predict what a gradient, or an optimizer's update, would have been.

A true gradient enters; it leaves as it came (or as the wrapped optimizer's update), and is recorded. In PREDICT
whatever enters is ignored, and what the records predict leaves in its place. What predicts, and when, are objects:
`prediction.predictors.factory` and `prediction.phases`.
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
    """Replaces the gradients of PREDICT steps by predictions; heads an ``optax.chain``.

    True gradients pass through unchanged and are recorded. In PREDICT the incoming gradients are ignored, so that they
    need not be computed: `vsa_optax.value_and_grad_by_phase` skips them. The optimizer behind runs at every step.

    A gradient with a NaN or an infinity is neither recorded nor passed on: zeros leave in its place, and the state's
    ``nonfinite_count`` goes up (with ``phases=None`` it is counted, but passes). Predictions saturate at their dtype's
    largest finite value.

    Args:
        predictor: what predicts: `vsa_optax.Secants`, or a `vsa_optax.Window`, `vsa_optax.Recursive` or
            `vsa_optax.Momentum` with ``predicts="gradient"``.
        phases: when: `vsa_optax.Guarded`, `vsa_optax.Cycle`, `vsa_optax.AdaptiveCycle`, or what
            `vsa_optax.momentum_predictor` gives; None never predicts.

    Returns:
        A transformation that takes the loss as the optional extra argument ``value``.

    State cost:
        the predictor's, the phases', and less than 150 bytes of scalars; with ``phases=None`` the scalars alone.

    Raises:
        ValueError: a ``predictor`` or ``phases`` of another type; a predictor of updates; at ``update``, gradients
            whose structure or shapes are not those given to ``init``, or no ``params`` or ``value`` where the settings
            need them.
        TypeError: at ``init``, a leaf that is not floating point or complex.

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

    With the defaults gradients are predicted, and ``opt`` runs at every step: a schedule inside it counts them all.
    ``Window`` and ``Recursive`` predict what ``opt`` emits; then ``opt`` does not run in PREDICT, and only
    ``learning_rate`` counts all steps.

    Args:
        opt: the optimizer. Line searches, a second phase machine, and what emits rarely, such as ``optax.MultiSteps``
            and `ternary_multi_steps`, are refused.
        learning_rate: a number ``>= 0`` or a schedule over all steps, for an ``opt`` at rate 1: it multiplies what
            leaves in every phase. With None nothing is multiplied.
        predictor: what predicts: `vsa_optax.Secants`, `vsa_optax.Window`, `vsa_optax.Recursive` or
            `vsa_optax.Momentum`.
        phases: when: `vsa_optax.Guarded`, `vsa_optax.Cycle`, `vsa_optax.AdaptiveCycle`, or what
            `vsa_optax.momentum_predictor` gives; with None this is ``opt``, bit for bit.

    Returns:
        A transformation that takes the loss as the optional extra argument ``value`` and forwards it, like every other
        extra argument, to ``opt``. Updates have the dtype that ``opt`` gives them.

    State cost:
        ``opt``'s own, and that of `predict_gradients`.

    Raises:
        ValueError: as `predict_gradients`; for an ``opt`` that is refused; at ``init``, for two rates that would
            multiply, or a schedule in an ``opt`` that does not run in PREDICT; for gradients to be recorded that differ
            between devices.
        TypeError: as `predict_gradients`.

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
        # Without predictions both domains are opt itself.
        predicts_updates=predictor.predicts == "update" or not ever_predicts(phases),
        learning_rate=learning_rate,
    )


def _check_phases(phases: Guarded | Cycle | None, predictor: PredictorSettings) -> Guarded | Cycle:
    """The settings, in which None never predicts."""
    if isinstance(phases, QualityCycle) and not isinstance(predictor, Momentum):
        raise ValueError(
            "phases must be a Guarded, Cycle or AdaptiveCycle unless predictor is a Momentum, which keeps the errors "
            f"that QualityCycle decides by: use predictor=Momentum(), got {predictor!r}"
        )
    return Cycle(predict_steps=0) if phases is None else _check_settings("phases", phases, _PHASES)


def _check_settings(name: str, settings: _Settings, kinds: tuple[type, ...]) -> _Settings:
    """``settings``; ``ValueError`` unless they are an object of one of these classes."""
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
