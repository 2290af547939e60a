import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from samples import CHEAP

from vsa_optax import HypervectorCodec, TritCodec, checkpoint
from vsa_optax.codecs.trit import CodedLeaf


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_tree(seed=0):
    """90 reals."""
    z = draw(seed + 1, 2, 5) + 1j * draw(seed + 2, 2, 5)
    return {"w": draw(seed, 8, 8), "z": z.astype(np.complex64), "b": [draw(seed + 3, 5), None, draw(seed + 4, 1)[0]]}


def flat_of(tree):
    """The coordinates in the order in which the codec lays them out."""
    reals = [np.stack([x.real, x.imag]) if np.iscomplexobj(x) else x for x in map(np.asarray, jax.tree.leaves(tree))]
    return np.concatenate([x.astype(np.float64).ravel() for x in reals])


@functools.cache
def compiled_keys(codec):
    return jax.jit(codec._keys, static_argnums=0, **CHEAP)


def keys_of(codec, size, step):
    """±1 ``[chunks, D]``, and where the first chunk begins."""
    bits, begin = compiled_keys(codec)(size, np.int32(step))
    return np.where(np.asarray(bits) > 0, -1.0, 1.0), int(begin)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert a.tobytes() == e.tobytes()


@pytest.mark.parametrize(
    ("dimension", "shrink"), [(1, True), (27, True), (27, False), (45, False), (89, True), (90, True), (1000, False)]
)
def test_encode_and_decode_equal_the_twin(dimension, shrink):
    codec = HypervectorCodec(dimension=dimension, shrink=shrink, seed=3)
    tree = make_tree()
    x = flat_of(tree)

    @functools.partial(jax.jit, **CHEAP)
    def encoded_and_decoded(tree, step):
        payload = codec.encode(tree, step)
        return payload, codec.decode(payload)

    payload, decoded = encoded_and_decoded(tree, 4)
    signs, begin = keys_of(codec, 90, 4)
    assert signs.shape == (-(-90 // dimension), min(dimension, 90))
    assert 0 <= begin < 90
    total = reference.bundle(x, signs, begin if signs.size != 90 else 0)
    np.testing.assert_allclose(payload.bundle, total, atol=1e-5)
    assert jax.tree.structure(decoded) == jax.tree.structure(tree)
    expected = reference.unbundle(total, 90, signs, begin if signs.size != 90 else 0, shrink)
    np.testing.assert_allclose(flat_of(decoded), expected, atol=1e-5)
    if dimension >= 90:
        np.testing.assert_allclose(flat_of(decoded), x, rtol=1e-6)


STEPS, N = 1000, 600
DATA = {
    "gaussian": draw(0, N),
    "one leaf dominates": draw(1, N) * np.where(np.arange(N) // 30 == 7, 100, 1).astype(np.float32),
    "the last coordinates": np.where(np.arange(N) < 590, 1e-3, draw(2, N)).astype(np.float32),
}


def over_steps(codecs, x):
    """``[STEPS, *x.shape]`` for each codec: what each row of ``x`` becomes at each step."""

    @functools.partial(jax.jit, **CHEAP)
    def run(x, steps):
        def decoded(row, step):
            return [codec.decode(codec.encode(row, step)) for codec in codecs]

        return jax.vmap(lambda step: jax.vmap(lambda row: decoded(row, step))(x))(steps)

    return run(x, np.arange(STEPS))


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 0.5])
def test_the_error_is_that_of_the_table_for_any_data(ratio):
    dimension = math.ceil(ratio * N)
    chunks = -(-N // dimension)
    met = np.where(np.arange(dimension) < N - (chunks - 1) * dimension, chunks, chunks - 1)
    of_sums = (met * (met - 1)).sum() / N
    assert of_sums >= N / dimension - 1
    assert (of_sums == N / dimension - 1) == (N % dimension == 0)
    x = np.stack(list(DATA.values()))
    wanted_of = {True: 1 - dimension / N, False: of_sums}
    of_codecs = over_steps([HypervectorCodec(ratio, shrink=shrink) for shrink in wanted_of], x)
    for (shrink, wanted), decoded in zip(wanted_of.items(), of_codecs, strict=True):
        off = np.float64(decoded) - x
        for name, of_data, vector in zip(DATA, off.swapaxes(0, 1), x, strict=True):
            errors = (of_data**2).sum(axis=1) / (np.float64(vector) ** 2).sum()
            assert abs(errors.mean() / wanted - 1) < 0.01, (name, shrink)
            if not shrink:
                z = of_data.mean(axis=0) / (of_data.std(axis=0) / math.sqrt(STEPS))
                assert abs(z).max() < 5, name
                assert abs(np.mean(z**2) - 1) < 4 * math.sqrt(2 / N), name
            else:  # On average D / N of the vector is left.
                kept = 1 + (of_data @ vector) / (np.float64(vector) @ vector)
                assert abs(kept.mean() - ratio) < 4 * kept.std() / math.sqrt(STEPS) + 1e-6, name


CODECS = {
    "shrink": HypervectorCodec(0.3),
    "unbiased": HypervectorCodec(0.3, shrink=False),
    "dimension": HypervectorCodec(dimension=45),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


@functools.cache
def compiled(codec):
    """Its two halves."""
    return jax.jit(codec.encode, **CHEAP), jax.jit(codec.decode, **CHEAP)


@every_codec
def test_payloads_are_vectors(codec):
    encode, decode = compiled(codec)
    a, b = make_tree(0), make_tree(10)
    of_a, of_b = encode(a, 2), encode(b, 2)
    cases = {
        "sum": (of_a + of_b, lambda x, y: x + y),
        "difference": (of_a - of_b, lambda x, y: x - y),
        "negative": (-of_a, lambda x, _: -x),
        "multiple": (of_a * 2.5, lambda x, _: 2.5 * x),
        "multiple from the left": (0.5 * of_a, lambda x, _: 0.5 * x),
        "by numpy": (np.float32(-3) * of_a * np.float64(0.5), lambda x, _: -1.5 * x),
        "by jax": (jnp.float32(-3) * of_a * jnp.asarray(0.5), lambda x, _: -1.5 * x),
        "momentum": (0.9 * of_a + 0.1 * of_b, lambda x, y: 0.9 * x + 0.1 * y),
    }
    for name, (payload, fun) in cases.items():
        assert jax.tree.structure(payload) == jax.tree.structure(of_a)
        assert payload.bundle.dtype == jnp.float32
        decoded = flat_of(decode(payload))
        combined = [np.asarray(fun(x, y), x.dtype) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
        direct = flat_of(decode(encode(jax.tree.unflatten(jax.tree.structure(a), combined), 2)))
        np.testing.assert_allclose(decoded, direct, atol=3e-6, err_msg=name)
        separately = fun(flat_of(decode(of_a)), flat_of(decode(of_b)))
        np.testing.assert_allclose(decoded, separately, atol=3e-6, err_msg=name)


@every_codec
def test_a_sum_of_payloads_is_the_sum_of_what_they_decode_to(codec):
    encode, decode = compiled(codec)
    trees = [make_tree(i) for i in range(3)]
    payloads = [encode(tree, 1) for tree in trees]
    coefficients = np.float32([2.0, -0.5, 1e3])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *payloads)
    total = jax.jit(codec.decode_sum, **CHEAP)(stacked, coefficients)
    assert total["z"].dtype == jnp.complex64
    expected = sum(float(c) * flat_of(decode(p)) for c, p in zip(coefficients, payloads, strict=True))
    np.testing.assert_allclose(flat_of(total), expected, atol=2e-6 * abs(expected).max())


def test_bundles_are_reduced_over_devices():
    codec, x = CODECS["shrink"], draw(5, 8, 90)

    def mean_of_all(own):
        payload = codec.encode(own[0], 1)
        return codec.decode(payload._replace(bundle=jax.lax.pmean(payload.bundle, "d")))[None]

    mesh = Mesh(np.array(jax.devices()), ("d",))
    reduced = jax.jit(jax.shard_map(mean_of_all, mesh=mesh, in_specs=P("d"), out_specs=P("d")), **CHEAP)(x)
    expected = codec.decode(codec.encode(x.mean(axis=0), 1))
    np.testing.assert_allclose(reduced, np.broadcast_to(expected, x.shape), atol=1e-6)


@pytest.mark.parametrize("shrink", [True, False], ids=["shrink", "unbiased"])
def test_a_ternary_bundle(shrink):
    """Loses what its trits lose besides, takes a fifth of a byte a dimension and two bytes a block, does not add."""
    codec, dense = (HypervectorCodec(0.5, use_ternary=use, shrink=shrink) for use in (True, False))
    x = draw(0, 2, 2048)
    payloads = jax.jit(lambda x: [codec.encode(row, 1) for row in x], **CHEAP)(x)
    payload = payloads[0]
    assert isinstance(payload.bundle, CodedLeaf)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(payload)) == codec.nbytes(x[0]) == 4 + math.ceil(1024 / 5) + 2
    assert dense.nbytes(x[0]) == 4 + 4 * 1024
    decode = jax.jit(codec.decode, **CHEAP)
    decoded, of_dense = decode(payload), dense.decode(dense.encode(x[0], 1))
    lost = jnp.sum((decoded - of_dense) ** 2) / jnp.sum(of_dense**2)
    assert float(lost) == pytest.approx(0.190 if shrink else 0.235, rel=0.1)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *payloads)
    total = jax.jit(codec.decode_sum, **CHEAP)(stacked, jnp.float32([1.0, -2.0]))
    np.testing.assert_allclose(total, decoded - 2 * decode(payloads[1]), atol=1e-5)
    broken = payload.bundle._replace(scales=payload.bundle.scales.at[0].set(jnp.nan))
    assert np.isnan(decode(payload._replace(bundle=broken))).all()
    for fails in (lambda: payload + payload, lambda: payload - payload, lambda: 2.0 * payload, lambda: -payload):
        with pytest.raises(TypeError, match="payloads add only with use_ternary=False"):
            fails()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_codec
def test_what_is_not_finite_takes_everything(bad, codec):
    tree = make_tree()
    tree["b"][0][2] = bad
    encode, decode = compiled(codec)
    assert np.isnan(flat_of(decode(encode(tree, 0)))).all()


TREES = {
    "empty": {},
    "none": None,
    "scalar": np.float32(2.5),
    "zero-size": {"a": np.zeros((0, 3), np.float32), "b": None},
    "mixed": {
        "half": [draw(0, 1, 2, 1, 3, 1).astype(jnp.bfloat16), draw(1, 4).astype(np.float16)],
        "empty": (np.zeros((0, 3), np.float32), None),
        "z": np.complex64(1 - 2j),
        "w": draw(2, 3, 4),
    },
}


@pytest.mark.parametrize("name", TREES)
def test_trees_keep_structure_and_dtypes(name):
    """With every dimension kept nothing is lost but rounding."""
    tree, codec = TREES[name], HypervectorCodec(1.0)
    payload = codec.encode(tree)
    assert codec.nbytes(tree) == sum(leaf.nbytes for leaf in jax.tree.leaves(payload))
    assert codec.nbytes(tree) == 4 + 4 * max(1, flat_of(tree).size if jax.tree.leaves(tree) else 1)
    decoded = codec.decode(payload)
    assert jax.tree.structure(decoded) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(decoded), strict=True):
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        np.testing.assert_allclose(np.asarray(y).astype(np.complex128), np.asarray(x).astype(np.complex128), rtol=1e-6)


