"""An accumulator in trits for `optax.microbatching`: a mean within its documented error."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import CHEAP, LARGE, noise, relative_error

from vsa_optax import ternary_accumulator

# Relative squared error of the mean of 2 and 8 gradients of pure noise, as documented: the last one is quantised, too.
DOCUMENTED_IN_A_CARRY = {1: (0.26, 0.48), 2: (0.041, 0.107), 3: (0.0052, 0.015)}
MEAN = optax.microbatching.AccumulationType.MEAN


def through_a_carry(accumulator, gradients):
    num = len(jax.tree.leaves(gradients)[0])
    one = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), gradients)

    def run(gradients):
        def grow(i, carry):
            return accumulator.update(carry, jax.tree.map(lambda g: g[i], gradients), i)

        return accumulator.finalize(jax.lax.fori_loop(0, num, grow, accumulator.init(one)))

    return jax.jit(run, **CHEAP)(gradients)


@pytest.mark.parametrize("trits", [1, 2, 3])
@pytest.mark.parametrize("column", [0, 1])
def test_the_accumulator_for_micro_batches_is_within_its_documented_error(trits, column):
    k = (2, 8)[column]
    gradients = noise(k, (LARGE,))
    mean = through_a_carry(ternary_accumulator(k, trits=trits), gradients)
    error = relative_error(mean, gradients.mean(axis=0))
    assert error == pytest.approx(DOCUMENTED_IN_A_CARRY[trits][column], rel=0.05)


def test_an_accumulator_in_optax_microbatching():
    def loss(params, batch):
        return jnp.mean((batch @ params["w"] + params["b"] - 1.0) ** 2)

    batch = jax.random.normal(jax.random.key(0), (24, 2048))
    params = {"w": jnp.zeros(2048), "b": jnp.zeros([])}
    both = (MEAN, ternary_accumulator(6, trits=3))
    in_pieces = optax.microbatching.microbatch(jax.value_and_grad(loss), 1, 4, both)
    value, grads = jax.jit(in_pieces, **CHEAP)(params, batch)
    expected_value, expected = jax.value_and_grad(loss)(params, batch)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_allclose(grads["b"], expected["b"], rtol=1e-5)
    assert relative_error(grads["w"], expected["w"]) < 0.02
    total = optax.microbatching.microbatch(jax.grad(loss), 1, 4, ternary_accumulator(6, trits=3, use_grad_mean=False))
    np.testing.assert_allclose(jax.jit(total, **CHEAP)(params, batch)["w"], 6 * grads["w"], rtol=1e-5)


def test_an_accumulator_leaves_out_what_is_not_finite():
    gradients = noise(4, (2048,))
    spoiled = gradients.at[1, 5].set(jnp.nan)
    accumulator = ternary_accumulator(4, trits=3)
    mean = through_a_carry(accumulator, spoiled)
    others = jnp.stack([gradients[0], gradients[2], gradients[3]]).mean(axis=0)
    assert relative_error(mean, others) < 0.02
    assert np.isnan(through_a_carry(accumulator, jnp.full((4, 2048), jnp.nan))).all()
    np.testing.assert_allclose(accumulator.aggregate(gradients), gradients.mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("expected", [3, 6, 12])
def test_the_mean_is_that_of_the_micro_batches_that_came(expected):
    """Whatever number was expected: Optax says it to no accumulator; all of six, or the first two."""
    gradients = noise(6, (3,))
    in_pieces = optax.microbatching.microbatch
    for num, theirs in ((None, MEAN), (2, optax.microbatching.AccumulationType.RUNNING_MEAN)):
        mean = in_pieces(lambda x: x[0], 0, 1, ternary_accumulator(expected), num_real_microbatches=num)
        wanted = in_pieces(lambda x: x[0], 0, 1, theirs, num_real_microbatches=num)
        np.testing.assert_allclose(mean(gradients), wanted(gradients), rtol=1e-5, atol=1e-6)


def test_each_device_of_a_shard_map_has_an_accumulator_of_its_own():
    """With replication checked; a NaN on one is left out there."""
    devices = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    gradients = noise(6, (40,)).at[1, 3].set(jnp.nan)
    mean = optax.microbatching.microbatch(lambda x: x[0], 0, 1, ternary_accumulator(3, trits=3, block_size=32))
    layout = jax.sharding.PartitionSpec("data")
    run = jax.shard_map(lambda x: mean(x)[None], mesh=devices, in_specs=layout, out_specs=layout)
    found = jax.jit(run, **CHEAP)(gradients)
    for own, rows in zip(found, ([0, 2], [3, 4, 5]), strict=True):
        assert relative_error(own, gradients[np.array(rows)].mean(axis=0)) < 0.03
