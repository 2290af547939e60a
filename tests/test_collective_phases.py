"""Phases inside ``shard_map``: devices decide together, whatever each has for a loss or a gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from samples import CHEAP

from vsa_optax import (
    AdaptiveCycle,
    Cycle,
    Guarded,
    Phase,
    Secants,
    TritCodec,
    Window,
    compressed_pmean,
    multisecant,
    multisecant_stats,
    needs_backward,
    phase_stats,
    phase_switched,
    state_specs,
    value_and_grad_by_phase,
)
from vsa_optax.core.mesh import as_varying

NUM = 4
MESH = Mesh(np.array(jax.devices()[:NUM]), ("data",))
DATA = frozenset(["data"])
LENGTHS = dict(warmup_steps=3, full_steps=2, predict_steps=5, correct_every=3)
FIXED = dict(predictor=Window(), phases=Cycle(**LENGTHS))
every_check = pytest.mark.parametrize("is_checked", [True, False], ids=["checked", "unchecked"])


def mapped(function, in_specs, out_specs, is_checked=True):
    return jax.jit(
        jax.shard_map(function, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=is_checked), **CHEAP
    )


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def loss(params, batch):
    """Of a device's ``batch [1, 41]``: a target, and what the loss is multiplied by."""
    return batch[0, 40] * jnp.mean((params - batch[0, :40]) ** 2)


def optimizer(is_coded=True, **kwargs):
    """With codes as sent, or with a codec that leaves gradients of this size as they are, which compiles in less."""
    codec = TritCodec(2, block_size=32) if is_coded else TritCodec()
    inner = compressed_pmean("data", codec, error_feedback=True)
    return phase_switched(optax.chain(inner, optax.adamw(1.0)), learning_rate=0.03, **kwargs)


@functools.cache
def program(is_checked=True, **kwargs):
    """A state, and a compiled step: ``(params, state, batch)`` to both and every device's phase before the step."""
    opt = optimizer(**kwargs)
    specs = state_specs(jax.eval_shape(opt.init, jnp.zeros(40)), "data")

    def varying(x):
        return as_varying(x, DATA) if is_checked else x

    def step(params, state, batch):
        value, grads = value_and_grad_by_phase(loss)(varying(params), batch, state=state)
        phase = varying(state.machine.phase)[None]
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, phase

    out_specs = (P(), specs, P("data"))
    state = mapped(opt.init, P(), specs, is_checked)(jnp.zeros(40))
    mapped_step = mapped(step, (P(), specs, P("data")), out_specs, is_checked)
    return state, mapped_step.lower(jnp.zeros(40), state, batches(1)[0]).compile()


def batches(steps):
    """``[steps, n, 41]``: targets that stay nearly the same."""
    targets = draw(0, NUM, 40) + 0.1 * draw(1, steps, NUM, 40)
    return np.concatenate([targets, np.ones((steps, NUM, 1), np.float32)], axis=-1)


def run(is_checked, data, **kwargs):
    """Parameters and state at the end, and the phases of all steps, the same on all devices."""
    state, step = program(is_checked, **kwargs)
    params, phases = jnp.zeros(40), ""
    for batch in data:
        params, state, phase = step(params, state, batch)
        assert len(set(np.asarray(phase).tolist())) == 1
        phases += Phase(int(phase[0])).name[0]
    assert len({np.asarray(shard.data).tobytes() for shard in params.addressable_shards}) == 1
    return params, state, phases


