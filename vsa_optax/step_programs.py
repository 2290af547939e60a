"""Compiles one program for each kind of step; the host chooses which one to run.

In a single program the device decides the phase, or whether a window of micro-batches is complete. The phase is decided
by conditionals, whose results a GPU copies; the window by a loop, at which a GPU stops until the host has fetched the
condition. Here, no program has control flow, except that of a micro-batch that may complete its window. Each program
also returns a forecast, which tells the host how many of the coming steps are of a certain kind. The host waits for a
device only where the forecast ends:

- With a phase machine (`prediction.forecast`), that is at a compared step after which a leap or a sleep may begin, and
  in a leap that may end early because the parameters moved too far.
- With a window of K micro-batches, that is once in K, after the one that may complete it. The host knows an upper bound
  of the number in the window, since a micro-batch that is left out only delays the end.
"""

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

import jax
import numpy as np

from vsa_optax.accumulation.multi_steps import AccumulateTernaryState, TernaryMultiStepsState
from vsa_optax.core.kinds import Assumption, Marks, StepKind, are_same, assumed
from vsa_optax.core.types import Tree
from vsa_optax.prediction.forecast import FOREVER
from vsa_optax.prediction.machine import Phase
from vsa_optax.prediction.machine_state import PhaseMachineState
from vsa_optax.prediction.stats import unwrapped

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# The states that own the kind of a step. The device decides about a state inside another.
_Owner: TypeAlias = PhaseMachineState | TernaryMultiStepsState | AccumulateTernaryState
_OWNERS = PhaseMachineState, TernaryMultiStepsState, AccumulateTernaryState
_OF_WINDOWS = StepKind.ACCUMULATED, StepKind.UNDECIDED

# How many forecasts are kept, since the newest may not have arrived yet. A forecast is fetched while fewer steps than
# that are known.
_NUM_FORECASTS = 4


class JitByPhase(Generic[Parameters, Result]):
    """The compiled training step that `jit_by_phase` returns.

    Attributes:
        programs: for each kind, the jitted function of the same arguments, which returns the result and a forecast. It
            is compiled when a step is first of this kind.
        num_waits: how often the host had to wait for a device to learn the kind of the next step.
    """

    def __init__(self, fun: Callable[Parameters, Result], jit_options: dict[str, Any]) -> None:
        functools.update_wrapper(self, fun)
        if "out_shardings" in jit_options:  # They are those of the result; a program also returns a forecast.
            jit_options = jit_options | {"out_shardings": (jit_options["out_shardings"], None)}
        self.programs = {kind: jax.jit(_traced_for(kind, fun), **jit_options) for kind in StepKind}
        self.num_waits = 0
        self._last: _Last | None = None
        self._forecasts: list[tuple[jax.Array, int]] = []  # Each with the steps since; the newest comes last.
        self._coming: list[tuple[StepKind, int]] = []

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        """Runs one step."""
        if self._last is None or not self._last.is_in(args, kwargs):
            # This is the first step, another run, or a state that was changed outside.
            self._forecasts, self._coming = [], _coming(_find_owner((args, kwargs)))
        kind = self._next_kind()
        self._last = None  # If the step fails, the forecasts are dropped.
        result, forecast = self.programs[kind](*args, **kwargs)
        if forecast is not None:
            self._keep(kind, forecast)
            self._last = _Last(result)
        return result

    def _keep(self, kind: StepKind, forecast: jax.Array) -> None:
        """Keeps the forecast of a step of this kind, if it may be needed."""
        num_needed = _NUM_FORECASTS
        if kind in _OF_WINDOWS:
            # A micro-batch that is left out changes the forecast of a window. So the newest decides, whichever have
            # arrived: otherwise processes might choose differently.
            self._forecasts, num_needed = [], 1
        if sum(num for _, num in self._coming) < num_needed:
            forecast = _in_host_memory(forecast)  # Otherwise the forecast is not needed.
        self._forecasts.append((forecast, 0))

    def _next_kind(self) -> StepKind:
        """The kind from the known runs; once they end, from the newest forecast that has arrived, or the next one."""
        if not self._coming:
            num_there = max((i + 1 for i, (runs, _) in enumerate(self._forecasts) if _is_ready(runs)), default=0)
            later = self._forecasts[num_there:]
            self._coming = _without(*self._forecasts[num_there - 1]) if num_there else []
            self.num_waits += not self._coming
            while not self._coming:
                self._coming = _without(*later.pop(0))
        kind, num = self._coming[0]
        self._coming = [(kind, num - 1), *self._coming[1:]] if num > 1 else self._coming[1:]
        self._forecasts = [(runs, steps + 1) for runs, steps in self._forecasts[-_NUM_FORECASTS:]]
        return kind


