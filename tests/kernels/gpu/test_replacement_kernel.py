"""The kernel beside NumPy: compiled where there is a GPU, interpreted elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsa_optax.kernels.gpu import replacement_kernel

ON_GPU = jax.default_backend() == "gpu"
# Shapes and dtypes: codes and scales of a row, of several with one and with two trits, and odd sizes.
LEAVES = {
    "one program": [((1, 1024), "uint8"), ((5,), "bfloat16")],
    "tails": [((1, 5 * 1024), "uint8"), ((25,), "bfloat16")],
    "two trits": [((2, 3 * 1024), "uint8"), ((15,), "bfloat16")] * 3,
    "one array": [((4096,), "uint8")],
    "other sizes": [((3, 1001), "uint8"), ((2500,), "bfloat16"), ((1,), "float32"), ((7, 5), "float32")],
}


def arrays(kinds, seed):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.integers(0, 243, shape), dtype) for shape, dtype in kinds]


def run(replaces, new, old):
    return replacement_kernel.replace_if(replaces, new, old, interpret=not ON_GPU)


@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.parametrize("name", LEAVES)
def test_all_are_replaced_or_none(name, replaces):
    new, old = (arrays(LEAVES[name], seed) for seed in range(2))
    found = run(jnp.array(replaces), new, old)
    for of_array, expected, was in zip(found, new if replaces else old, old, strict=True):
        assert (of_array.shape, of_array.dtype) == (was.shape, was.dtype)
        np.testing.assert_array_equal(np.asarray(of_array), np.asarray(expected))


def test_numbers_that_are_not_finite_are_copied_as_they_are():
    new, old = [jnp.array([jnp.nan, -jnp.inf, -0.0], jnp.bfloat16)], [jnp.ones(3, jnp.bfloat16)]
    (found,) = run(jnp.array(True), new, old)
    assert np.asarray(found).tobytes() == np.asarray(new[0]).tobytes()
    assert run(jnp.array(False), new, old)[0].tolist() == [1, 1, 1]


def test_each_program_of_a_batch_has_its_own_condition():
    kinds = [((2, 3, 1024), "uint8"), ((2, 15), "bfloat16")]
    new, old = (arrays(kinds, seed) for seed in range(2))
    found = jax.vmap(run)(jnp.array([True, False]), new, old)
    for of_array, a, b in zip(found, new, old, strict=True):
        np.testing.assert_array_equal(np.asarray(of_array), np.stack([a[0], b[1]]))


def test_it_lowers_for_cuda_with_each_old_array_in_the_place_of_a_result():
    new = old = arrays(LEAVES["two trits"], 0)
    call = jax.jit(lambda *given: replacement_kernel.replace_if(*given))
    text = call.trace(jnp.array(True), new, old).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text
    num = len(old)
    for i in range(num):
        assert f"output_tuple_indices = [{i}], operand_index = {1 + num + i}," in text