@every_check
def test_devices_communicate_in_true_steps_only(is_checked):
    """By the count of averages, and by the compiled program, where nothing outside a branch communicates."""
    params, state, phases = run(is_checked, batches(30), **FIXED)
    assert phases == reference.walk_phases(30, **LENGTHS)
    stats = phase_stats(state)
    assert stats.predict_steps == phases.count("P") > 10
    assert state.inner_state[0].step == 30 - phases.count("P")
    assert np.linalg.norm(params - draw(0, NUM, 40).mean(axis=0)) < 0.7 * np.linalg.norm(draw(0, NUM, 40).mean(axis=0))

    text = program(is_checked, **FIXED)[1].as_text()
    computations = re.split(r"\n(?=(?:ENTRY )?%?[\w.-]+ \(.*\{\n)", text)
    kind = r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(-start)?\("
    holding = [part for part in computations if re.search(kind, part)]
    entry = [part for part in computations if part.startswith("ENTRY")]
    names = [re.match(r"%?([\w.-]+) ", part)[1] for part in holding]
    assert len(entry) == 1
    assert "ENTRY" not in "".join(part[:5] for part in holding)
    assert sum(len(re.findall(kind, part)) for part in holding) == 4  # Payloads twice, the flag, the loss.
    # Each of them is called as a branch, or as a loop's body; a call from elsewhere would run it in all phases.
    for name in names:
        calls = re.findall(rf"(\w+)=(?:\{{[^}}]*)?%?{re.escape(name)}\b", text)
        assert calls
        assert set(calls) <= {"branch_computations", "true_computation", "false_computation", "body"}


@every_check
def test_one_devices_loss_does_not_split_the_phases(is_checked):
    """Lengths that follow the loss follow the mean one, on all devices; one NaN among the losses is passed over."""
    data = batches(60)
    data[:, 2, 40] = np.linspace(1, 40, 60)  # This device's loss rises, the others' fall.
    _, state, phases = run(is_checked, data, is_coded=False, predictor=Window(), phases=AdaptiveCycle(**LENGTHS))
    machine = state.machine.unpacked()
    assert phases != reference.walk_phases(60, **LENGTHS)
    means = np.mean(data[:, :, 40], axis=1)
    assert machine.adaptive.num_losses == 60
    assert machine.adaptive.losses[0] == pytest.approx(float(np.mean(data[0, :, :40] ** 2 * data[0, :, 40:])), rel=1e-5)
    assert machine.adaptive.full_length > LENGTHS["full_steps"]
    assert np.all(np.diff(means) > 0)


def test_the_guard_decides_for_all():
    _, state, phases = run(True, batches(40), is_coded=False, predictor=Window(), phases=Guarded(warmup_steps=3))
    assert phases[:4] == "WWWF"
    assert phase_stats(state).guard.constant > 0
    assert state.inner_state[0].step == 40 - phases.count("P")


@every_check
def test_a_nan_on_one_device_in_any_phase(is_checked):
    """Skipped on all, counted once, nobody hangs; in PREDICT no gradient is looked at."""
    walk = reference.walk_phases(16, **LENGTHS)
    whole = batches(16)
    for bad in map(walk.index, "WFPC"):
        data = whole.copy()
        data[bad, bad % NUM, 40] = np.nan
        params, state, phases = run(is_checked, data, **FIXED)
        skipped = {bad} if walk[bad] != "P" else set()
        assert phases == reference.walk_phases(16, skipped=skipped, **LENGTHS)
        assert phase_stats(state).nonfinite_count == len(skipped)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
        assert state.inner_state[0].step == 16 - phases.count("P") - len(skipped)


@every_check
def test_the_loss_is_averaged_where_it_differs(is_checked):
    """And in PREDICT the last one stays, without asking the other devices."""
    state, step = program(is_checked, **FIXED)
    params, data = jnp.zeros(40), batches(8)
    data[:, 1, 40] = 7.0
    for t, batch in enumerate(data):
        phase, before = int(state.machine.phase), state.machine.unpacked().value
        wanted = np.mean(batch[:, 40] * np.mean((np.asarray(params) - batch[:, :40]) ** 2, axis=1))
        params, state, _ = step(params, state, batch)
        expected = before if phase == Phase.PREDICT else wanted
        assert float(state.machine.unpacked().value) == pytest.approx(float(expected), rel=1e-5), t
    assert phase_stats(state).predict_steps > 0


def test_without_predictions_a_nan_is_counted_on_all():
    state, step = program(True, is_coded=False, predictor=Window(), phases=None)
    data = batches(3)
    data[1, 2, 40] = np.nan
    params = jnp.zeros(40)
    for batch in data:
        params, state, _ = step(params, state, batch)
    assert phase_stats(state).nonfinite_count == state.inner_state[0].nonfinite_count == 1
    assert np.isfinite(params).all()


@every_check
def test_the_gradients_are_those_of_each_device(is_checked):
    """And a value, too; in PREDICT zeros and the last value, of the same type for ``shard_map``."""
    state, step = program(is_checked, **FIXED)
    specs = state_specs(state, "data")

    def differentiate(params, state, batch):
        own = as_varying(params, DATA) if is_checked else params
        value, grads = value_and_grad_by_phase(loss)(own, batch, state=state)
        return value[None], grads[None]

    look = mapped(differentiate, (P(), specs, P("data")), P("data"), is_checked)
    params, seen = draw(3, 40), set()
    for batch in batches(8):
        value, grads = look(params, state, batch)
        needs = bool(needs_backward(state))
        seen.add(needs)
        for i in range(NUM):
            wanted = jax.value_and_grad(loss)(params, batch[i : i + 1])
            np.testing.assert_allclose(value[i], wanted[0] if needs else state.machine.unpacked().value, rtol=1e-6)
            np.testing.assert_allclose(grads[i], wanted[1] if needs else np.zeros(40), rtol=1e-5, atol=1e-7)
        _, state, _ = step(params, state, batch)
    assert seen == {True, False}


def test_predicting_gradients_of_each_device_is_refused():
    reason = r"along \['data'\]: {}, which differ .*: use predictor=Window\(.*\), whose updates are the same on all"
    for predictor, words in (
        (Secants(), "secants predict gradients"),
        (Window(predicts="gradient"), "predicts='grad.*"),
    ):
        with pytest.raises(ValueError, match=reason.format(words)):
            jax.eval_shape(optimizer(predictor=predictor).init, jnp.zeros(40))
    for predictor in (Secants(), Window(predicts="gradient"), Window()):
        opt = phase_switched(optax.sgd(0.1), predictor=predictor)
        with pytest.raises(ValueError, match=r"gradients differ between the devices along \['data'\]"):
            mapped(lambda g, p, opt=opt: opt.update(g[0], opt.init(p), p), (P("data"), P()), P())(
                draw(0, NUM, 40), jnp.zeros(40)
            )


def test_averaged_gradients_and_machines_of_their_own_are_welcome():
    """The mean as the optimizer's own link; and on each device a run of its own, whose phases may part."""
    opt = phase_switched(optax.sgd(1.0), learning_rate=0.1, **FIXED)
    params, grads = jnp.zeros(40), draw(0, NUM, 40)

    def averaged(grads, state):
        return opt.update(lax.pmean(grads[0], "data"), state)

    updates, _ = mapped(averaged, (P("data"), P()), P())(grads, opt.init(params))
    np.testing.assert_allclose(updates, -0.1 * grads.mean(axis=0), rtol=1e-5, atol=1e-7)

    def alone(grads, state):
        state = jax.tree.map(lambda x: x[0], state)
        return jax.tree.map(lambda x: x[None], opt.update(grads[0], state))

    states = jax.tree.map(lambda x: jnp.stack([x] * NUM), opt.init(params))
    broken = grads.copy()
    broken[1, 3] = np.nan
    updates, states = mapped(alone, P("data"), P("data"), is_checked=False)(broken, states)
    assert states.machine.unpacked().nonfinite_count.tolist() == [0, 1, 0, 0]
    assert states.machine.unpacked().steps_in_phase.tolist() == [1, 0, 1, 1]
    np.testing.assert_allclose(updates[0], -0.1 * grads[0], rtol=1e-6)


def test_what_follows_the_loss_gets_measured_ones_of_all_devices_in_predict():
    """Inside an optimizer that runs there; the loss that a forward pass gave differs between devices."""
    opt = phase_switched(optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()), predictor=Secants(2))
    params = jnp.ones(3)
    state = opt.init(params)
    state = state._replace(machine=state.machine._replace(phase=jnp.int32(Phase.PREDICT)))

    def step(losses, state):
        return opt.update(jnp.zeros(3), state, params, value=losses[0])[1].inner_state[-1].best_value

    losses = jnp.arange(4.0)
    assert mapped(step, (P("data"), P()), P())(losses, state) == jnp.mean(losses)