class _Last:
    """Recognizes the owner in the last result when it returns as an argument.

    Searching all containers can take longer than a step, so an immutable container is recognized by its identity.
    """

    def __init__(self, result: Tree) -> None:
        parts = (result, *result) if type(result) is tuple else (result,)
        self._parts = [part for part in parts if _leads_to_owner(part)]
        self._marks = None if self._parts else _marks_of(_find_owner(result))

    def is_in(self, args: tuple[Tree, ...], kwargs: dict[str, Tree]) -> bool:
        if any(arg is part for arg in (*args, *kwargs.values()) for part in self._parts):
            return True
        marks = _marks_of(_find_owner(self._parts[0])) if self._marks is None else self._marks
        return are_same(_marks_of(_find_owner((args, kwargs))), marks)


def _leads_to_owner(tree: Tree) -> bool:
    """Whether an owner is reached through tuples alone, which are immutable."""
    if isinstance(tree, _OWNERS):
        return True
    return isinstance(tree, tuple) and any(map(_leads_to_owner, tree))


def _owners_in(tree: Tree) -> list[_Owner]:
    """The machines or, if there are none, the windows; a machine inside a window is none."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, _OWNERS))
    owners = [node for node in nodes if isinstance(node, _OWNERS)]
    return [owner for owner in owners if isinstance(owner, PhaseMachineState)] or owners


def _find_owner(tree: Tree) -> _Owner:
    found = _owners_in(tree)
    if len(found) != 1:
        raise ValueError(
            "expected one phase machine or one window of micro-batches in the arguments, found "
            f"{[type(node).__name__ for node in found] or 'none'}: pass the state of an optimizer made with "
            "predict_gradients, phase_switched, accumulate_ternary or ternary_multi_steps, and use only one machine, "
            "or one window without a machine beside it. For several groups of parameters, wrap one around all of them: "
            "phase_switched(optax.multi_transform({...}, labels))"
        )
    return found[0]


def _marks_of(owner: _Owner) -> Marks:
    """The arrays by which an owner is recognized; an optimizer of Flax nnx wraps them."""
    return tuple(None if mark is None else unwrapped(mark) for mark in owner.marks())


def jit_by_phase(fun: Callable[Parameters, Result], **jit_options: Any) -> JitByPhase[Parameters, Result]:
    """Replaces ``jax.jit`` for a training step: compiles it once for each kind of step, and chooses on the host.

    It is meant for GPUs, where conditionals are copied, and loops make the device wait for the host. There are two
    families of kinds:

    - With `vsa_optax.phase_switched` or `vsa_optax.predict_gradients`, a step is predicted, or true and not recorded,
      recorded, or compared. No program has a conditional.
    - With `vsa_optax.ternary_multi_steps` or `vsa_optax.accumulate_ternary`, a micro-batch certainly does not complete
      its window, or it may. The first program has no conditional, and emits zeros that XLA knows. In the second, the
      device decides. The host waits for the device once in a window, after the second; where K is 1, once in 32 steps.

    For windows it saves a wait in most micro-batches: 11 % of the time of one of GPT-2. For phases it saves the copies
    of conditionals, 6 % of a step of a transformer of 11 million parameters while the guard sleeps. But a wait takes
    longer than the copies of a small model: with ``optax.flatten``, a predicted step of a PINN of 0.2 million
    parameters takes 0.32 instead of ``jax.jit``'s 0.11 times a plain one (H200, JAX 0.11.2,
    benchmarks/micro_step_gpu.log and phase_in_flight_gpu.log).

    The rules of ``jax.jit(fun)`` apply, and a state may move back and forth between both. Parameters differ by
    rounding. Phases differ only where rounding changes a decision of the guard or of `vsa_optax.AdaptiveCycle`. Windows
    do not differ. A parameter that is -0.0 stays so where the emitted zeros are not added.

    Compile a single step, not several in a ``lax.scan``: the body of a loop is compiled once, for all kinds. In
    ``ternary_multi_steps(phase_switched(...), k)`` the kind is that of the window. The device decides the phase, and
    `vsa_optax.value_and_grad_by_phase` keeps its conditional.

    Args:
        fun: the training step. Its arguments contain exactly one phase machine or one window, inside an optimizer's
            state, and its result contains the updated one and no other. The update must be the first of this state in
            the step, and outside loops, ``jax.jit``, ``jax.shard_map``, ``optax.MultiSteps`` and
            ``optax.apply_if_finite``. Elsewhere the device decides, as in ``jax.jit``. A window beside a machine is
            decided on the device, too.
        **jit_options: keyword arguments of ``jax.jit``, such as ``donate_argnums=(0, 1)`` or ``static_argnames=...``.

    Returns:
        A function with the same arguments and the same result. Its attribute ``programs`` holds the jitted functions
        by kind. Several processes choose alike, since they read the same scalars.

    Raises:
        ValueError: at a call, if the arguments contain neither one phase machine nor one window of micro-batches, or
            several. A machine inside a window does not count, and neither does a window beside a machine. Also if the
            state was made under ``jax.vmap``.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.sgd(0.1))
        >>> loss = lambda params: jnp.sum(params**2)
        >>> @vsa_optax.jit_by_phase
        ... def step(params, state):
        ...     value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
        ...     updates, state = opt.update(grads, state, params, value=value)
        ...     return optax.apply_updates(params, updates), state
        >>> params, state = jnp.arange(3.0), opt.init(jnp.zeros(3))
        >>> for _ in range(30):
        ...     params, state = step(params, state)
        >>> int(vsa_optax.phase_stats(state).predict_steps) > 0
        True
    """
    return JitByPhase(fun, jit_options)


def _traced_for(kind: StepKind, fun: Callable[..., Result]) -> Callable[..., tuple[Result, jax.Array | None]]:
    @functools.wraps(fun)
    def traced(*args: Tree, **kwargs: Tree) -> tuple[Result, jax.Array | None]:
        owner = _find_owner((args, kwargs))
        if isinstance(owner, PhaseMachineState) == (kind in _OF_WINDOWS):
            raise ValueError(
                f"programs[StepKind.{kind.name}] must not get the state of {type(owner).__name__}: ACCUMULATED and "
                "UNDECIDED are the kinds of a window of micro-batches, and the others those of a phase machine"
            )
        assumption = Assumption(kind, _marks_of(owner))
        with assumed(assumption):
            result = fun(*args, **kwargs)
        # A forecast is valid only for the owner that it was made for.
        after = assumption.marks_after
        is_its = after is not None and [are_same(_marks_of(o), after) for o in _owners_in(result)] == [True]
        return result, assumption.forecast if is_its else None

    return traced


def _coming(owner: _Owner) -> list[tuple[StepKind, int]]:
    """The kind of the coming step; of a machine it is read from the machine's own scalars, and the host waits."""
    first, *_ = _marks_of(owner)
    if first is not None and (shape := first.shape):
        raise ValueError(
            f"the state must be that of one training run, got a {type(owner).__name__} with leading axes {shape}: "
            "under jax.vmap or jax.pmap steps differ in their kinds, so use jax.jit in place of jit_by_phase"
        )
    if not isinstance(owner, PhaseMachineState):
        return [(StepKind.UNDECIDED, 1)]
    state = unwrapped(owner)
    machine = jax.device_get(state._replace(calibration=None)).unpacked()
    if machine.errors is None:
        return [(StepKind.PLAIN, FOREVER)]
    if int(machine.phase) == Phase.PREDICT:
        return [(StepKind.PREDICTED, 1)]
    if machine.guard is not None:
        asleep = int(machine.guard.asleep)
        return [*([(StepKind.PLAIN, asleep)] if asleep else []), (StepKind.WATCHED, 1)]
    is_watched = state.calibration is not None or int(machine.phase) == Phase.CORRECT
    return [(StepKind.WATCHED if is_watched else StepKind.RECORDED, 1)]


@jax.jit
def _in_host_memory(runs: jax.Array) -> jax.Array:
    """The forecast in host memory: to compute and read it takes 0.08 ms instead of 0.21 (benchmarks/dispatch_gpu.log).

    In a step's own program, this would commit all results to their device, and the next call would compile it again.
    """
    return jax.device_put(runs, jax.memory.Space.Host)


def _is_ready(x: jax.Array) -> bool:
    return bool(x.is_ready())  # type: ignore[attr-defined] # JAX's stubs leave it out.


def _without(runs: jax.Array, steps: int) -> list[tuple[StepKind, int]]:
    """The runs of a forecast that remain after ``steps`` steps."""
    left = []
    for kind, num in np.asarray(runs).tolist():
        taken = min(num, steps)
        steps -= taken
        if num > taken:
            left.append((StepKind(kind), num - taken))
    return left
