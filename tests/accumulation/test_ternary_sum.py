import warnings

import pytest

from vsa_optax import accumulate_ternary, ternary_accumulator


def test_many_micro_batches_in_one_trit_are_warned_of():
    with pytest.warns(UserWarning, match="33 micro-batches in one trit"):
        accumulate_ternary(33, trits=1)
    with pytest.warns(UserWarning, match="40 micro-batches in one trit"):
        ternary_accumulator(40, trits=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulate_ternary(32, trits=1)
        accumulate_ternary(100, trits=2)
