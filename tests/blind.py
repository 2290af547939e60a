"""Both transformations by flat settings; by default lines as they are, in fixed cycles. Most tests are of mechanics."""

import inspect

import optax

import vsa_optax
from vsa_optax import AdaptiveCycle, Cycle, Guarded, Momentum, Recursive, Secants, Window

TAKEN = {
    kind: set(inspect.signature(kind).parameters)
    for kind in (Secants, Window, Recursive, Momentum, Guarded, Cycle, AdaptiveCycle)
}


def settings(*, line=Window, when=Cycle, **flat):
    """``predictor=`` and ``phases=`` of these classes, each with those of the flat settings that it takes.

    A line is blind unless ``calibrate=True`` is among them: it has a residual, or none if ``residual_decay`` is None.
    Of secants, ``length`` is the window.
    """
    unknown = set(flat) - set.union(*TAKEN.values())
    assert not unknown, unknown
    if line is Secants and "length" in flat:
        flat["window"] = flat.pop("length")
    flat.setdefault("calibrate", False)
    flat.setdefault("residual_decay", None if flat["calibrate"] else 0.95)
    return {
        "predictor": line(**{name: value for name, value in flat.items() if name in TAKEN[line]}),
        "phases": when(**{name: value for name, value in flat.items() if name in TAKEN[when]}),
    }


def phase_switched(opt, *, learning_rate=None, **flat):
    return vsa_optax.phase_switched(opt, learning_rate=learning_rate, **settings(**flat))


def predict_gradients(**flat):
    return vsa_optax.predict_gradients(**settings(predicts="gradient", **flat))


# Both transformations by name, as functions of settings alone.
MAKERS = {
    "predict_gradients": predict_gradients,
    "phase_switched": lambda **kwargs: phase_switched(optax.adam(0.1), **kwargs),
}
