"""Every public function, called with every kind of argument it takes: checked by mypy, and run."""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vsa_optax
from vsa_optax import (
    AdaptiveCycle,
    Cycle,
    GuardAction,
    Guarded,
    GuardStats,
    HypervectorCodec,
    LegacyCycle,
    LossReport,
    LossStatistics,
    Momentum,
    MomentumSettings,
    MultisecantStats,
    Phase,
    PhaseStats,
    PredictionQuality,
    ProbeReport,
    ProbeRun,
    QualityCycle,
    Recursive,
    Secants,
    StateBytes,
    TritCodec,
    Window,
    accumulate_ternary,
    aggressive,
    balanced,
    checkpoint,
    compress_gradients,
    compressed_pmean,
    conservative,
    jit_by_phase,
    loss_report,
    momentum_predictor,
    multisecant,
    multisecant_stats,
    needs_backward,
    phase_stats,
    phase_switched,
    plots,
    predict_gradients,
    probe,
    state_bytes,
    state_specs,
    ternary_accumulator,
    ternary_multi_steps,
    track_loss,
    trits,
    value_and_grad_by_phase,
    vsa,
)
from vsa_optax.accumulation.multi_steps import TernaryMultiSteps
from vsa_optax.prediction.value_and_grad import ValueAndGradByPhase

Params = dict[str, jax.Array]


def loss(params: Params, x: jax.Array, *, scale: float = 1.0) -> jax.Array:
    """``[] float32``."""
    return scale * jnp.mean((x @ params["w"]) ** 2)


