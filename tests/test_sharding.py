"""Under `jax.jit` on eight devices with automatic sharding, results equal one device's, and the state is sharded alike.

The compiled program shows the communication. Parameters are replicated, or each is split along one of its axes (FSDP);
the batch is split, so that gradients are sums over devices.
"""

import contextlib
import functools
import math
import re
from collections import Counter

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import CHEAP

import vsa_optax
from vsa_optax import Guarded, Recursive, Secants
from vsa_optax.accumulation.ternary_sum import make_ternary_sum

STEPS = 20
SHORT = dict(warmup_steps=3, full_steps=2, predict_steps=4, correct_every=2, length=5)
SHAPES = {"w": (16, 64), "b": (64,), "v": (64, 16)}  # Whole blocks, and less than one.
SPLIT = {"w": P("data", None), "b": P("data"), "v": P(None, "data")}
LAYOUTS = {"replicated": dict.fromkeys(SHAPES, P()), "split": SPLIT}
CODEC = vsa_optax.TritCodec()
CODED = [SHAPES["w"], SHAPES["v"]]  # The leaves of at least a block.
SENT = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def phase_switched(**kwargs):
    return blind.phase_switched(optax.adamw(1.0), learning_rate=0.01, **kwargs)


EXACT = {
    "secants, guarded": phase_switched(line=Secants, when=Guarded, warmup_steps=3, length=5),
    "window": phase_switched(**SHORT),
    "window, calibrated": phase_switched(calibrate=True, **SHORT),
    "recursive": phase_switched(line=Recursive, calibrate=True, **SHORT),
}
# The optimizer, and in how many places of its program gradients are coded: as a record and as a residual; as one of a
# window's micro-batches and as its last.
LOSSY = {
    "coded window": (phase_switched(codec=CODEC, **SHORT), 2),
    "ternary_multi_steps": (vsa_optax.ternary_multi_steps(optax.adamw(0.01), 3), 2),
    "compressed": (optax.chain(vsa_optax.compress_gradients(CODEC, error_feedback=True), optax.adamw(0.01)), 1),
}


def make_params():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def make_batch():
    return jnp.asarray(np.random.default_rng(1).normal(size=(32, 16)), jnp.float32)


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] - 1.0) ** 2)


def make_step(opt, has_phases):
    def step(params, state, x):
        if has_phases:
            value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, x, state=state)
        else:
            value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def mesh_of_all():
    return Mesh(np.array(jax.devices()), ("data",))


def place(tree, mesh, specs):
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def placed(mesh, layout, path, leaf):
    """The leaf of a first state with its final sharding.

    Most leaves have it already. Counters and codes are on one device, from where JAX may move them, or on all of a mesh
    that is set. So are arrays that a codec does not code, which will have the sharding of their parameters.
    """
    name = next((key.key for key in path if getattr(key, "key", None) in SHAPES), None)
    is_like = name is not None and leaf.shape[leaf.ndim - len(SHAPES[name]) :] == SHAPES[name]
    spec = LAYOUTS[layout][name] if is_like else P()
    return place(leaf, mesh, P(*[None] * (leaf.ndim - len(spec)), *spec))


def run(opt, layout, *, has_phases, in_context):
    """Parameters and state after `STEPS` steps, the first state, and the compiled program that made all of them."""
    mesh = mesh_of_all()
    step = make_step(optax.with_extra_args_support(opt), has_phases)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        params = place(make_params(), mesh, LAYOUTS[layout])
        batch = place(make_batch(), mesh, P("data"))
        first = opt.init(params)
        state = jax.tree_util.tree_map_with_path(functools.partial(placed, mesh, layout), first)
        compiled = step.lower(params, state, batch).compile(**CHEAP)
        for _ in range(STEPS):
            params, state = compiled(params, state, batch)  # An error if the results' sharding were not the arguments'.
    return params, state, first, compiled


@functools.cache
def run_alone(opt, *, has_phases):
    step, params, batch = make_step(optax.with_extra_args_support(opt), has_phases), make_params(), make_batch()
    state = opt.init(params)
    step = step.lower(params, state, batch).compile(**CHEAP)
    for _ in range(STEPS):
        params, state = step(params, state, batch)
    return params, state


