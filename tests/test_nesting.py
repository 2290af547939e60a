"""Inside and around what Optax offers."""

import functools

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsa_optax
from vsa_optax import Recursive, Window

SHORT = dict(warmup_steps=2, full_steps=2, predict_steps=4, correct_every=2, length=3)
PARAMS = {"phase": jnp.arange(1.0, 4.0), "w": jnp.ones((2, 2))}


def loss(params):
    return sum(jnp.sum((p - 3.0) ** 2) for p in jax.tree.leaves(params))


def run(opt, steps=40, params=PARAMS):
    state = opt.init(params)

    @jax.jit
    def step(params, state):
        value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    stats = vsa_optax.phase_stats(state)
    assert stats.total_steps == steps
    assert stats.predict_steps == pytest.approx(steps // 2, abs=4)
    return params, state


def rated(learning_rate):
    return blind.phase_switched(optax.adam(1.0), learning_rate=learning_rate, **SHORT)


NESTINGS = {
    "chain": lambda: optax.chain(optax.clip(10.0), rated(0.05), optax.scale(1.0)),
    "chain around a chain": lambda: blind.phase_switched(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0)), learning_rate=0.05, **SHORT
    ),
    "head of a chain": lambda: optax.chain(blind.predict_gradients(**SHORT), optax.adam(0.05)),
    "masked inside": lambda: blind.phase_switched(
        optax.chain(optax.masked(optax.scale_by_adam(), {"phase": True, "w": False}), optax.scale(-0.05)),
        **SHORT,
    ),
    "masked outside": lambda: optax.masked(rated(0.05), {"phase": True, "w": True}),
    "partition, one frozen": lambda: optax.partition(
        {"a": rated(0.05), "b": optax.set_to_zero()}, {"phase": "a", "w": "b"}
    ),
    "partition inside": lambda: blind.phase_switched(
        optax.partition({"a": optax.adam(0.05), "b": optax.sgd(0.05)}, {"phase": "a", "w": "b"}), **SHORT
    ),
    "injected": lambda: optax.inject_hyperparams(rated)(learning_rate=0.05),
    "injected schedule": lambda: optax.inject_hyperparams(rated)(learning_rate=optax.cosine_decay_schedule(0.05, 40)),
    "apply_if_finite": lambda: optax.apply_if_finite(rated(0.05), 3),
}


@functools.cache
def trained(name):
    return run(NESTINGS[name]())[0]


@pytest.mark.parametrize("name", NESTINGS)
def test_trains(name):
    params = trained(name)
    assert loss(params) < loss(PARAMS)


def test_injected_rate_equals_the_constant_one():
    injected = trained("injected")
    constant, _ = run(rated(0.05))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), injected, constant)


# Groups of parameters outside the machine, whose optimizers would use the zeros of skipped steps as gradients.
STARVED = {
    "mask": lambda: optax.masked(rated(0.05), {"phase": True, "w": False}),
    "sgd": lambda: optax.partition({"a": rated(0.05), "b": optax.sgd(0.05)}, {"phase": "a", "w": "b"}),
    "secants and adamw": lambda: optax.partition(
        {"a": vsa_optax.phase_switched(optax.adam(0.1)), "b": optax.adamw(0.1)}, {"phase": "a", "w": "b"}
    ),
    "recursion and a chain": lambda: optax.chain(
        optax.partition(
            {"a": blind.phase_switched(optax.sgd(0.1), line=vsa_optax.Recursive), "b": optax.sgd(0.1)},
            {"phase": "a", "w": "b"},
        ),
        optax.scale(1.0),
    ),
}


@pytest.mark.parametrize("name", STARVED)
def test_groups_that_would_be_starved_are_refused(name):
    state = STARVED[name]().init(PARAMS)
    with pytest.raises(ValueError, match=r"does not cover \(\['w'\]\).*phase_switched\(optax\.multi_transform"):
        vsa_optax.value_and_grad_by_phase(loss)(PARAMS, state=state)


