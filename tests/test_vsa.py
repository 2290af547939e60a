import functools
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsa_optax import vsa

KEY = jax.random.key(7)
MODELS = ["bipolar", "ternary"]
MAJORITIES = [None, "ternary", "bipolar"]
DIMS = st.sampled_from([1, 33])  # Few shapes, since each is compiled.
NUMS = st.sampled_from([1, 5])
SEEDS = st.integers(0, 10_000)
NAMES = ("bind", "unbind", "inverse", "permute", "dot_similarity", "cosine_similarity", "cleanup")
jitted = types.SimpleNamespace(
    bundle=jax.jit(vsa.bundle, static_argnames=("majority", "axis")),
    **{name: jax.jit(getattr(vsa, name)) for name in NAMES},
)


def draw(seed, *shape, model="bipolar"):
    """Hypervectors that the library did not draw."""
    symbols = {"bipolar": [-1, 1], "ternary": [-1, 0, 1], "integer": range(-9, 10)}[model]
    return np.random.default_rng(seed).choice(np.array(symbols, np.float32), size=shape)


@functools.cache
def memory():
    """A hundred bipolar hypervectors in 4096 coordinates: cosines scatter by 1/64."""
    return vsa.random_hypervectors(KEY, 100, 4096)


def twin_bundle(x, weights=None, majority=None):
    """``[n, d]`` in float64, one coordinate after the other."""
    weights = np.ones(len(x)) if weights is None else weights
    out = []
    for i in range(x.shape[1]):
        total = sum(float(w) * float(row[i]) for w, row in zip(weights, x, strict=True))
        if majority and total == 0:
            out.append(0.0 if majority == "ternary" else -1.0 if i % 2 else 1.0)
        else:
            out.append(math.copysign(1.0, total) if majority else total)
    return np.array(out)


def twin_cosine(x, y):
    x, y = np.float64(x), np.float64(y)
    return 0.0 if not x.any() or not y.any() else x @ y / math.sqrt((x @ x) * (y @ y))


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16, "float16"])
def test_random_symbols_are_equally_likely(make_key, model, dtype):
    x = vsa.random_hypervectors(make_key(3), 40, 4999, model, dtype=dtype)
    assert x.shape == (40, 4999)
    assert x.dtype == jnp.dtype(dtype or jnp.float32)
    symbols = [-1.0, 1.0] if model == "bipolar" else [-1.0, 0.0, 1.0]
    values, counts = np.unique(np.asarray(x, np.float32), return_counts=True)
    assert values.tolist() == symbols
    p = 1 / len(symbols)
    assert (abs(counts / x.size - p) < 4 * math.sqrt(p * (1 - p) / x.size)).all()


@pytest.mark.parametrize("model", MODELS)
def test_random_hypervectors_are_nearly_orthogonal(model):
    """Between rows, and between neighbouring coordinates, of which 32 share a random word: 2016 pairs each."""
    x = np.asarray(vsa.random_hypervectors(KEY, 64, 2048, model), np.float64)
    variance = 1.0 if model == "bipolar" else 2 / 3
    for vectors in (x, x[:, :64].T):
        gram = vectors @ vectors.T / (variance * vectors.shape[1])
        assert abs(gram[np.triu_indices(64, 1)]).max() < 4.5 / math.sqrt(vectors.shape[1])


def test_random_hypervectors_follow_the_key():
    one = vsa.random_hypervectors(KEY, 3, 70)
    np.testing.assert_array_equal(one, vsa.random_hypervectors(KEY, 3, 70))
    np.testing.assert_array_equal(
        vsa.random_hypervectors(jax.random.key(5), 3, 70), vsa.random_hypervectors(jax.random.PRNGKey(5), 3, 70)
    )
    assert (one != vsa.random_hypervectors(jax.random.key(8), 3, 70)).any()
    assert len(np.unique(one, axis=0)) == 3


