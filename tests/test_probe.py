"""The probe: what it measures, against loops written out here; what it recommends; what it refuses; its command."""

import contextlib
import dataclasses
import io
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refusals import check_names_itself

import vsa_optax
from vsa_optax import ProbeReport, ProbeRun, probe_runs
from vsa_optax import probe as probe_module
from vsa_optax.probe_report import choose

STEPS = 30
SCALES = np.logspace(0, 1, 4, dtype=np.float32)
PARAMS = {"w": jnp.array([3.0, -1.0, 2.0, 0.5])}
RATE = 0.02


def loss(params, batch):
    return jnp.sum(jnp.asarray(SCALES) * (params["w"] - batch) ** 2)


@dataclasses.dataclass
class Clock:
    """One second further at each look, so that every run takes one."""

    now: float = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


@dataclasses.dataclass
class Probed:
    report: ProbeReport
    printed: str


def probed(batches, opt, *, is_on_gpu=False):
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(probe_runs, "time", Clock())
        patch.setattr(probe_module, "_is_on_gpu", lambda params: is_on_gpu)
        report = vsa_optax.probe(loss, PARAMS, batches, opt, steps=STEPS)
    return Probed(report, printed.getvalue())


@pytest.fixture(scope="module")
def full_batch():
    """One batch, as if on a GPU."""
    return probed(np.zeros(4, np.float32), optax.adam(RATE), is_on_gpu=True)


BATCHES = [np.random.default_rng(seed).normal(size=4).astype(np.float32) for seed in range(5)]


@pytest.fixture(scope="module")
def mini_batches():
    return probed(iter(BATCHES), optax.adam(RATE))


def walk(opt, batches, value_and_grad=None):
    """Parameters, state and losses of so many steps."""

    @jax.jit
    def step(params, state, batch):
        value, grads = (
            jax.value_and_grad(loss)(params, batch)
            if value_and_grad is None
            else value_and_grad(loss)(params, batch, state=state)
        )
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    params, state, values = PARAMS, opt.init(PARAMS), []
    for batch in batches:
        params, state, value = step(params, state, batch)
        values.append(float(value))
    return params, state, values


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_plain_training_is_the_given_optimizers(full_batch, mini_batches):
    opt = optax.with_extra_args_support(optax.adam(RATE))
    for report, given in ((full_batch.report, [np.zeros(4)]), (mini_batches.report, BATCHES)):
        params, state, _ = walk(opt, itertools.islice(itertools.cycle(given), STEPS))
        assert report.plain.loss == pytest.approx(np.mean([float(loss(params, batch)) for batch in given]), rel=1e-5)
        assert report.first_loss == pytest.approx(np.mean([float(loss(PARAMS, batch)) for batch in given]), rel=1e-5)
        assert (report.plain.gradients, report.plain.steps_to_plain) == (STEPS, STEPS)
        assert report.plain.state_bytes == bytes_of(state)


def test_the_predictable_share_is_what_the_guard_skips(full_batch):
    opt = vsa_optax.phase_switched(optax.adam(RATE))
    _, state, _ = walk(opt, [np.zeros(4)] * STEPS, vsa_optax.value_and_grad_by_phase)
    skipped = int(vsa_optax.phase_stats(state).predict_steps)
    assert skipped > 0
    report = full_batch.report
    assert report.predictable_share == pytest.approx(skipped / STEPS)
    for run in (report.phase_switched, report.by_phase):
        assert run.gradients == STEPS - skipped
        assert run.state_bytes == bytes_of(state)
    assert report.by_phase.loss == pytest.approx(report.phase_switched.loss, rel=1e-4)


