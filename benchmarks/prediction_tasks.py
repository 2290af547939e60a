"""Tasks for skipping backward passes: without noise, where it should help; mini-batches, where it must do no harm."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import codec_tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
from codec_tasks import Task

FRACTIONS = (0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.25, 1.5)
BOUNDARY_WEIGHT = 10.0


class Case(NamedTuple):
    """A task and how it is used.

    Attributes:
        task: makes it.
        rates: the grid to choose plain Adam's from.
        steps: of training.
        recorded: steps of a trajectory, at the middle one of the task's own rates.
        least: targets for the ratio of backward passes.
        fractions: of the steps, plain Adam's budgets.
        runs_apart: whether each run is a job of its own, as it takes long.
    """

    task: Callable[[], Task]
    rates: tuple[float, ...]
    steps: int
    recorded: int
    least: tuple[float, ...]
    fractions: tuple[float, ...] = FRACTIONS
    runs_apart: bool = False


@functools.cache
def digits_full_batch():
    """The loss that is differentiated is the final one."""
    task = codec_tasks.digits(64)
    return task._replace(
        description=task.description.replace("batch 64", "full batch"),
        batches=no_batches,
        loss=lambda params, _: task.final(params),
    )


def no_batches(seed, steps):
    del seed
    return np.zeros((steps, 1), np.int32)


def pinn_errors(frequency, points, params):
    """``[points]`` errors of the equation, and the two values at the ends, of the network of `pinn`."""

    def solution(x):
        hidden = x[None]
        for layer in params[:-1]:
            hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"])
        return (hidden @ params[-1]["kernel"] + params[-1]["bias"])[0]

    residual = jax.vmap(jax.grad(jax.grad(solution)))(points) + jnp.sin(frequency * np.pi * points)
    return residual, (solution(jnp.array(0.0)), solution(jnp.array(1.0)))


def pinn_residuals(frequency, num_points=128):
    """Parameters to a vector whose squares sum to the loss of `pinn`."""
    points = jnp.linspace(0, 1, num_points)

    def residuals(params):
        residual, ends = pinn_errors(frequency, points, params)
        return jnp.append(residual / np.sqrt(num_points), np.sqrt(BOUNDARY_WEIGHT) * jnp.stack(ends))

    return residuals


@functools.cache
def pinn(frequency, width=32, num_points=128):
    """A network of two hidden layers for ``u'' = -sin(frequency pi x)`` on [0, 1], zero at both ends."""
    points = jnp.linspace(0, 1, num_points)
    sizes = [1, width, width, 1]

    def init(seed):
        layers = []
        for key, fan_in, fan_out in zip(jax.random.split(jax.random.key(seed), 3), sizes, sizes[1:], strict=False):
            is_first = fan_in == 1
            scale = (3 if is_first else 1) * np.sqrt(2 / (fan_in + fan_out))
            bias = (0.5 if is_first else 0.0) * jax.random.normal(jax.random.fold_in(key, 1), (fan_out,))
            layers.append({"kernel": scale * jax.random.normal(key, (fan_in, fan_out)), "bias": bias})
        return layers

    def final(params):
        residual, ends = pinn_errors(frequency, points, params)
        return jnp.mean(residual**2) + BOUNDARY_WEIGHT * (ends[0] ** 2 + ends[1] ** 2)

    num = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init(0))))
    return Task(
        f"PINN: {num:,} parameters, u'' = -sin({frequency} pi x) at {num_points} points; final loss is the same",
        rates=(0.003, 0.01, 0.02),
        init=init,
        batches=no_batches,
        loss=lambda params, _: final(params),
        final=final,
    )


CASES = {
    "digits, full batch": Case(digits_full_batch, (0.003, 0.01, 0.03, 0.06), 300, 300, (1.5, 2.5)),
    "PINN, sin(2 pi x)": Case(lambda: pinn(2), (0.003, 0.01, 0.02, 0.04), 2000, 600, (1.5,)),
    "PINN, sin(6 pi x)": Case(lambda: pinn(6), (0.003, 0.01, 0.02, 0.04), 2000, 600, (1.5,)),
    "digits, batch 64": Case(lambda: codec_tasks.digits(64), (0.001, 0.003, 0.01, 0.03), 300, 300, (1.0,)),
    "chars, batch 8": Case(
        lambda: codec_tasks.characters(8, 128),
        (0.001, 0.003, 0.006, 0.012),
        200,
        120,
        (1.0,),
        fractions=(0.65, 1.0, 1.25),
        runs_apart=True,
    ),
}


def chosen(task):
    """The names of the cases that contain ``task``."""
    return [name for name in CASES if task in name]


def trial(cases, steps=5):
    """Trains a few steps with Adam in each case of a dictionary; prints losses, and seconds a step behind the first."""
    for name, case in cases.items():
        task, rate = case.task(), case.rates[len(case.rates) // 2]
        opt = optax.adam(rate)

        @jax.jit
        def step(params, state, batch, task=task, opt=opt):
            value, grads = jax.value_and_grad(task.loss)(params, batch)
            updates, state = opt.update(grads, state)
            return value, optax.apply_updates(params, updates), state

        print(f"{name}: {task.description}")
        params, final = task.init(0), jax.jit(task.final)
        state = opt.init(params)
        print(f"  final loss before: {final(params):.4f}; rate {rate:g}; loss of each batch:", end="", flush=True)
        for number, batch in enumerate(task.batches(0, steps)):
            value, params, state = step(params, state, batch)
            print(f" {value:.4f}", end="", flush=True)
            if number == 0:
                began = time.perf_counter()
        seconds = (time.perf_counter() - began) / (steps - 1)
        print(f"\n  final loss after {steps} steps: {final(params):.4f}; {seconds:.4f} s a step", flush=True)