@given(seed=SEEDS, n=NUMS, d=DIMS, model=st.sampled_from([*MODELS, "integer"]))
def test_bind_commutes_associates_and_distributes(seed, n, d, model):
    x, y, z = draw(seed, 3, n, d, model=model)
    bound = jitted.bind(x, y)
    np.testing.assert_array_equal(bound, x * y)
    np.testing.assert_array_equal(bound, jitted.bind(y, x))
    np.testing.assert_array_equal(jitted.bind(bound, z), jitted.bind(x, jitted.bind(y, z)))
    np.testing.assert_array_equal(jitted.bind(x[0], jitted.bundle(y)), jitted.bundle(jitted.bind(x[0], y)))


@given(seed=SEEDS, d=DIMS, of_key=st.sampled_from(MODELS), of_value=st.sampled_from([*MODELS, "integer"]))
def test_unbind_recovers_what_the_key_has_not_erased(seed, d, of_key, of_value):
    key, value = draw(seed, d, model=of_key), draw(seed + 1, 4, d, model=of_value)
    bound = jitted.bind(key, value)
    recovered = jitted.unbind(bound, key)
    np.testing.assert_array_equal(recovered, np.where(key == 0, 0, value))
    np.testing.assert_array_equal(recovered, jitted.bind(key, bound))
    np.testing.assert_array_equal(jitted.inverse(key), key)


def test_bind_makes_something_unlike_either():
    x, y = memory()[:2]
    assert abs(jitted.cosine_similarity(jitted.bind(x, y), memory())).max() < 4.5 / 64


def test_inverse_of_any_number():
    tiny = np.finfo(np.float32).tiny
    x = np.array([4.0, -0.5, 0.0, -0.0, 1e30, 3e38, np.inf, -np.inf, tiny, -tiny, tiny / 2, 1e-45], np.float32)
    expected = [0.25, -2.0, 0, 0, 1e-30, 0, 0, 0, 1 / tiny, -1 / tiny, 0, 0]
    np.testing.assert_allclose(jitted.inverse(x), expected, rtol=1e-6, atol=1e-38)
    assert np.isnan(jitted.inverse(jnp.nan))
    np.testing.assert_allclose(jitted.unbind([6.0, 5.0], [-3, 0]), [-2.0, 0.0])


def test_shapes_broadcast():
    x, y = draw(0, 5, 1, 33), draw(1, 3, 33)
    np.testing.assert_array_equal(jitted.bind(x, y), x * y)
    np.testing.assert_array_equal(jitted.unbind(x, y), x * y)
    assert jitted.bind(x, y).shape == (5, 3, 33)


@pytest.mark.parametrize("majority", MAJORITIES)
@given(seed=SEEDS, n=NUMS, d=DIMS, model=st.sampled_from(MODELS), weighted=st.booleans())
def test_bundle_equals_twin_in_any_order(majority, seed, n, d, model, weighted):
    x = draw(seed, n, d, model=model)
    weights = draw(seed + 1, n, model="integer") if weighted else None
    bundled = jitted.bundle(x, weights, majority=majority)
    np.testing.assert_array_equal(bundled, twin_bundle(x, weights, majority))
    order = np.random.default_rng(seed).permutation(n)
    again = jitted.bundle(x[order], None if weights is None else weights[order], majority=majority)
    np.testing.assert_array_equal(bundled, again)


@pytest.mark.parametrize("axis", [0, 1, 2, -2, -3, -4])
def test_bundle_along_any_axis_with_weights_for_each_batch(axis):
    x, weights = draw(0, 4, 4, 4, 10, model="ternary"), draw(2, 4, 4, 4, model="integer")
    moved = np.moveaxis(x, axis, -2)
    for own in (None, weights):
        actual = jitted.bundle(x, own, majority="bipolar", axis=axis)
        assert actual.shape == (4, 4, 10)
        for i in itertools.product(range(4), range(4)):
            np.testing.assert_array_equal(actual[i], twin_bundle(moved[i], None if own is None else own[i], "bipolar"))