def test_halves_saturate():
    codec = HypervectorCodec(0.5, shrink=False)
    decoded = np.asarray(codec.decode(codec.encode(np.full(8, 65504, np.float16))), np.float64)
    assert set(abs(decoded)) == {0.0, 65504.0}


@pytest.mark.parametrize(
    ("ratio", "dimension"), [(0.1, 9), (0.101, 10), (0.3, 27), (1 / 3, 30), (0.5, 45), (1, 90), (1e-9, 1)]
)
def test_the_ratio_sets_the_dimension(ratio, dimension):
    tree = make_tree()
    assert HypervectorCodec(ratio).nbytes(tree) == 4 + 4 * dimension
    assert HypervectorCodec(dimension=dimension).nbytes(tree) == 4 + 4 * dimension
    assert HypervectorCodec(0.9, dimension=dimension).nbytes(tree) == 4 + 4 * dimension


def test_jit_scan_and_eager_agree(tmp_path):
    """To the bit, and a checkpoint in between."""
    codec, tree = CODECS["shrink"], make_tree()
    eager = codec.encode(tree, 2)
    jitted = jax.jit(codec.encode)(tree, 2)
    assert_same_bits(eager, jitted)
    decoded = jax.jit(codec.decode)(jitted)
    assert_same_bits(codec.decode(eager), decoded)

    def step(payload, _):
        return codec.encode(tree, payload.step + 1), codec.decode(payload)

    after, of_steps = jax.jit(lambda p: jax.lax.scan(step, p, None, length=3))(codec.encode(tree, 0))
    assert_same_bits(jax.tree.map(lambda x: x[2], of_steps), decoded)
    assert after.step == 3
    checkpoint.save(tmp_path, 4, {"payload": jitted})
    _, restored = checkpoint.restore(tmp_path, {"payload": jax.tree.map(jnp.zeros_like, jitted)})
    assert_same_bits(restored["payload"], jitted)


