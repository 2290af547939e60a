import functools

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import CHEAP

import vsa_optax
from vsa_optax import HypervectorCodec, TritCodec, compress_gradients

# Leaves of 128 reals, for which the codec is compiled once, and smaller ones, which it leaves alone.
CODECS = {"trits": TritCodec(1, block_size=64), "hypervector": HypervectorCodec(0.5)}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
feedback = pytest.mark.parametrize("error_feedback", [False, True], ids=["plain", "feedback"])


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_tree(seed=0):
    return {
        "f32": draw(seed, 8, 16),
        "bf16": draw(seed + 1, 128).astype(jnp.bfloat16),
        "f16": draw(seed + 2, 128).astype(np.float16),
        "c64": (draw(seed + 3, 64) + 1j * draw(seed + 4, 64)).astype(np.complex64),
        "small": [draw(seed + 5, 3).astype(jnp.bfloat16), None, draw(seed + 6, 1)[0], np.zeros((0, 2), np.float32)],
    }


def make_small_tree(seed=0):
    return {"w": draw(seed, 128), "b": draw(seed + 1, 3)}


def types_of(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def assert_same_bits(actual, expected):
    assert types_of(actual) == types_of(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def wide(tree):
    return [np.asarray(x).astype(np.complex128) for x in jax.tree.leaves(tree)]


@every_codec
def test_what_is_not_sent_stays_behind(codec):
    """At each step and over all, for every dtype, up to rounding: emitted plus kept equals received."""
    opt = compress_gradients(codec, error_feedback=True)
    state = opt.init(make_tree())
    entered, left = ([0.0] * len(wide(make_tree())) for _ in range(2))
    for step in range(20):
        grads = make_tree(10 * step)
        emitted, after = opt.update(grads, state)
        assert types_of(emitted) == types_of(grads)
        for g, e, s, r in zip(*map(wide, (grads, state.residual, emitted, after.residual)), strict=True):
            np.testing.assert_allclose(s + r, g + e, atol=3e-7 * abs(g + e).max(initial=0))
        assert any(x.any() for x in wide(after.residual))
        entered = [total + g for total, g in zip(entered, wide(grads), strict=True)]
        left = [total + s for total, s in zip(left, wide(emitted), strict=True)]
        state = after
    for g, s, e in zip(entered, left, wide(state.residual), strict=True):
        np.testing.assert_allclose(s + e, g, atol=1e-5)
    assert {name: np.dtype(leaf.dtype).name for name, leaf in state.residual.items() if name != "small"} == dict(
        f32="float32", bf16="float32", f16="float32", c64="complex64"
    )
    assert (state.step, state.nonfinite_count) == (20, 0)


def test_the_residual_of_a_steady_gradient_stays_bounded():
    """The mean of the emitted gradients tends to that of the received ones; without feedback it does not."""
    grads = {"w": draw(0, 128) * np.exp2(np.arange(128) % 8, dtype=np.float32)}
    means = {}
    for error_feedback in (False, True):
        opt = compress_gradients(CODECS["trits"], error_feedback=error_feedback)
        state, total = opt.init(grads), np.zeros(128)
        for _ in range(60):
            emitted, state = opt.update(grads, state)
            total += emitted["w"]
        means[error_feedback] = np.linalg.norm(total / 60 - grads["w"]) / np.linalg.norm(grads["w"])
    assert np.linalg.norm(state.residual["w"]) < 1.5 * np.linalg.norm(grads["w"])
    assert means[True] < 1.5 / 60 < 0.15 < means[False]


@every_codec
def test_without_feedback_it_is_encode_and_decode(codec):
    opt = compress_gradients(codec)
    grads, state = make_small_tree(), opt.init(make_small_tree())
    assert state.residual is None
    seen = []
    for step in range(3):
        emitted, state = opt.update(grads, state)
        assert_same_bits(emitted, codec.decode(codec.encode(grads, step)))
        seen.append(np.asarray(emitted["w"]).tobytes())
    assert len(set(seen)) == 3  # The same gradient, another key.
    assert (state.step, state.nonfinite_count) == (3, 0)


@feedback
@every_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite(codec, error_feedback, bad):
    """It leaves as the codec decodes it, is counted, and the residual keeps every bit."""
    opt = compress_gradients(codec, error_feedback=error_feedback)
    grads = make_small_tree()
    _, state = opt.update(grads, opt.init(grads))
    broken = {"w": grads["w"].copy(), "b": grads["b"]}
    broken["w"][70] = bad
    emitted, after = opt.update(broken, state)
    assert_same_bits(after.residual, state.residual)
    assert (after.step, after.nonfinite_count) == (2, 1)
    whole = opt.update(grads, state)[0]
    is_hit = np.arange(128) // 64 == 1 if isinstance(codec, TritCodec) else np.full(128, True)
    assert np.isnan(emitted["w"][is_hit]).all()
    if isinstance(codec, TritCodec):
        np.testing.assert_array_equal(emitted["w"][~is_hit], whole["w"][~is_hit])
        np.testing.assert_array_equal(emitted["b"], whole["b"])
    else:
        assert np.isnan(emitted["b"]).all()
    emitted, after = opt.update(grads, after)
    assert all(np.isfinite(x).all() for x in wide(emitted))
    assert after.nonfinite_count == 1


def test_a_small_leaf_that_is_not_finite_is_counted_too():
    opt = compress_gradients(CODECS["trits"], error_feedback=True)
    grads = make_small_tree()
    _, state = opt.update(grads, opt.init(grads))
    broken = grads | {"b": np.float32([1.0, np.inf, 2.0])}
    emitted, after = opt.update(broken, state)
    assert emitted["b"][1] == np.inf
    assert_same_bits(after.residual, state.residual)
    assert after.nonfinite_count == 1


def test_state_bytes_are_those_documented():
    tree = make_tree()
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(compress_gradients(TritCodec()).init(tree)))]
    with_feedback = compress_gradients(TritCodec(), error_feedback=True).init(tree)
    sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(with_feedback)))
    assert sizes == [8, 8 + 4 * (3 * 128 + 3 + 1) + 8 * 64]
    with jax.enable_x64(True):
        double = {"w": np.zeros(10, np.float64), "z": np.zeros(10, np.complex128)}
        state = jax.eval_shape(compress_gradients(TritCodec(), error_feedback=True).init, double)
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) == 8 + 80 + 160