def test_weights_broadcast_over_the_batch():
    x = draw(0, 5, 33, model="integer")
    weights = draw(1, 3, 5, model="integer")
    np.testing.assert_array_equal(jitted.bundle(x, weights), weights @ x)
    np.testing.assert_array_equal(jitted.bundle(x[None], weights), weights @ x)
    np.testing.assert_array_equal(jitted.bundle(np.zeros((0, 4)), majority="bipolar"), [1, -1, 1, -1])


def test_bundle_resembles_its_items_and_nothing_else():
    items, others = memory()[:5], memory()[5:]
    for majority, share in ((None, 1 / math.sqrt(5)), ("bipolar", 3 / 8)):  # E|s|/K of 5 signs is (5 + 15 + 10) / 80.
        bundled = jitted.bundle(items, majority=majority)
        np.testing.assert_allclose(jitted.cosine_similarity(bundled, items), share, atol=4.5 / 64)
        assert abs(jitted.cosine_similarity(bundled, others)).max() < 4.5 / 64


def test_ties_are_balanced_and_shared():
    """Two bundles of two: tied in both with probability 1/4, where they agree; elsewhere nothing in common."""
    x = memory()
    one, two = (jitted.bundle(pair, majority="bipolar") for pair in (x[:2], x[2:4]))
    np.testing.assert_allclose(jitted.cosine_similarity(one, two), 1 / 4, atol=4.5 / 64)
    assert jitted.bundle(jnp.stack([x[0], -x[0]]), majority="bipolar").sum() == 0
    one, two = (jitted.bundle(pair, majority="ternary") for pair in (x[:2], x[2:4]))
    assert abs(jitted.cosine_similarity(one, two)) < 4.5 / 64


@pytest.mark.parametrize("majority", MAJORITIES)
def test_nan_never_becomes_a_level(majority):
    x = np.ones((3, 4), np.float32)
    x[1, 2] = np.nan
    np.testing.assert_array_equal(np.isnan(jitted.bundle(x, majority=majority)), [False, False, True, False])
    assert np.isnan(jitted.bundle(x, [1, 0, 1], majority=majority)[2])
    assert np.isnan(jitted.bundle(np.ones((2, 4)), [1.0, np.nan], majority=majority)).all()
    opposed = np.array([[np.inf] * 4, [-np.inf] * 4], np.float32)
    assert np.isnan(jitted.bundle(opposed, majority=majority)).all()
    for of_two in (jitted.bind, jitted.unbind, jitted.dot_similarity, jitted.cosine_similarity):
        assert np.isnan(of_two(x[1], x[0])).any()
        assert np.isnan(of_two(x[0], x[1])).any()


@given(seed=SEEDS, d=DIMS, shifts=st.integers(-(2**31), 2**31 - 1))
def test_permute_rolls_preserves_similarity_and_comes_back(seed, d, shifts):
    x, y = draw(seed, 2, d, model="integer")
    moved = jitted.permute(x, np.int32(shifts))
    np.testing.assert_array_equal(moved, [x[(i - shifts) % d] for i in range(d)])
    assert jitted.dot_similarity(moved, jitted.permute(y, np.int32(shifts))) == x @ y
    np.testing.assert_array_equal(jitted.permute(moved, np.int32(-(shifts % d))), x)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32])
def test_permute_keeps_the_dtype_and_rolls_the_last_axis(dtype):
    x = jnp.asarray(np.arange(12).reshape(2, 6), dtype)
    assert vsa.permute(x).dtype == dtype
    np.testing.assert_array_equal(vsa.permute(x), [[5, 0, 1, 2, 3, 4], [11, 6, 7, 8, 9, 10]])
    assert vsa.permute(jnp.zeros((2, 0), dtype), 3).shape == (2, 0)


@pytest.mark.parametrize("shifts", [jnp.int8(-100), jnp.uint8(200), jnp.uint32(2**32 - 1), np.int64(-7), 2**31 - 1])
def test_permute_by_integers_of_any_kind(shifts):
    x = np.arange(1000)
    np.testing.assert_array_equal(vsa.permute(x, shifts), np.roll(x, int(shifts)))
    np.testing.assert_array_equal(jitted.permute(x, shifts), np.roll(x, int(shifts)))


