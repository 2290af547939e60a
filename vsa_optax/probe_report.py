"""The report of `vsa_optax.probe`: its measurements, its recommendation, and both as text."""

import math
import textwrap
from typing import Literal, NamedTuple, TypeAlias

from vsa_optax.memory import in_units

Recommendation: TypeAlias = Literal["none", "phase_switched", "multisecant"]

# Gradients whose relative difference is smaller differ by rounding only.
LEAST_NOISE = 1e-4
# The largest fraction of plain's seconds that a recommended transformation may take: a smaller saving may be chance.
MOST_OF_PLAINS_TIME = 0.9
# A loss counts as no worse if it exceeds plain's final loss by at most this fraction of it.
LOSS_TOLERANCE = 0.05
# Losses count as equal if they differ by at most this fraction of the first loss.
_ROUNDING = 2.0**-23

_SWITCHED_CODE = """\
opt = vsa_optax.phase_switched(opt, predictor=vsa_optax.Secants(), phases=vsa_optax.Guarded())
# In the training step:
value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, batch, state=opt_state)
updates, opt_state = opt.update(grads, opt_state, params, value=value)"""
_BY_PHASE_CODE = """
# In place of jax.jit:
train_step = vsa_optax.jit_by_phase(train_step, donate_argnums=(0, 1))"""
_MULTISECANT_CODE = """\
opt = vsa_optax.multisecant(opt, history_window=8)
# In the training step:
value, grads = jax.value_and_grad(loss)(params, batch)
updates, opt_state = opt.update(grads, opt_state, params, value=value)
# At the end, the best parameters are opt_state.params."""
_COLUMNS = ("", "gradients", "loss at the end", "ms a step", "of plain", "state", "arguments", "temporaries")


class ProbeRun(NamedTuple):
    """The result and the cost of one variant of training in a probe.

    Attributes:
        gradients: the number of evaluations of loss and gradient in all steps.
        loss: the mean loss of the first batches at the parameters after the last step; for ``multisecant`` at the
            accepted parameters.
        steps_to_plain: the number of steps until its loss reached plain training's final loss; None if it never did.
            For ``phase_switched`` it is all steps if its final loss is at most 5 % above plain training's.
        seconds_per_step: the mean time per step without compilation; the host does not wait after each step.
        state_bytes: the bytes of the optimizer's state.
        argument_bytes: the bytes of the compiled step's arguments, as XLA counts them: parameters, state and a batch.
            None if XLA does not report them.
        temporary_bytes: the bytes that the compiled step allocates while it runs; None if XLA does not report them.
    """

    gradients: int
    loss: float
    steps_to_plain: int | None
    seconds_per_step: float
    state_bytes: int
    argument_bytes: int | None
    temporary_bytes: int | None


class ProbeReport(NamedTuple):
    """The measurements of `vsa_optax.probe`; ``str(report)`` is the printed text.

    Attributes:
        recommendation: ``"none"``, ``"phase_switched"`` or ``"multisecant"``. Only measured variants are recommended.
        reason: the reason for it, in one or two sentences.
        code: the lines to paste; empty for ``"none"``.
        setting: the device, and the numbers of steps, distinct batches, parameters and leaves.
        first_loss: the mean loss of the first batches at the given parameters.
        evaluation_noise: the relative difference of two evaluations with the same parameters and batch, of loss or
            gradient, whichever is larger.
        batch_noise: ``||g - g'||`` over the mean of both norms for two batches at the given parameters, averaged over
            neighbours among the first eight batches; None with one batch.
        batch_noise_at_end: the same at the final parameters of plain training.
        predictable_share: the fraction of steps that ``phase_switched`` skipped; None if it was not measured.
        plain: `vsa_optax.ProbeRun` of the given optimizer.
        plain_as_long: the same for as much time as ``multisecant`` took, with the lowest loss of all steps; None
            without ``multisecant``.
        phase_switched: `vsa_optax.ProbeRun` of the optimizer inside `vsa_optax.phase_switched`, or None.
        by_phase: the same compiled by `vsa_optax.jit_by_phase`, or None. It has several programs, so their bytes are
            None.
        multisecant: `vsa_optax.ProbeRun` of the optimizer inside `vsa_optax.multisecant`, or None.
        not_measured: a list of what was not measured, with reasons.
    """

    recommendation: Recommendation
    reason: str
    code: str
    setting: str
    first_loss: float
    evaluation_noise: float
    batch_noise: float | None
    batch_noise_at_end: float | None
    predictable_share: float | None
    plain: ProbeRun
    plain_as_long: ProbeRun | None
    phase_switched: ProbeRun | None
    by_phase: ProbeRun | None
    multisecant: ProbeRun | None
    not_measured: tuple[str, ...]

    def __str__(self) -> str:
        """The text that `vsa_optax.probe` prints."""
        words = [self.setting, _noise_in_words(self), _share_in_words(self), _leaps_in_words(self)]
        missing = ["Not measured:", *(_folded(f"- {text}", indent="  ") for text in self.not_measured)]
        paragraphs = "\n".join(_folded(text) for text in words if text), _table(self), _advice(self), "\n".join(missing)
        return "\n\n".join(paragraphs)