def test_keys_follow_seed_and_step():
    x = draw(4, 90)
    bundles = [HypervectorCodec(0.3, seed=seed).encode(x, step).bundle for seed, step in [(0, 0), (1, 0), (0, 1)]]
    assert len({np.asarray(b).tobytes() for b in bundles}) == 3
    np.testing.assert_array_equal(HypervectorCodec(0.3, seed=0).encode(x, jnp.int32(0)).bundle, bundles[0])
    begins = [keys_of(CODECS["shrink"], 90, step)[1] for step in range(40)]
    assert len(set(begins)) > 20


def test_payloads_of_other_codecs_and_trees_are_refused():
    tree = make_tree()
    codec = CODECS["shrink"]
    payload = codec.encode(tree)
    for other in (HypervectorCodec(0.4), HypervectorCodec(0.3, seed=1), CODECS["unbiased"]):
        for use in (other.decode, lambda p, c=other: c.encode(tree) + p, lambda p, c=other: c.encode(tree) - p):
            with pytest.raises(ValueError, match="payload was encoded by") as error:
                use(payload)
            assert str(error.value) == f"payload was encoded by {codec}, not by {other}"
    with pytest.raises(ValueError, match=r"payload.*\['b'\]\[0\] has shape \(4,\)"):
        _ = payload + codec.encode(tree | {"b": [draw(0, 4), None, np.float32(0)]})
    with pytest.raises(ValueError, match=r"payload: leaf \['b'\]\[0\] is missing"):
        _ = payload + codec.encode({"z": tree["z"]})