def test_multi_steps_around_counts_emissions():
    k = 3
    opt = optax.MultiSteps(rated(0.05), every_k_schedule=k)
    state, params = opt.init(PARAMS), PARAMS
    update = jax.jit(opt.update)
    for step in range(30):
        assert vsa_optax.phase_stats(state).total_steps == step // k
        _, state = update(jax.grad(loss)(params), state, params)


def test_map_params_sees_every_parameter_sized_leaf():
    for line, trees in ((Window, 4), (Recursive, 5)):  # History, residual and two moments.
        opt = blind.phase_switched(optax.adam(1.0), line=line, **SHORT)
        marked = optax.tree.map_params(opt, lambda x: "param", opt.init(PARAMS), transform_non_params=lambda x: "other")
        leaves = jax.tree.leaves(marked)
        assert leaves.count("param") == trees * len(PARAMS)
        assert leaves.count("other") > 5


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        (lambda: blind.phase_switched(optax.MultiSteps(optax.adam(0.1), 2)), "MultiSteps"),
        (
            lambda: blind.phase_switched(vsa_optax.ternary_multi_steps(optax.adam(0.1), 2)),
            r"TernaryMultiSteps.*ternary_multi_steps\(phase_switched\(...\), k\)",
        ),
        (lambda: blind.phase_switched(0.1), "opt must be an optax.GradientTransformation, got 0.1"),
    ],
)
def test_refused_where_it_is_made(opt, message):
    with pytest.raises(ValueError, match=message):
        opt()


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), "MultiSteps"),
        (
            lambda: optax.chain(vsa_optax.ternary_multi_steps(optax.adam(0.1), 2), optax.scale(1.0)),
            r"ternary_multi_steps, which emits rarely.*ternary_multi_steps\(phase_switched",
        ),
        (lambda: optax.chain(vsa_optax.accumulate_ternary(2), optax.sgd(0.1)), "accumulate_ternary, which emits"),
        (lambda: optax.chain(optax.sgd(0.1), optax.apply_every(4)), r"optax\.apply_every, which emits"),
        (
            lambda: optax.transforms.conditionally_mask(optax.sgd(0.1), lambda step: step % 4 == 0),
            "conditionally_mask where its updates are predicted",
        ),
        (lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)), "line search"),
        (lambda: optax.lbfgs(), "line search"),
        (lambda: optax.chain(blind.predict_gradients(), optax.adam(0.1)), "a phase machine of its own"),
    ],
)
def test_refused_at_init(inner, message):
    with pytest.raises(ValueError, match=message):
        blind.phase_switched(inner()).init(PARAMS)


@pytest.mark.parametrize("query", [vsa_optax.needs_backward, vsa_optax.phase_stats])
def test_queries_want_exactly_one_machine(query):
    with pytest.raises(ValueError, match=r"expected one phase machine.*found 0"):
        query(optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match=r"expected one phase machine.*found 2.*phase_switched\(optax.multi_transform"):
        query(optax.chain(blind.predict_gradients(), rated(0.1)).init(PARAMS))


def test_unknown_and_static_extra_arguments_pass_through():
    seen = {}

    def update(updates, state, params=None, *, scale=1.0, mode=None, **extra_args):
        seen.update(mode=mode, extra=sorted(extra_args))
        return jax.tree.map(lambda u: -u * scale, updates), state

    opt = blind.phase_switched(optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update), **SHORT)

    @jax.jit
    def updated(state):
        return opt.update(PARAMS, state, PARAMS, scale=jnp.float32(2.0), mode="static", value=1.0, other=None)[0]

    emitted = updated(opt.init(PARAMS))
    np.testing.assert_array_equal(emitted["w"], -2.0 * np.asarray(PARAMS["w"]))
    assert seen == {"mode": "static", "extra": ["other", "value"]}
    plain = blind.phase_switched(optax.sgd(0.1), **SHORT)
    jax.eval_shape(plain.update, PARAMS, plain.init(PARAMS), PARAMS, unknown=jnp.ones(3))
