import warnings

import jax.numpy as jnp
import pytest

from vsa_optax import TritCodec, accumulate_ternary, ternary_accumulator
from vsa_optax.accumulation.ternary_sum import SummedLeaf
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
