"""Windows of micro-batches on several devices: each sums its own, and all decide together when and what they emit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from samples import CHEAP, draw

from vsa_optax import TritCodec, accumulate_ternary, compressed_pmean, state_specs, ternary_multi_steps

NUM, K, STEPS = 3, 2, 5
MESH = Mesh(np.array(jax.devices()[:NUM]), ("data",))
SHAPES = {"w": (5, 8), "b": ()}
BAD = 1  # The micro-batch in which one device has a NaN.


def average(**kwargs):
    return compressed_pmean("data", TritCodec(), **kwargs)


def skip_much(updates, gradient_step, params):
    largest = jnp.max(jnp.abs(updates["w"]))
    return largest > 50, {"largest": largest}


def make_gradients():
    """``[steps, n, ...]``; in the second micro-batch one device has a NaN, in the fourth another one much too much."""
    grads = {name: draw(i, STEPS, NUM, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
    grads["w"][BAD, 2, 3, 3] = np.nan
    grads["w"][3, 0, 1, 1] = 100.0
    return grads


def make_params():
    return {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def train(opt, grads, params, state):
    """Parameters and state at the end, and mini_step after each micro-batch, on one device."""

    def step(carry, gradient):
        params, state = carry
        updates, state = opt.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), state.mini_step

    (params, state), walked = lax.scan(step, (params, state), grads)
    return params, state, walked


def run_in_shard_map(opt, *, is_checked):
    specs = state_specs(jax.eval_shape(opt.init, make_params()), "data")

    def step(params, state, grads):
        return train(opt, jax.tree.map(lambda g: g[:, 0], grads), params, state)

    kwargs = dict(mesh=MESH, check_vma=is_checked)
    state = jax.jit(jax.shard_map(opt.init, in_specs=P(), out_specs=specs, **kwargs), **CHEAP)(make_params())
    mapped = jax.shard_map(step, in_specs=(P(), specs, P(None, "data")), out_specs=(P(), specs, P()), **kwargs)
    params, state, walked = jax.jit(mapped, **CHEAP)(make_params(), state, make_gradients())
    for leaf in jax.tree.leaves(params):
        assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1
    return params, state, walked


def run_in_pmap(opt):
    """The first device's parameters, once it is known that the others have the same; the state of all."""

    def step(grads):
        params = make_params()
        return train(opt, grads, params, opt.init(params))

    devices = jax.devices()[:NUM]
    params, state, walked = jax.pmap(step, "data", in_axes=1, devices=devices)(make_gradients())
    for leaf in jax.tree.leaves((params, walked)):
        np.testing.assert_array_equal(leaf, np.stack([leaf[0]] * NUM))
    return jax.tree.map(lambda x: x[0], params), state, walked[0]


RUNS = {
    "checked": functools.partial(run_in_shard_map, is_checked=True),
    "unchecked": functools.partial(run_in_shard_map, is_checked=False),
    "pmap": run_in_pmap,
}


@functools.cache
def expected():
    """The parameters that one device comes to by the micro-batches that no device refuses."""
    mean = jax.tree.map(lambda g: g[np.array([0, 2])].mean(axis=(0, 1)), make_gradients())
    opt = optax.adam(1e-2)
    updates, _ = opt.update(mean, opt.init(make_params()))
    return optax.apply_updates(make_params(), updates)


@pytest.mark.parametrize("case", RUNS)
def test_each_device_sums_its_own_and_emissions_cross_the_wire(case):
    """All devices skip a NaN of one device, or a step that one alone wants skipped; none waits forever."""
    inner = optax.chain(average(error_feedback=True), optax.adam(1e-2))
    opt = ternary_multi_steps(inner, K, True, skip_much, trits=3, block_size=32)
    params, state, walked = RUNS[case](opt)
    assert walked.tolist() == [1, 1, 0, 0, 1]
    for counted in (state.gradient_step, state.nonfinite_count, state.inner_opt_state[0].step):
        assert np.all(np.asarray(counted) == 1)
    for name, leaf in expected().items():
        np.testing.assert_allclose(params[name], leaf, atol=1e-4)
    sums = np.asarray(state.acc_grads["b"].values).reshape(-1)
    np.testing.assert_allclose(sums, make_gradients()["b"][-1])  # The fifth micro-batch, of each device.
    assert len(set(np.asarray(state.skip_state["largest"]).reshape(-1).tolist())) == NUM