def choose(
    steps: int,
    first_loss: float,
    plain: ProbeRun,
    plain_as_long: ProbeRun | None,
    phase_switched: ProbeRun | None,
    by_phase: ProbeRun | None,
    multisecant: ProbeRun | None,
) -> tuple[Recommendation, str, str]:
    """Recommends the transformation that reached plain's loss in the least time, if it saves time.

    `phase_switched` saves time if it takes at most 0.9 of plain's time. `multisecant` saves time if plain does not
    reach as low a loss in the time of its run, since it may be slower than plain at first and faster later.

    Args:
        steps: the number of steps of each run.
        first_loss: the loss before the first step.
        plain: the run of the given optimizer.
        plain_as_long: its run for as long as `multisecant` took, if that was measured.
        phase_switched: the run of `phase_switched`, if it was measured.
        by_phase: the same compiled by `jit_by_phase`, if it was measured.
        multisecant: the run of `multisecant`, if it was measured.

    Returns:
        The recommendation, its reason, and the lines to paste.
    """
    if not (math.isfinite(plain.loss) and plain.loss < first_loss):
        reason = (
            f"it did not lower the loss ({first_loss:.3g} before, {plain.loss:.3g} after {steps} "
            "steps), so there is nothing to compare with: try another learning rate, or more steps, and probe again."
        )
        return "none", reason, ""
    arrived = [
        (run.steps_to_plain * run.seconds_per_step, recommendation, code, run)
        for recommendation, code, run in _ways(phase_switched, by_phase, multisecant)
        if run.steps_to_plain is not None and _gradients_to_plain(run, steps) < steps
    ]
    limit = steps * plain.seconds_per_step
    saving: list[tuple[Recommendation, str, str]] = []
    losing: list[tuple[Recommendation, str, str]] = []
    for seconds, recommendation, code, run in sorted(arrived, key=lambda entry: entry[0]):
        words = (
            f"came to plain's loss at the end after {_gradients_to_plain(run, steps)} gradients instead of {steps}, in "
            f"{seconds:.3g} s instead of {limit:.3g} s"
        )
        saves = seconds <= MOST_OF_PLAINS_TIME * limit
        if recommendation == "multisecant" and plain_as_long is not None:
            words += (
                f"; in the time of its {steps} gradients plain takes {plain_as_long.gradients} and comes to "
                f"{plain_as_long.loss:.3g}, and multisecant to {run.loss:.3g}"
            )
            slack = max(LOSS_TOLERANCE * abs(plain_as_long.loss), _ROUNDING * abs(first_loss))
            ahead = plain_as_long.loss - run.loss
            saves = ahead >= -slack if saves else ahead > slack
        (saving if saves else losing).append((recommendation, words, code))
    if saving:
        recommendation, words, code = saving[0]
        return recommendation, f"it {words}.", code
    if losing:
        recommendation, words, _ = losing[0]
        reason = (
            f"{recommendation} {words}. It saves gradients, but here it does not save enough time: a gradient costs "
            "little beside what the transformation does. If a gradient costs more elsewhere, probe again there."
        )
        return "none", reason, ""
    return "none", _why_nothing(steps, phase_switched, multisecant), ""