def test_multisecant_is_compared_at_equal_numbers_of_gradients(full_batch):
    opt = vsa_optax.multisecant(optax.adam(RATE))
    params, state, accepted = PARAMS, opt.init(PARAMS), []
    step = jax.jit(lambda params, state, grads, value: opt.update(grads, state, params, value=value))
    for _ in range(STEPS):
        value, grads = jax.value_and_grad(loss)(params, 0.0)
        updates, state = step(params, state, grads, value)
        params = optax.apply_updates(params, updates)
        accepted.append(float(state.loss))
    run, plain = full_batch.report.multisecant, full_batch.report.plain
    assert run.gradients == plain.gradients == STEPS
    assert run.loss == pytest.approx(float(loss(state.params, 0.0)), abs=1e-6)
    assert run.steps_to_plain == 1 + next(k for k, value in enumerate(accepted) if value <= plain.loss) < STEPS
    assert f"{run.loss:.3g}, and plain's {plain.loss:.3g}" in " ".join(full_batch.printed.split())


def test_without_noise_and_with_equal_times_the_fewest_steps_win(full_batch):
    report = full_batch.report
    assert (report.evaluation_noise, report.batch_noise, report.batch_noise_at_end) == (0, None, None)
    assert {run.seconds_per_step for run in (report.plain, report.phase_switched, report.by_phase, report.multisecant)}
    assert report.recommendation == "multisecant"
    assert report.code.startswith("opt = vsa_optax.multisecant(opt")


def test_on_mini_batches_nothing_is_recommended(mini_batches):
    report = mini_batches.report
    assert (report.recommendation, report.code, report.predictable_share) == ("none", "", 0)
    assert report.multisecant is None
    assert any(text.startswith("multisecant: the gradient has noise") for text in report.not_measured)
    assert any(text.startswith("jit_by_phase: it is meant for GPUs") for text in report.not_measured)


def test_the_noise_is_the_distance_of_gradients_of_neighbours(mini_batches):
    gradients = [2 * SCALES * (np.asarray(PARAMS["w"]) - batch) for batch in BATCHES]
    norm = np.linalg.norm
    apart = [norm(x - y) / ((norm(x) + norm(y)) / 2) for x, y in itertools.pairwise(gradients)]
    assert mini_batches.report.batch_noise == pytest.approx(np.mean(apart), rel=1e-4)
    assert mini_batches.report.batch_noise_at_end > mini_batches.report.batch_noise


def test_a_loss_that_is_another_each_time_is_noise(monkeypatch):
    rng = np.random.default_rng(0)

    def noisy(params, batch):
        drawn = jax.ShapeDtypeStruct((4,), np.float32)
        return loss(params, jax.pure_callback(lambda: rng.normal(size=4).astype(np.float32), drawn))

    task = probe_runs.Task(noisy, PARAMS, [None] * STEPS, 1)
    evaluation = probe_runs.Evaluation(task)
    assert evaluation.again(PARAMS) > 0.1
    assert probe_runs.Evaluation(task._replace(loss=loss, batches=[0.0])).again(PARAMS) == 0


def test_equal_batches_are_no_noise():
    """As of a loss on all data that ignores its batch."""
    task = probe_runs.Task(loss, PARAMS, [np.ones(4, np.float32)] * 3, 3)
    assert probe_runs.Evaluation(task).between_batches(PARAMS) == 0


def test_plain_training_gets_the_time_of_multisecant():
    """Three times its own, if a step takes three times as long; its lowest loss counts."""
    opt = optax.with_extra_args_support(optax.adam(RATE))
    task = probe_runs.Task(loss, PARAMS, [np.zeros(4, np.float32)] * STEPS, 1)
    trial = probe_runs.compiled(task, opt, probe_runs.plain_step)
    run = probe_module._as_long(task, trial, made(milliseconds=2.0), made(milliseconds=6.0))
    _, _, losses = walk(opt, [np.zeros(4)] * 3 * STEPS)
    assert run.gradients == 3 * STEPS
    assert run.loss == pytest.approx(min(losses), rel=1e-4)


def test_the_report_is_what_is_printed(full_batch, mini_batches):
    for report, printed in ((full_batch.report, full_batch.printed), (mini_batches.report, mini_batches.printed)):
        assert printed == f"{report}\n"
        assert max(map(len, printed.splitlines())) <= 104
        printed = " ".join(printed.split())
        for run in (report.plain, report.phase_switched):
            assert f"{run.loss:.4g}" in printed
            assert f"{1e3 * run.seconds_per_step:.3g}" in printed
        for text in (*report.not_measured, report.code, report.reason, report.setting):
            assert " ".join(text.split()) in printed