@functools.cache
def made_for_two(wrapped):
    """A state on two devices, and a step: ``(params, state, batch)`` to both and each device's own copy of both."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    average = compressed_pmean("data", TritCodec(3, block_size=32), error_feedback=True)
    opt = wrapped(average)
    specs = state_specs(jax.eval_shape(opt.init, jnp.zeros(40)), "data")

    def step(params, state, batch):
        own = as_varying(params, DATA)
        if wrapped is switching:
            value, grads = value_and_grad_by_phase(loss)(own, batch, state=state)
        else:
            value, grads = jax.value_and_grad(loss)(own, batch)
        updates, state = opt.update(grads, state, params, value=lax.pmean(value, "data"))
        return optax.apply_updates(params, updates), state

    def on_two(function, in_specs, out_specs):
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs), **CHEAP)

    state = on_two(opt.init, P(), specs)(jnp.zeros(40))
    return state, on_two(step, (P(), specs, P("data")), (P(), specs))


def leaping(average):
    return optax.chain(average, multisecant(optax.adam(0.05), history_window=2, history_dtype=None))


def switching(average):
    return phase_switched(optax.chain(average, optax.adamw(1.0)), learning_rate=0.03, **FIXED)


@pytest.mark.parametrize("wrapped", [switching, leaping])
def test_two_devices_decide_alike_and_go_on_from_a_checkpoint(wrapped, tmp_path):
    """Both have the same bits, except for residuals; a true step sends a gradient, and a predicted one does not."""
    checkpoint = pytest.importorskip("vsa_optax.checkpoint")
    state, step = made_for_two(wrapped)
    params, data = jnp.zeros(40), batches(16)[:, :2]
    for t, batch in enumerate(data):
        params, state = step(params, state, batch)
        if t == 8:  # In PREDICT.
            checkpoint.save(tmp_path, t, (params, state))
    for leaf in jax.tree.leaves((params, state)):
        if leaf.is_fully_replicated:
            assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1
    if wrapped is switching:
        exchanges, predicted = state.inner_state[0].step, phase_stats(state).predict_steps
        assert exchanges == 16 - predicted
        assert predicted == reference.walk_phases(16, **LENGTHS).count("P") > 4
    else:
        exchanges, stats = state[0].step, multisecant_stats(state)
        assert exchanges == stats.evaluations == 16
        assert stats.accepted > 8
    at, restored = checkpoint.restore(tmp_path, (jnp.zeros_like(params), made_for_two(wrapped)[0]))
    assert at == 8
    for batch in data[9:]:
        restored = step(*restored, batch)
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)
