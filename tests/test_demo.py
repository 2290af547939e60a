"""The demo from its command line: what it prints, draws and refuses."""

import contextlib
import importlib.util
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsa_optax
from vsa_optax import GuardAction, Phase, demo, plots

for _package in ("flax", "matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(_package)

_STEPS = 40
_WINDOW = 16  # The default.
_HIDDEN = (64,)  # One layer less than the demo has, and less to compile.


class _Demo(NamedTuple):
    runs: dict[str, demo.Run]
    output: str
    folder: Path

    @property
    def plain(self) -> demo.Run:
        return self.runs[demo._PLAIN]

    @property
    def switched(self) -> demo.Run:
        return self.runs[demo._SWITCHED]


_COMPILED: dict[str, Any] = {}
_compile = jax.stages.Lowered.compile


def _compile_once(lowered: jax.stages.Lowered) -> Any:
    """A run with the same shapes and settings needs no program of its own, and so short a run no fast one."""
    key = lowered.as_text()
    if key not in _COMPILED:
        _COMPILED[key] = _compile(lowered, compiler_options={"xla_backend_optimization_level": 0})
    return _COMPILED[key]


def _run_demo(folder: Path, *options: str, of_two: bool = False) -> _Demo:
    """A short demo with one hidden layer; ``of_two``: with none, of plain AdamW and `phase_switched`, no picture."""
    runs: dict[str, demo.Run] = {}
    train = demo._train

    def remembered(task: demo.Task, options: Any, method: str) -> demo.Run:
        runs[method] = train(task, options, method)
        return runs[method]

    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(demo, "_train", remembered)
        hidden = () if of_two else _HIDDEN
        make = demo.make_network
        patch.setattr(demo, "make_network", lambda seed, _: make(seed, hidden))
        if of_two:
            patch.setattr(demo, "_COLOURS", {name: demo._COLOURS[name] for name in (demo._PLAIN, demo._SWITCHED)})
            patch.setattr(demo, "_draw", lambda *args: None)
        patch.setattr(jax.stages.Lowered, "compile", _compile_once)
        assert demo.main(["--steps", str(_STEPS), "--output", str(folder), *options]) == 0
    return _Demo(runs, output.getvalue(), folder)


def _rows(output: str) -> dict[str, list[str]]:
    """The table's cells, by method."""
    lines = itertools.dropwhile(lambda line: not line.startswith("---"), output.splitlines())
    lines = itertools.takewhile(bool, itertools.islice(lines, 1, None))
    return {line[:20].strip(): line[20:].split() for line in lines}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> _Demo:
    """A short demo on the whole training set."""
    return _run_demo(tmp_path_factory.mktemp("demo") / "new" / "folder")


@pytest.fixture(scope="module")
def on_small_batches(tmp_path_factory: pytest.TempPathFactory) -> _Demo:
    """A short demo on batches of 64."""
    return _run_demo(tmp_path_factory.mktemp("demo"), "--seed", "3", "--batch-size", "64", of_two=True)


def test_prints_the_table_and_where_the_picture_is(finished: _Demo) -> None:
    rows = _rows(finished.output)
    assert list(rows) == ["plain AdamW", "phase-switched AdamW", "multisecant AdamW", "L-BFGS"]
    assert [row[2] for row in rows.values()] == [str(run.backward_passes) for run in finished.runs.values()]
    for loss, accuracy, *_ in rows.values():
        assert 0 < float(loss) < 2.3  # Below ln 10, a guess among ten digits.
        assert 50 < float(accuracy.rstrip("%")) <= 100
    assert finished.output.splitlines()[-1] == f"Picture: {finished.folder / 'training.png'}"


def test_losses_of_the_true_steps_are_kept_and_drawn(finished: _Demo) -> None:
    report, steps = finished.switched.report, finished.switched.steps
    assert report is not None
    (true_steps,) = np.nonzero(steps.phase != Phase.PREDICT)
    assert report.history.steps == tuple(true_steps)
    np.testing.assert_allclose(report.history.values, steps.loss[true_steps], rtol=1e-6)
    assert f"Losses of phase-switched AdamW: {finished.folder / 'losses.png'}" in finished.output.splitlines()
    assert (finished.folder / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_passes_in_vain_are_warned_of(finished: _Demo) -> None:
    """As if the step had kept ``jax.value_and_grad``; the demo itself has none."""
    assert finished.switched.ignored_gradients == 0
    assert "Warning" not in finished.output
    assert "Warning: 7 gradients" in demo._warning(finished.switched._replace(ignored_gradients=7))


def test_picture_is_a_png_that_shows_something(finished: _Demo) -> None:
    picture = finished.folder / "training.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = pytest.importorskip("matplotlib.image").imread(picture)
    assert min(pixels.shape[:2]) > 500
    red, green, blue = np.moveaxis((pixels[..., :3] * 255).round().astype(np.int32), -1, 0)
    colours = {f"#{colour:06x}" for colour in np.unique(red << 16 | green << 8 | blue)}
    shades = {plots._SHADES[phase] for phase in (Phase.WARMUP, Phase.FULL, Phase.PREDICT)}
    assert {*shades, *demo._COLOURS.values(), demo._RED} <= colours


def test_picture_marks_where_the_guard_gave_up(finished: _Demo, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    steps = finished.switched.steps
    assert not np.any(steps.action == GuardAction.GAVE_UP)
    steps = steps._replace(action=np.full_like(steps.action, GuardAction.GAVE_UP))
    demo._draw(finished.runs | {demo._SWITCHED: finished.switched._replace(steps=steps)}, tmp_path / "marks.png")
    paths = finished.folder / "training.png", tmp_path / "marks.png"
    pictures = [image.imread(path)[..., :3] for path in paths]
    red = [int(demo._RED[i : i + 2], 16) for i in (1, 3, 5)]
    without, marked = (np.sum(np.all((pixels * 255).round() == red, axis=-1)) for pixels in pictures)
    assert marked > without + 100


def test_predicts_and_ends_where_plain_training_does(finished: _Demo) -> None:
    plain, switched = finished.plain, finished.switched
    assert plain.backward_passes == _STEPS
    assert switched.backward_passes == np.sum(switched.steps.phase != Phase.PREDICT) < _STEPS
    assert switched.final_loss == pytest.approx(plain.final_loss, rel=0.1)


def test_multisecant_ends_at_its_accepted_parameters(finished: _Demo) -> None:
    run = finished.runs[demo._MULTISECANT]
    assert run.backward_passes == len(run.steps.loss) == _STEPS
    assert run.final_loss == pytest.approx(run.steps.loss[-1], rel=1e-4)
    assert run.final_loss < finished.plain.final_loss / 100


def test_a_run_ends_once_it_is_solved(finished: _Demo, on_small_batches: _Demo) -> None:
    run = finished.runs[demo._LBFGS]
    assert run.backward_passes < _STEPS
    assert run.steps.loss[-1] <= demo._SOLVED < run.steps.loss[-2]
    assert run.final_loss == pytest.approx(run.steps.loss[-1], rel=1e-2)
    assert "A run ends early once its loss is at most 1e-06." in finished.output
    assert "ends early" not in on_small_batches.output


@pytest.mark.parametrize(("budget", "steps"), [(10, 3), (9, 3), (1, 1)])
def test_no_line_search_beyond_the_budget(budget: int, steps: int) -> None:
    """Each takes three passes; the first is always taken."""
    options = demo._make_parser().parse_args(["--steps", str(budget)])
    task = demo.Task(*[(np.zeros(1), np.zeros(1))] * 2, None, lambda params, images: images)

    def step(params: int, state: int, *batch: Any) -> tuple[int, int, demo.StepRecord]:
        return params + 1, state - 1, demo.StepRecord(1.0, 3, 1.0)

    params, state, records, _ = demo._repeat(demo._LBFGS, step, (0, 0), task, options)
    assert (params, state) == (steps, -steps)
    np.testing.assert_array_equal(records.backward_passes, [3] * steps)


@pytest.mark.parametrize("is_whole", [True, False])
def test_evaluations_inside_line_searches_are_counted(is_whole: bool) -> None:
    evaluations = 0

    def count(_: Any) -> None:
        nonlocal evaluations
        evaluations += 1

    class Counted(demo.Task):
        def loss(self, params: Any, images: Any, labels: Any) -> jax.Array:
            jax.debug.callback(count, params[0])
            return jnp.sum(images * (jnp.cosh(params) - 1))

    task = Counted(*[(np.zeros(2), np.zeros(2))] * 2, None, lambda params, images: images)
    opt = optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(max_linesearch_steps=20))  # Less to compile.
    step = jax.jit(demo._make_line_search_step(task, opt, is_whole=is_whole))
    params = jnp.asarray([3.0, -4.0])
    state, counted = opt.init(params), []
    for _ in range(4):
        params, state, record = step(params, state, jnp.asarray([1.0, 300.0]), None)
        jax.effects_barrier()
        counted.append(int(record.backward_passes))
        assert sum(counted) == evaluations
    assert max(counted) > 3
    assert min(counted) > (0 if is_whole else 1)


def test_small_batches_are_plain_training(on_small_batches: _Demo) -> None:
    plain, switched = on_small_batches.plain, on_small_batches.switched
    assert plain.backward_passes == switched.backward_passes == _STEPS
    assert not np.any(switched.steps.predict_length)
    np.testing.assert_allclose(plain.steps.loss, switched.steps.loss, rtol=1e-3)  # The rate is applied elsewhere.


def test_records_every_step(finished: _Demo) -> None:
    plain, switched = finished.plain.steps, finished.switched.steps
    for field in (*plain[:3], *switched):
        assert field.shape == (_STEPS,)
    assert plain[3:] == (None,) * len(plain[3:])
    assert set(switched.phase.tolist()) == {Phase.WARMUP, Phase.FULL, Phase.PREDICT}  # No CORRECT.
    is_predict = switched.phase == Phase.PREDICT
    first = np.argmax(is_predict)
    assert np.all(switched.gradient_norm[is_predict] == 0)
    assert np.all(switched.gradient_norm[~is_predict] > 0)
    assert not np.any(switched.last_prediction_error[: first + 1])
    behind = 1 + np.flatnonzero(is_predict[:-1] & ~is_predict[1:])
    assert np.all(switched.last_prediction_error[behind] > 0)
    assert np.all(switched.predict_length[is_predict] > 0)
    assert set(switched.action[is_predict].tolist()) <= {GuardAction.GREW, GuardAction.SHRANK}
    assert np.all(switched.mean_r_squared <= 1)
    assert np.all(switched.mean_r_squared[is_predict] > 0)
    # The weights and the batches are the same, and so are the steps before a prediction, up to rounding.
    np.testing.assert_allclose(plain.loss[:first], switched.loss[:first], rtol=1e-4)


def test_state_bytes_are_those_of_the_documented_cost(finished: _Demo) -> None:
    size = 4 * (64 * 64 + 64 + 64 * 10 + 10)
    plain, switched = finished.plain.state_bytes, finished.switched.state_bytes
    assert 2 * size <= plain.moments == plain.total < 2 * size + 100
    trees = 2 + 2 * _WINDOW + 2  # Moments; moves and changes; newest parameters and gradient.
    products = 4 * 4 * (_WINDOW**2 + 1) + 4 * _WINDOW**2  # Of four leaves' changes, and of the moves.
    assert 0 < switched.total - trees * size - products < 150
    assert (switched.moments, switched.accumulator, switched.residual, switched.losses) == (plain.moments, 0, 0, 0)
    for run in finished.runs.values():
        assert f"  {run.method:20}  {run.state_bytes}\n" in finished.output


def test_same_seed_same_losses(on_small_batches: _Demo, tmp_path: Path) -> None:
    again = _run_demo(tmp_path, "--seed", "3", "--batch-size", "64", of_two=True)
    for method, cells in _rows(on_small_batches.output).items():
        assert cells[:3] == _rows(again.output)[method][:3]
    np.testing.assert_array_equal(on_small_batches.switched.steps.loss, again.switched.steps.loss)


def test_another_seed_gives_other_weights_and_batches() -> None:
    tasks = [demo._make_task(seed) for seed in (0, 1)]
    np.testing.assert_array_equal(tasks[0].train[0], tasks[1].train[0])
    weights, others = (jax.tree.leaves(task.params) for task in tasks)
    assert any(np.any(w != o) for w, o in zip(weights, others, strict=True))
    options = [demo._make_parser().parse_args(["--batch-size", "64", "--seed", seed]) for seed in "01"]
    (images, _), (other_images, _) = (next(demo._batches(tasks[0], o)) for o in options)
    assert np.any(images != other_images)


def test_an_epoch_shows_no_image_twice() -> None:
    images = np.arange(demo._TRAIN_SIZE)
    task = demo.Task((images, images), (images, images), None, lambda params, images: params)
    options = demo._make_parser().parse_args(["--steps", "7", "--batch-size", "400"])
    batches = [batch for batch, _ in demo._batches(task, options)]
    assert [len(batch) for batch in batches] == [400] * 7
    for epoch in (batches[:3], batches[3:6]):
        assert len(np.unique(np.concatenate(epoch))) == 1200


def test_draws_a_run_of_one_step(finished: _Demo, tmp_path: Path) -> None:
    runs = {name: run._replace(steps=jax.tree.map(lambda x: x[:1], run.steps)) for name, run in finished.runs.items()}
    demo._draw(runs, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--steps", "0"], "argument --steps: must be an integer from 1 to 100000, got '0'"),
        (["--steps", "100001"], "argument --steps: must be an integer from 1 to 100000, got '100001'"),
        (["--steps", "1.5"], "argument --steps: must be an integer from 1 to 100000, got '1.5'"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--seed", "-1"], "argument --seed: must be an integer from 0 to 2147483647, got '-1'"),
        (["--seed", "x\ny"], "argument --seed: must be an integer from 0 to 2147483647, got 'x\\ny'"),
        (["--batch-size", "-1"], "argument --batch-size: must be an integer from 0 to 1437, got '-1'"),
        (["--width", "0"], "argument --width: must be an integer from 1 to 4096, got '0'"),
        (["--batch-size", "1438"], "argument --batch-size: must be an integer from 0 to 1437, got '1438'"),
        (
            ["--learning-rate", "nan"],
            "argument --learning-rate: must be a number from 1e-09 to 100, got 'nan'",
        ),
        (
            ["--learning-rate", "inf"],
            "argument --learning-rate: must be a number from 1e-09 to 100, got 'inf'",
        ),
        (["--learning-rate", "-1"], "argument --learning-rate: must be a number from 1e-09 to 100, got '-1'"),
        (["--learning-rate", "0"], "argument --learning-rate: must be a number from 1e-09 to 100, got '0'"),
        (
            ["--learning-rate", "fast"],
            "argument --learning-rate: must be a number from 1e-09 to 100, got 'fast'",
        ),
        (["--momentum", "0.9"], "unrecognized arguments: --momentum 0.9"),
        (["--step", "5"], "unrecognized arguments: --step 5"),
        (["more\nwords"], "unrecognized arguments: more words"),
    ],
)
def test_bad_option_is_one_line(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        demo.main(words)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == f"python -m vsa_optax.demo: error: {reason}\n"
    assert captured.out == ""


@pytest.mark.parametrize("below", ["", "folder"])
def test_output_that_is_a_file_is_one_line(below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(SystemExit) as exit_info:
        demo.main(["--output", str(file / below)])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "argument --output: must be a folder to write training.png to" in captured.err
    assert file.read_text() == "kept"


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("flax", "tqdm") else find_spec(name))
    assert demo.main(["--output", str(tmp_path / "folder")]) == 1
    assert capsys.readouterr().err == (
        'python -m vsa_optax.demo: error: cannot import flax, tqdm: run pip install "vsa-optax[demo]"\n'
    )
    assert not (tmp_path / "folder").exists()


def test_help_explains_and_imports_no_extra() -> None:
    root = Path(vsa_optax.__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vsa_optax.demo", "--help"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    for option in ("--steps", "--seed", "--batch-size", "--width", "--learning-rate", "--output"):
        assert f"  {option} " in finished.stdout
    assert finished.stdout.count("(default:") == 6
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "optax" in imported
    assert not imported & {"flax", "sklearn", "matplotlib", "tqdm"}
