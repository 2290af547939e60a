import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vsa_optax import TritCodec, accumulate_ternary, ternary_accumulator, ternary_multi_steps
from vsa_optax.accumulation.ternary_sum import SummedLeaf, make_ternary_sum
from vsa_optax.codecs.trit import CodedLeaf, RawLeaf


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


def test_the_largest_number_that_may_be_summed():
    """Times 2^16 it has to be finite: in a coded leaf the largest that is, and not the next one."""
    total = make_ternary_sum(2, trits=2, rounding="nearest", block_size=4, seed=0)
    zeros = {"coded": jnp.zeros(4), "raw": jnp.zeros(3)}
    largest = np.float32(jnp.finfo(jnp.float32).max / 2**16)
    for number, is_taken in ((largest, True), (np.nextafter(largest, np.float32(np.inf)), False)):
        gradients = {"coded": zeros["coded"].at[1].set(number), "raw": zeros["raw"].at[1].set(3e38)}
        assert bool(total.takes(total.zeros(zeros), gradients)) == is_taken


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
