"""Compares plain AdamW, AdamW inside `phase_switched` and `multisecant`, and L-BFGS on one classifier.

Run as ``python -m vsa_optax.demo``. It prints a table and draws two plots. It needs the extra ``vsa-optax[demo]``,
which is imported only after the options have been checked.
"""

import argparse
import contextlib
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vsa_optax
from vsa_optax import GuardAction, Phase, plots

_TRAIN_SIZE = 1437  # The training images among 1797; the other 360 are the test set.
_DESCRIPTION = """Trains a small network on scikit-learn's handwritten digits four times, from the same weights
and on the same batches: by plain AdamW; by AdamW inside vsa_optax.phase_switched, which predicts gradients
instead of running backward passes for as many steps as its guard trusts the predictions; by AdamW inside
vsa_optax.multisecant, which leaps to where the predicted gradient vanishes; and by optax.lbfgs. Shows the
progress, prints a table, and draws losses against backward passes and how phase_switched went: phases,
gradient norms, prediction errors, and what the guard made of them. A second picture has the losses
that vsa_optax.track_loss kept of it."""
_STEPS_HELP = "steps of each training, and the most backward passes, 1 to 100000"
_BATCH_HELP = f"""images a step, 1 to {_TRAIN_SIZE}, or 0 for the whole training set. The larger the batch,
the less noisy and the more predictable the gradients, and the more time a skipped backward pass saves; at 64
the guard predicts nothing, and training is plain AdamW with more memory and more time a step, as it is with
multisecant"""
_WIDTH_HELP = """units in each of the two hidden layers, 1 to 4096; the wider they are, the longer a backward
pass takes, and the more time a skipped one saves"""
_NOTES = """Final training loss: over the whole training set, at the end. Backward passes: evaluations of loss and
gradient, those inside the line search of L-BFGS included. Wall time: of the training steps; compilation is
excluded. State bytes: of the optimizer's live state, and by part:"""
_SOLVED = 1e-6  # The loss of the whole training set at which a run ends; not far below, only rounding remains.
_REQUIRED = ("flax", "sklearn", "matplotlib", "tqdm")
_PICTURE, _LOSSES = "training.png", "losses.png"
_PLAIN, _SWITCHED, _MULTISECANT, _LBFGS = "plain AdamW", "phase-switched AdamW", "multisecant AdamW", "L-BFGS"
_COLOURS = {_PLAIN: "#333333", _SWITCHED: "#0b5fa5", _MULTISECANT: "#1b7f3b", _LBFGS: "#d1710a"}
_RED = "#b3261e"
_MAX_HISTORY = 10_000
_DOTS = {"linewidth": 1, "marker": ".", "markersize": 5}


class Task(NamedTuple):
    """The digits, and a network for them.

    Attributes:
        train: images ``[1437, 64] float32``, standardised, and labels ``[1437] int32``.
        test: the same for the 360 images kept apart.
        params: tree, the initial weights.
        logits: ``[batch, 10] float32``, a function of weights and images.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    params: Any
    logits: Callable[[Any, Any], jax.Array]

    def loss(self, params: Any, images: Any, labels: Any) -> jax.Array:
        """``[] float32``, mean cross-entropy."""
        logits = self.logits(params, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


class StepRecord(NamedTuple):
    """The record of one step; in the record of a run, every field has a leading axis ``[steps]``.

    Attributes:
        loss: ``[] float32``, the loss of the batch before the step. In PREDICT it is that of the last true step; with
            multisecant that of the accepted parameters; with L-BFGS on the whole training set that at the end of the
            line search.
        backward_passes: ``[] int32``, the number of evaluations of loss and gradient.
        gradient_norm: ``[] float32``, the norm of the gradient; 0 in PREDICT.
        phase: ``[] int32``, the `Phase` of the step; this and the following fields are None without phases.
        last_prediction_error: ``[] float32``, the error at the latest true step after a prediction; 0 before the first.
        predict_length: ``[] float32``, the number of steps that the guard would predict next; 0 for none.
        action: ``[] int32``, the last `GuardAction`.
        mean_r_squared: ``[] float32``, R² of the predictions at about the last ten true steps.
    """

    loss: Any
    backward_passes: Any
    gradient_norm: Any
    phase: Any = None
    last_prediction_error: Any = None
    predict_length: Any = None
    action: Any = None
    mean_r_squared: Any = None


class Run(NamedTuple):
    """One finished training: the `StepRecord` of its steps, the numbers in the table, and with phases a loss report."""

    method: str
    steps: StepRecord
    final_loss: float
    accuracy: float
    backward_passes: int
    seconds: float
    state_bytes: vsa_optax.StateBytes
    ignored_gradients: int
    report: vsa_optax.LossReport | None = None


def load_digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """``Task.train`` and ``Task.test``, the same split at every call."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    images, labels = datasets.load_digits(return_X_y=True)
    split: Any = train_test_split(images, labels, train_size=_TRAIN_SIZE, random_state=0, stratify=labels)
    mean, deviation = split[0].mean(axis=0), split[0].std(axis=0) + 1e-3
    images = [((x - mean) / deviation).astype(np.float32) for x in split[:2]]
    train, test = zip(images, [y.astype(np.int32) for y in split[2:]], strict=True)
    return train, test


