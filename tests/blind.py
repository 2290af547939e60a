"""The machine without its guard: phases by the schedule, lines in time as they are. Most tests are of its mechanics."""

import functools

import optax

import vsa_optax

SETTINGS = {"guard": False, "calibrate": False}
phase_switched = functools.partial(vsa_optax.phase_switched, **SETTINGS)
predict_gradients = functools.partial(vsa_optax.predict_gradients, **SETTINGS)
# Both transformations by name, as functions of settings alone.
MAKERS = {
    "predict_gradients": predict_gradients,
    "phase_switched": lambda **kwargs: phase_switched(optax.adam(0.1), **kwargs),
}
