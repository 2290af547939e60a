"""Which losses are kept, counted, or passed over; and that the optimizer inside does not notice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refusals import check_names_itself

import vsa_optax
from vsa_optax import Cycle, Phase, Window

RHYTHM = Cycle(warmup_steps=2, full_steps=2, predict_steps=4, correct_every=3)


def switched(opt=None):
    return vsa_optax.phase_switched(opt or optax.sgd(0.1), predictor=Window(predicts="gradient"), phases=RHYTHM)


def loss(w):
    return jnp.sum((w - 2.0) ** 2)


@functools.cache
def trained(*, value_in_predict, steps=40):
    """The state behind a run, and the phases and losses of its steps."""
    opt = vsa_optax.track_loss(switched())

    def step(carry, _):
        params, state = carry
        phase, true_loss = vsa_optax.phase_stats(state).phase, loss(params)
        grad = vsa_optax.value_and_grad_by_phase(loss, value_in_predict=value_in_predict)
        value, grads = grad(params, state=state)
        updates, state = opt.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), (phase, true_loss)

    params = jnp.arange(3.0)
    (_, state), seen = jax.jit(lambda: jax.lax.scan(step, (params, opt.init(params)), None, length=steps))()
    return state, *map(np.asarray, seen)


def kept(state):
    num, size = int(state.num_measured), state.values.size
    order = np.arange(max(num - size, 0), num) % size
    return np.asarray(state.values)[order], np.asarray(state.steps)[order]


def test_a_repeated_loss_is_no_measurement():
    state, phases, losses = trained(value_in_predict=False)
    (true_steps,) = np.nonzero(phases != Phase.PREDICT)
    values, steps = kept(state)
    np.testing.assert_array_equal(steps, true_steps)
    np.testing.assert_allclose(values, losses[true_steps], rtol=1e-6)
    np.testing.assert_array_equal(state.phases[: len(true_steps)], phases[true_steps])
    assert (state.total_steps, state.num_repeated) == (40, 40 - len(true_steps))


def test_a_loss_that_a_forward_pass_measured_in_predict_counts():
    state, phases, losses = trained(value_in_predict=True)
    values, steps = kept(state)
    np.testing.assert_array_equal(steps, np.arange(40))
    np.testing.assert_allclose(values, losses, rtol=1e-6)
    np.testing.assert_array_equal(state.phases[:40], phases)
    assert state.num_repeated == 0


def test_a_repeated_loss_is_known_by_its_bits_where_the_trace_tells_nothing():
    """Gradients come from one program, and the update is another."""
    opt = vsa_optax.track_loss(switched())
    grad = jax.jit(lambda params, state: vsa_optax.value_and_grad_by_phase(loss)(params, state=state))
    update = jax.jit(lambda grads, state, value: opt.update(grads, state, value=value))
    params = jnp.arange(3.0)
    state = opt.init(params)
    for _ in range(20):
        value, grads = grad(params, state)
        updates, state = update(grads, state, value)
        params = optax.apply_updates(params, updates)
    assert state.num_repeated == vsa_optax.phase_stats(state).predict_steps > 5


def test_the_same_loss_twice_is_a_measurement_in_a_true_step():
    opt = vsa_optax.track_loss(switched())
    state, update = opt.init(jnp.zeros(2)), jax.jit(opt.update)
    true_steps = 0
    for _ in range(15):
        true_steps += int(vsa_optax.needs_backward(state))
        _, state = update(jnp.ones(2), state, value=1.0)
    assert state.num_measured == true_steps == 15 - state.num_repeated


def test_errors_of_predictions_stand_beside_the_losses_they_were_measured_with():
    state, phases, _ = trained(value_in_predict=False)
    (true_steps,) = np.nonzero(phases != Phase.PREDICT)
    errors = np.asarray(state.errors[: len(true_steps)])
    # A calibrated line is compared at every true step; only errors after a leap count.
    behind = np.array([step > 0 and phases[step - 1] == Phase.PREDICT for step in true_steps])
    assert (errors[behind] >= 0).all()
    assert (errors[true_steps < 2] == -1).all()
    stats = vsa_optax.phase_stats(state)
    np.testing.assert_allclose(stats.mean_prediction_error, np.mean(errors[errors >= 0]), rtol=1e-5)
    assert (state.errors[len(true_steps) :] == -1).all()


def test_what_is_not_finite_is_counted_and_nothing_else():
    opt = vsa_optax.track_loss(optax.identity(), max_history=8)
    state, update = opt.init(jnp.zeros(2)), jax.jit(opt.update)
    for value in (3.0, np.nan, np.inf, 2.0, -np.inf, np.nan, 5.0):
        updates, state = update(jnp.ones(2), state, value=value)
        np.testing.assert_array_equal(updates, 1)
    values, steps = kept(state)
    assert (values.tolist(), steps.tolist()) == ([3.0, 2.0, 5.0], [0, 3, 6])
    assert (state.num_nonfinite, state.total_steps) == (4, 7)
    assert (state.best_value, state.best_step) == (2.0, 3)


def test_the_ring_keeps_the_last():
    opt = vsa_optax.track_loss(optax.identity(), max_history=5)
    state = jax.lax.scan(
        lambda s, v: (opt.update(jnp.ones(1), s, value=v)[1], None), opt.init(jnp.zeros(1)), jnp.arange(13.0)
    )[0]
    assert kept(state)[0].tolist() == [8.0, 9.0, 10.0, 11.0, 12.0]
    assert (state.best_value, state.best_step) == (0.0, 0)


def test_the_optimizer_does_not_notice():
    plain, tracked = switched(optax.adam(0.1)), vsa_optax.track_loss(switched(optax.adam(0.1)))
    params = jnp.arange(3.0)
    states = plain.init(params), tracked.init(params)
    updates = jax.jit(plain.update), jax.jit(tracked.update)
    for step in range(20):
        results = [
            update(params * (step + 1), state, params, value=float(step))
            for update, state in zip(updates, states, strict=True)
        ]
        (expected, _), (found, _) = results
        states = tuple(state for _, state in results)
        np.testing.assert_array_equal(found, expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), states[0], states[1].inner_state))


def test_a_run_resumes_exactly(tmp_path):
    from vsa_optax import checkpoint

    opt = vsa_optax.track_loss(optax.sgd(0.1), max_history=4)
    update = jax.jit(opt.update)
    state = opt.init(jnp.zeros(2))
    for value in range(6):
        _, state = update(jnp.ones(2), state, value=value)
    checkpoint.save(tmp_path, 6, state)
    _, restored = checkpoint.restore(tmp_path, opt.init(jnp.zeros(2)))
    for value in range(6, 9):
        _, state = update(jnp.ones(2), state, value=value)
        _, restored = update(jnp.ones(2), restored, value=value)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), state, restored))


def test_settings_are_those_of_the_transformation_and_not_of_an_old_state():
    old = vsa_optax.track_loss(optax.identity(), spike_threshold=9.0).init(jnp.zeros(1))
    _, state = vsa_optax.track_loss(optax.identity(), spike_threshold=2.0).update(jnp.ones(1), old, value=1.0)
    assert state.settings.spike_threshold == 2.0
    with pytest.raises(ValueError, match="max_history is 1000, here 7"):
        vsa_optax.track_loss(optax.identity(), max_history=7).update(jnp.ones(1), old, value=1.0)


def test_it_works_with_programs_by_phase():
    opt = vsa_optax.track_loss(switched())

    def step(params, state):
        value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    found = []
    for jit in (jax.jit, vsa_optax.jit_by_phase):
        carry, compiled = (jnp.arange(3.0), opt.init(jnp.arange(3.0))), jit(step)
        for _ in range(30):
            carry = compiled(*carry)
        found.append(carry[1])
    for name in ("steps", "phases", "num_measured", "num_repeated"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
    np.testing.assert_allclose(found[0].values, found[1].values, rtol=1e-4)


@pytest.mark.parametrize(
    "opt",
    [switched(vsa_optax.track_loss(optax.sgd(0.1))), optax.chain(vsa_optax.track_loss(optax.identity()), switched())],
    ids=["inside", "beside"],
)
def test_where_it_cannot_see_the_phases_repeated_losses_are_refused(opt):
    params = jnp.arange(3.0)
    state = opt.init(params)

    def step(params, state):
        value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
        return opt.update(grads, state, params, value=value)

    with pytest.raises(ValueError, match=r"follows the loss \(TrackLossState\)"):
        step(params, state)


def test_a_loss_is_needed_and_arguments_name_themselves():
    opt = vsa_optax.track_loss(optax.identity())
    with pytest.raises(ValueError, match="needs the loss at every step"):
        opt.update(jnp.ones(1), opt.init(jnp.zeros(1)))
    with pytest.raises(ValueError, match="opt must be"):
        vsa_optax.track_loss(3)
    make = functools.partial(vsa_optax.track_loss, optax.identity())
    for name, value, valid in (
        ("max_history", 0, ">= 1"),
        ("rolling_window", 1, ">= 2"),
        ("spike_threshold", 0, "> 0"),
        ("divergence_threshold", 0.9, ">= 1"),
        ("convergence_window", 3, ">= 4"),
        ("convergence_threshold", -1, ">= 0"),
    ):
        check_names_itself(make, name, value, valid)


@pytest.mark.parametrize("max_history", [10, 1000])
def test_state_cost(max_history):
    def size(opt):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(opt.init, jnp.zeros(3))))

    assert size(vsa_optax.track_loss(optax.identity(), max_history=max_history)) == 8 * max_history + 44
    more = size(vsa_optax.track_loss(switched(), max_history=max_history)) - size(switched())
    assert more == 16 * max_history + 44


def test_devices_average_a_loss_that_differs():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    opt = vsa_optax.track_loss(optax.identity(), max_history=3)

    def step(state, values):
        return opt.update(jnp.ones(1), state, value=values[0])[1]

    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(spec(), spec("x")), out_specs=spec()))
    assert mapped(opt.init(jnp.zeros(1)), jnp.array([1.0, 4.0])).values[0] == 2.5