def collectives(compiled, kind):
    """How often the program has a collective of this kind, by the arrays that it makes."""
    found = re.findall(rf"= (.*?) {kind}(?:-start)?\(", compiled.as_text())
    arrays = [array for result in found for array in re.findall(r"(\w+)\[([\d,]*)\]", result)]
    return Counter((dtype, tuple(map(int, filter(None, shape.split(","))))) for dtype, shape in arrays)


def num_bytes(arrays):
    sizes = {"pred": 1, "u8": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}
    return sum(count * sizes[dtype] * math.prod(shape) for (dtype, shape), count in arrays.items())


def assert_like_the_parameters(state, layout):
    """Whatever has a parameter's name and, behind axes of its own, its shape; returns how many arrays that were."""
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = getattr(path[-1], "key", None)
        if name in SHAPES and leaf.shape[leaf.ndim - len(SHAPES[name]) :] == SHAPES[name]:
            wanted = P(*[None] * (leaf.ndim - len(SHAPES[name])), *LAYOUTS[layout][name])
            sharding = NamedSharding(mesh_of_all(), wanted)
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (jax.tree_util.keystr(path), leaf.sharding)
            shares = 8 if layout == "split" else 1
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // shares}
            found += 1
    return found


phase_stats = jax.jit(vsa_optax.phase_stats, **CHEAP)


def assert_same_training(params, state, alone, *, atol):
    for name, start in make_params().items():
        np.testing.assert_allclose(params[name], alone[0][name], rtol=0, atol=atol)
        assert np.max(np.abs(np.asarray(params[name]) - np.asarray(start))) > 0.05
    if isinstance(state, vsa_optax.prediction.update.PhaseSwitchedState):
        stats, wanted = phase_stats(jax.device_get(state)), phase_stats(alone[1])
        np.testing.assert_array_equal(stats[:7], wanted[:7])
        assert stats.predict_steps > 0


@pytest.fixture(scope="module")
def plain():
    """The programs of AdamW alone, by layout."""
    opt = optax.adamw(0.01)
    return {layout: run(opt, layout, has_phases=False, in_context=False)[3] for layout in LAYOUTS}


@pytest.mark.parametrize(("case", "layout"), [*((case, "split") for case in EXACT), ("secants, guarded", "replicated")])
def test_histories_stay_where_the_parameters_are(case, layout, plain):
    """From `init` on; and nothing is gathered that AdamW alone does not gather."""
    params, state, first, compiled = run(EXACT[case], layout, has_phases=True, in_context=False)
    num_moments = 2
    num_records = {"secants, guarded": 4, "window": 2, "window, calibrated": 1, "recursive": 2}[case]
    for one in (first, state):
        assert assert_like_the_parameters(one, layout) == len(SHAPES) * (num_records + num_moments)
    assert_like_the_parameters(params, layout)
    for kind in SENT:
        assert collectives(compiled, kind) == collectives(plain[layout], kind), kind
    # Norms and inner products are sums over devices, at most W numbers each.
    more = collectives(compiled, "all-reduce") - collectives(plain[layout], "all-reduce")
    assert all(math.prod(shape) <= 5 for _, shape in more), more
    assert_same_training(params, state, run_alone(EXACT[case], has_phases=True), atol=2e-5)


def test_leaps_are_made_where_the_parameters_are(plain):
    """Of the accepted parameters, a gradient, its root mean square and two rings; products are sums over devices."""
    opt = vsa_optax.multisecant(optax.adamw(0.01), history_window=5)
    params, state, first, compiled = run(opt, "split", has_phases=False, in_context=False)
    for one in (first, state):
        assert assert_like_the_parameters(one, "split") == len(SHAPES) * (5 + 2)
    assert_like_the_parameters(params, "split")
    for kind in SENT:
        assert collectives(compiled, kind) == collectives(plain["split"], kind), kind
    more = collectives(compiled, "all-reduce") - collectives(plain["split"], "all-reduce")
    assert all(math.prod(shape) <= 5 * 5 for _, shape in more), more
    assert_same_training(params, state, run_alone(opt, has_phases=False), atol=2e-3)


