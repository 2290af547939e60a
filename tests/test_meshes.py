"""Every feature on every kind of mesh: eight devices come to what one device comes to.

The parameters are split along an axis, and the batch is whole, so that a gradient is split like its parameter. A mesh
has explicit axes, where an array's type says how it is laid out; or axes that XLA uses as it sees fit, and is set; or
such axes, and is not set.
"""

import contextlib
import functools

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import CHEAP, compiled_once

import vsa_optax
from vsa_optax import Recursive

KINDS = ("explicit", "auto", "none")
STEPS = 20
SHAPES = {"w": (16, 512), "b": (16,)}
SPLIT = {"w": P("data", None), "b": P("data")}
SHORT = dict(warmup_steps=2, full_steps=2, predict_steps=4, correct_every=2, length=3)
CODEC = vsa_optax.TritCodec()
SKETCH = vsa_optax.HypervectorCodec(0.5)
TERNARY = vsa_optax.HypervectorCodec(0.5, use_ternary=True)


def phase_switched(**kwargs):
    return blind.phase_switched(optax.adamw(1.0), learning_rate=0.003, **kwargs)


def compressed(codec):
    return optax.chain(vsa_optax.compress_gradients(codec, error_feedback=True), optax.adamw(0.003))


# The optimizer, and by how much parameters may differ: of a code, a sum in another order is now and then on the other
# side of the border between two levels.
OPTIMIZERS = {
    "secants": (vsa_optax.balanced(0.003), 2e-5),  # The defaults; the other presets differ in numbers.
    "window, blind": (phase_switched(**SHORT), 2e-5),
    "window, calibrated": (phase_switched(calibrate=True, **SHORT), 2e-5),
    "recursive": (phase_switched(line=Recursive, calibrate=True, **SHORT), 2e-5),
    "coded window": (phase_switched(codec=vsa_optax.TritCodec(1), residual_decay=None, **SHORT), 3e-3),
    "multisecant": (vsa_optax.multisecant(optax.adamw(0.003), history_window=4), 3e-3),
    "predict_gradients": (optax.chain(blind.predict_gradients(**SHORT), optax.adamw(0.003)), 2e-5),
    "compress_gradients": (compressed(CODEC), 3e-3),
    "accumulate_ternary": (optax.chain(vsa_optax.accumulate_ternary(3), optax.sgd(0.3)), 3e-3),
    "ternary_multi_steps": (vsa_optax.ternary_multi_steps(optax.adamw(0.003), 3), 3e-3),
}


def make_params():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def make_batch():
    return jnp.asarray(0.1 + 0.02 * np.random.default_rng(1).normal(size=(8, 512)), jnp.float32)


def loss(params, x):
    return jnp.mean((x @ params["w"].T + params["b"] - 0.5) ** 2)


def mesh_of(kind):
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


def in_context(kind, mesh):
    return contextlib.nullcontext() if kind == "none" else jax.set_mesh(mesh)


@contextlib.contextmanager
def laid_out(kind):
    """Parameters and batch on a mesh of this kind, or on one device."""
    if kind == "alone":
        yield make_params(), make_batch()
        return
    mesh = mesh_of(kind)
    with in_context(kind, mesh):
        yield place(make_params(), mesh, SPLIT), place(make_batch(), mesh, P())


def place(tree, mesh, specs):
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def train(opt, kind, value_and_grad, steps=STEPS):
    """Parameters and state behind all steps, on the host."""
    opt = optax.with_extra_args_support(opt)

    def step(params, state, x):
        value, grads = value_and_grad(params, x, state)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    with laid_out(kind) as (params, x):
        state, layouts = opt.init(params), None
        if kind != "alone":  # To compile once, what XLA lays out as it sees fit goes back to where it was.
            state = jax.tree.map(functools.partial(on_the_mesh, params["w"].sharding.mesh), state)
            layouts = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
        step = compiled_once(jax.jit(step, out_shardings=layouts).lower(params, state, x), **CHEAP)
        for _ in range(steps):
            params, state = step(params, state, x)
    if kind == "explicit":
        assert_like_the_parameters((params, state))
    return jax.device_get((params, state))