def _ways(
    switched: ProbeRun | None, by_phase: ProbeRun | None, multisecant: ProbeRun | None
) -> list[tuple[Recommendation, str, ProbeRun]]:
    """The variants that may be recommended, since they were measured, with the lines to paste."""
    ways: list[tuple[Recommendation, str, ProbeRun | None]] = [
        ("phase_switched", _SWITCHED_CODE, switched),
        ("phase_switched", _SWITCHED_CODE + _BY_PHASE_CODE, by_phase),
        ("multisecant", _MULTISECANT_CODE, multisecant),
    ]
    return [(name, code, run) for name, code, run in ways if run is not None]


def _gradients_to_plain(run: ProbeRun, steps: int) -> int:
    """The number of gradients until plain's loss was reached; a step of `multisecant` takes one."""
    return run.gradients if run.steps_to_plain == steps else run.steps_to_plain or 0


def _why_nothing(steps: int, switched: ProbeRun | None, multisecant: ProbeRun | None) -> str:
    reasons = []
    if switched is not None and switched.gradients == steps:
        reasons.append("phase_switched found nothing to skip")
    elif switched is not None:
        reasons.append("phase_switched skipped gradients, but ended at a higher loss")
    if multisecant is not None:
        reasons.append("multisecant did not come to plain's loss with fewer gradients")
    return f"{' and '.join(reasons) or 'nothing else was measured'}."


def _noise_in_words(report: ProbeReport) -> str:
    again = report.evaluation_noise
    if again == 0:
        text = "Noise: evaluated twice, loss and gradient are the same."
    elif again <= LEAST_NOISE:
        text = f"Noise: evaluated twice, gradients differ by rounding, {again:.1e} of their norm."
    else:
        text = f"Noise: evaluated twice on the same batch, gradients differ by {again:.2g} of their norm."
    if report.batch_noise is None or report.batch_noise_at_end is None:
        return f"{text} There is one batch."
    if max(report.batch_noise, report.batch_noise_at_end) <= LEAST_NOISE:
        return f"{text} The batches compared give the same gradient."
    return (
        f"{text} At the same parameters, gradients of two batches differ by {report.batch_noise:.2g} of their norm "
        f"before training and by {report.batch_noise_at_end:.2g} after it (independent gradients: 1.4)."
    )


def _share_in_words(report: ProbeReport) -> str:
    share, run = report.predictable_share, report.phase_switched
    if share is None or run is None:
        return ""
    if share == 0:
        return "Predictable: no step. The guard of phase_switched let none be skipped."
    return f"Predictable: {share:.0%} of the steps, which phase_switched skipped: it took {run.gradients} gradients."


def _leaps_in_words(report: ProbeReport) -> str:
    run = report.multisecant
    if run is None:
        return ""
    return (
        f"Leaps: after equally many gradients, {run.gradients}, the loss of multisecant is {run.loss:.3g}, and plain's "
        f"{report.plain.loss:.3g}."
    )


def _table(report: ProbeReport) -> str:
    runs = {
        "plain": report.plain,
        "plain, as long": report.plain_as_long,
        "phase_switched": report.phase_switched,
        "  by jit_by_phase": report.by_phase,
        "multisecant": report.multisecant,
    }
    row = "{:16}  {:>9}  {:>15}  {:>9}  {:>8}  {:>9}  {:>9}  {:>11}".format
    lines = [row(*_COLUMNS)]
    for name, run in runs.items():
        if run is not None:
            seconds = run.seconds_per_step
            times = f"{1e3 * seconds:.3g}", f"{seconds / report.plain.seconds_per_step:.2f}"
            sizes = map(_in_units, (run.state_bytes, run.argument_bytes, run.temporary_bytes))
            lines.append(row(name, run.gradients, f"{run.loss:.4g}", *times, *sizes).rstrip())
    return "\n".join(lines)


def _in_units(size: int | None) -> str:
    return "-" if size is None else in_units(size)


def _advice(report: ProbeReport) -> str:
    if report.recommendation == "none":
        return _folded(f"Keep the optimizer as it is: {report.reason}")
    indented = "\n".join(f"    {line}" for line in report.code.splitlines())
    return f"{_folded(f'Take {report.recommendation}: {report.reason}')}\n\n{indented}"


def _folded(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