def test_averages_of_the_users_own_are_found_in_the_program():
    """Without a check of replication, by what the inner optimizer sends, since its state does not say."""

    def mean_if_finite(updates, state, params=None):
        return lax.cond(True, lambda g: lax.pmean(g, "data"), lambda g: g, updates), state

    inner = optax.chain(optax.GradientTransformation(lambda params: optax.EmptyState(), mean_if_finite), optax.sgd(1.0))
    params, state, walked = run_in_pmap(ternary_multi_steps(inner, K))
    assert walked.tolist() == [1, 1, 0, 1, 0]
    grads = make_gradients()
    for name, leaf in params.items():
        used = grads[name][np.array([0, 2, 3, 4])]
        np.testing.assert_allclose(leaf, 1 - used.mean(axis=(0, 1)) * 2, rtol=1e-5, atol=1e-5)
    assert state.nonfinite_count.tolist() == [1] * NUM


def traced(opt, *, is_checked, state=None, steps=1):
    """Updates of what each device has for itself, traced only."""
    params = make_params()

    def step(grads, state):
        state = opt.init(params) if state is None else state
        for i in range(steps):
            updates, state = opt.update(jax.tree.map(lambda g, i=i: g[i, 0], grads), state, params)
        return jax.tree.map(lambda u: u[None], updates)

    mapped = jax.shard_map(step, mesh=MESH, in_specs=(P(None, "data"), P()), out_specs=P("data"), check_vma=is_checked)
    return jax.eval_shape(mapped, make_gradients(), state)


BEHIND = {
    "accumulate_ternary": (accumulate_ternary(K), optax.clip(1.0), average()),
    "ternary_multi_steps": (ternary_multi_steps(optax.clip(1.0), K), average()),
}


@pytest.mark.parametrize("links", BEHIND.values(), ids=BEHIND)
def test_an_average_behind_a_window_is_refused(links):
    opt = optax.chain(*links)
    with pytest.raises(
        ValueError, match=r"gradients differ between the devices along \['data'\], but .* one sum for all"
    ):
        traced(opt, is_checked=True)
    words = (
        r"got those of accumulate_ternary or .* ternary_multi_steps\(optax.chain\(compressed_pmean\(...\), opt\), k\)"
    )
    with pytest.raises(ValueError, match=words):
        traced(opt, is_checked=False)
    of_devices = jax.tree.map(lambda g: g[0], make_gradients())
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(jax.vmap(lambda g: opt.update(g, opt.init(g), g), axis_name="data"), of_devices)


@pytest.mark.parametrize("is_checked", [True, False], ids=["checked", "unchecked"])
def test_averaged_gradients_may_enter_any_window(is_checked):
    links = optax.stateless(lambda updates, params: lax.pmean(updates, "data")), accumulate_ternary(K), optax.sgd(1.0)
    assert traced(optax.chain(*links), is_checked=is_checked)["w"].shape == (NUM, *SHAPES["w"])


@pytest.mark.parametrize("is_checked", [True, False], ids=["checked", "unchecked"])
def test_an_average_before_a_window_comes_before_it_in_each_step_of_a_program(is_checked):
    opt = optax.chain(average(), accumulate_ternary(K), optax.sgd(1.0))
    assert traced(opt, is_checked=is_checked, steps=2)["w"].shape == (NUM, *SHAPES["w"])


def test_a_state_that_is_one_for_all_devices_is_refused():
    """It was made outside, and has the sum of one device, which is not the other devices' too."""
    opt = ternary_multi_steps(average(), K)
    state = opt.init(make_params())
    with pytest.raises(ValueError, match=r"but the state has one sum for all.* laid out by state_specs"):
        traced(opt, is_checked=True, state=state)
    with pytest.raises(
        ValueError, match=r"opt_state must be made inside jax\.shard_map, where each device gets its own acc_grads"
    ):
        state_specs(state, "data")