def test_the_page_shows_what_is_printed(full_batch):
    """The heads of its table, the lines to paste, and the sentences common to all reports."""
    page = (Path(__file__).parents[1] / "docs" / "probe.md").read_text()
    shown = re.search(r"^```text\n(Probe of .*?)^```$", page, flags=re.MULTILINE | re.DOTALL)[1]
    (heads,) = [line for line in full_batch.printed.splitlines() if "loss at the end  ms a step" in line]
    for line in (heads, *full_batch.report.code.splitlines()):
        assert line in shown
    always = full_batch.report.not_measured[-1].replace(f"{STEPS} steps", "100 steps")
    assert always in " ".join(shown.split())
    assert [shown.count(word) for word in ("Noise: ", "Predictable: ", "Leaps: ")] == [1, 1, 1]


def test_two_probes_give_the_same_but_for_times(mini_batches):
    assert probed(list(BATCHES), optax.adam(RATE)) == mini_batches


def test_the_parameters_are_left_as_they_are(full_batch, mini_batches):
    assert not PARAMS["w"].is_deleted()
    np.testing.assert_array_equal(PARAMS["w"], [3.0, -1.0, 2.0, 0.5])


def test_xla_says_the_bytes(full_batch):
    run = full_batch.report.plain
    assert run.argument_bytes >= bytes_of(PARAMS) + run.state_bytes
    assert run.temporary_bytes >= 0
    assert full_batch.report.by_phase.argument_bytes is None


def test_a_state_that_holds_the_parameters_is_donated_as_well():
    opt = optax.GradientTransformationExtraArgs(lambda params: params, lambda g, state, params, **extra: (g, state))
    task = probe_runs.Task(loss, PARAMS, [np.zeros(4, np.float32)] * 2, 1)
    outcome = probe_runs.run(task, probe_runs.compiled(task, opt, probe_runs.plain_step))
    assert outcome.gradients == 2
    assert not PARAMS["w"].is_deleted()


def outcome(seconds):
    return probe_runs.Outcome(None, 0, np.zeros(1), 1, seconds)


@pytest.mark.parametrize(("first", "rounds"), [(4.9, 3), (5.1, 1)])
def test_times_are_the_fastest_of_rounds_in_turn(monkeypatch, first, rounds):
    """The first runs, which compile, count for the number of rounds only."""
    ran, seconds = [], iter([6.0, 7.0, 3.0, 8.0, 5.0, 2.0])

    def run(task, trial):
        ran.append(trial)
        return outcome(next(seconds))

    monkeypatch.setattr(probe_runs, "run", run)
    timed = probe_runs.fastest(None, {"a": "A", "b": "B"}, {"a": outcome(first), "b": outcome(first)})
    assert ran == ["A", "B"] * rounds
    assert [timed[name].seconds for name in "ab"] == ([3.0, 2.0] if rounds == 3 else [6.0, 7.0])


def made(gradients=100, loss=0.1, steps_to_plain=100, milliseconds=10.0):
    return ProbeRun(gradients, loss, steps_to_plain, milliseconds / 1e3, 0, 0, 0)


def leapt(loss, steps_to_plain):
    return made(loss=loss, steps_to_plain=steps_to_plain, milliseconds=20.0)


PLAIN, AS_LONG = made(), made(gradients=200, loss=0.01)


