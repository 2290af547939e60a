"""Training steps for `vsa_optax.probe`: compiled, run on the same batches from the same parameters, and timed."""

import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vsa_optax.core.types import Tree
from vsa_optax.memory import state_bytes
from vsa_optax.prediction.leap import MultisecantState
from vsa_optax.prediction.stats import needs_backward
from vsa_optax.prediction.value_and_grad import value_and_grad_by_phase
from vsa_optax.step_programs import jit_by_phase

# A step returns parameters, state, the loss known after the step, and whether it took a gradient.
Step = Callable[[Tree, Tree, Tree], tuple[Tree, Tree, jax.Array, jax.Array]]

NUM_COMPARED = 8  # The number of batches whose gradients are compared and whose losses are averaged.
_MOST_ROUNDS = 3
_ENOUGH_SECONDS = 10.0


class Task(NamedTuple):
    """The loss, the parameters and the batches of a training.

    Attributes:
        loss: a function of parameters and a batch.
        params: the parameters at the start of each run; they are never donated.
        batches: one batch for each step.
        num_different: the number of batches given; the others repeat them.
    """

    loss: Callable[[Tree, Tree], jax.Array]
    params: Tree
    batches: Sequence[Tree]
    num_different: int

    @property
    def compared(self) -> Sequence[Tree]:
        """The first distinct batches, at most `NUM_COMPARED`."""
        return self.batches[: min(self.num_different, NUM_COMPARED)]


class Trial(NamedTuple):
    """A compiled training step.

    Attributes:
        step: the step, which donates parameters and state.
        init: makes the optimizer's initial state. It is called for each run, so only one state is in memory.
        argument_bytes: the bytes of the step's arguments, as `ProbeRun` defines them.
        temporary_bytes: the bytes that the step allocates, as `ProbeRun` defines them.
    """

    step: Step
    init: Callable[[], Tree]
    argument_bytes: int | None
    temporary_bytes: int | None


class Outcome(NamedTuple):
    """The result of a run.

    Attributes:
        params: the parameters after the last step; for `multisecant` the accepted ones.
        state_bytes: the bytes of the optimizer's state after the last step.
        losses: ``[steps] float``, the losses known after each step.
        gradients: the number of gradients taken.
        seconds: the time of all steps.
    """

    params: Tree
    state_bytes: int
    losses: np.ndarray
    gradients: int
    seconds: float


