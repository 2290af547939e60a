"""JAX's own safety nets: users who set them must not be stopped by what is done here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformations import TRANSFORMATIONS, params_of, states_of, traced

import vsa_optax
from vsa_optax import HypervectorCodec, Phase, TritCodec, trits, vsa

every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


@pytest.fixture
def nothing_implicit():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def assert_steady(states):
    """The same structure, shapes and dtypes after each update."""
    first, *others = states
    for other in others:
        assert jax.tree.structure(other) == jax.tree.structure(first)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(first), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64], ids=lambda dtype: dtype.__name__)
@every_transformation
def test_updates_promote_no_rank_and_no_dtype(name, dtype, nothing_implicit):
    params = params_of(dtype)
    assert_steady(traced(lambda: states_of(name, params, 2, is_jitted=True), name))


@every_transformation
def test_in_double_precision_neither_and_types_stay(name, nothing_implicit):
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64):
            params = params_of(dtype)
            assert_steady(traced(lambda params=params: states_of(name, params, 2, is_jitted=True), name))


def test_codecs_promote_neither(nothing_implicit):
    tree = {"w": jnp.ones((8, 8), jnp.complex64), "b": jnp.ones(3, jnp.bfloat16)}

    def round_trips():
        payload = HypervectorCodec(0.5).encode(tree)
        yield HypervectorCodec(0.5).decode(0.5 * (payload + payload) - payload)
        for codec in (TritCodec(1, block_size=32, unbiased=True), HypervectorCodec(0.5, use_ternary=True)):
            yield codec.decode(codec.encode(tree))

    for decoded in jax.eval_shape(lambda: list(round_trips())):
        assert {name: x.dtype for name, x in decoded.items()} == {name: x.dtype for name, x in tree.items()}


def test_micro_batches_promote_neither(nothing_implicit):
    accumulator = vsa_optax.ternary_accumulator(4, block_size=32)

    def loss(params, batch):
        return jnp.mean((batch @ params) ** 2)

    in_pieces = optax.microbatching.microbatch(jax.grad(loss), 1, 4, accumulator)
    assert jax.eval_shape(in_pieces, jnp.ones(64), jnp.ones((16, 64))).shape == (64,)


@pytest.mark.parametrize("is_double", [False, True], ids=["x32", "x64"])
def test_the_algebra_promotes_neither(is_double, nothing_implicit):
    key = jax.random.key(0)

    def everything():
        x, y = vsa.random_hypervectors(key, 4, 20), vsa.random_hypervectors(key, 3, 20, "ternary", dtype="bfloat16")
        yield vsa.bind(x, y[0]), vsa.unbind(x, y[0]), vsa.inverse(jnp.arange(3)), vsa.permute(x, jnp.int8(2))
        for majority in (None, "ternary", "bipolar"):
            yield vsa.bundle(x, majority=majority), vsa.bundle(x[None], weights=jnp.ones(4, jnp.bfloat16))
        for other in (y, y[0]):
            yield vsa.cosine_similarity(x, other), vsa.dot_similarity(x, other)
        yield vsa.cleanup(x, y)
        for axis in (None, 0, 1):
            for rule in ("mean", "lloyd_max"):
                yield trits.dequantize(*trits.quantize_deterministic(x, rule=rule, axis=axis))
            yield trits.quantize_stochastic(x, key, axis=axis)
        yield trits.unpack(trits.pack(jnp.array([1, 0, -1])), 3)

    with jax.enable_x64(is_double):
        assert len(jax.tree.leaves(jax.eval_shape(lambda: list(everything())))) > 20


def test_a_loss_that_nobody_gave_stops_no_hunt_for_nans():
    """It is not known in PREDICT: NaN, but infinity where JAX would stop at that."""
    opt, params = vsa_optax.phase_switched(optax.sgd(0.1), predictor=vsa_optax.Secants(2)), jnp.ones(3)
    state = opt.init(params)
    state = state._replace(machine=state.machine._replace(phase=jnp.int32(Phase.PREDICT)))

    def value(state):
        return vsa_optax.value_and_grad_by_phase(lambda w: jnp.sum(w**2))(params, state=state)[0]

    assert np.isnan(jax.jit(value)(state))
    with jax.debug_nans(True):
        assert jax.jit(lambda state: value(state))(state) == np.inf


def test_without_jit_a_window_of_micro_batches_is_emitted():
    """Its loops and conditionals are then Python's."""
    opt, gradient = vsa_optax.accumulate_ternary(2), jnp.arange(40.0)
    state = opt.init(gradient)
    with jax.disable_jit():
        nothing, state = opt.update(gradient, state)
        mean, state = opt.update(gradient, state)
    assert not nothing.any()
    np.testing.assert_array_equal(mean, gradient)
