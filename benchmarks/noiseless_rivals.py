"""The alternatives of a user without noise: Adam, Muon, L-BFGS, and this library's methods, each compiled as a whole.

A method runs until its evaluations of loss and gradient are used up. The result is the loss after each evaluation; a
line search has only one, after its last evaluation. Without noise, the parameters of the lowest loss can be kept, so a
method counts by its lowest loss so far, which `lowest` computes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vsa_optax
from vsa_optax.prediction import presets

BETAS = ((0.9, 0.999), (0.9, 0.98), (0.95, 0.98), (0.8, 0.95))


class Setting(NamedTuple):
    """The settings of a method.

    Attributes:
        rate: the rate in half octaves above 0.001; 0 for methods without one.
        betas: the betas of Adam.
        own: the method's own settings, each a name and a value, static when compiled.
        stretch: the number of steps per evaluation, for methods that skip some.
    """

    rate: int = 0
    betas: tuple[float, float] = BETAS[0]
    own: tuple[tuple[str, Any], ...] = ()
    stretch: float = 1.0

    def __str__(self):
        own = ", ".join(f"{name} {value}" for name, value in self.own)
        return ", ".join(part for part in (own, f"{self.stretch:g} steps each" if self.stretch != 1 else "") if part)


class Method(NamedTuple):
    """A way to minimise.

    Attributes:
        compiled: task, own settings, most evaluations -> ``params, data, budget, steps, rate, betas`` to the losses
            ``[most]`` (infinite where none was measured) and the evaluations used.
        has_rate: whether there is a rate, whose cosine ends with the budget: other budgets are then other runs.
        betas: to choose from.
        own: values to choose from, for each name; the search starts from the first.
        stretches: to choose from, likewise.
        costs: for each way to count, the evaluations that one counts as; a function of the task.
        suits: whether a task can be solved in this way.
        most: evaluations, if the method is not run for as long as others.
    """

    compiled: Callable[..., Any]
    has_rate: bool = True
    betas: tuple[tuple[float, float], ...] = BETAS[:1]
    own: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    stretches: tuple[float, ...] = (1.0,)
    costs: Callable[[Any], dict[str, int]] = lambda task: {"": 1}
    suits: Callable[[Any], bool] = lambda task: True
    most: int | None = None


def rate_of(setting):
    return 1e-3 * 2 ** (setting.rate / 2)


def cosine(rate, steps):
    """A schedule whose length may be traced: from the rate to 0."""
    return lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / steps, 1)))


def lowest(losses):
    """The lowest so far; numbers that are none count as infinite."""
    return np.minimum.accumulate(
        np.nan_to_num(np.asarray(losses, np.float64), nan=np.inf, posinf=np.inf, neginf=np.inf)
    )


def stepwise(make, task, own, most):
    """An evaluation a step, its loss handed to the optimizer."""

    def run(params, data, budget, steps, rate, betas):
        opt = optax.with_extra_args_support(make(cosine(rate, steps), betas, **dict(own)))

        def step(carry):
            params, state, count, losses = carry
            value, grads = jax.value_and_grad(task.loss)(params, data)
            updates, state = opt.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state, count + 1, losses.at[count].set(value)

        carry = (params, opt.init(params), jnp.int32(0), jnp.full(most, jnp.inf))
        _, _, count, losses = jax.lax.while_loop(lambda carry: carry[2] < budget, step, carry)
        return losses, count

    return jax.jit(run)


def skipping(task, own, most):
    """A preset of `phase_switched`: steps go on in PREDICT, where nothing is evaluated and nothing counted."""
    preset = getattr(presets, dict(own)["preset"].upper())

    def run(params, data, budget, steps, rate, betas):
        adam = optax.adam(1.0, b1=betas[0], b2=betas[1])
        opt = vsa_optax.phase_switched(adam, learning_rate=cosine(rate, steps), **preset._asdict())

        def step(carry):
            params, state, number, count, losses = carry
            needs = vsa_optax.needs_backward(state)
            value, grads = vsa_optax.value_and_grad_by_phase(task.loss)(params, data, state=state)
            updates, state = opt.update(grads, state, params, value=value)
            losses = losses.at[jnp.where(needs, count, most)].set(value, mode="drop")
            return optax.apply_updates(params, updates), state, number + 1, count + needs, losses

        def goes_on(carry):
            return (carry[2] < steps) & (carry[3] < budget)

        carry = (params, opt.init(params), jnp.int32(0), jnp.int32(0), jnp.full(most, jnp.inf))
        params, _, _, count, losses = jax.lax.while_loop(goes_on, step, carry)
        # Where its last predictions have led; an evaluation like the others, if there is one left.
        losses = losses.at[jnp.where(count < budget, count, most)].set(task.loss(params, data), mode="drop")
        return losses, jnp.minimum(count + 1, budget)

    return jax.jit(run)


def lbfgs(task, own, most):
    """`optax.lbfgs`, the line search's evaluations counted one by one; its last one serves the next step."""
    opt = optax.lbfgs(memory_size=dict(own)["memory"])

    def run(params, data, budget, steps, rate, betas):
        del steps, rate, betas

        def loss(params):
            return task.loss(params, data)

        def step(carry):
            params, state, number, count, losses = carry
            known = optax.tree.get(state, "value")
            count += ~jnp.isfinite(known)  # A finite one is not evaluated again.
            value, grads = optax.value_and_grad_from_state(loss)(params, state=state)
            losses = losses.at[count - 1].set(value, mode="drop")
            updates, state = opt.update(grads, state, params, value=value, grad=grads, value_fn=loss)
            count += optax.tree.get(state, "num_linesearch_steps")
            found = optax.tree.get(state, "value")
            losses = losses.at[count - 1].set(found, mode="drop")
            return optax.apply_updates(params, updates), state, number + 1, count, losses

        def goes_on(carry):
            return (carry[2] < budget) & (carry[3] < budget)  # Also where a line search evaluates nothing.

        carry = (params, opt.init(params), jnp.int32(0), jnp.int32(0), jnp.full(most, jnp.inf))
        _, _, _, count, losses = jax.lax.while_loop(goes_on, step, carry)
        return losses, count

    return jax.jit(run)


def adam(schedule, betas):
    return optax.adam(schedule, b1=betas[0], b2=betas[1])


def muon(schedule, betas, adam_ratio):
    """Matrices by Muon, the rest by Adam, whose rate is a part of Muon's."""
    return optax.contrib.muon(
        schedule,
        adam_b1=betas[0],
        adam_b2=betas[1],
        adam_learning_rate=lambda count: adam_ratio * schedule(count),
    )


def multisecant(schedule, betas, window):
    return vsa_optax.multisecant(adam(schedule, betas), history_window=window)


METHODS = {
    "Adam": Method(functools.partial(stepwise, adam), betas=BETAS),
    "Muon": Method(functools.partial(stepwise, muon), betas=BETAS[:2], own=(("adam_ratio", (1.0, 0.25)),)),
    "L-BFGS": Method(lbfgs, has_rate=False, own=(("memory", (10, 16, 20, 30)),)),
    "phase_switched": Method(
        skipping,
        betas=BETAS[:1] + BETAS[2:3],
        own=(("preset", ("aggressive", "balanced")),),
        stretches=(2.0, 1.0, 3.0),
    ),
    "multisecant": Method(
        functools.partial(stepwise, multisecant), betas=BETAS[:1] + BETAS[2:3], own=(("window", (8, 16)),)
    ),
}