@pytest.mark.parametrize(
    ("switched", "by_phase", "leaping", "expected", "words"),
    [  # Plain's is 0.1 after 100 gradients, and 0.01 in the time that multisecant takes.
        (None, None, None, "none", "nothing else was measured"),
        (made(gradients=40, milliseconds=5.0), None, None, "phase_switched", "40 gradients instead of 100"),
        (made(gradients=40, milliseconds=9.2), None, None, "none", "does not save enough time"),
        (made(gradients=40, milliseconds=8.8), None, None, "phase_switched", "in 0.88 s instead of 1 s"),
        (made(gradients=40, milliseconds=12.0), made(gradients=40, milliseconds=6.0), None, "phase_switched", "0.6 s"),
        (made(gradients=40, steps_to_plain=None, milliseconds=5.0), None, None, "none", "at a higher loss"),
        (made(milliseconds=5.0), None, None, "none", "found nothing to skip"),
        (made(gradients=40, milliseconds=5.0), None, leapt(0.005, 20), "multisecant", "after 20 gradients"),
        (made(gradients=40, milliseconds=3.0), None, leapt(0.005, 20), "phase_switched", "after 40 gradients"),
        (made(gradients=40, milliseconds=5.0), None, leapt(0.02, 20), "phase_switched", "after 40 gradients"),
        (None, None, leapt(0.02, 20), "none", "does not save enough time"),
        (None, None, leapt(0.0102, 20), "multisecant", "comes to 0.01, and multisecant to 0.0102"),
        (None, None, leapt(0.0102, 80), "none", "does not save enough time"),
        (None, None, leapt(0.005, 80), "multisecant", "in 1.6 s instead of 1 s; in the time of its 100 gradients"),
        (None, None, leapt(0.005, None), "none", "multisecant did not come"),
        (None, None, leapt(0.005, 100), "none", "multisecant did not come"),
    ],
)
def test_what_comes_to_plains_loss_in_the_least_time_is_chosen(switched, by_phase, leaping, expected, words):
    recommendation, reason, code = choose(100, 1.0, PLAIN, leaping and AS_LONG, switched, by_phase, leaping)
    assert recommendation == expected
    assert words in reason
    assert (expected in code) if expected != "none" else not code
    assert ("jit_by_phase" in code) == (by_phase is not None)


def test_what_is_lower_by_rounding_alone_is_not_lower():
    """Both have solved the task, and plain training sooner."""
    for end in (0.0, 1e-9):
        assert choose(100, 1.0, PLAIN, made(loss=end), None, None, leapt(0.0, 80))[0] == "none"
    assert choose(100, 1.0, PLAIN, made(loss=1e-6), None, None, leapt(0.0, 80))[0] == "multisecant"


