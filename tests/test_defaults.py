"""The public names, their arguments and defaults, written down once more; and the prose that repeats the numbers."""

import enum
import inspect
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import vsa_optax
from vsa_optax import (
    AdaptiveCycle,
    Cycle,
    Guarded,
    LegacyCycle,
    Momentum,
    QualityCycle,
    Recursive,
    Secants,
    TritCodec,
    Window,
)
from vsa_optax.accumulation import ternary_sum
from vsa_optax.prediction import guard, leap, machine, multisecant, presets, step

# Changing a line here changes what programs of users do.
SIGNATURES = """
AdaptiveCycle(*, warmup_steps=10, full_steps=5, predict_steps=20, correct_every=5, loss_threshold=0.1)
Cycle(*, warmup_steps=10, full_steps=5, predict_steps=20, correct_every=5)
GuardAction(NONE=0, GREW=1, SHRANK=2, GAVE_UP=3, SLEPT=4)
GuardStats(action, predict_length, constant, asleep)
Guarded(*, tolerance=0.14, longest=20, warmup_steps=10)
HypervectorCodec(compression_ratio=0.1, *, dimension=None, use_ternary=False, shrink=True, seed=42)
LegacyCycle(*, warmup_steps=0, full_steps=10, predict_steps=40, correct_every=10, loss_threshold=0.1)
LossReport(total_steps, num_measured, num_repeated, num_nonfinite, best_value, best_step, last_value, statistics, \
rolling, by_phase, improvement_rate, trend, is_converging, is_plateau, divergence, is_diverging, spikes, history)
LossStatistics(num, mean, variance, deviation, minimum, maximum, median)
Momentum(*, momentum=0.9, correction_weight=0.5, predicts='gradient')
MomentumSettings(predictor, phases)
MultisecantStats(evaluations, accepted, rejected, nonfinite_count, damping, dimension, prediction_error)
Phase(WARMUP=0, FULL=1, PREDICT=2, CORRECT=3)
PhaseStats(phase, total_steps, warmup_steps, full_steps, predict_steps, correct_steps, cycles, steps_per_backward, \
nonfinite_count, ignored_gradients, mean_prediction_error, last_prediction_error, quality=None, guard=None)
PredictionQuality(coefficients, ridge, r_squared, mean_r_squared)
ProbeReport(recommendation, reason, code, setting, first_loss, evaluation_noise, batch_noise, batch_noise_at_end, \
predictable_share, plain, plain_as_long, phase_switched, by_phase, multisecant, not_measured)
ProbeRun(gradients, loss, steps_to_plain, seconds_per_step, state_bytes, argument_bytes, temporary_bytes)
QualityCycle(*, predict_steps=4, most_error=0.5)
Recursive(*, decay=0.95, predicts='update', calibrate=True, residual_decay=None, dtype=None)
Secants(window=16, *, dtype=None)
StateBytes(moments, history, accumulator, residual, losses, bookkeeping)
TritCodec(trits=2, *, block_size=1024, unbiased=False, seed=42)
Window(length=8, *, decay=0.95, predicts='update', calibrate=True, residual_decay=None, dtype=None, codec=None)
accumulate_ternary(every_k_schedule, *, trits=None, rounding='nearest', block_size=1024, use_grad_mean=True, seed=0)
aggressive(learning_rate)
balanced(learning_rate)
checkpoint.latest_step(directory)
checkpoint.restore(directory, template, *, step=None, config=None)
checkpoint.save(directory, step, tree, *, config=None, keep=None)
compress_gradients(codec, *, error_feedback=False)
compressed_pmean(axis_name, codec, *, error_feedback=False, bucket_bytes=None)
conservative(learning_rate)
jit_by_phase(fun, **jit_options)
loss_report(opt_state)
momentum_predictor(schedule='trainer', *, momentum=0.9, correction_weight=0.5, predicts='gradient')
multisecant(opt, *, learning_rate=None, history_window=8, history_dtype=<class 'jax.numpy.bfloat16'>)
multisecant_stats(opt_state)
needs_backward(opt_state)
phase_stats(opt_state)
phase_switched(opt, *, learning_rate=None, predictor=Secants(window=16, dtype=None), \
phases=Guarded(tolerance=0.14, longest=20, warmup_steps=10))
plots.draw_losses(report, path=None)
plots.shade_phases(axis, phases, *, first_step=0)
predict_gradients(*, predictor=Secants(window=16, dtype=None), \
phases=Guarded(tolerance=0.14, longest=20, warmup_steps=10))
probe.main(argv=None)
probe.probe(loss, params, batches, opt, steps=100)
state_bytes(tree, *, per_device=False)
state_specs(opt_state, axis_name)
ternary_accumulator(num_microbatches, *, trits=None, rounding='nearest', block_size=1024, use_grad_mean=True, seed=0)
ternary_multi_steps(opt, every_k_schedule, use_grad_mean=True, should_skip_update_fn=None, *, trits=None, \
rounding='nearest', block_size=1024, seed=0)
track_loss(opt, *, max_history=1000, rolling_window=20, spike_threshold=3.0, divergence_threshold=1.2, \
convergence_window=50, convergence_threshold=0.01)
trits.Trits(values, scale)
trits.dequantize(values, scale)
trits.pack(values)
trits.quantize_deterministic(x, *, rule='mean', threshold=0.7, axis=None)
trits.quantize_stochastic(x, key, *, axis=None)
trits.unpack(packed, size)
value_and_grad_by_phase(fun, argnums=0, has_aux=False, *, value_in_predict=False, allow_int=False)
vsa.Cleanup(vector, item, similarity)
vsa.bind(x, y)
vsa.bundle(hypervectors, weights=None, *, majority=None, axis=-2)
vsa.cleanup(x, memory)
vsa.cosine_similarity(x, y)
vsa.dot_similarity(x, y)
vsa.inverse(x)
vsa.permute(x, shifts=1)
vsa.random_hypervectors(key, num, dim, model='bipolar', *, dtype=<class 'jax.numpy.float32'>)
vsa.unbind(bound, key)
"""


