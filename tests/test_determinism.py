"""On eight devices: replicated, the bits are those of one; sharded, the state is laid out as the parameters are."""

import functools

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import vsa_optax
from vsa_optax import Guarded, Recursive, Secants, Window

STEPS = 16
SHORT = dict(warmup_steps=3, full_steps=2, predict_steps=4, correct_every=2, length=4)
CASES = [
    dict(line=Window, predicts="update"),
    dict(line=Recursive, predicts="gradient"),
    dict(line=Secants, when=Guarded),
]
SPECS = {"w": P("data", None), "v": P(None, "data"), "b": P("data"), "scale": P()}


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"w": (16, 6), "v": (6, 24), "b": (16,), "scale": ()}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def make_batch():
    return jnp.asarray(np.random.default_rng(1).normal(size=(32, 16)), jnp.float32)


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("data",))


def loss(params, x):
    hidden = jnp.tanh((x + params["b"]) @ params["w"])
    return params["scale"] * jnp.mean((hidden @ params["v"] - 1.0) ** 2)


def make_optimizer(case):
    return blind.phase_switched(optax.adamw(1.0), learning_rate=0.01, **SHORT, **case)


def train(opt, params, batch, *, steps=STEPS):
    @jax.jit
    def step(params, state, batch):
        value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, batch, state=state)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    mesh = params["w"].sharding.mesh
    state = jax.tree.map(lambda x: on_the_mesh(x, mesh), opt.init(params))
    step = step.lower(params, state, batch).compile()
    for _ in range(steps):
        params, state = step(params, state, batch)  # An error if the results' sharding were not the arguments'.
    return params, state


def on_the_mesh(leaf, mesh):
    """Counters are on one device, from where JAX would move them and compile a second time."""
    return leaf if isinstance(leaf.sharding, NamedSharding) else jax.device_put(leaf, NamedSharding(mesh, P()))


@functools.cache
def train_replicated(number, count):
    """The case of this number on so many devices."""
    replicated = NamedSharding(mesh_of(count), P())
    params, batch = jax.device_put((make_params(), make_batch()), replicated)
    return train(make_optimizer(CASES[number]), params, batch)


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replicated_over_eight_devices_the_bits_are_those_of_one(case):
    results = [train_replicated(CASES.index(case), count) for count in (1, 8)]
    # The scores of secants differ by rounding; the ridge that predicts does not.
    scores = [results[i][1].machine.calibration for i in range(2)]
    jax.tree.map(lambda one, eight: np.testing.assert_allclose(one, eight, rtol=1e-4), *scores)
    machine = results[1][1].machine.unpacked()
    if "when" in case:
        results = [(p, s._replace(machine=s.machine._replace(calibration=None, numbers=None))) for p, s in results]
    for one, eight in zip(*map(jax.tree.leaves, results), strict=True):
        assert len(eight.sharding.device_set) == 8
        assert len(one.sharding.device_set) == 1
        for shard in eight.addressable_shards:
            np.testing.assert_array_equal(shard.data, one)
    assert machine.predict_steps > 0
    assert machine.correct_steps > 0 or "when" in case


def assert_laid_out(tree, leading):
    """Each leaf is split as its parameter is, its first ``leading`` axes not at all."""
    for name, spec in SPECS.items():
        leaf = tree[name]
        wanted = NamedSharding(mesh_of(8), P(*[None] * leading, *spec))
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (name, leaf.sharding)
        sizes = {shard.data.size for shard in leaf.addressable_shards}
        assert sizes == {leaf.size // (8 if "data" in spec else 1)}


def assert_state_laid_out(state):
    if isinstance(state.history, vsa_optax.prediction.predictors.secant.SecantHistoryState):
        assert_laid_out(state.history.diff_params, 1)
        assert_laid_out(state.history.diff_gradients, 1)
        assert_laid_out(state.history.params, 0)
        assert_laid_out(state.history.gradient, 0)
        return
    if isinstance(state.history, vsa_optax.prediction.predictors.window.WindowHistoryState):
        assert_laid_out(state.history.records, 1)
    else:
        assert_laid_out(state.history.mean, 0)
        assert_laid_out(state.history.velocity, 0)
    assert_laid_out(state.residual, 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_state_is_sharded_as_the_parameters_are(case):
    """From `init` on, called outside jit, and after every step; no device holds a whole record."""
    mesh = mesh_of(8)
    params = jax.device_put(make_params(), {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()})
    batch = jax.device_put(make_batch(), NamedSharding(mesh, P()))
    opt = make_optimizer(case)
    assert_state_laid_out(opt.init(params))
    sharded, state = train(opt, params, batch)
    assert_laid_out(sharded, 0)
    assert_state_laid_out(state)
    whole, reference_state = train_replicated(CASES.index(case), 1)
    for name in SPECS:
        np.testing.assert_allclose(sharded[name], whole[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(vsa_optax.phase_stats(state)[:7], vsa_optax.phase_stats(reference_state)[:7])
    assert vsa_optax.phase_stats(state).predict_steps > 0


@pytest.mark.parametrize("line", [Window, Recursive])
def test_init_under_jit_takes_the_layout_it_is_told(line):
    """A jitted `init` makes zeros that depend on no parameter: like Optax's, it must be told where they go."""
    mesh = mesh_of(8)
    params = jax.device_put(make_params(), {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()})
    opt = make_optimizer(dict(line=line))
    laid_out = jax.tree.map(
        lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else NamedSharding(mesh, P()), opt.init(params)
    )
    assert_state_laid_out(jax.jit(opt.init, out_shardings=laid_out)(params))