@feedback
def test_jit_scan_and_donation(error_feedback):
    """One compilation, buffers reused, and everywhere the same bits."""
    opt = compress_gradients(CODECS["trits"], error_feedback=error_feedback)
    stream = [make_small_tree(10 * i) for i in range(4)]
    update = jax.jit(opt.update, donate_argnums=(0, 1), **CHEAP)
    state, eager_state = opt.init(stream[0]), opt.init(stream[0])
    for grads in stream:
        assert types_of(state) == types_of(eager_state)
        eager, eager_state = opt.update(grads, eager_state)
        donated = jax.tree.map(jnp.array, grads)
        given = jax.tree.leaves(state)
        emitted, state = update(donated, state)
        assert all(leaf.is_deleted() for leaf in given)
        for a, e in zip(wide((emitted, state)), wide((eager, eager_state)), strict=True):
            np.testing.assert_allclose(a, e, atol=1e-5)
    assert update._cache_size() == 1
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stream)
    run = jax.jit(lambda grads: jax.lax.scan(lambda s, g: opt.update(g, s)[::-1], opt.init(stream[0]), grads), **CHEAP)
    scanned, of_steps = run(stacked)
    assert types_of(scanned) == types_of(state)
    for a, e in zip(wide((jax.tree.map(lambda x: x[-1], of_steps), scanned)), wide((emitted, state)), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)


def test_parameters_and_extra_arguments_are_ignored():
    opt = compress_gradients(CODECS["trits"])
    grads = make_small_tree()
    plain, _ = opt.update(grads, opt.init(grads))
    with_more, _ = opt.update(grads, opt.init(grads), {"other": 1}, value=1.0, unknown=None)
    assert_same_bits(with_more, plain)


