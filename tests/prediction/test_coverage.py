"""Which gradients a machine answers for: those that it records, and not one coordinate more."""

import jax
import jax.numpy as jnp
import optax
import pytest

from vsa_optax import Guarded, TritCodec, Window, phase_switched
from vsa_optax.prediction.coverage import check_covers

LEAVES = {name: jnp.ones(3) for name in "abcdef"}


def covers(recorded, wanted, predictor):
    state = phase_switched(optax.sgd(0.1), predictor=predictor, phases=Guarded()).init({n: LEAVES[n] for n in recorded})
    grads = {name: jax.ShapeDtypeStruct(LEAVES[name].shape, jnp.float32) for name in wanted if name in LEAVES}
    grads |= {name: jax.ShapeDtypeStruct((), jnp.float32) for name in wanted if name not in LEAVES}
    check_covers(state, state, grads)


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ("ax", r"\(\['x'\]\)"),
        ("bc", r"\(\['c'\]\)"),
        ("abcd", r"\(\['b'\], \['c'\], \['d'\]\)"),
        ("abcde", r"\(\['b'\], \['c'\], \['d'\], \.\.\.\)"),
    ],
)
def test_up_to_three_leaves_that_are_not_recorded_are_named(wanted, named):
    """A scalar is enough."""
    covers("a", "a", Window(2))
    covers("ab", "a", Window(2))
    with pytest.raises(ValueError, match=f"does not cover {named}"):
        covers("a", wanted, Window(2))


def test_of_coded_records_the_number_of_leaves_is_known():
    """Not that of one leaf, which may be all parameters in a row."""
    coded = Window(2, codec=TritCodec())
    covers("ab", "ab", coded)
    covers("a", "abc", coded)
    with pytest.raises(ValueError, match=r"does not cover \(some leaves\)"):
        covers("ab", "abc", coded)
