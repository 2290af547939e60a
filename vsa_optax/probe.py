"""Recommends a transformation: ``vsa_optax.probe(loss, params, batches, opt)``, or from the command line.

``python -m vsa_optax.probe module:function`` calls the function, which returns ``(loss, params, batches, opt)``, and
prints the measurements of `probe`.

This module is callable, because ``vsa_optax.probe`` is the module once anything has imported it.
"""

import argparse
import importlib
import itertools
import operator
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vsa_optax import probe_runs
from vsa_optax.core import checks
from vsa_optax.core.types import Tree
from vsa_optax.prediction.api import phase_switched
from vsa_optax.prediction.function_checks import Array
from vsa_optax.prediction.leap import MultisecantState
from vsa_optax.prediction.multisecant import multisecant
from vsa_optax.prediction.stats import contains_machine
from vsa_optax.probe_report import LEAST_NOISE, LOSS_TOLERANCE, ProbeReport, ProbeRun, choose

_LEAST_STEPS = 20
_PLAIN, _SWITCHED, _BY_PHASE, _MULTISECANT = "plain", "phase_switched", "jit_by_phase", "multisecant"
_NEVER_MEASURED = (
    "more than these {steps} steps, other seeds, other learning rates, other settings than the defaults, and losses on "
    "data kept apart"
)
_DESCRIPTION = """Runs a hundred steps of training with the optimizer of a program, with it inside
vsa_optax.phase_switched and inside vsa_optax.multisecant, and says what each would bring and cost."""


