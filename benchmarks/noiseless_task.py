"""A task without noise: its loss is one deterministic function of the parameters, evaluated on all data at once."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

DATA_VARIABLE = "NOISELESS_DATA"  # The name of a file that `exported` wrote, for machines without scikit-learn.


class FullBatch(NamedTuple):
    """Something to minimise; all in float32.

    Attributes:
        description: one line for a log.
        init: seed -> parameters to start from.
        loss: parameters, data -> the loss, which is at least 0.
        budgets: evaluations of loss and gradient to compare at; settings are searched from the middle one.
        rates: Adam's coarse grid, as exponents: 0.001 times 2 to the power of half of each.
        floor: losses below are rounding, and count as this much.
        data: seed -> what the loss reads beside the parameters; the task may be another one for each seed.
        residuals: parameters -> a vector whose squares sum to the loss, if it is short enough for Levenberg-Marquardt.
        is_for_gpu: whether a CPU takes seconds for an evaluation.
        further: of the middle budget: what plain Adam is given as well, to see when it gets as low as others.
    """

    description: str
    init: Callable[[int], Any]
    loss: Callable[[Any, Any], jax.Array]
    budgets: tuple[int, ...]
    rates: tuple[int, ...]
    floor: float
    data: Callable[[int], Any] = lambda seed: ()
    residuals: Callable[[Any], jax.Array] | None = None
    is_for_gpu: bool = False
    further: tuple[int, ...] = (2, 4, 8)


def make(task, seed):
    """Parameters to start from, and the loss as a function of parameters alone."""
    data = task.data(seed)
    return task.init(seed), lambda params: task.loss(params, data)


def stored(name):
    """An array of the exported file, or None if none is in use."""
    path = os.environ.get(DATA_VARIABLE)
    if not path:
        return None
    with np.load(path) as arrays:
        return arrays[name]


def dense(key, fan_in, fan_out, scale=1.0):
    """A layer's kernel, with the deviation that keeps the size of activations, and its bias of zeros."""
    deviation = scale * np.sqrt(2 / (fan_in + fan_out))
    return {"kernel": deviation * jax.random.normal(key, (fan_in, fan_out)), "bias": np.zeros(fan_out, np.float32)}


def num_params(init):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init(0))))