def signature(name, value):
    if isinstance(value, enum.EnumMeta):
        return f"{name}({', '.join(f'{member.name}={member.value}' for member in value)})"
    found = inspect.signature(value)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return f"{name}{found.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"


def public():
    for name in vsa_optax.__all__:
        value = getattr(vsa_optax, name)
        if not isinstance(value, types.ModuleType):
            yield signature(name, value)
            continue
        for inner, part in sorted(vars(value).items()):
            if not inner.startswith("_") and getattr(part, "__module__", None) == value.__name__:
                yield signature(f"{name}.{inner}", part)


def test_names_arguments_and_defaults():
    assert sorted(public()) == SIGNATURES.strip().splitlines()


PRESETS = ("conservative", "balanced", "aggressive")
SETTINGS = [Secants, Window, Recursive, Momentum, Guarded, Cycle, AdaptiveCycle, LegacyCycle, QualityCycle]
PAGE = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()


def test_the_page_on_settings_names_the_defaults():
    """In its tables, as the calls that give nothing else; the presets in one sentence."""
    spans = re.findall(r"^\| `([^`]*)` \|", PAGE.partition("## Old arguments")[0], flags=re.MULTILINE)
    assert [eval(span, vars(vsa_optax)) for span in spans] == [kind() for kind in SETTINGS] + [None]
    assert sum(span.count("=") for span in spans) == 11
    sentence = re.search(r"`conservative`, `balanced` and `aggressive` are (.*?)\.\n", PAGE, flags=re.DOTALL)[1]
    named = [eval(span, vars(vsa_optax)) for span in re.findall(r"`([^`]*)`", sentence)]
    assert named == [*presets.CONSERVATIVE, *presets.AGGRESSIVE]