def make_network(seed: int, hidden: Sequence[int] = (128, 128)) -> tuple[Any, Callable[[Any, Any], jax.Array]]:
    """``Task.params`` for a seed, and ``Task.logits``, with hidden layers of these widths."""
    from flax import nnx

    rngs = nnx.Rngs(seed)
    layers: list[Any] = []
    for inputs, outputs in itertools.pairwise((64, *hidden, 10)):
        layers += [nnx.Linear(inputs, outputs, rngs=rngs), nnx.relu]
    parts: Any = nnx.split(nnx.Sequential(*layers[:-1]), nnx.Param, ...)
    graphdef, params, rest = parts
    structure = jax.tree.structure(params)

    def logits(weights: Any, images: Any) -> jax.Array:
        return nnx.merge(graphdef, jax.tree.unflatten(structure, jax.tree.leaves(weights)), rest)(images)

    # Plain arrays: at each call of a compiled step, JAX takes apart and makes anew every Variable, moments included.
    return nnx.to_pure_dict(params), logits


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Args:
        argv: the arguments of the command line; None takes them from ``sys.argv``.

    Returns:
        The exit code: 0, or 1 if a package is missing.

    Raises:
        SystemExit: with code 2 for a bad option, and with code 0 after ``--help``.
    """
    parser = _make_parser()
    options = parser.parse_args(argv)
    missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        reason = f'cannot import {", ".join(missing)}: run pip install "vsa-optax[demo]"'
        print(f"{parser.prog}: error: {reason}", file=sys.stderr)
        return 1
    picture, losses = options.output / _PICTURE, options.output / _LOSSES
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        picture.open("ab").close()
    except OSError as error:
        reason = f"must be a folder to write {_PICTURE} to, got {str(options.output)!r}: {error.strerror}"
        parser.error(f"argument --output: {reason}")
    task = _make_task(options.seed, options.width)
    runs = {method: _train(task, options, method) for method in _COLOURS}
    _draw(runs, picture)
    report = runs[_SWITCHED].report
    assert report is not None
    plots.draw_losses(report, losses)
    print(f"\n{_table(runs)}\n\n{_NOTES}\n\n{_parts(runs)}\n{_ending(options)}{_warning(runs[_SWITCHED])}")
    print(f"\nLosses of {_SWITCHED}: {losses}\nPicture: {picture}")
    return 0


def _train(task: Task, options: argparse.Namespace, method: str) -> Run:
    """Compiles one step, repeats it, and measures the result."""
    opt = _make_optimizer(method, optax.cosine_decay_schedule(options.learning_rate, options.steps))
    if method == _LBFGS:
        step = _make_line_search_step(task, opt, is_whole=_is_whole(options))
    else:
        step = _make_step(task, opt, method)

    # A step donates its arguments, hence the copies; its first call is slower, and not measured.
    start = jax.jit(lambda params: (jax.tree.map(jnp.copy, params), opt.init(params)))
    first = *start(task.params), *next(_batches(task, options))
    donated = () if method == _LBFGS else (0, 1)  # A line search that uses too many passes is discarded.
    compiled = jax.jit(step, donate_argnums=donated).lower(*first).compile()
    jax.device_get(compiled(*first))
    params, state, steps, seconds = _repeat(method, compiled, start(task.params), task, options)
    if method == _MULTISECANT:
        params = state.params  # The next parameters have not been evaluated.
    logits = jax.jit(task.logits)(params, task.test[0])
    report, ignored_gradients = None, 0
    if method == _SWITCHED:
        report, ignored_gradients = vsa_optax.loss_report(state), int(vsa_optax.phase_stats(state).ignored_gradients)
        state = state.inner_state  # The table shows the bytes of skipping, without those of track_loss.
    return Run(
        method=method,
        steps=steps,
        final_loss=float(jax.jit(task.loss)(params, *task.train)),
        accuracy=float(np.mean(np.argmax(logits, axis=-1) == task.test[1])),
        backward_passes=int(np.sum(steps.backward_passes)),
        seconds=seconds,
        state_bytes=vsa_optax.state_bytes(state),
        ignored_gradients=ignored_gradients,
        report=report,
    )


def _make_optimizer(method: str, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    adamw = optax.adamw(schedule)
    if method == _SWITCHED:
        return vsa_optax.track_loss(vsa_optax.phase_switched(adamw), max_history=_MAX_HISTORY)
    if method == _MULTISECANT:
        return vsa_optax.multisecant(adamw)
    return optax.lbfgs() if method == _LBFGS else optax.with_extra_args_support(adamw)


def _make_step(task: Task, opt: optax.GradientTransformationExtraArgs, method: str) -> Callable[..., Any]:
    """Returns the step: parameters, state and a batch -> parameters, state and `StepRecord`."""

    def step(params: Any, state: Any, *batch: Any) -> tuple[Any, Any, StepRecord]:
        if method == _SWITCHED:
            phase = vsa_optax.phase_stats(state).phase
            value, grads = vsa_optax.value_and_grad_by_phase(task.loss)(params, *batch, state=state)
        else:
            value, grads = jax.value_and_grad(task.loss)(params, *batch)
        updates, state = opt.update(grads, state, params, value=value)
        record = StepRecord(value, jnp.int32(1), optax.tree.norm(grads))
        if method == _MULTISECANT:
            record = record._replace(loss=state.loss)
        if method == _SWITCHED:
            stats = vsa_optax.phase_stats(state)
            assert stats.guard is not None
            assert stats.quality is not None
            record = record._replace(
                backward_passes=(phase != Phase.PREDICT).astype(jnp.int32),
                phase=phase,
                last_prediction_error=stats.last_prediction_error,
                predict_length=stats.guard.predict_length,
                action=stats.guard.action,
                mean_r_squared=stats.quality.mean_r_squared,
            )
        return optax.apply_updates(params, updates), state, record

    return step


def _make_line_search_step(
    task: Task, opt: optax.GradientTransformationExtraArgs, *, is_whole: bool
) -> Callable[..., Any]:
    """The same for L-BFGS, whose line search also evaluates loss and gradient."""

    def step(params: Any, state: Any, *batch: Any) -> tuple[Any, Any, StepRecord]:
        def value_fn(params: Any) -> jax.Array:
            return task.loss(params, *batch)

        if is_whole:  # The last line search has evaluated the point at which it ended.
            value, grads = optax.value_and_grad_from_state(value_fn)(params, state=state)
            passes = (~jnp.isfinite(optax.tree.get(state, "value"))).astype(jnp.int32)
        else:  # The last line search used another batch.
            value, grads = jax.value_and_grad(value_fn)(params)
            passes = jnp.int32(1)
        updates, state = opt.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        passes += optax.tree.get(state, "num_linesearch_steps")
        loss = optax.tree.get(state, "value") if is_whole else value
        return optax.apply_updates(params, updates), state, StepRecord(loss, passes, optax.tree.norm(grads))

    return step


def _repeat(
    method: str, compiled: Callable[..., Any], start: Any, task: Task, options: argparse.Namespace
) -> tuple[Any, Any, StepRecord, float]:
    """Runs all steps with a progress bar; returns trained weights, the optimizer's state, the records, and seconds.

    The number of steps is that of the options, or smaller. A run ends at `_SOLVED`, and before it takes more backward
    passes than this number, unless the first line search of L-BFGS alone does.
    """
    from tqdm import tqdm

    params, state = start
    records: list[StepRecord] = []
    passes = 0
    unit = "pass" if method == _LBFGS else "step"
    with tqdm(desc=method, total=options.steps, unit=unit, dynamic_ncols=True) as bar:
        begin = time.perf_counter()
        for batch in _batches(task, options):
            *after, record = compiled(params, state, *batch)
            record = jax.device_get(record)
            passes += int(record.backward_passes)
            if passes > options.steps and records:
                break
            params, state = after
            records.append(record)
            phase = "" if record.phase is None else f"{Phase(record.phase).name:7s} "
            bar.set_postfix_str(f"{phase}loss {record.loss:.3g}", refresh=False)
            bar.update(max(int(record.backward_passes), 1))
            if _is_whole(options) and record.loss <= _SOLVED:
                break
        seconds = time.perf_counter() - begin
    return params, state, jax.tree.map(lambda *fields: np.stack(fields), *records), seconds


def _make_task(seed: int, width: int = 128) -> Task:
    """The task of a seed: it decides the initial weights, and the split of the digits is the same for all."""
    return Task(*load_digits(), *make_network(seed, (width, width)))


def _batches(task: Task, options: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """One batch per step: the seed shuffles every epoch, whose remainder is left out."""
    images, labels = task.train
    size = options.batch_size
    if _is_whole(options):
        yield from itertools.repeat((jnp.asarray(images), jnp.asarray(labels)), options.steps)
        return
    rng = np.random.default_rng(options.seed)
    orders = (rng.permutation(_TRAIN_SIZE) for _ in itertools.count())
    chosen = (order[i : i + size] for order in orders for i in range(0, _TRAIN_SIZE - size + 1, size))
    for indices in itertools.islice(chosen, options.steps):
        yield images[indices], labels[indices]


def _is_whole(options: argparse.Namespace) -> bool:
    """Whether every batch is the whole training set."""
    return options.batch_size in (0, _TRAIN_SIZE)


def _table(runs: dict[str, Run]) -> str:
    row = "{:20}  {:>19}  {:>13}  {:>15}  {:>9}  {:>11}".format
    heads = "method", "final training loss", "test accuracy", "backward passes", "wall time", "state bytes"
    lines = [row(*heads), row("-" * 20, *("-" * len(head) for head in heads[1:]))]
    for name, _, loss, accuracy, backward_passes, seconds, size, *_ in runs.values():
        cost = backward_passes, f"{seconds:.2f} s", f"{size.total:,}"
        lines.append(row(name, f"{loss:.2e}", f"{accuracy:.2%}", *cost))
    return "\n".join(lines)


def _parts(runs: dict[str, Run]) -> str:
    """The bytes of each state by part, one line per method."""
    return "\n".join(f"  {name:20}  {run.state_bytes}" for name, run in runs.items())


def _ending(options: argparse.Namespace) -> str:
    """A sentence about runs that end early, or an empty string."""
    return f"\nA run ends early once its loss is at most {_SOLVED:g}." if _is_whole(options) else ""


def _warning(run: Run) -> str:
    """A paragraph about wasted backward passes, or an empty string."""
    if not run.ignored_gradients:
        return ""
    return (
        f"\n\nWarning: {run.ignored_gradients} gradients were computed in PREDICT steps, and ignored: the time of "
        "their backward\npasses is not saved. Use value_and_grad_by_phase instead of jax.value_and_grad."
    )


def _draw(runs: dict[str, Run], path: Path) -> None:
    """Draws all losses, the gradient norms and prediction errors of `phase_switched`, and the actions of its guard."""
    from matplotlib.figure import Figure

    plain, switched = runs[_PLAIN], runs[_SWITCHED]
    name, steps = switched.method, switched.steps
    is_predict = steps.phase == Phase.PREDICT
    (true_steps,) = np.nonzero(~is_predict)
    landings = 1 + np.flatnonzero(is_predict[:-1] & ~is_predict[1:])
    refusals = landings[steps.action[landings] == GuardAction.GAVE_UP]
    figure = Figure(figsize=(10, 10), layout="constrained")
    losses, *axes = figure.subplots(4, 1, height_ratios=[2.6, 1, 1, 1])
    norms, errors, lengths = axes
    _draw_losses(losses, runs)
    norms.plot(plain.steps.gradient_norm, color=_COLOURS[_PLAIN])
    norms.plot(true_steps, steps.gradient_norm[true_steps], color=_COLOURS[_SWITCHED], **_DOTS)
    norms.set_yscale("log")

    error = steps.last_prediction_error
    errors.plot(landings, error[landings], color=_COLOURS[_SWITCHED], **_DOTS)
    tolerance = vsa_optax.Guarded().tolerance
    errors.axhline(tolerance, color="#333333", linestyle="--", linewidth=1, label="tolerance of the guard")
    gave_up = {"color": _RED, "marker": "X", "linestyle": "", "zorder": 3, "label": f"gave up: {len(refusals)}"}
    errors.plot(refusals, error[refusals], **gave_up)
    errors.set_ylim(0, 1.5 * float(np.max(error[landings], initial=tolerance)))
    errors.legend(loc="upper right", ncols=2, framealpha=0.95)

    lengths.plot(steps.predict_length, color="#333333", drawstyle="steps-post")
    lengths.set_ylim(0, 1.1 * float(np.max(steps.predict_length, initial=1)))
    quality = lengths.twinx()  # The first step had no prediction.
    quality.plot(np.arange(len(is_predict))[1:], steps.mean_r_squared[1:], color=_RED, linewidth=1)
    quality.set_ylabel("mean R²", color=_RED)
    quality.tick_params(axis="y", colors=_RED)

    names = "gradient norm", "prediction error", "steps to predict"
    for axis, label in zip(axes, names, strict=True):
        plots.shade_phases(axis, steps.phase)
        axis.set(ylabel=label, xlim=(-0.5, len(is_predict) - 0.5))
        axis.grid(alpha=0.3)
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False)
    norms.set_title(f"{name}: {switched.backward_passes} backward passes in {len(is_predict)} steps")
    norms.legend(loc="upper right", ncols=3, framealpha=0.95)
    lengths.set_xlabel(f"step  ({name}: a point at each backward pass; errors where it follows a prediction)")
    figure.savefig(path, dpi=130)


def _draw_losses(axis: Any, runs: dict[str, Run]) -> None:
    """Draws losses against backward passes, both on logarithmic scales."""
    for method, (_, steps, *_) in runs.items():
        (true_steps,) = np.nonzero(steps.backward_passes)
        passes = np.cumsum(steps.backward_passes)[true_steps]
        axis.plot(passes, steps.loss[true_steps], color=_COLOURS[method], label=method, **_DOTS)
    axis.set(xscale="log", yscale="log", xlabel="backward passes", ylabel="batch loss")
    if min(np.min(run.steps.loss) for run in runs.values()) <= _SOLVED:
        axis.set_ylim(bottom=_SOLVED / 10)  # A loss may be 0.
    axis.set_title("digits: loss against backward passes")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", framealpha=0.95)


class _OneLineParser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line, without its usage."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="python -m vsa_optax.demo", description=_DESCRIPTION, allow_abbrev=False)

    def add(option: str, kind: Callable[[str], Any], default: Any, metavar: str, text: str) -> None:
        text = f"{text} (default: %(default)s)"
        parser.add_argument(option, type=kind, default=default, metavar=metavar, help=text)

    add("--steps", _number(int, 1, 100_000), 300, "N", _STEPS_HELP)
    add("--seed", _number(int, 0, 2**31 - 1), 0, "N", "seed of the weights and the batches, 0 to 2147483647")
    add("--batch-size", _number(int, 0, _TRAIN_SIZE), 0, "N", _BATCH_HELP)
    add("--width", _number(int, 1, 4096), 512, "N", _WIDTH_HELP)
    add("--learning-rate", _number(float, 1e-9, 100), 1e-3, "X", "peak of the cosine schedule, 1e-09 to 100")
    add("--output", Path, Path("vsa_optax_demo"), "FOLDER", f"where {_PICTURE} goes; made if missing")
    return parser


def _number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """Returns the converter of an option, which accepts numbers from ``low`` to ``high``."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (number := kind(text)) <= high:
                return number
        noun = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {noun} from {low} to {high}, got {text!r}")

    return convert


if __name__ == "__main__":
    sys.exit(main())