@pytest.mark.parametrize("end", [1.0, 2.0, np.nan])
def test_training_that_fails_is_no_measure(end):
    recommendation, reason, _ = choose(100, 1.0, made(loss=end), None, made(gradients=40), None, None)
    assert recommendation == "none"
    assert "did not lower the loss" in reason


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        (optax.lbfgs(), "line search"),
        (optax.MultiSteps(optax.sgd(0.1), 2), "MultiSteps"),
        (optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()), "follows the loss"),
    ],
    ids=["lbfgs", "MultiSteps", "plateau"],
)
def test_what_cannot_be_wrapped_is_said(opt, message, monkeypatch):
    monkeypatch.setattr(probe_module, "_LEAST_STEPS", 2)
    report = vsa_optax.probe(loss, PARAMS, np.zeros(4, np.float32), opt, steps=2)
    assert report.phase_switched is None
    assert any(text.startswith("phase_switched: ") and message in text for text in report.not_measured)
    assert report.plain.gradients == 2


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes", "INTERNAL: broken"])
def test_too_little_memory_is_said(message, monkeypatch):
    """Any other failure of the device is the user's to see."""

    def failing(opt):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(probe_module, "phase_switched", failing)
    if message.startswith("INTERNAL"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
            vsa_optax.probe(loss, PARAMS, BATCHES, optax.sgd(0.01), steps=20)
    else:
        report = vsa_optax.probe(loss, PARAMS, BATCHES, optax.sgd(0.01), steps=20)
        assert report.not_measured[0] == "phase_switched: the device has too little memory for it"
        assert (report.recommendation, report.phase_switched) == ("none", None)


@pytest.mark.parametrize(
    ("batches", "num_different"),
    [
        (np.ones((7, 4)), 1),
        ((np.ones(4), np.ones(4)), 1),
        ({"x": np.ones(4)}, 1),
        (None, 1),
        ([np.ones(4)], 1),
        ([np.ones(4)] * 7, 7),
        ((np.ones(4) for _ in itertools.count()), STEPS),
        (zip(np.ones((7, 4)), np.ones(7), strict=True), 7),
    ],
    ids=["array", "tuple", "dict", "None", "list of one", "list", "endless", "zip"],
)
def test_batches_are_one_or_several(batches, num_different):
    task = probe_module._make_task(lambda params, batch: jnp.sum(params["w"]), PARAMS, batches, STEPS)
    assert (task.num_different, len(task.batches)) == (num_different, STEPS)
    assert len(task.compared) == min(num_different, 8)
    last, early = task.batches[-1], task.batches[(STEPS - 1) % num_different]
    assert last is early


GIVEN: dict[str, Any] = {"loss": loss, "params": PARAMS, "batches": np.zeros(4), "opt": optax.sgd(0.1)}


@pytest.mark.parametrize("steps", [19, 20.5, "100"])
def test_steps_are_checked(steps):
    check_names_itself(lambda steps: vsa_optax.probe(**GIVEN, steps=steps), "steps", steps, ">= 20")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"opt": optax.sgd}, ValueError, "opt must be an optax.GradientTransformation"),
        ({"opt": vsa_optax.phase_switched(optax.sgd(0.1))}, ValueError, "opt must be the optimizer without"),
        ({"opt": vsa_optax.multisecant(optax.sgd(0.1))}, ValueError, "opt must be the optimizer without"),
        ({"params": {}}, ValueError, "params must have a leaf"),
        ({"params": {"w": np.arange(3)}}, TypeError, "leaf .* has dtype int"),
        ({"loss": 3}, TypeError, "loss must be a function"),
        ({"loss": lambda params, batch: (loss(params, batch), {})}, TypeError, "loss must return one real"),
        ({"loss": lambda params, batch: params["w"]}, TypeError, "loss must return one real"),
        ({"loss": lambda params, batch: 3}, TypeError, "loss must return one real"),
        ({"batches": []}, ValueError, "batches must have at least one"),
        ({"batches": "digits"}, TypeError, "batches must be made of arrays, but batches is a str"),
        ({"batches": [{"x": 1.0}, {"x": "1"}]}, TypeError, r"but batches\[1\]\['x'\] is a str"),
        ({"batches": [np.zeros(4), np.zeros(3)]}, ValueError, r"leave out a last one .*batches\[1\] is float32\[3\]"),
    ],
)
def test_what_does_not_fit_is_refused(changed, error, message):
    with pytest.raises(error, match=message):
        vsa_optax.probe(**GIVEN | changed)


@pytest.mark.parametrize("imported", ["import vsa_optax", "import vsa_optax.probe"])
def test_it_is_called_by_its_name_whatever_was_imported(imported):
    code = f"""
{imported}
import vsa_optax
early = vsa_optax.probe
import inspect, vsa_optax.probe
for probe in (early, vsa_optax.probe):
    print(*inspect.signature(probe).parameters, inspect.signature(probe) == inspect.signature(vsa_optax.probe.probe))
    try:
        probe(None, 1.0, None, None)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    called = ["loss params batches opt steps True", "opt must be an optax.GradientTransformation, got None"]
    assert done.stdout.splitlines() == called * 2


MODULE = """
import jax.numpy as jnp, optax

def training():
    return lambda params, batch: jnp.sum((params - batch) ** 2), jnp.ones(3), jnp.zeros(3), optax.sgd(0.01)

def nothing():
    return None
"""


def test_the_command_prints_the_report(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    command = [sys.executable, "-m", "vsa_optax.probe", "mine:training", "--steps", "25"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Probe of 25 steps on ")
    assert "multisecant  " in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["probed"], "must be given as module:function, got 'probed'"),
        (["no_such_module:f"], "cannot find no_such_module:f: No module named"),
        (["probed:other"], "cannot find probed:other: module 'probed' has no attribute"),
        (["probed:nothing"], "must return (loss, params, batches, opt), got NoneType"),
        (["probed:training", "--steps", "3"], "--steps must be an integer >= 20, got 3"),
    ],
)
def test_the_command_says_what_is_wrong(words, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "probed.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        probe_module.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