def numbers(pattern, text):
    """The numbers in the groups of the pattern; line ends in the text count as spaces."""
    (found,) = re.findall(pattern, " ".join(text.split()))
    return pytest.approx(list(map(float, found if isinstance(found, tuple) else [found])), rel=1e-6)


def test_docstrings_say_the_numbers():
    bold, few = presets.AGGRESSIVE.phases, ternary_sum._FEW_ENOUGH_FOR_TWO_TRITS
    largest = ternary_sum.LARGEST_SCALE
    looks = vsa_optax.PhaseStats.__doc__.replace("the four largest", "the 4 largest")
    accumulates = vsa_optax.accumulate_ternary.__doc__
    sleeps = [guard._MOST_WATCHED, guard._SHORTEST_SLEEP, guard._LONGEST_SLEEP, guard._MOST_WATCHED / 2]
    lengths = [machine._SHORTEST_FULL, machine._LONGEST_FULL, machine._SHORTEST_PREDICT, machine._LONGEST_PREDICT]
    assert numbers(r"within (\d+) % ", vsa_optax.balanced.__doc__) == [100 * Guarded().tolerance]
    assert numbers(r"within (\d+) % .* up to (\d+) steps", vsa_optax.aggressive.__doc__) == [
        100 * bold.tolerance,
        bold.longest,
    ]
    rule = r"u reaches (\d+), .* the next (\d+) true steps .* up to (\d+), .* watches (\d+) steps"
    assert numbers(rule, guard.__doc__) == sleeps
    bounds = r"FULL stays between (\d+) and (\d+) steps and PREDICT between (\d+) and (\d+);"
    assert numbers(bounds, AdaptiveCycle.__doc__) == lengths
    cycle, (full, predict) = LegacyCycle(), (jnp.int32(40), jnp.int32(60))
    worse = [cycle.moved(full, predict, True, False), cycle.moved(jnp.int32(60), jnp.int32(3), True, False)]
    better = [cycle.moved(full, predict, False, True), cycle.moved(jnp.int32(1), jnp.int32(99), False, True)]
    (full_up, predict_down), most = (worse[0][0] - 40, 60 - worse[0][1]), worse[1]
    (full_down, predict_up), least = (40 - better[0][0], better[0][1] - 60), better[1]
    said = (
        r"FULL becomes (\d+) steps longer, up to (\d+), and PREDICT (\d+) shorter, down to (\d+)\. .* FULL becomes "
        + (r"(\d+) steps shorter, down to (\d+), and PREDICT (\d+) longer, up to (\d+)")
    )
    rule = [full_up, most[0], predict_down, most[1], full_down, least[0], predict_up, least[1]]
    assert numbers(said, LegacyCycle.__doc__) == rule
    bound, ring = vsa_optax.MultisecantStats.__doc__, leap.MultisecantState.__doc__
    assert numbers(r"coming step. At (\d+) or more", bound) == [leap.MOST_DAMPING]
    assert numbers(r"losses: ``\[(\d+)\]``", ring) == [leap.NUM_LOSSES]
    assert numbers(r"up to (\d+) evaluations apart", multisecant.__doc__) == [leap.MOST_REST]
    assert numbers(r"the (\d+) largest leaves of at most (\d+)", looks) == [step._NUM_LOOKED_AT, step._LOOKED_AT]
    assert numbers(r"None takes two for K up to (\d+)", accumulates) == [few]
    assert numbers(r"a scale beyond (\S+),", accumulates) == [float(f"{largest:.0e}")]
    for make in (vsa_optax.accumulate_ternary, vsa_optax.ternary_accumulator):
        assert numbers(r"more than (\d+) micro-batches in one", make.__doc__) == [ternary_sum._MANY_FOR_ONE_TRIT]


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_docstrings_say_the_bytes_of_the_machine():
    adaptive, guarded = machine.init(AdaptiveCycle()).adaptive, machine.init(Guarded()).guard
    assert numbers(r"State cost: (\d+) bytes", AdaptiveCycle.__doc__) == [bytes_of(adaptive)]
    assert numbers(r"State cost: (\d+) bytes", Guarded.__doc__) == [bytes_of(guarded)]
    for preset in (presets.CONSERVATIVE, presets.BALANCED, presets.AGGRESSIVE):
        copies = 2 * preset.predictor.window + 2
        doc = getattr(vsa_optax, next(name for name in PRESETS if getattr(presets, name.upper()) is preset)).__doc__
        assert numbers(r"(\d+) bytes .* and (\d+) copies", doc) == [8 + 4 * copies, copies]