def loss_with_aux(params: Params, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """``[] float32`` and a tree."""
    return loss(params, x), {"mean": jnp.mean(x)}


def use_transformations() -> list[optax.GradientTransformationExtraArgs]:
    """All factories, with defaults and with every argument."""
    schedule: optax.Schedule = optax.cosine_decay_schedule(0.1, 100)
    return [
        predict_gradients(),
        predict_gradients(
            predictor=Recursive(decay=1, predicts="gradient", calibrate=False, residual_decay=0.5, dtype=jnp.bfloat16),
            phases=AdaptiveCycle(warmup_steps=2, full_steps=1, predict_steps=4, correct_every=2, loss_threshold=0.2),
        ),
        conservative(1e-3),
        balanced(learning_rate=schedule),
        aggressive(jnp.float32(1e-3)),
        predict_gradients(predictor=Window(predicts="gradient", codec=TritCodec(2))),
        predict_gradients(predictor=Window(predicts="gradient", codec=HypervectorCodec())),
        compress_gradients(TritCodec()),
        compress_gradients(HypervectorCodec(), error_feedback=True),
        compressed_pmean("data", TritCodec(), bucket_bytes=25 << 20),
        compressed_pmean(("data", "replica"), HypervectorCodec(), error_feedback=True),
        accumulate_ternary(4),
        accumulate_ternary(
            lambda step: 2 + step, trits=1, rounding="stochastic", block_size=64, use_grad_mean=False, seed=1
        ),
        ternary_multi_steps(optax.adam(0.1), 4, True, None, trits=3, rounding="nearest", block_size=256, seed=2),
        predict_gradients(predictor=Secants(8, dtype="float16"), phases=Guarded(tolerance=1)),
        predict_gradients(predictor=Secants(window=8, dtype=np.dtype("float32")), phases=None),
        phase_switched(
            optax.adamw(1.0),
            predictor=Window(length=4, dtype=None),
            phases=Guarded(tolerance=0.1, longest=4, warmup_steps=3),
        ),
        predict_gradients(predictor=Momentum(momentum=1, correction_weight=0, predicts="gradient")),
        phase_switched(
            optax.adamw(1.0),
            predictor=Momentum(predicts="update"),
            phases=LegacyCycle(warmup_steps=2, full_steps=1, predict_steps=4, correct_every=2, loss_threshold=0.2),
        ),
        phase_switched(optax.sgd(0.1), predictor=Momentum(), phases=QualityCycle(predict_steps=2, most_error=1)),
        track_loss(
            phase_switched(optax.adam(0.1)),
            max_history=10,
            rolling_window=5,
            spike_threshold=2,
            divergence_threshold=1.5,
            convergence_window=8,
            convergence_threshold=0.1,
        ),
        multisecant(optax.adamw(schedule)),
        multisecant(optax.sgd(1.0), learning_rate=0.1, history_window=4, history_dtype=None),
        phase_switched(optax.adamw(1.0)),
        phase_switched(optax.adamw(1.0), learning_rate=0.1),
        phase_switched(optax.adamw(1.0), learning_rate=schedule),
        phase_switched(optax.adamw(1.0), learning_rate=jnp.float32(0.1)),
        phase_switched(optax.with_extra_args_support(optax.sgd(0.1)), learning_rate=None),
        phase_switched(
            optax.sgd(1.0),
            learning_rate=lambda count: 0.1 / (1.0 + count),
            predictor=Window(
                4,
                decay=0.9,
                predicts="update",
                calibrate=False,
                residual_decay=None,
                dtype=None,
                codec=TritCodec(trits=3),
            ),
            phases=Cycle(warmup_steps=2, full_steps=1, predict_steps=4, correct_every=2),
        ),
    ]


def use_accumulation(params: Params) -> None:
    """The queries of a transformation that accumulates, and the accumulator for micro-batches."""
    opt: TernaryMultiSteps = ternary_multi_steps(optax.sgd(0.1), every_k_schedule=2, use_grad_mean=False)
    updated: jax.Array = opt.has_updated(opt.init(params))
    assert not updated
    accumulator = ternary_accumulator(2, trits=1, rounding="nearest", block_size=32, use_grad_mean=True, seed=0)
    assert accumulator.finalize(accumulator.update(accumulator.init(params), params, 0))["w"].shape == (3,)


def use_collectives(params: Params) -> None:
    """How the state of a mean over devices is laid out."""
    opt: optax.GradientTransformationExtraArgs = compressed_pmean("data", TritCodec(1), error_feedback=True)
    specs = state_specs(jax.eval_shape(opt.init, params), axis_name="data")
    assert specs.residual["w"] == jax.sharding.PartitionSpec("data")
    assert state_specs(optax.adam(0.1).init(params), ("data", "replica"))[0].count == jax.sharding.PartitionSpec()


def use_codecs(params: Params) -> None:
    """Both codecs with every argument, and their payloads."""
    trit = TritCodec(trits=1, block_size=32, unbiased=True, seed=0)
    decoded = trit.decode(trit.encode(params, step=jnp.int32(3)))
    assert decoded["w"].shape == params["w"].shape
    size: int = trit.nbytes(params) + TritCodec(3).nbytes(jax.ShapeDtypeStruct((7,), jnp.float32))
    assert size > 0
    sketch = HypervectorCodec(compression_ratio=0.5, dimension=None, use_ternary=False, shrink=False, seed=1)
    payload = sketch.encode(params) + 2.0 * sketch.encode(params, 0) - sketch.encode(params)
    assert sketch.decode(-payload)["w"].shape == params["w"].shape
    assert HypervectorCodec(0.5, dimension=2, use_ternary=True).nbytes(params) > 0


def use_arrays(x: jax.Array) -> None:
    """Every function of the two modules of array algebra."""
    key = jax.random.key(0)
    a, b = vsa.random_hypervectors(key, 2, 64, model="ternary", dtype=jnp.bfloat16)
    pair = vsa.bundle(jnp.stack([vsa.bind(a, b), vsa.permute(a, 2)]), weights=jnp.ones(2), majority="bipolar")
    assert vsa.unbind(pair, vsa.inverse(b)).shape == (64,)
    assert vsa.dot_similarity(a, b).shape == vsa.cosine_similarity(a, b).shape == ()
    found = vsa.cleanup(pair, jnp.stack([a, b]))
    assert found.vector.shape == (64,)
    values, scale = trits.quantize_deterministic(x, rule="mean", threshold=0.7, axis=0)
    assert trits.dequantize(values, scale).shape == x.shape
    values, scale = trits.quantize_stochastic(x, key, axis=None)
    assert trits.unpack(trits.pack(values), values.shape[-1]).shape == x.shape
    assert checkpoint.latest_step("no/such/folder") is None


def use_leaps(params: Params, x: jax.Array) -> MultisecantStats:
    """A step, and its statistics."""
    opt = multisecant(optax.sgd(0.1), learning_rate=None, history_dtype="float16")
    value, grads = jax.value_and_grad(loss)(params, x)
    stats = multisecant_stats(opt.init(params))
    updates, _ = jax.eval_shape(lambda: opt.update(grads, opt.init(params), params, value=value))
    assert updates["w"].shape == params["w"].shape
    assert_type(stats, MultisecantStats)
    counts: list[jax.Array] = [stats.evaluations, stats.accepted, stats.rejected, stats.nonfinite_count]
    measures: list[jax.Array] = [stats.damping, stats.dimension, stats.prediction_error]
    assert all(number.shape == () for number in [*counts, *measures])
    return stats


def use_momentum() -> MomentumSettings:
    """The legacy pair with every argument."""
    pair = momentum_predictor("predictor", momentum=0.5, correction_weight=0.1, predicts="update")
    assert_type(pair, MomentumSettings)
    assert_type(pair.predictor, Momentum)
    assert phase_switched(optax.sgd(0.1), **pair._asdict()).init({"w": jnp.ones(3)}) is not None
    assert phase_switched(optax.sgd(0.1), predictor=pair.predictor, phases=pair.phases) is not None
    return pair


def use_losses(params: Params) -> LossReport:
    """The report of a run's losses, and two plots of them."""
    opt: optax.GradientTransformationExtraArgs = track_loss(optax.sgd(0.1))
    _, state = opt.update(params, opt.init(params), params, value=1.0)
    report = loss_report(state)
    assert_type(report, LossReport)
    recent: LossStatistics | None = report.over(3)
    last: float | None = report.last_value
    assert recent is not None
    assert recent.mean == last == 1.0
    figure = plots.draw_losses(LossReport.from_json(report.to_json()), path=None)
    plots.shade_phases(figure.axes[0], [Phase.FULL, Phase.PREDICT], first_step=0)
    return report


def use_programs(params: Params, x: jax.Array) -> Params:
    """A training step with a program for each kind."""
    opt = phase_switched(optax.sgd(0.1))

    def train_step(params: Params, state: optax.OptState, x: jax.Array) -> tuple[Params, optax.OptState]:
        value, grads = value_and_grad_by_phase(loss)(params, x, state=state)
        updates, state = opt.update(grads, state, params, value=value)
        moved: Params = optax.apply_updates(params, updates)
        return moved, state

    by_phase = jit_by_phase(train_step, donate_argnames=("state",))
    moved, _ = by_phase(params, opt.init(params), x)
    assert_type(moved, Params)
    assert by_phase.num_waits == 0
    return moved


def use_probe(params: Params, x: jax.Array) -> ProbeReport:
    """The measurements and the recommendation; `test_probe` runs such a probe, which takes long."""
    report = probe(loss, params, x, optax.sgd(0.1), steps=20)
    assert_type(report, ProbeReport)
    runs: list[ProbeRun | None] = [report.plain, report.plain_as_long, report.phase_switched, report.multisecant]
    assert all(run.gradients >= 0 for run in runs if run is not None)
    share: float | None = report.predictable_share
    assert share is not None
    assert report.recommendation in ("none", "phase_switched", "multisecant")
    assert report.code in str(report)
    return report


def use_state_bytes(state: optax.OptState) -> int:
    """By part, in all, and as text."""
    size = state_bytes(state, per_device=True)
    assert_type(size, StateBytes)
    parts: list[int] = [size.moments, size.history, size.accumulator, size.residual, size.losses, size.bookkeeping]
    assert sum(parts) == size.total
    line: str = str(size)
    assert line
    return size.total


def use_queries(state: optax.OptState) -> PhaseStats:
    """Both queries, every field, and the phases."""
    assert_type(needs_backward(state), jax.Array)
    stats = phase_stats(state)
    assert_type(stats, PhaseStats)
    counts: list[jax.Array] = [
        stats.total_steps,
        stats.warmup_steps,
        stats.full_steps,
        stats.predict_steps,
        stats.correct_steps,
        stats.cycles,
        stats.nonfinite_count,
    ]
    measures: list[jax.Array] = [stats.steps_per_backward, stats.mean_prediction_error, stats.last_prediction_error]
    assert all(x.shape == () for x in [*counts, *measures])
    phase: Phase = Phase(int(stats.phase))
    name: str = phase.name
    assert name in {p.name for p in (Phase.WARMUP, Phase.FULL, Phase.PREDICT, Phase.CORRECT)}
    number: int = Phase.PREDICT  # A Phase is an int.
    guard: GuardStats | None = stats.guard
    quality: PredictionQuality | None = stats.quality
    if guard is not None and quality is not None:
        assert_type(guard, GuardStats)
        assert_type(quality, PredictionQuality)
        action: GuardAction = GuardAction(int(guard.action))
        worth: jax.Array = quality.r_squared
        ridge: jax.Array | None = quality.ridge
        assert ridge is None or ridge.shape == ()
        assert action in GuardAction
        assert worth.ndim == 1
    assert number == 2
    return stats


def use_value_and_grad(params: Params, x: jax.Array, state: optax.OptState) -> None:
    """Every signature of the function and of what it returns."""
    by_phase: ValueAndGradByPhase[jax.Array] = value_and_grad_by_phase(loss)
    value, grads = by_phase(params, x, state=state, scale=2.0)
    assert_type(value, jax.Array)
    assert value.shape == ()
    assert grads["w"].shape == params["w"].shape
    value, grads = value_and_grad_by_phase(loss, 0)(params, x, state=state)
    of_both = phase_switched(optax.sgd(0.1)).init((params, x))
    value, grads = value_and_grad_by_phase(loss, argnums=(0, 1))(params, x, state=of_both)
    value, grads = value_and_grad_by_phase(loss, [1], allow_int=True)(params, x, state=of_both)
    value, grads = value_and_grad_by_phase(loss, value_in_predict=True)(params, x, state=state)
    aux = {"mean": jnp.zeros([])}
    (value, aux), grads = value_and_grad_by_phase(loss_with_aux, has_aux=True)(
        params, x, state=state, aux_in_predict=aux
    )
    (value, aux), grads = value_and_grad_by_phase(loss_with_aux, 0, True, value_in_predict=True)(params, x, state=state)
    assert aux["mean"].shape == ()


def main() -> None:
    """The start of each transformation, and two steps of one of them."""
    version: str = vsa_optax.__version__
    names: list[str] = vsa_optax.__all__
    assert version
    assert names
    params: Params = {"w": jnp.ones(3)}
    x = jnp.ones((2, 3))
    use_codecs(params)
    use_collectives(params)
    use_accumulation(params)
    use_arrays(x)
    assert use_leaps(params, x).accepted == 0
    assert use_programs(params, x)["w"].shape == (3,)
    assert use_losses(params).total_steps == 1
    assert use_momentum().phases.predict_steps == 4
    states = [opt.init(params) for opt in use_transformations()]
    assert len(states) > 1
    assert use_state_bytes(states) > 0
    opt, state = use_transformations()[1], states[1]
    use_value_and_grad(params, x, state)
    value, grads = value_and_grad_by_phase(loss)(params, x, state=state)
    updates, state = opt.update(grads, state, params, value=value)
    updates, state = opt.update(grads, state, params, value=1.0)
    assert use_queries(state).total_steps == 2
    params = optax.apply_updates(params, updates)


if __name__ == "__main__":
    main()