def plain_step(loss: Callable[[Tree, Tree], jax.Array], opt: optax.GradientTransformationExtraArgs) -> Step:
    """A step of the given optimizer, with all extra arguments that Optax's transformations may need."""

    def step(params: Tree, state: Tree, batch: Tree) -> tuple[Tree, Tree, jax.Array, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        grads = jax.tree.map(jnp.conj, grads)  # For complex leaves, the loss falls along the conjugate.
        extra = {"value": value, "grad": grads, "value_fn": lambda params: loss(params, batch)}
        updates, state = opt.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, value, jnp.array(True)

    return step


def switched_step(loss: Callable[[Tree, Tree], jax.Array], opt: optax.GradientTransformationExtraArgs) -> Step:
    """A step of `phase_switched`."""

    def step(params: Tree, state: Tree, batch: Tree) -> tuple[Tree, Tree, jax.Array, jax.Array]:
        needs = needs_backward(state)
        value, grads = value_and_grad_by_phase(loss)(params, batch, state=state)
        grads = jax.tree.map(jnp.conj, grads)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, value, needs

    return step


def multisecant_step(loss: Callable[[Tree, Tree], jax.Array], opt: optax.GradientTransformationExtraArgs) -> Step:
    """A step of `multisecant`; its loss is that of the accepted parameters."""

    def step(params: Tree, state: Tree, batch: Tree) -> tuple[Tree, Tree, jax.Array, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        grads = jax.tree.map(jnp.conj, grads)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, state.loss, jnp.array(True)

    return step


def compiled(task: Task, opt: optax.GradientTransformationExtraArgs, make_step: Callable[..., Step]) -> Trial:
    """Compiles the step of an optimizer into one program."""
    jitted = jax.jit(make_step(task.loss, opt), donate_argnums=(0, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable", UserWarning)
        program = jitted.lower(task.params, opt.init(task.params), task.batches[0]).compile()
    # Sharded results may have other shardings than the arguments, which a compiled program does not accept.
    devices = {device for leaf in jax.tree.leaves(task.params) for device in leaf.devices()}
    step: Any = program if len(devices) == 1 else jitted
    memory = program.memory_analysis()
    sizes = (None, None) if memory is None else (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    return Trial(step, lambda: opt.init(task.params), *sizes)


def compiled_by_phase(task: Task, opt: optax.GradientTransformationExtraArgs) -> Trial:
    """The step of `phase_switched` with one program for each kind of step, which the first run compiles."""
    step: Any = jit_by_phase(switched_step(task.loss, opt), donate_argnums=(0, 1))
    return Trial(step, lambda: opt.init(task.params), None, None)


def run(task: Task, trial: Trial) -> Outcome:
    """Runs all steps, and waits for them at the end only."""
    params, state = jax.block_until_ready(_own_copy((task.params, trial.init())))
    records = []
    began = time.perf_counter()
    for batch in task.batches:
        params, state, *record = trial.step(params, state, batch)
        records.append(record)
    jax.block_until_ready((params, state))
    seconds = time.perf_counter() - began
    losses, needs = zip(*jax.device_get(records), strict=True)
    accepted = state.params if isinstance(state, MultisecantState) else params
    return Outcome(accepted, state_bytes(state).total, np.asarray(losses, np.float64), int(np.sum(needs)), seconds)


def fastest(task: Task, trials: Mapping[str, Trial], outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """The outcomes, with the seconds of the fastest of up to three rounds.

    All runs of a trial differ in time only. A round runs each trial once, so that other load on the machine affects all
    of them. There is only one round if the runs of ``outcomes`` took long. Their own times do not count, since they may
    include compilation.
    """
    num_rounds = _MOST_ROUNDS if sum(outcome.seconds for outcome in outcomes.values()) < _ENOUGH_SECONDS else 1
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    for _ in range(num_rounds):
        for name, trial in trials.items():
            seconds[name].append(run(task, trial).seconds)
    return {name: outcome._replace(seconds=min(seconds[name])) for name, outcome in outcomes.items()}


class Evaluation:
    """Losses and gradients of a task's first batches, and the distances between them."""

    def __init__(self, task: Task) -> None:
        self._batches = task.compared
        self._evaluate = jax.jit(jax.value_and_grad(task.loss))

    def loss(self, params: Tree) -> float:
        """The loss, averaged over the batches."""
        return float(np.mean([float(self._evaluate(params, batch)[0]) for batch in self._batches]))

    def again(self, params: Tree) -> float:
        """The relative distance of two evaluations of one batch, in loss or in gradient, whichever is larger."""
        (value, grads), (value_again, grads_again) = (self._evaluate(params, self._batches[0]) for _ in range(2))
        return max(_distance(value, value_again), _distance(grads, grads_again))

    def between_batches(self, params: Tree) -> float | None:
        """The mean relative distance between the gradients of neighbouring batches; None for one batch."""
        if len(self._batches) == 1:
            return None
        gradients = (self._evaluate(params, batch)[1] for batch in self._batches)
        return float(np.mean([_distance(*pair) for pair in itertools.pairwise(gradients)]))


def _own_copy(tree: Tree) -> Tree:
    """Copies each leaf into its own buffer, which can be donated."""
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else jnp.array(leaf), tree)


def _distance(x: Tree, y: Tree) -> float:
    """The distance of two trees, relative to the mean of their norms; 0 for two zeros."""
    apart, x_norm, y_norm = (float(norm) for norm in _norms(x, y))
    return 0.0 if apart == 0 else apart / ((x_norm + y_norm) / 2)


@jax.jit
def _norms(x: Tree, y: Tree) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide = [jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree) for tree in (x, y)]
    return optax.tree.norm(optax.tree.sub(*wide)), optax.tree.norm(wide[0]), optax.tree.norm(wide[1])
