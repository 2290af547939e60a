import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsa_optax import TritCodec, accumulate_ternary, ternary_accumulator
from vsa_optax.accumulation.ternary_sum import SummedLeaf, make_ternary_sum
from vsa_optax.codecs.trit import CodedLeaf


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
    with pytest.raises(ValueError, match=r"payload.leaves must be what encode made of 1 arrays"):
        TritCodec(2).decode(payload._replace(leaves=leaf))


@pytest.mark.parametrize(("dtype", "reals"), [("float32", 1), ("complex64", 2)])
def test_a_leaf_of_a_block_is_coded_and_a_smaller_one_is_not(dtype, reals):
    """A block of 64 real numbers: as many bytes as documented on either side of the border."""
    block = 64
    for size in (block - reals, block, block + reals):
        total = accumulate_ternary(2, block_size=block).init(jnp.zeros(size // reals, dtype)).acc_grads
        assert isinstance(total, SummedLeaf) == (size >= block), size
        nbytes = sum(x.nbytes for x in jax.tree.leaves(total))
        # Five blocks of 32 share a row's bytes: two trits for each of 32 of these, and a scale for each of five.
        assert nbytes == (4 * size if size < block else 2 * 32 + 2 * 5), size


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
