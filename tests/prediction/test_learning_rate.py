"""One learning rate, which counts all steps: never two, and never one that a resting optimizer counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import AS_USERS_DO

import vsa_optax
from vsa_optax import Cycle, Guarded, Recursive, Secants, Window

SCHEDULE = optax.cosine_decay_schedule(0.1, 60)
# Optimizers whose state holds a schedule's count, wherever it is.
COUNTING = {
    "alias": lambda: optax.adamw(SCHEDULE),
    "chain": lambda: optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.scale_by_schedule(SCHEDULE)),
    "masked": lambda: optax.masked(optax.sgd(SCHEDULE), True),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
    "injected inside": lambda: optax.inject_hyperparams(lambda b1: optax.adamw(SCHEDULE, b1=b1))(b1=0.9),
}
CONSTANT = {"injected number": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.1)}
PARAMS = jnp.ones(3)


def loss(params):
    return 0.5 * jnp.sum(jnp.array([1.0, 0.3, 0.1]) * params**2)


def train(opt):
    def step(carry, _):
        params, state = carry
        value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
        updates, state = opt.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda: jax.lax.scan(step, (PARAMS, opt.init(PARAMS)), length=60)[0], **AS_USERS_DO)
    return run()


def test_around_secants_a_schedule_inside_counts_all_steps():
    """The same bits as with the schedule outside."""
    inside, state = train(vsa_optax.phase_switched(optax.adamw(SCHEDULE), predictor=Secants(4)))
    outside, _ = train(vsa_optax.phase_switched(optax.adamw(1.0), learning_rate=SCHEDULE, predictor=Secants(4)))
    np.testing.assert_array_equal(inside, outside)
    assert vsa_optax.phase_stats(state).predict_steps > 30
    assert optax.tree.get(state.inner_state[-1], "count") == 60


@pytest.mark.parametrize("predictor", [Window(), Recursive()])
@pytest.mark.parametrize("name", COUNTING)
def test_where_updates_are_predicted_a_schedule_inside_is_refused(name, predictor):
    opt = vsa_optax.phase_switched(COUNTING[name](), predictor=predictor)
    with pytest.raises(ValueError, match=r"^learning_rate must be given .*true steps only.*optax\.adamw\(1\.0\)"):
        jax.eval_shape(opt.init, PARAMS)


@pytest.mark.parametrize(
    "settings",
    [
        dict(predictor=Secants()),
        dict(predictor=Window(predicts="gradient")),
        dict(predictor=Window(), phases=None),
        dict(predictor=Window(), phases=Cycle(predict_steps=0)),
    ],
)
def test_where_it_counts_all_steps_it_is_welcome(settings):
    for make in COUNTING.values():
        jax.eval_shape(vsa_optax.phase_switched(make(), **settings).init, PARAMS)


@pytest.mark.parametrize("predictor", [Secants(), Window()])
@pytest.mark.parametrize("rate", [0.5, SCHEDULE], ids=["number", "schedule"])
def test_two_rates_are_refused(predictor, rate):
    for make in (COUNTING | CONSTANT).values():
        opt = vsa_optax.phase_switched(make(), learning_rate=rate, predictor=predictor)
        with pytest.raises(ValueError, match=r"^learning_rate must be None .* of its own, here .*multiply") as error:
            jax.eval_shape(opt.init, PARAMS)
        assert repr(rate) in str(error.value)
    named = vsa_optax.phase_switched(CONSTANT["injected number"](), learning_rate=rate)
    with pytest.raises(ValueError, match="here inject_hyperparams' learning_rate"):
        jax.eval_shape(named.init, PARAMS)


def test_what_is_no_rate_may_be_injected_beside_one():
    decay = optax.inject_hyperparams(lambda weight_decay: optax.adamw(1.0, weight_decay=weight_decay))
    for weight_decay in (0.1, SCHEDULE):
        opt = vsa_optax.phase_switched(decay(weight_decay=weight_decay), learning_rate=0.1, predictor=Window())
        jax.eval_shape(opt.init, PARAMS)


@pytest.mark.parametrize("phases", [Guarded(), None], ids=["guarded", "off"])
def test_a_rate_may_be_injected_from_outside(phases):
    """The transformation itself takes it, or a function of the rate alone."""

    def by_rate(learning_rate):
        return vsa_optax.phase_switched(optax.adamw(1.0), learning_rate=learning_rate, phases=phases)

    itself = functools.partial(optax.inject_hyperparams(vsa_optax.phase_switched), optax.adamw(1.0), phases=phases)
    for make in (itself, optax.inject_hyperparams(by_rate)):
        for rate in (0.25, lambda count: 0.25):
            opt = make(learning_rate=rate)
            state = opt.init(PARAMS)
            assert state.hyperparams == {"learning_rate": 0.25}
            if phases is None:
                updates, _ = opt.update(PARAMS, state, PARAMS)
                np.testing.assert_allclose(updates, -0.25 * np.ones(3), rtol=1e-3)
            else:
                jax.eval_shape(opt.update, PARAMS, state, PARAMS)


@pytest.mark.parametrize(
    "rate", [-0.1, float("nan"), "0.1", 1e300, np.float32(np.nan), np.float64(-1.0), jnp.float32(np.inf)]
)
def test_a_rate_out_of_range_names_itself(rate):
    with pytest.raises(ValueError, match="learning_rate must be a finite number >= 0"):
        vsa_optax.phase_switched(optax.adam(1.0), learning_rate=rate)


def test_a_rate_that_is_no_scalar():
    with pytest.raises(ValueError, match=r"learning_rate.*shape \(2,\)"):
        vsa_optax.phase_switched(optax.adam(1.0), learning_rate=jnp.ones(2))