@pytest.mark.parametrize("kind", ["none", "dict", "trits"])
def test_what_is_no_payload_is_refused(kind):
    payload = {"none": lambda: None, "dict": lambda: {"x": 1}, "trits": lambda: TritCodec().encode(draw(0, 3))}[kind]()
    codec = HypervectorCodec()
    for use in (codec.decode, codec.specs):
        with pytest.raises(ValueError, match=f"payload must be a HypervectorPayload, got {type(payload).__name__}"):
            use(payload)
    own = codec.encode(np.ones(3, np.float32))
    for odd in (lambda: own + payload, lambda: own - payload, lambda: own * own, lambda: own + 1.0):
        with pytest.raises(TypeError, match="unsupported operand"):
            odd()


def test_numpy_settings_are_welcome():
    codec = HypervectorCodec(np.float32(0.5), dimension=np.int64(30), seed=np.uint8(1))
    assert codec == HypervectorCodec(0.5, dimension=30, seed=1)
    assert codec.encode(draw(0, 90)).bundle.shape == (30,)
    assert HypervectorCodec(np.float64(0.5)).nbytes(draw(0, 90)) == 4 + 4 * 45


def test_a_tree_without_coordinates_makes_no_nan():
    codec = HypervectorCodec()
    with jax.debug_nans(True):
        assert codec.decode(codec.encode({})) == {}


def test_the_ratio_is_not_rounded_up_for_noise_in_its_digits():
    assert HypervectorCodec(0.07).nbytes(draw(0, 100)) == 4 + 4 * 7