def test_head_of_a_chain():
    codec, grads = CODECS["trits"], make_small_tree()
    opt = optax.chain(compress_gradients(codec), optax.scale(-0.1))
    state = opt.init(grads)
    for step in range(2):
        updates, state = opt.update(grads, state, grads)
        expected = codec.decode(codec.encode(grads, step))
        jax.tree.map(lambda u, d: np.testing.assert_allclose(u, -0.1 * d, rtol=1e-6), updates, expected)


def test_masked_and_partitioned():
    """Masked gradients pass unchanged; each label has its own state and key."""
    codec, grads = CODECS["trits"], {"a": draw(0, 128), "b": draw(1, 128), "c": draw(2, 128)}
    opt = optax.masked(compress_gradients(codec, error_feedback=True), {"a": True, "b": False, "c": True})
    updates, state = opt.update(grads, opt.init(grads), grads)
    np.testing.assert_array_equal(updates["b"], grads["b"])
    np.testing.assert_array_equal(updates["a"], codec.decode(codec.encode([grads["a"]]))[0])
    np.testing.assert_allclose(updates["c"] + state.inner_state.residual["c"], grads["c"], atol=1e-5)
    transforms = {
        "x": compress_gradients(codec, error_feedback=True),
        "y": compress_gradients(TritCodec(2, block_size=64)),
    }
    opt = optax.multi_transform(transforms, {"a": "x", "b": "y", "c": "x"})
    updates, state = opt.update(grads, opt.init(grads), grads)
    decoded = codec.decode(codec.encode([grads["a"], grads["c"]]))
    np.testing.assert_array_equal(updates["a"], decoded[0])
    np.testing.assert_array_equal(updates["c"], decoded[1])
    assert 0 < np.linalg.norm(updates["b"] - grads["b"]) < 0.25 * np.linalg.norm(grads["b"])
    assert state.inner_states["x"].inner_state.step == 1
    assert state.inner_states["y"].inner_state.residual is None


def test_injected_hyperparameters_around_the_chain():
    def make(learning_rate):
        return optax.chain(compress_gradients(CODECS["trits"], error_feedback=True), optax.adamw(learning_rate))

    injected, plain = optax.inject_hyperparams(make)(learning_rate=0.1), make(0.1)
    grads = make_small_tree()
    states = [injected.init(grads), plain.init(grads)]
    for _ in range(2):
        (a, states[0]), (b, states[1]) = injected.update(grads, states[0], grads), plain.update(grads, states[1], grads)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a, b)
    states[0].hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, _ = injected.update(grads, states[0], grads)
    assert not any(x.any() for x in wide(updates))


def test_inside_the_phase_switch_it_sees_true_gradients_only():
    inner = optax.chain(compress_gradients(CODECS["trits"], error_feedback=True), optax.adamw(1.0))
    opt = blind.phase_switched(
        inner, learning_rate=0.05, warmup_steps=2, full_steps=2, predict_steps=4, correct_every=2
    )
    target = {"w": draw(3, 128), "b": draw(4, 3)}
    loss = lambda p: sum(jnp.sum((p[name] - target[name]) ** 2) for name in target)  # noqa: E731

    @functools.partial(jax.jit, **CHEAP)
    def step(params, state):
        value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.zeros_like, target)
    state = opt.init(params)
    for _ in range(60):
        params, state = step(params, state)
    stats = vsa_optax.phase_stats(state)
    assert stats.predict_steps > 20
    assert state.inner_state[0].step == stats.total_steps - stats.predict_steps
    assert loss(params) < 0.05 * loss(jax.tree.map(jnp.zeros_like, target))


def test_map_params_sees_the_residual():
    opt = optax.chain(compress_gradients(CODECS["trits"], error_feedback=True), optax.adam(0.1))
    map_params = optax.tree.map_params if hasattr(optax.tree, "map_params") else optax.tree_utils.tree_map_params
    tree = make_tree()
    specs = jax.tree.map(lambda x: x.dtype.name, tree)
    marked = map_params(opt, lambda x, spec: spec, opt.init(tree), specs, transform_non_params=lambda x: "other")
    assert marked[0].residual == specs
    assert (marked[0].step, marked[0].nonfinite_count) == ("other", "other")