def probe(
    loss: Callable[[Any, Any], jax.Array],
    params: optax.Params,
    batches: object,
    opt: optax.GradientTransformation,
    steps: int = 100,
) -> ProbeReport:
    """Measures the effect of skipping gradients on your training, and prints a recommended transformation.

    It trains from ``params`` on the same batches with ``opt``, with ``phase_switched(opt)`` and, if the gradient has no
    noise, with ``multisecant(opt)``. Each has its defaults. On a GPU, ``phase_switched`` is also compiled by
    `vsa_optax.jit_by_phase`. The probe recommends the transformation that reached plain training's loss in the least
    time, if it saves time. ``phase_switched`` must take at most 0.9 of plain training's time. ``multisecant`` must
    reach a loss that plain training does not reach in the same time. The report also lists what was not measured.

    Each variant runs two to four times, to be timed: four to twelve times ``steps`` steps in total, up to sixteen on a
    GPU. Plain training runs once more for as long as ``multisecant`` took. Two probes give the same report, except for
    times and a recommendation that depends on them. ``params`` do not change.

    Args:
        loss: a function of parameters and a batch that returns a real scalar. ``jax.jit`` must be able to trace it.
        params: a tree of floating-point or complex arrays, from which each run starts.
        batches: a list, or another iterable such as a generator, with one batch per step; it repeats when it ends. At
            most ``steps`` batches are taken, and all are kept in memory. An array or another JAX tree, such as a tuple
            ``(x, y)``, a dict or None, is the single batch of all steps, for a loss on all data. All batches have the
            same structure, shapes and dtypes.
        opt: your optimizer, without `vsa_optax.phase_switched` or `vsa_optax.multisecant`.
        steps: the number of steps of each run, ``>= 20``.

    Returns:
        A `vsa_optax.ProbeReport` of the measurements; ``str(report)`` is the printed text.

    Raises:
        ValueError: if ``steps`` is out of range; if there are no ``params`` or no batches; if batches differ in
            structure, shape or dtype; if ``opt`` is not an Optax transformation, or already contains
            ``phase_switched``, ``predict_gradients`` or ``multisecant``.
        TypeError: if ``loss`` cannot be called or does not return a real scalar; if a leaf of ``params`` has no
            gradient; if a leaf of a batch is not an array.

    Example:
        >>> import contextlib, io, jax.numpy as jnp, optax, vsa_optax
        >>> scales = jnp.array([1.0, 10.0, 100.0])
        >>> loss = lambda params, batch: jnp.sum(scales * (params - batch) ** 2)
        >>> with contextlib.redirect_stdout(io.StringIO()) as text:
        ...     report = vsa_optax.probe(loss, jnp.zeros(3), jnp.ones(3), optax.adam(0.01), steps=50)
        >>> report.predictable_share > 0, report.multisecant.steps_to_plain < 50, str(report) in text.getvalue()
        (True, True, True)
    """
    steps = checks.check_integer("steps", steps, _LEAST_STEPS)
    opt = _check_optimizer(opt)
    task = _make_task(loss, params, batches, steps)
    _refuse_ours(opt.init(task.params))

    evaluation = probe_runs.Evaluation(task)
    first_loss, evaluation_noise = evaluation.loss(task.params), evaluation.again(task.params)
    batch_noise = evaluation.between_batches(task.params)
    trials = {_PLAIN: probe_runs.compiled(task, opt, probe_runs.plain_step)}
    outcomes = {_PLAIN: probe_runs.run(task, trials[_PLAIN])}
    batch_noise_at_end = evaluation.between_batches(outcomes[_PLAIN].params)
    noises = evaluation_noise, batch_noise or 0.0, batch_noise_at_end or 0.0

    not_measured = []
    for name, prepare in _ways(task, opt, is_noisy=not all(noise <= LEAST_NOISE for noise in noises)).items():
        try:
            trial = prepare()
            outcomes[name], trials[name] = probe_runs.run(task, trial), trial
        except (ValueError, TypeError) as error:  # The optimizer cannot be wrapped.
            not_measured.append(f"{name}: {error}")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            not_measured.append(f"{name}: the device has too little memory for it")
    runs = _compared(task, evaluation, trials, probe_runs.fastest(task, trials, outcomes))
    plain, switched, by_phase, leaping = (runs.get(name) for name in (_PLAIN, _SWITCHED, _BY_PHASE, _MULTISECANT))
    assert plain is not None
    as_long = None if leaping is None else _as_long(task, trials[_PLAIN], plain, leaping)
    recommendation, reason, code = choose(steps, first_loss, plain, as_long, switched, by_phase, leaping)
    report = ProbeReport(
        recommendation=recommendation,
        reason=reason,
        code=code,
        setting=_setting(task),
        first_loss=first_loss,
        evaluation_noise=evaluation_noise,
        batch_noise=batch_noise,
        batch_noise_at_end=batch_noise_at_end,
        predictable_share=None if switched is None else 1 - switched.gradients / steps,
        plain=plain,
        plain_as_long=as_long,
        phase_switched=switched,
        by_phase=by_phase,
        multisecant=leaping,
        not_measured=(*not_measured, _NEVER_MEASURED.format(steps=steps)),
    )
    print(report)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments of the command line; None takes them from ``sys.argv``.

    Returns:
        The exit code, 0.

    Raises:
        SystemExit: with code 2 for a bad option or function, and with code 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(prog="python -m vsa_optax.probe", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("function", metavar="module:function", help="returns (loss, params, batches, opt)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of each run (default: %(default)s)")
    options = parser.parse_args(argv)
    module, _, name = options.function.partition(":")
    if not (module and name):
        parser.error(f"the function must be given as module:function, got {options.function!r}")
    try:
        function = operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        parser.error(f"cannot find {options.function}: {error}")
    if options.steps < _LEAST_STEPS:
        parser.error(f"--steps must be an integer >= {_LEAST_STEPS}, got {options.steps}")
    given = function()
    if not (isinstance(given, tuple) and len(given) == 4):
        parser.error(f"{options.function} must return (loss, params, batches, opt), got {type(given).__name__}")
    probe(*given, steps=options.steps)
    return 0


def _ways(
    task: probe_runs.Task, opt: optax.GradientTransformationExtraArgs, *, is_noisy: bool
) -> dict[str, Callable[[], probe_runs.Trial]]:
    """The alternatives to plain training; each raises an error if it is not applicable."""

    def switched() -> probe_runs.Trial:
        return probe_runs.compiled(task, phase_switched(opt), probe_runs.switched_step)

    def by_phase() -> probe_runs.Trial:
        if not _is_on_gpu(task.params):
            raise ValueError("it is meant for GPUs, and the parameters are on none")
        return probe_runs.compiled_by_phase(task, phase_switched(opt))

    def leaping() -> probe_runs.Trial:
        if is_noisy:
            raise ValueError("the gradient has noise, in which it becomes the optimizer that it wraps")
        return probe_runs.compiled(task, multisecant(opt), probe_runs.multisecant_step)

    return {_SWITCHED: switched, _BY_PHASE: by_phase, _MULTISECANT: leaping}


def _compared(
    task: probe_runs.Task,
    evaluation: probe_runs.Evaluation,
    trials: Mapping[str, probe_runs.Trial],
    outcomes: Mapping[str, probe_runs.Outcome],
) -> dict[str, ProbeRun]:
    """The runs, with the steps that each needed to reach plain training's loss."""
    steps, plain_loss = len(task.batches), evaluation.loss(outcomes[_PLAIN].params)
    runs = {}
    for name, (params, state_bytes, losses, gradients, seconds) in outcomes.items():
        loss = evaluation.loss(params)
        reached: int | None = steps if loss <= plain_loss + LOSS_TOLERANCE * abs(plain_loss) else None
        if name == _MULTISECANT:
            (below,) = np.nonzero(losses <= plain_loss)
            reached = int(below[0]) + 1 if below.size else None
        sizes = state_bytes, trials[name].argument_bytes, trials[name].temporary_bytes
        runs[name] = ProbeRun(gradients, loss, reached, seconds / steps, *sizes)
    return runs


def _as_long(task: probe_runs.Task, trial: probe_runs.Trial, plain: ProbeRun, leaping: ProbeRun) -> ProbeRun:
    """Plain training for as long as `multisecant` took."""
    steps = len(task.batches)
    num = max(steps, round(steps * leaping.seconds_per_step / plain.seconds_per_step))
    batches = list(itertools.islice(itertools.cycle(task.batches), num))
    losses = probe_runs.run(task._replace(batches=batches), trial).losses
    return plain._replace(gradients=num, loss=float(np.min(losses)))


def _make_task(loss: Callable[[Any, Any], jax.Array], params: Tree, batches: object, steps: int) -> probe_runs.Task:
    """Checks the arguments of a probe and returns them as a task."""
    if not callable(loss):
        raise TypeError(f"loss must be a function of parameters and a batch, got {loss!r}")
    checks.check_inexact_leaves(params)
    if not jax.tree.leaves(params):
        raise ValueError(f"params must have a leaf, got {params!r}")
    params = jax.tree.map(jnp.asarray, params)
    given = _batches_in(batches, steps)
    value = jax.eval_shape(loss, params, given[0])
    if not (
        isinstance(value, jax.ShapeDtypeStruct) and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)
    ):
        raise TypeError(
            "loss must return one real floating-point number, and nothing beside it (of a loss with aux give "
            f"lambda params, batch: loss(params, batch)[0]), got {value}"
        )
    return probe_runs.Task(loss, params, list(itertools.islice(itertools.cycle(given), steps)), len(given))