def written(pattern, kind, **symbols):
    """The value of a formula in a docstring."""
    found = re.search(pattern, " ".join(kind.__doc__.split()))
    return eval(found[found.lastindex], symbols)


def test_docstrings_say_the_bytes_of_what_is_in_trits():
    for kind, trits, block_size in ((4, 2, 1024), (9, 3, 1024), (2, 1, 256)):
        given = dict(trits=trits) if trits == 1 else {}  # Else the default.
        opt = vsa_optax.accumulate_ternary(kind, block_size=block_size, **given)
        size = 5 * block_size
        state = jax.eval_shape(opt.init, jnp.zeros(size))
        each = written(r"``(\(1\.6 .*?)`` bytes a", vsa_optax.accumulate_ternary, trits=trits, block_size=block_size)
        assert bytes_of(state) == pytest.approx(size * each + 12)
        codec = TritCodec(trits, block_size=block_size)
        each = written(r"``(\(1\.6 .*?)`` bytes per", TritCodec, trits=trits, block_size=block_size)
        assert codec.nbytes(jnp.zeros(size)) == pytest.approx(size * each + 4)


@pytest.mark.parametrize(
    "predictor",
    [Secants(), Window(), Window(codec=TritCodec(block_size=64)), Recursive(), Momentum()],
    ids=["s", "w", "coded", "r", "m"],
)
def test_docstrings_say_the_bytes_of_a_history(predictor):
    """Two leaves need copies of the parameters, a calibration of each, and some scalars."""
    params = {"a": jnp.zeros((10, 64)), "b": jnp.zeros((5, 128))}
    opt = vsa_optax.phase_switched(optax.sgd(1.0), predictor=predictor)
    state = jax.eval_shape(opt.init, params)
    codec, length = getattr(predictor, "codec", None), {Secants: 16, Window: 8}.get(type(predictor))
    size = bytes_of(params) if codec is None else codec.nbytes(params)
    kept = written(r"``([^`]* \* P)``", type(predictor), W=length, P=size, Q=size)
    each = 56 if codec else written(r"(?:``([^`]*)``|(\d+)) bytes per leaf", type(predictor), W=length)
    more = written(r"per leaf and ``([^`]*)``", type(predictor), W=length) if predictor == Secants() else 0
    assert 0 <= bytes_of((state.history, state.machine.calibration)) - kept - 2 * each - more < 60


@pytest.mark.parametrize("window", [8, 3])
@pytest.mark.parametrize("history_dtype", [jnp.bfloat16, None])
def test_docstrings_say_the_bytes_of_leaps(window, history_dtype):
    """Exactly; and a parameter's share with the defaults."""
    params, doc = {"w": jnp.zeros((10, 64)), "b": jnp.zeros(7)}, vsa_optax.multisecant
    opt = vsa_optax.multisecant(optax.sgd(1.0), history_window=window, history_dtype=history_dtype)
    state = jax.eval_shape(opt.init, params)
    copies = written(r"twice the parameters, ``([^`]*)`` copies of them in", doc, W=window)
    scalars = written(r"in ``history_dtype``, and ``([^`]*)`` bytes", doc, W=window)
    size = bytes_of(params)
    assert bytes_of(state) == 2 * size + copies * size * (1 if history_dtype is None else 0.5) + scalars
    if (window, history_dtype) == (8, jnp.bfloat16):
        assert numbers(r"bytes: (\d+) bytes per float32", doc.__doc__) == [4 * (bytes_of(state) - scalars) / size]
