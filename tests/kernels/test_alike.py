import jax.numpy as jnp
import pytest

from vsa_optax.kernels import alike


def test_indices_are_of_one_group_if_all_their_arrays_have_the_same_types():
    first = [jnp.zeros(3), jnp.zeros(4), jnp.zeros(3), jnp.zeros(3, jnp.bfloat16), jnp.zeros(3)]
    second = [jnp.zeros(2), jnp.zeros(2), jnp.zeros(2), jnp.zeros(2), jnp.zeros(1)]
    assert alike.numbers_of_alike(first) == [[0, 2, 4], [1], [3]]
    assert alike.numbers_of_alike(first, second) == [[0, 2], [1], [3], [4]]
    assert alike.numbers_of_alike([]) == []


@pytest.mark.parametrize(("num", "expected"), [(1, [1]), (16, [16]), (17, [8, 9]), (24, [12, 12]), (40, [13, 13, 14])])
def test_large_groups_are_divided_into_parts_of_about_the_same_size(num, expected):
    found = alike.numbers_of_alike([jnp.zeros(2)] * num, most=16)
    assert list(map(len, found)) == expected
    assert [i for part in found for i in part] == list(range(num))