def _batches_in(batches: object, steps: int) -> list[Tree]:
    """The distinct batches, at most ``steps`` of them."""
    if _are_several(batches):
        given = list(itertools.islice(batches, steps))
        if not given:
            raise ValueError(f"batches must have at least one batch, got {batches!r}")
    else:
        given = [batches]
    for number, batch in enumerate(given):
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            if not isinstance(leaf, Array | int | float | complex):
                place = f"{f'batches[{number}]' if given[0] is not batches else 'batches'}{jax.tree_util.keystr(path)}"
                raise TypeError(f"batches must be made of arrays, but {place} is a {type(leaf).__name__}")
        if _kind_of(batch) != _kind_of(given[0]):
            raise ValueError(
                "batches must have the same structure, shapes and dtypes (leave out a last one that is smaller), but "
                f"batches[{number}] is {_kind_of(batch)}, and batches[0] is {_kind_of(given[0])}"
            )
    # A single batch for all steps is copied to the device once.
    return [jax.tree.map(jnp.asarray, given[0])] if len(given) == 1 else given


def _are_several(batches: object) -> TypeGuard[Iterable[Tree]]:
    """Whether ``batches`` are a list, or an iterable that is neither an array, a JAX tree nor a string."""
    if isinstance(batches, list):
        return True
    is_leaf = jax.tree_util.all_leaves([batches]) and not isinstance(batches, Array | str | bytes)
    return is_leaf and isinstance(batches, Iterable)


def _kind_of(batch: Tree) -> str:
    """Structure, shapes and dtypes as text, for comparisons and errors."""
    return str(jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", batch))


def _check_optimizer(opt: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    if not (hasattr(opt, "init") and hasattr(opt, "update")):
        raise ValueError(f"opt must be an optax.GradientTransformation, got {opt!r}")
    return optax.with_extra_args_support(opt)


def _refuse_ours(state: optax.OptState) -> None:
    """``ValueError`` if the optimizer already contains one of the transformations to be tried."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MultisecantState))
    if contains_machine(state) or any(isinstance(node, MultisecantState) for node in nodes):
        raise ValueError(
            "opt must be the optimizer without phase_switched, predict_gradients or multisecant, which the probe puts "
            "around it, but its state holds one of them already"
        )


def _is_on_gpu(params: Tree) -> bool:
    return all(device.platform == "gpu" for leaf in jax.tree.leaves(params) for device in leaf.devices())


def _setting(task: probe_runs.Task) -> str:
    leaves = jax.tree.leaves(task.params)
    (*others, device) = sorted({device.device_kind for leaf in leaves for device in leaf.devices()})
    size = sum(leaf.size for leaf in leaves)
    count = "one batch" if task.num_different == 1 else f"{task.num_different} batches"
    return (
        f"Probe of {len(task.batches)} steps on {', '.join([*others, device])}: {count}, {size:,} parameters in "
        f"{len(leaves)} leaves."
    )


class _Callable(types.ModuleType):
    """A module that can be called like `probe`.

    Importing ``vsa_optax.probe`` sets the package's attribute of that name to the module, and nothing here can prevent
    it. The module is callable, so that ``vsa_optax.probe(...)`` works whatever was imported before.
    """

    def __call__(
        self,
        loss: Callable[[Any, Any], jax.Array],
        params: optax.Params,
        batches: object,
        opt: optax.GradientTransformation,
        steps: int = 100,
    ) -> ProbeReport:
        """Calls `vsa_optax.probe.probe`."""
        return probe(loss, params, batches, opt, steps)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _Callable