def test_permute_makes_something_unlike():
    assert abs(jitted.cosine_similarity(vsa.permute(memory()[0]), memory())).max() < 4.5 / 64


@given(seed=SEEDS, d=DIMS, model=st.sampled_from([*MODELS, "integer"]))
def test_similarities_equal_twins(seed, d, model):
    x, y = draw(seed, 2, 5, d, model=model)
    dot, cosine = jitted.dot_similarity(x, y), jitted.cosine_similarity(x, y)
    np.testing.assert_array_equal(dot, x @ y.T)
    np.testing.assert_allclose(cosine, [[twin_cosine(a, b) for b in y] for a in x], atol=3e-7)
    assert abs(cosine).max() <= 1
    np.testing.assert_array_equal(jitted.dot_similarity(x, y[0]), dot[:, 0])
    np.testing.assert_allclose(jitted.cosine_similarity(x, y[0]), cosine[:, 0], atol=3e-7)


@pytest.mark.parametrize("of_x", [1e-34, 1e-30, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("of_y", [1e-30, 1e30])
def test_cosine_at_any_magnitude(of_x, of_y):
    x, y = np.random.default_rng(0).uniform(-1, 1, size=(2, 3, 50)).astype(np.float32)
    y[0] = -abs(y[0])
    expected = [[twin_cosine(a, b) for b in y] for a in x]
    scales = np.array([[1.0], [of_x], [of_x / 8]], np.float32)  # Rows of one array, each in its own magnitude.
    actual = jitted.cosine_similarity(x * scales, y * np.float32(of_y))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    np.testing.assert_array_equal(jitted.cleanup(y * np.float32(of_x), y * np.float32(of_y)).item, [0, 1, 2])


def test_cosine_never_exceeds_1():
    """Rounding alone would take more than a quarter of these there."""
    x = np.random.default_rng(0).normal(size=(100, 33)).astype(np.float32)
    cosine = np.asarray(jitted.cosine_similarity(x, np.concatenate([x, -x])))
    np.testing.assert_allclose(np.diag(cosine), 1, rtol=1e-6)
    assert cosine.max() == 1
    assert cosine.min() == -1


def test_cosine_with_nothing_is_0_and_its_gradient_finite():
    x = jnp.array([[0.0, 0.0], [1e30, 2e30]])
    np.testing.assert_allclose(jitted.cosine_similarity(x, x), [[0, 0], [0, 1]], atol=1e-6)
    gradient = jax.grad(lambda x, y: jitted.cosine_similarity(x, y))
    np.testing.assert_allclose(gradient(x[0], x[1]), [1 / math.sqrt(5), 2 / math.sqrt(5)], rtol=1e-6)
    y = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(gradient(jnp.array([8.0, 0.0]), y), [0, 0.1], atol=1e-7)  # (y/|y| - 0.6 x/|x|) / |x|
    assert jitted.cosine_similarity(jnp.zeros((3, 0)), jnp.zeros(0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_cosine_of_what_is_not_finite_is_nan(bad):
    x = np.ones((2, 3), np.float32)
    x[1, 0] = bad
    np.testing.assert_array_equal(np.isnan(jitted.cosine_similarity(x, x)), [[False, True], [True, True]])
    assert np.isnan(jitted.cleanup(x, x).similarity).all()


@pytest.mark.parametrize("function", [vsa.bundle, vsa.cosine_similarity, vsa.dot_similarity])
def test_contractions_are_at_the_highest_precision(function):
    """No rounding of factors to bf16 or tf32 on accelerators."""
    x = jnp.ones((3, 4))
    for arguments in ((x, x[:, 0] if function is vsa.bundle else x), (x, x[:, 0] if function is vsa.bundle else x[0])):
        text = str(jax.make_jaxpr(function)(*arguments))
        assert text.count("dot_general") == text.count("(Precision.HIGHEST, Precision.HIGHEST)") == 1


@given(seed=SEEDS, d=DIMS)
def test_cleanup_equals_twin(seed, d):
    rows, x = draw(seed, 5, d, model="integer"), draw(seed + 1, 2, 3, d, model="integer")
    found = jitted.cleanup(x, rows)
    assert found.vector.shape == (2, 3, d)
    assert found.item.shape == found.similarity.shape == (2, 3)
    for place in itertools.product(range(2), range(3)):
        similarities = [twin_cosine(x[place], row) for row in rows]
        np.testing.assert_allclose(found.similarity[place], max(similarities), atol=3e-7)
        np.testing.assert_allclose(similarities[found.item[place]], max(similarities), atol=3e-7)
        np.testing.assert_array_equal(found.vector[place], rows[found.item[place]])


def test_cleanup_of_ties_of_nothing_and_of_noise():
    rows = jnp.array([[-1, -1, 1], [1, 1, 1], [1, 1, 1]], jnp.int8)
    found = jitted.cleanup(jnp.array([[2.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), rows)
    assert found.item.tolist() == [1, 0]
    assert found.item.dtype == jnp.int32
    assert found.vector.dtype == jnp.int8
    assert found.similarity[1] == 0
    noise = np.where(np.random.default_rng(0).uniform(size=memory().shape) < 0.3, -1, 1)  # Three of ten signs change.
    found = jitted.cleanup(memory() * noise, memory())
    assert found.item.tolist() == list(range(100))
    np.testing.assert_array_equal(found.vector, memory())
    np.testing.assert_allclose(found.similarity, 0.4, atol=4.5 / 64)


X, Y = (draw(seed, 3, 5, 16, model="ternary") for seed in (0, 1))
BATCHED = {
    "bind": (vsa.bind, X, Y),
    "inverse": (vsa.inverse, X + 0.5),
    "unbind": (vsa.unbind, X, Y),
    "bundle": (vsa.bundle, X),
    "weights": (vsa.bundle, X, Y[..., 0]),
    "bipolar": (lambda x: vsa.bundle(x, majority="bipolar"), X),
    "ternary": (lambda x: vsa.bundle(x, majority="ternary"), X),
    "permute": (vsa.permute, X, jnp.arange(3)),
    "dot": (lambda x: vsa.dot_similarity(x, Y[0]), X),
    "cosine": (lambda x: vsa.cosine_similarity(x, Y[0]), X),
    "cleanup": (lambda x: vsa.cleanup(x, Y[0]), X),
}


@pytest.mark.parametrize("name", BATCHED)
def test_a_loop_jit_and_vmap_agree(name):
    function, *arguments = BATCHED[name]
    loop = [function(*(np.asarray(a)[i] for a in arguments)) for i in range(3)]
    loop = jax.tree.map(lambda *leaves: np.stack(leaves), *loop)
    for way in [jax.vmap(function)] if name == "permute" else [jax.vmap(function), function]:
        batch = jax.jit(way)(*arguments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), batch, loop)


@pytest.mark.parametrize("model", MODELS)
def test_random_hypervectors_jit(model):
    draw_them = jax.jit(vsa.random_hypervectors, static_argnums=(1, 2, 3))
    np.testing.assert_array_equal(draw_them(KEY, 3, 70, model), vsa.random_hypervectors(KEY, 3, 70, model))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8, jnp.uint8])
def test_every_real_dtype_is_computed_and_leaves_in_f32(dtype):
    """Products up to 81 and sums up to 2700: exact in neither int8 nor bfloat16."""
    x, y = np.abs(draw(0, 300, 16, model="integer")), np.abs(draw(1, 16, model="integer"))
    inverse = np.array([0 if v == 0 else 1 / v for v in y], np.float32)
    expected = {
        "bind": x * y,
        "inverse": inverse,
        "unbind": x * inverse,
        "bundle": x[:, 0] @ x,
        "dot_similarity": x @ y,
        "cosine_similarity": [twin_cosine(row, y) for row in x],
    }

    @jax.jit
    def all_of_them(x, y):
        arguments = {"inverse": (y,), "bundle": (x, x[:, 0])}
        out = {name: getattr(vsa, name)(*arguments.get(name, (x, y))) for name in expected}
        return out, vsa.cleanup(x, x[:9])

    actual, cleaned = all_of_them(jnp.asarray(x, dtype), jnp.asarray(y, dtype))
    for name, value in actual.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)
    assert (cleaned.vector.dtype, cleaned.item.dtype, cleaned.similarity.dtype) == (dtype, jnp.int32, jnp.float32)


def test_f64_stays_f64():
    with jax.enable_x64(True):
        x = jnp.asarray(np.float64(draw(0, 3, 8)) * (1 + 2.0**-40))
        expected = [twin_cosine(row, x[0]) for row in x]
        np.testing.assert_allclose(jitted.cosine_similarity(x * 1e200, x[0] * 1e-200), expected, atol=1e-15)
        np.testing.assert_array_equal(jitted.bundle(x, majority="bipolar"), np.sign(x.sum(0)))
        for function in (vsa.bind, vsa.unbind, vsa.bundle, vsa.dot_similarity, vsa.cosine_similarity):
            arguments = (x, x[:, 0] if function is vsa.bundle else x)
            assert jax.eval_shape(function, *arguments).dtype == jnp.float64
        assert jax.eval_shape(vsa.inverse, x).dtype == jax.eval_shape(vsa.permute, x).dtype == jnp.float64
        drawn = jax.eval_shape(lambda: vsa.random_hypervectors(KEY, 3, 8, dtype="float64"))
        assert drawn.dtype == jnp.float64


# Recall of a bundle of K key-value pairs: s = sum_k key_k v_k in D coordinates is unbound with key_j and compared
# with the N rows of the codebook that the values come from. Let z = (key_j s)_i v_ji be one coordinate of the unbound
# trace times the right value's; the D of them are independent. The right row scores sum z. Given the trace, a wrong
# row's score is a sum of independent signs times the trace: nearly normal with mean 0 and variance sum z^2. So the
# right one wins if t = sum z / sqrt(sum z^2) exceeds N - 1 standard normal numbers, p = E Phi(t)^(N - 1).
#
# For bipolar keys and a plain sum z = 1 + (K - 1 random signs), so E z = 1 and E z^2 = K, and t has mean sqrt(D / K).
# Frady, Kleyko & Sommer (2018) take t as normal with variance 1, which it has for large K. The delta method gives the
# variance for any K.
#
#     Var t = Var z / q - m Cov(z, z^2) / q^2 + m^2 Var z^2 / (4 q^3),    m = E z,  q = E z^2,
#
# which is 0.56 at K = 5: a lucky score raises the norm it is divided by. Majority makes z a sign; ternary keys make
# it 0 at a third of the coordinates.


def recall(mean, variance, candidates):
    h = np.linspace(-9, 9, 3601)
    phi = np.array([0.5 * math.erfc(-(mean + math.sqrt(variance) * x) / math.sqrt(2)) for x in h])
    return float(np.sum(np.exp(-h * h / 2) * phi ** (candidates - 1)) * (h[1] - h[0]) / math.sqrt(2 * math.pi))


def recall_from_one_coordinate(dim, pairs, candidates, model, majority):
    step = np.array([1, 0, 1]) / 2 if model == "bipolar" else np.ones(3) / 3  # Given that key_j is not 0.
    z, p = 1.0 + np.arange(-(pairs - 1), pairs), np.ones(1)
    for _ in range(pairs - 1):
        p = np.convolve(p, step)
    if model == "ternary":
        z, p = np.append(z, 0.0), np.append(2 / 3 * p, 1 / 3)
    if majority:
        sides = np.array([p[z > 0].sum(), p[z < 0].sum(), p[z == 0].sum()])
        if majority == "bipolar":  # A tie's sign has nothing to do with the value's.
            sides = np.array([sides[0] + sides[2] / 2, sides[1] + sides[2] / 2, 0])
        z, p = np.array([1.0, -1.0, 0.0]), sides
    m, q, third, fourth = (float(np.sum(p * z**power)) for power in (1, 2, 3, 4))
    variance = (q - m * m) / q - m * (third - m * q) / q**2 + m * m * (fourth - q * q) / (4 * q**3)
    return recall(m * math.sqrt(dim / q), variance, candidates)


VARIANTS = [("bipolar", None), ("bipolar", "bipolar"), ("bipolar", "ternary"), ("ternary", None)]


def measured_recalls(dims, pairs, candidates, seeds, variants):
    """The recall of every dimension and variant in one program: shorter vectors are prefixes of the longest."""

    def one(seed):
        for_rows, for_items, for_keys = jax.random.split(jax.random.fold_in(KEY, seed), 3)
        whole = vsa.random_hypervectors(for_rows, candidates, max(dims))
        items = jax.random.randint(for_items, [pairs], 0, candidates)
        of_model = {model: vsa.random_hypervectors(for_keys, pairs, max(dims), model) for model, _ in variants}
        shares = []
        for dim, (model, majority) in itertools.product(dims, variants):
            key, codebook = of_model[model][:, :dim], whole[:, :dim]
            trace = vsa.bundle(vsa.bind(key, codebook[items]), majority=majority)
            shares.append(jnp.mean(vsa.cleanup(vsa.unbind(trace, key), codebook).item == items))
        return jnp.stack(shares)

    # A program that runs longer than it compiles may use a little more of the compiler's time.
    options = {"xla_backend_optimization_level": int(len(dims) * candidates * max(dims) > 1e6)}
    run = jax.jit(lambda seeds: jax.lax.map(one, seeds), compiler_options=options)
    return np.mean(run(np.arange(seeds)), axis=0)


def test_recall_of_a_bundle_is_the_published_one():
    dims, pairs, candidates, seeds = (512, 1024), 50, 1000, 100
    measured = measured_recalls(dims, pairs, candidates, seeds, VARIANTS[:1])
    for dim, share in zip(dims, measured, strict=True):
        p = recall(math.sqrt(dim / pairs), 1.0, candidates)
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / (seeds * pairs)), (dim, share, p)


def test_recall_follows_from_one_coordinate():
    """Small K too, where the published form is off by 4 standard errors, and with what loses something."""
    dim, pairs, candidates, seeds = 128, 10, 100, 400
    measured = measured_recalls([dim], pairs, candidates, seeds, VARIANTS)
    for variant, share in zip(VARIANTS, measured, strict=True):
        p = recall_from_one_coordinate(dim, pairs, candidates, *variant)
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / (seeds * pairs)), (variant, share, p)


