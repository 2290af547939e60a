import functools
import types

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import AS_USERS_DO, PARAMS, SIZES, compiled_once, flat_of, gradient_stream, tree_of

import vsa_optax
from vsa_optax import AdaptiveCycle, Recursive, Window
from vsa_optax.prediction import stats

SHORT = dict(warmup_steps=3, full_steps=2, predict_steps=4, correct_every=2)


@pytest.mark.parametrize("line", [Window, Recursive])
@pytest.mark.parametrize("predicts", ["update", "gradient"])
def test_bad_gradients_leave_no_trace(line, predicts):
    """With bad steps in between, optimizer, history and residual hold what they hold without them."""
    opt = blind.phase_switched(optax.adam(0.1), line=line, predicts=predicts, **SHORT)
    update = jax.jit(opt.update)
    state = opt.init(PARAMS)
    for step, gradient in enumerate(gradient_stream(40)):
        if bool(vsa_optax.needs_backward(state)):
            for bad in (np.nan, np.inf):
                broken = dict(tree_of(gradient), b=jnp.float32(bad))
                emitted, after = update(broken, state, PARAMS)
                assert not flat_of(emitted).any()
                for name in ("history", "residual", "inner_state"):
                    jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
                assert after.machine.unpacked().nonfinite_count == state.machine.unpacked().nonfinite_count + 1
                assert vsa_optax.phase_stats(after).total_steps == step + 1
        _, state = update(tree_of(gradient), state, PARAMS)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_an_optimizers_own_nan_is_not_emitted_or_recorded():
    broken = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u / 0.0 * 0.0, updates))
    opt = blind.phase_switched(broken, **SHORT)
    emitted, state = jax.jit(opt.update)(tree_of(np.ones(sum(SIZES))), opt.init(PARAMS))
    assert not flat_of(emitted).any()
    assert state.machine.unpacked().nonfinite_count == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_without_predictions_a_bad_gradient_is_counted_and_opts_own_affair():
    opt = blind.phase_switched(optax.apply_if_finite(optax.adam(0.1), 2), predict_steps=0)
    emitted, state = jax.jit(opt.update)(tree_of(np.full(sum(SIZES), np.nan)), opt.init(PARAMS), PARAMS)
    assert not flat_of(emitted).any()
    assert state.machine.unpacked().nonfinite_count == 1


START = {"w": jnp.linspace(-1, 1, 50).reshape(5, 10), "b": jnp.linspace(0, 2, 7)}


def quadratic(params):
    return jnp.sum((params["w"] - 3.0) ** 2) + 0.5 * jnp.sum((params["b"] + 1.0) ** 4)


def train(opt, steps, *, runs=1, by_scan=False, options=types.MappingProxyType({}), loss=quadratic):
    """Parameters and state after these steps, and the updates of each; of several runs of one program, a list."""

    def step(carry, _):
        params, state = carry
        if stats.contains_machine(state):
            value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
            updates, state = opt.update(grads, state, params, value=value)
        else:
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = opt.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    start = START, opt.init(START)
    if by_scan:
        scan = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps))
        run = compiled_once(scan.lower(start), **options)
    else:
        one_step = compiled_once(jax.jit(step).lower(start, None), **options)

        def run(carry):
            history = []
            for _ in range(steps):
                carry, updates = one_step(carry, None)
                history.append(updates)
            return carry, jax.tree.map(lambda *x: np.stack(x), *history)

    trained = [(*carry, updates) for carry, updates in (run(start) for _ in range(runs))]
    return trained if runs > 1 else trained[0]


OPTIMIZERS = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
    "rmsprop": optax.rmsprop,
    "nadamw": optax.nadamw,
    "adafactor": optax.adafactor,
    "clipped": lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)),
}


RATE = optax.cosine_decay_schedule(0.05, 30)


@functools.cache
def trained_plainly(name, by_scan):
    return train(OPTIMIZERS[name](RATE), 30, by_scan=by_scan, options=AS_USERS_DO)[0]


# In a loop, too: these in every run, the others at length, for both programs are compiled as users' are.
IN_A_LOOP = {"adam", "adafactor", "clipped"}