def on_the_mesh(mesh, leaf):
    return leaf if isinstance(leaf.sharding, NamedSharding) else place(leaf, mesh, P())


def assert_like_the_parameters(tree):
    """Whatever has a parameter's name and, behind axes of its own, its shape."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = getattr(path[-1], "key", None)
        if name in SHAPES and leaf.shape[leaf.ndim - len(SHAPES[name]) :] == SHAPES[name]:
            wanted = P(*[None] * (leaf.ndim - len(SHAPES[name])), *SPLIT[name])
            assert jax.typeof(leaf).sharding.spec == wanted, jax.tree_util.keystr(path)


def by_phase_or_not(params, x, state):
    try:
        vsa_optax.needs_backward(state)
    except ValueError:  # No phases.
        return jax.value_and_grad(loss)(params, x)
    return vsa_optax.value_and_grad_by_phase(loss)(params, x, state=state)


@functools.cache
def trained_alone(case):
    return train(OPTIMIZERS[case][0], "alone", by_phase_or_not)


phase_stats = jax.jit(vsa_optax.phase_stats, **CHEAP)


def assert_same_training(found, wanted, *, atol):
    for name, start in make_params().items():
        np.testing.assert_allclose(found[0][name], wanted[0][name], rtol=0, atol=atol)
        assert np.max(np.abs(found[0][name] - start)) > 0.01
    try:
        stats = phase_stats(wanted[1])
    except ValueError:
        return
    np.testing.assert_array_equal(phase_stats(found[1])[:7], stats[:7])
    assert stats.predict_steps > 0


# For leaps on the other kinds, `test_sharding.py` shows that nothing else is sent.
ELSEWHERE = {("multisecant", "auto"), ("multisecant", "none")}
# The calibrated window and the coded one cover the steps of these; explicit axes also cover the types.
SLOW = {("window, blind", kind) for kind in KINDS}
SLOW |= {(case, kind) for case in ("recursive", "predict_gradients") for kind in ("auto", "none")}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, marks=pytest.mark.slow if (case, kind) in SLOW else ())
        for case in OPTIMIZERS
        for kind in KINDS
        if (case, kind) not in ELSEWHERE
    ],
)
def test_an_optimizer(case, kind):
    found = train(OPTIMIZERS[case][0], kind, by_phase_or_not)
    assert_same_training(found, trained_alone(case), atol=OPTIMIZERS[case][1])


every_kind = pytest.mark.parametrize("kind", KINDS)


def normalized_error(found, wanted):
    return float(np.sum((found - wanted) ** 2) / np.sum(wanted**2))


@every_kind
@pytest.mark.parametrize("codec", [CODEC, SKETCH, TERNARY], ids=["TritCodec", "HypervectorCodec", "use_ternary"])
def test_a_codec(codec, kind):
    """Jitted apart, as payloads are that are kept; codes are whole on every device, and come back as they went."""
    with laid_out(kind) as (params, _):
        payload = jax.jit(codec.encode, **CHEAP)(params, 3)
        decoded = jax.jit(codec.decode, **CHEAP)(payload)
        if kind == "explicit":
            assert_like_the_parameters(decoded)
        decoded = jax.device_get(decoded)
    wanted = decoded_alone(codec)
    for name in SHAPES:
        np.testing.assert_allclose(decoded[name], wanted[name], rtol=0, atol=1e-6)


@functools.cache
def decoded_alone(codec):
    return jax.device_get(codec.decode(codec.encode(make_params(), 3)))


@every_kind
def test_value_and_grad_by_phase(kind):
    """With aux, in a true step and in PREDICT; what is not differentiated lies where the gradient does."""

    def loss_and_aux(params, x):
        return loss(params, x), {"bias": params["b"] + 1.0}

    opt = blind.predict_gradients(line=Recursive, calibrate=True)
    differentiate = jax.jit(vsa_optax.value_and_grad_by_phase(loss_and_aux, has_aux=True), **CHEAP)
    wanted = jax.value_and_grad(loss_and_aux, has_aux=True)(make_params(), make_batch())
    with laid_out(kind) as (params, x):
        state = opt.init(params)
        for phase in (vsa_optax.Phase.FULL, vsa_optax.Phase.PREDICT):
            state = state._replace(machine=state.machine._replace(phase=jnp.int32(phase)))
            aux = {"bias": jnp.zeros_like(params["b"])}
            (value, aux), grads = differentiate(params, x, state=state, aux_in_predict=aux)
            if kind == "explicit":
                assert_like_the_parameters(grads)
            is_true_step = phase == vsa_optax.Phase.FULL
            for name in SHAPES:
                np.testing.assert_allclose(grads[name], is_true_step * wanted[1][name], rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(aux["bias"], is_true_step * wanted[0][1]["bias"], rtol=1e-6)
            np.testing.assert_allclose(value, wanted[0][0] if is_true_step else np.nan, rtol=1e-6)


def accumulated(kind):
    in_pieces = optax.microbatching.microbatch(jax.grad(loss), 1, 2, vsa_optax.ternary_accumulator(4))
    with laid_out(kind) as (params, x):
        found = jax.jit(in_pieces, **CHEAP)(params, x)
    if kind == "explicit":
        assert_like_the_parameters(found)
    return jax.device_get(found)


@functools.cache
def accumulated_alone():
    """The gradient by pieces, and that of the whole batch."""
    return accumulated("alone"), jax.device_get(jax.grad(loss)(make_params(), make_batch()))


@every_kind
def test_an_accumulator_in_optax_microbatching(kind):
    found, (wanted, exact) = accumulated(kind), accumulated_alone()
    assert normalized_error(found["w"], wanted["w"]) < 1e-3
    assert normalized_error(found["w"], exact["w"]) == pytest.approx(
        normalized_error(wanted["w"], exact["w"]), rel=0.01
    )
    np.testing.assert_allclose(found["b"], wanted["b"], rtol=1e-5)


def train_by_compressed_means(kind, steps=10):
    """Parameters behind two steps, and behind all; on one device `jax.vmap` takes the place of the mesh."""
    mean = vsa_optax.compressed_pmean("data", CODEC, error_feedback=True)
    opt = optax.chain(mean, optax.sgd(0.2))
    specs = vsa_optax.state_specs(jax.eval_shape(opt.init, make_params()), "data")

    def step(params, state, x):
        own = params if kind == "alone" else jax.lax.pcast(params, "data", to="varying")
        updates, state = opt.update(jax.grad(loss)(own, x), state, params)
        return optax.apply_updates(params, updates), state

    params, x = make_params(), make_batch()
    if kind == "alone":
        params, x = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), params), x[:, None]
        state = jax.vmap(opt.init)(params)
        step = jax.jit(jax.vmap(step, axis_name="data"), **CHEAP)
        seen = []
        for _ in range(steps):
            params, state = step(params, state, x)
            seen.append(jax.device_get(jax.tree.map(lambda leaf: leaf[0], params)))
        return seen[1], seen[-1]
    mesh = mesh_of(kind)
    with in_context(kind, mesh):
        params, x = place(params, mesh, P()), place(x, mesh, P("data"))
        init = jax.jit(jax.shard_map(opt.init, mesh=mesh, in_specs=P(), out_specs=specs))
        state = compiled_once(init.lower(params), **CHEAP)(params)
        in_specs, out_specs = (P(), specs, P("data")), (P(), specs)
        step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs))
        step = compiled_once(step.lower(params, state, x), **CHEAP)
        seen = []
        for _ in range(steps):
            params, state = step(params, state, x)
            seen.append(jax.device_get(params))
    return seen[1], seen[-1]


trained_alone_by_compressed_means = functools.cache(functools.partial(train_by_compressed_means, "alone"))


@every_kind
def test_compressed_means_inside_shard_map(kind):
    """With its replication check, and error feedback, whose residuals differ between devices."""
    found, wanted = train_by_compressed_means(kind), trained_alone_by_compressed_means()
    # Gradients equal to rounding have the same codes except at ties, of which the later steps meet some.
    for name, start in make_params().items():
        for (after, alone), atol in zip(zip(found, wanted, strict=True), (1e-6, 1e-3), strict=True):
            np.testing.assert_allclose(after[name], alone[name], rtol=0, atol=atol)
        assert np.max(np.abs(found[-1][name] - start)) > 0.01
