"""The predictions of a history alone, from its own pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vsa_optax.kernels import numerics


@functools.cache
def compiled(history):
    """To record at a step, and to predict for one, by the history's own pieces."""

    def record(state, record, at):
        return history.record(state, record, None, at, history.scalars(state, at), jnp.array(True))

    def predict(state, step):
        coefficients, trees = history.terms(state, history.scalars(state, step))
        return jax.tree.map(lambda *terms: numerics.linear_combination(coefficients, terms), *trees)

    return jax.jit(record), jax.jit(predict)


def run(history, steps, records, step):
    """Prediction for ``step`` after ``records``."""
    record, predict = compiled(history)
    state = history.init(jnp.zeros(records.shape[1]))
    for at, x in zip(steps, np.asarray(records, np.float32), strict=True):
        state = record(state, x, np.int32(at))
    return predict(state, np.int32(step))