BAD = [
    (lambda: vsa.random_hypervectors(KEY, 0, 5), "num must be an integer >= 1 and < 2\\*\\*31, got 0"),
    (lambda: vsa.random_hypervectors(KEY, 2.0, 5), "num must be an integer >= 1 and < 2\\*\\*31, got 2.0"),
    (lambda: vsa.random_hypervectors(KEY, 1, 0), "dim must be an integer >= 1 and < 2\\*\\*31, got 0"),
    (lambda: vsa.random_hypervectors(KEY, 1, 5, "dense"), "model must be one of 'bipolar', 'ternary', got 'dense'"),
    (lambda: vsa.random_hypervectors(KEY, 1, 5, dtype="int8"), "dtype must be .*float32.*, got 'int8'"),
    (lambda: vsa.random_hypervectors(0, 1, 5), "key must be one PRNG key.*, got 0"),
    (lambda: vsa.random_hypervectors(jax.random.split(KEY), 1, 5), "key must be one PRNG key"),
    (lambda: vsa.random_hypervectors(jnp.float32([1, 2]), 1, 5), "key must be one PRNG key"),
    (lambda: vsa.bind(X, Y[0, :3]), r"x and y must have shapes that broadcast, got \(3, 5, 16\) and \(3, 16\)"),
    (lambda: vsa.unbind(X[0], Y[0, 0, :9]), r"bound and key must have .*, got \(5, 16\) and \(9,\)"),
    (lambda: vsa.bundle(X[0, 0]), r"hypervectors must have shape \[..., n, d\], got \(16,\)"),
    (lambda: vsa.bundle(X, majority="mean"), "majority must be one of 'ternary', 'bipolar', got 'mean'"),
    (lambda: vsa.bundle(X, axis=-1), r"axis must be .* not the last, got -1 for shape \(3, 5, 16\)"),
    (lambda: vsa.bundle(X, axis=2), r"axis must be .* not the last, got 2 for shape \(3, 5, 16\)"),
    (lambda: vsa.bundle(X, axis=-4), "axis must be an integer >= -3 .*, got -4"),
    (lambda: vsa.bundle(X, axis=None), "axis must be an integer >= -3 .*, got None"),
    (lambda: vsa.bundle(X, jnp.ones(4)), r"weights must have shape \(5,\) or \(3, 5\), got \(4,\)"),
    (lambda: vsa.bundle(X, jnp.ones((2, 5))), r"weights must have shape \(5,\) or \(3, 5\), got \(2, 5\)"),
    (lambda: vsa.bundle(X, 2.0), r"weights must have shape \(5,\) or \(3, 5\), got \(\)"),
    (lambda: vsa.permute(X, 1.5), r"shifts must be an integer >= -2147483648 and < 2\*\*31, got 1.5"),
    (lambda: vsa.permute(X, jnp.ones(2, int)), "shifts must be an integer"),
    (lambda: vsa.permute(X, jnp.float32(1)), "shifts must be an integer"),
    (lambda: vsa.permute(3.0), "x must have at least one axis"),
    (lambda: vsa.dot_similarity(X, Y[0, 0, :9]), r"y must have shape \[d\] or \[n, d\] with d = 16 as x, got \(9,\)"),
    (lambda: vsa.dot_similarity(X, Y), r"y must have shape \[d\] or \[n, d\] with d = 16 as x, got \(3, 5, 16\)"),
    (lambda: vsa.cosine_similarity(X, 1.0), "y must have at least one axis"),
    (lambda: vsa.cosine_similarity(1.0, X[0]), "x must have at least one axis"),
    (lambda: vsa.cleanup(X, Y[0, 0]), r"memory must have shape \[n, d\] with n >= 1, got \(16,\)"),
    (lambda: vsa.cleanup(X, jnp.ones((0, 16))), r"memory must have shape \[n, d\] with n >= 1, got \(0, 16\)"),
    (lambda: vsa.cleanup(X, jnp.ones((4, 9))), r"memory must have shape .* with d = 16 as x, got \(4, 9\)"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_name_themselves(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


OF_ONE = {"x": [vsa.inverse, vsa.permute], "hypervectors": [vsa.bundle]}
OF_TWO = {
    ("x", "y"): [vsa.bind, vsa.dot_similarity, vsa.cosine_similarity],
    ("bound", "key"): [vsa.unbind],
    ("hypervectors", "weights"): [vsa.bundle],
    ("x", "memory"): [vsa.cleanup],
}


@pytest.mark.parametrize("odd", [np.array([1j]), np.array([True]), "text", object(), [[1], [1, 2]], [10**400], None])
def test_what_is_no_array_of_real_numbers_names_itself(odd):
    for name, functions in OF_ONE.items():
        for function in functions:
            with pytest.raises(TypeError, match=f"{name} must be an array of real numbers, got "):
                function(odd)
    for (first, second), functions in OF_TWO.items():
        for function in functions:
            with pytest.raises(TypeError, match=f"{first} must be an array of real numbers, got "):
                function(odd, np.ones((1, 1)))
            if odd is not None or second != "weights":
                with pytest.raises(TypeError, match=f"{second} must be an array of real numbers, got "):
                    function(np.ones((1, 1)), odd)