class Halves:
    """A codec that nobody here wrote: bfloat16."""

    def encode(self, tree, step=0):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)

    def decode(self, payload):
        return jax.tree.map(lambda x: x.astype(jnp.float32), payload)

    def decode_sum(self, payloads, coefficients):
        raise NotImplementedError

    def nbytes(self, tree):
        raise NotImplementedError

    def specs(self, payload):
        raise NotImplementedError


def test_any_object_with_a_codecs_methods_will_do():
    opt = compress_gradients(Halves(), error_feedback=True)
    grads = make_small_tree()
    emitted, state = opt.update(grads, opt.init(grads))
    np.testing.assert_array_equal(emitted["w"], grads["w"].astype(jnp.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(state.residual["w"], grads["w"] - emitted["w"])


@pytest.mark.parametrize(
    "codec",
    [None, TritCodec, HypervectorCodec, "trits", object(), 3],
    ids=["None", "type", "hv", "str", "object", "int"],
)
def test_what_is_no_codec_is_refused(codec):
    with pytest.raises(ValueError, match="codec must be a codec, such as TritCodec") as error:
        compress_gradients(codec)
    assert f"got {codec!r}" in str(error.value)


@pytest.mark.parametrize("value", [None, 1, "yes", np.True_], ids=repr)
def test_error_feedback_is_a_bool(value):
    with pytest.raises(ValueError, match="error_feedback must be True or False") as error:
        compress_gradients(TritCodec(), error_feedback=value)
    assert f"got {value!r}" in str(error.value)


def test_feedback_that_would_grow_is_refused():
    codec = HypervectorCodec(0.5, shrink=False)
    with pytest.raises(ValueError, match=r"error_feedback must be False with HypervectorCodec\(shrink=False\)"):
        compress_gradients(codec, error_feedback=True)
    compress_gradients(codec)


WRONG = {
    "shape": ({"w": draw(0, 4, 32), "b": draw(0, 3)}, ValueError, r"\['w'\] has shape \(4, 32\).*\(128,\)"),
    "missing": ({"w": draw(0, 128)}, ValueError, r"\['b'\] is missing"),
    "none": ({"w": draw(0, 128), "b": None}, ValueError, r"\['b'\] is missing"),
    "extra": (make_small_tree() | {"z": draw(0, 1)}, ValueError, r"\['z'\] was not among"),
    "integer": ({"w": draw(0, 128), "b": np.arange(3)}, TypeError, r"\['b'\] has dtype int"),
    "complex": ({"w": draw(0, 128), "b": np.ones(3, np.complex64)}, TypeError, r"\['b'\] has dtype complex64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_gradients_unlike_the_parameters_name_the_leaf(case):
    grads, kind, message = WRONG[case]
    opt = compress_gradients(CODECS["trits"], error_feedback=True)
    with pytest.raises(kind, match=f"gradients: leaf {message}"):
        opt.update(grads, opt.init(make_small_tree()))


@feedback
def test_integer_leaves_are_refused_by_name(error_feedback):
    opt = compress_gradients(TritCodec(), error_feedback=error_feedback)
    with pytest.raises(TypeError, match=r"leaf \['count'\] has dtype int"):
        opt.init({"w": draw(0, 3), "count": np.arange(3)})


def test_the_count_saturates():
    opt = compress_gradients(TritCodec())
    grads = {"b": draw(0, 3)}
    state = opt.init(grads)._replace(step=jnp.int32(2**31 - 1))
    assert opt.update(grads, state)[1].step == 2**31 - 1


def test_a_number_is_a_leaf():
    opt = compress_gradients(TritCodec(), error_feedback=True)
    emitted, state = opt.update({"x": 2.0}, opt.init({"x": 1.0}))
    assert (float(emitted["x"]), float(state.residual["x"])) == (2.0, 0.0)