@pytest.mark.parametrize("predicts", ["update", "gradient"])
@pytest.mark.parametrize(
    ("name", "by_scan"),
    [
        pytest.param(
            name,
            by_scan,
            id=f"{'scan' if by_scan else 'jit'}-{name}",
            marks=pytest.mark.slow if by_scan and name not in IN_A_LOOP else (),
        )
        for name in OPTIMIZERS
        for by_scan in (False, True)
    ],
)
def test_without_predictions_the_bits_are_plain_optax(name, predicts, by_scan):
    opt = blind.phase_switched(OPTIMIZERS[name](RATE), predict_steps=0, predicts=predicts)
    ours, state, _ = train(opt, 30, by_scan=by_scan, options=AS_USERS_DO)
    jax.tree.map(np.testing.assert_array_equal, ours, trained_plainly(name, by_scan))
    assert state.history is None
    assert state.residual is None
    assert state.machine.unpacked().errors is None


WARMUP = optax.warmup_cosine_decay_schedule(0.0, 0.05, 5, 40)


@functools.cache
def trained_with_a_warmup():
    return train(optax.adamw(WARMUP), 40)[0]


@pytest.mark.parametrize("predicts", ["update", "gradient"])
def test_learning_rate_without_predictions_equals_plain_optax(predicts):
    opt = blind.phase_switched(optax.adamw(1.0), learning_rate=WARMUP, predict_steps=0, predicts=predicts)
    ours, _, _ = train(opt, 40)
    plain = trained_with_a_warmup()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, plain)


@pytest.mark.parametrize("predicts", ["update", "gradient"])
def test_the_rate_of_step_t_applies_in_every_phase(predicts):
    """With unit directions, what is emitted is the schedule, read at the number of the step."""
    sign = optax.stateless(lambda updates, params: jax.tree.map(lambda u: -jnp.sign(u), updates))
    schedule = optax.cosine_decay_schedule(0.3, 60)
    opt = blind.phase_switched(sign, learning_rate=schedule, predicts=predicts, **SHORT)
    params, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    state, update = opt.init(params), jax.jit(opt.update)
    for rate in np.asarray(jax.jit(jax.vmap(schedule))(np.arange(60))):
        emitted, state = update(ones, state, params)
        np.testing.assert_allclose(emitted, -float(rate) * ones, rtol=1e-5, atol=1e-7)
    assert vsa_optax.phase_stats(state).predict_steps > 20


def test_inner_state_rests_in_predict_in_the_update_domain_only():
    for predicts, moves in (("update", False), ("gradient", True)):
        opt = blind.phase_switched(optax.adam(0.1), predicts=predicts, **SHORT)
        _, state, _ = train(opt, 40)
        counted = int(optax.tree.get(state.inner_state, "count"))
        stats = vsa_optax.phase_stats(state)
        assert counted == stats.total_steps if moves else counted == stats.total_steps - stats.predict_steps


def test_predict_gradients_in_a_chain_is_the_gradient_domain():
    chained, _, _ = train(optax.chain(blind.predict_gradients(**SHORT), optax.adam(0.1)), 40)
    wrapped, _, _ = train(blind.phase_switched(optax.adam(0.1), predicts="gradient", **SHORT), 40)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), chained, wrapped)


@pytest.mark.parametrize(("line", "predicts"), [(Window, "update"), (Recursive, "gradient")])
def test_same_bits_twice_and_in_scan(line, predicts):
    opt = blind.phase_switched(
        optax.adamw(1.0), learning_rate=0.05, line=line, length=3, predicts=predicts, when=AdaptiveCycle, **SHORT
    )
    once, twice = train(opt, 60, runs=2, options=AS_USERS_DO)
    scanned = train(opt, 60, by_scan=True, options=AS_USERS_DO)
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    jax.tree.map(np.testing.assert_array_equal, once, scanned)


@pytest.mark.parametrize("params", [{}, [], {"a": jnp.zeros((0, 2))}, jnp.float32(2.0), {"phase": jnp.ones(3)}])
def test_trees_with_nothing_much_in_them(params):
    opts = blind.predict_gradients(**SHORT), blind.phase_switched(optax.adam(0.1), **SHORT)

    @jax.jit
    def update(states):
        return [opt.update(params, state, params) for opt, state in zip(opts, states, strict=True)]

    states = [opt.init(params) for opt in opts]
    for _ in range(12):
        emitted, states = zip(*update(states), strict=True)
        assert [jax.tree.structure(tree) for tree in emitted] == [jax.tree.structure(params)] * 2
    for state in states:
        assert vsa_optax.phase_stats(state).predict_steps > 0
