import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import CHEAP

from vsa_optax import TritCodec, accumulate_ternary, ternary_accumulator, ternary_multi_steps
from vsa_optax.accumulation import packed_rows
from vsa_optax.accumulation.ternary_sum import LARGEST_SCALE, SummedLeaf, make_ternary_sum
from vsa_optax.codecs.trit import CodedLeaf, RawLeaf
from vsa_optax.kernels import signs


def test_many_micro_batches_in_one_trit_are_warned_of():
    with pytest.warns(UserWarning, match="33 micro-batches in one trit"):
        accumulate_ternary(33, trits=1)
    with pytest.warns(UserWarning, match="40 micro-batches in one trit"):
        ternary_accumulator(40, trits=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulate_ternary(32, trits=1)
        accumulate_ternary(100, trits=2)


def test_a_codec_does_not_read_a_sum_whose_trits_lie_in_another_order():
    gradient = jnp.ones(5 * 1024)
    leaf = accumulate_ternary(4, trits=2).init(gradient).acc_grads
    payload = TritCodec(2).encode(gradient)
    assert isinstance(leaf, SummedLeaf)
    assert not isinstance(leaf, CodedLeaf)
    # The same fields and shapes: only the type tells them apart.
    assert (leaf.codes.shape, leaf.scales.shape) == (payload.leaves.codes.shape, payload.leaves.scales.shape)
    with pytest.raises(ValueError, match=r"payload.leaves must be those that encode returned for 1 arrays"):
        TritCodec(2).decode(payload._replace(leaves=leaf))


@pytest.mark.parametrize(("size", "kind"), [(31, RawLeaf), (32, SummedLeaf), (33, SummedLeaf)])
def test_a_leaf_of_exactly_one_block_is_summed_in_trits(size, kind):
    state = jax.eval_shape(accumulate_ternary(4, block_size=32).init, jax.ShapeDtypeStruct((size,), jnp.bfloat16))
    assert isinstance(state.acc_grads, kind)
    dtypes = [leaf.dtype for leaf in state.acc_grads]
    assert dtypes == ([jnp.float32] if kind is RawLeaf else [jnp.uint8, jnp.bfloat16])


def test_a_gradient_of_another_size_is_refused_by_its_name():
    """Of what is in trits the sum knows the size to a row, of the others the shape."""
    opt = accumulate_ternary(4, block_size=32)
    params = {"small": jnp.ones(3), "large": jnp.ones((8, 40))}
    state = opt.init(params)
    for name, shape in (("small", (4,)), ("large", (8, 41))):
        with pytest.raises(ValueError, match=rf"gradients: leaf \['{name}'\] has shape \({shape[0]}.*init saw"):
            opt.update(params | {name: jnp.ones(shape)}, state)
    with pytest.raises(ValueError, match=r"leaf \['large'\] is missing"):
        opt.update({"small": params["small"]}, state)
    with pytest.raises(ValueError, match=r"leaf \['more'\] was not among"):
        opt.update(params | {"more": jnp.ones(3)}, state)


def test_the_default_is_two_trits_up_to_eight_micro_batches():
    for make in (accumulate_ternary, ternary_accumulator):
        found = [
            jax.eval_shape(make(k).init, jnp.zeros(5 * 1024)).acc_grads.codes.shape[0] for k in (7, 8, 9, 31, 32, 33)
        ]
        assert found == [2, 2, 3, 3, 3, 3]


def test_the_largest_scale_that_may_be_summed():
    """The limit holds for a coded leaf; a leaf that is not coded may be as large as its sum can be."""
    total = make_ternary_sum(2, trits=2, rounding="nearest", block_size=4, seed=0)
    zeros = {"coded": jnp.zeros(20), "raw": jnp.zeros(3)}
    level = 0.918796  # The nearest to 1, which is the magnitude of all in a turned block of one number, over its rms.
    for share, number, is_taken in ((0.99, 3e38, True), (1.01, 3e38, False), (0.5, np.inf, False)):
        scale = share * LARGEST_SCALE
        gradients = {"coded": zeros["coded"].at[1].set(2 * level * scale), "raw": zeros["raw"].at[1].set(number)}
        grown, is_finite = total.add(total.zeros(zeros), gradients, 0, 0)
        assert float(grown["coded"].scales[0]) == pytest.approx(scale, rel=4e-3)
        assert bool(is_finite) == is_taken
    sums = total.add(total.zeros(zeros), {"coded": zeros["coded"], "raw": jnp.full(3, 3e38)}, 0, 0)[0]
    assert not total.add(sums, {"coded": zeros["coded"], "raw": jnp.full(3, 3e38)}, 0, 1)[1]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_leaves_that_are_summed_together_are_summed_as_they_are_alone(rounding, monkeypatch):
    """Those of less than a row, by the width of its blocks; large ones and one that is not coded among them."""
    sizes = {"a": 70, "b": 400, "c": (8, 10), "d": 3, "e": 64, "f": 200, "g": 320, "h": 300}
    together = make_ternary_sum(3, trits=2, rounding=rounding, block_size=64, seed=0)
    calls, add = [], packed_rows.add
    monkeypatch.setattr(packed_rows, "add", lambda *args, **kwargs: calls.append(args) or add(*args, **kwargs))
    rng = np.random.default_rng(0)
    batches = [{name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()} for _ in range(3)]
    total, grow = together.zeros(batches[0]), jax.jit(together.add, **CHEAP)
    for i, gradients in enumerate(batches[:2]):
        total, is_finite = grow(total, gradients, 7, i)
        assert is_finite
    assert len(calls) == 4  # Of a, c and e; of b; of f and h; of g.
    mean = together.finish(batches[2], total, 7, jnp.int32(3))
    words, first = signs.random_bits(signs.stream(0, 7, 0), (1000,)), 0
    for name, gradient in batches[2].items():
        if name == "d":
            np.testing.assert_allclose(mean[name], sum(b[name] for b in batches) / 3, rtol=1e-6)
            continue
        exact = sum(np.ravel(b[name]) for b in batches) / 3
        error = np.sum((np.ravel(mean[name]) - exact) ** 2) / np.sum(exact**2)
        assert error < (0.08 if rounding == "nearest" else 0.5), name
        if rounding == "nearest":
            num = packed_rows.num_words(gradient.size, 64)
            alone = packed_rows.zeros(gradient.size, trits=2, block_size=64)
            for b in batches[:2]:
                alone = add(alone, b[name].reshape(-1), words[first : first + num], None, block_size=64)
            first += num
            np.testing.assert_array_equal(total[name].codes, alone.codes)
            np.testing.assert_array_equal(total[name].scales, alone.scales)


def updates_of(params):
    """Functions of the gradients alone, where the shapes of the parameters are known."""
    for opt in (accumulate_ternary(2, block_size=32), ternary_multi_steps(optax.sgd(0.1), 2, block_size=32)):
        yield functools.partial(opt.update, state=opt.init(params), params=params)
    accumulator = ternary_accumulator(2, block_size=32)
    yield lambda gradients: accumulator.update(accumulator.init(params), gradients, 0)


def test_a_gradient_unlike_its_parameter_is_refused_where_the_shapes_are_known():
    """The trits of a sum do not tell them, but the parameters do, and so does what an accumulator carries."""
    for update in updates_of({"w": jnp.ones((8, 6))}):
        with pytest.raises(ValueError, match=r"gradients: leaf \['w'\] has shape \(6, 8\), but .* of shape \(8, 6\)"):
            update({"w": jnp.ones((6, 8))})
        with pytest.raises(TypeError, match=r"gradients: leaf \['w'\] has dtype complex64, but .* of dtype float32"):
            update({"w": jnp.ones((8, 6), jnp.complex64)})


@pytest.mark.parametrize("adds", [True, False])
def test_settling_keeps_one_of_two_sums_in_each_leaf(adds):
    """Small leaves, which are added again, leaves of narrow rows, and large ones, which a GPU replaces together."""
    sizes = 200_000, 1000, 3000, 131_072, 1023
    total = make_ternary_sum(4, trits=2, rounding="nearest", block_size=1024, seed=0)
    gradients = [jnp.full(size, 2.0, jnp.bfloat16) for size in sizes]
    rng = np.random.default_rng(0)

    def filled(like):
        return jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 243, x.shape), x.dtype), like)

    old, grown = (filled(total.zeros(gradients)) for _ in range(2))
    expected = [
        (RawLeaf(was.values + 2) if isinstance(was, RawLeaf) else new) if adds else was
        for was, new in zip(old, grown, strict=True)
    ]
    found = total.settle(old, grown, gradients, jnp.array(adds))
    assert jax.tree.structure(found) == jax.tree.structure(old)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