@pytest.mark.parametrize(
    ("case", "layout"), [*((case, "split") for case in LOSSY), ("ternary_multi_steps", "replicated")]
)
def test_what_is_coded_is_whole_on_every_device(case, layout, plain):
    """Each coded leaf of a gradient is gathered once to be coded; codes never are, and decoding sends nothing."""
    opt, places = LOSSY[case]
    has_phases = case == "coded window"
    params, state, first, compiled = run(opt, layout, has_phases=has_phases, in_context=True)
    num_trees = 3 if case == "compressed" else 2  # Adam's moments, and the residual.
    assert assert_like_the_parameters(state, layout) == len(SHAPES) * num_trees
    for one in (first, state):
        codes = [leaf for leaf in jax.tree.leaves(one) if leaf.dtype == jnp.uint8]
        assert len(codes) == (0 if case == "compressed" else 4 if has_phases else 2)
        assert all(leaf.sharding.is_fully_replicated for leaf in codes)
    assert_like_the_parameters(params, layout)
    more = collectives(compiled, "all-gather") - collectives(plain[layout], "all-gather")
    assert {shape for _, shape in more} == (set(CODED) if layout == "split" else set())
    # Of a select that comes before, XLA may gather both operands: a quarter more.
    assert num_bytes(more) <= places * 1.25 * sum(4 * math.prod(shape) for shape in CODED)
    for kind in SENT[1:]:
        assert not collectives(compiled, kind), kind
    more = collectives(compiled, "all-reduce") - collectives(plain[layout], "all-reduce")
    assert all(math.prod(shape) <= 5 for _, shape in more), more
    # A sum in another order is now and then on the other side of the border between two levels.
    assert_same_training(params, state, run_alone(opt, has_phases=has_phases), atol=3e-3)


def test_a_nan_in_any_shard_of_a_gradient_is_seen():
    mesh, total = mesh_of_all(), make_ternary_sum(2, trits=None, rounding="nearest", block_size=1024, seed=0)
    with jax.set_mesh(mesh):
        gradients = place(make_params(), mesh, SPLIT)
        zeros = total.zeros(gradients)
        add = jax.jit(total.add, **CHEAP)
        for name in SHAPES:
            bad = gradients | {name: gradients[name].at[-1].set(jnp.nan)}
            assert not add(zeros, place(bad, mesh, SPLIT), 0, 0)[1], name
        assert add(zeros, gradients, 0, 0)[1]


def test_inside_shard_map_an_accumulator_is_local():
    """Each device sums its own shard of the gradient: nothing is sent, and it holds an eighth of the trits."""
    mesh, opt = mesh_of_all(), vsa_optax.accumulate_ternary(2)
    gradients = np.random.default_rng(2).normal(size=(2, 8 * 40, 128)).astype(np.float32)

    def init(shard):
        return jax.tree.map(lambda x: x[None], opt.init(shard))

    def update(shard, state):
        mean, state = opt.update(shard, jax.tree.map(lambda x: x[0], state))
        return mean, jax.tree.map(lambda x: x[None], state)

    by_rows = P("data")
    state = jax.jit(jax.shard_map(init, mesh=mesh, in_specs=by_rows, out_specs=by_rows), **CHEAP)(gradients[0])
    step = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(by_rows, by_rows), out_specs=(by_rows, by_rows)))
    compiled = step.lower(place(gradients[0], mesh, by_rows), state).compile(**CHEAP)
    assert not any(collectives(compiled, kind) for kind in (*SENT, "all-reduce"))
    for gradient in gradients:
        mean, state = compiled(place(gradient, mesh, by_rows), state)
    codes = state.acc_grads.codes
    assert {shard.data.nbytes for shard in codes.addressable_shards} == {codes.nbytes // 8}
    exact = np.mean(gradients, axis=0)
    error = np.sum((np.asarray(mean) - exact) ** 2) / np.sum(exact**2)
    assert 0.01 < error < 0.02  # Of noise in two trits, K = 2: 0.014.
