import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsa_optax import AdaptiveCycle, Cycle, Guarded
from vsa_optax.prediction import machine

# Settings, the sizes of both arrays, and the number of all arrays.
KINDS = {
    "never": (Cycle(predict_steps=0), 9, 1, 3),
    "never, adaptive": (AdaptiveCycle(predict_steps=0), 12, 1, 4),
    "cycle": (Cycle(), 10, 3, 3),
    "adaptive": (AdaptiveCycle(), 13, 3, 4),
    "guarded": (Guarded(), 15, 8, 3),
}


def numbered(tree):
    """The same tree with another value in each leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [jnp.full_like(leaf, True if leaf.dtype == bool else 3 + i) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, leaves)


@pytest.mark.parametrize("name", KINDS)
def test_every_scalar_returns(name):
    """Also from the arrays of several machines, and on the host."""
    phases, num_counts, num_numbers, num_arrays = KINDS[name]
    scalars = numbered(machine.init(phases))
    state = scalars.packed()
    assert (state.counts.shape, state.numbers.shape) == ((num_counts,), (num_numbers,))
    assert (state.counts.dtype, state.numbers.dtype) == (jnp.int32, jnp.float32)
    assert len(jax.tree.leaves(state)) == num_arrays
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    for found in (state.unpacked(), jax.tree.map(lambda x: x[1], twice.unpacked()), jax.device_get(state).unpacked()):
        assert jax.tree.structure(found) == jax.tree.structure(scalars)
        for one, other in zip(*map(jax.tree.leaves, (found, scalars)), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
