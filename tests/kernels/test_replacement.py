import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vsa_optax.kernels import platforms, replacement
from vsa_optax.kernels.gpu import replacement_kernel

ON_GPU = jax.default_backend() == "gpu"
# Eighteen leaves of one kind, among which lie three of another kind.
SIZES = [(64, 5) if i % 7 else (96, 8) for i in range(1, 22)]


def pairs(seed, sizes=SIZES):
    rng = np.random.default_rng(seed)
    of_leaf = [(rng.integers(0, 243, (1, of_codes)), rng.integers(0, 243, of_scales)) for of_codes, of_scales in sizes]
    return [(jnp.asarray(codes, jnp.uint8), jnp.asarray(scales, jnp.bfloat16)) for codes, scales in of_leaf]


def check(found, expected):
    assert len(found) == len(expected)
    for of_leaf, of_expected in zip(found, expected, strict=True):
        for array, wanted in zip(of_leaf, of_expected, strict=True):
            np.testing.assert_array_equal(np.asarray(array), np.asarray(wanted))


@pytest.mark.parametrize("replaces", [True, False])
def test_all_are_replaced_or_none(replaces):
    new, old = pairs(0), pairs(1)
    check(replacement.replace_if(jnp.array(replaces), new, old), new if replaces else old)


@pytest.mark.parametrize("replaces", [True, False])
def test_in_batches_each_result_is_at_its_place(monkeypatch, replaces):
    """As on a GPU: more leaves of a kind than a batch has."""
    kernel = functools.partial(replacement_kernel.replace_if, interpret=not ON_GPU)
    monkeypatch.setattr(replacement_kernel, "replace_if", kernel)
    monkeypatch.setattr(platforms, "on_each_gpu_or_anywhere", lambda on_gpu, anywhere, *operands: on_gpu(*operands))
    new, old = pairs(0), pairs(1)
    check(replacement.replace_if.__wrapped__(jnp.array(replaces), new, old), new if replaces else old)


@pytest.mark.parametrize(("num", "expected"), [(1, [1]), (16, [16]), (17, [8, 9]), (24, [12, 12]), (40, [13, 13, 14])])
def test_batches_have_at_most_16_leaves_and_about_the_same_number(num, expected):
    found = replacement.batches(pairs(0, [(64, 5)] * num))
    assert sorted(map(len, found)) == expected
    assert sorted(i for batch in found for i in batch) == list(range(num))


def test_leaves_of_other_types_have_their_own_batch():
    found = replacement.batches(pairs(0))
    assert sorted(map(len, found)) == [3, 9, 9]
    assert all(len({SIZES[i] for i in batch}) == 1 for batch in found)


def launches(function, *arguments):
    text = jax.jit(lambda *given: function(*given)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.count('"replace_if"')


def test_a_gpu_has_a_kernel_for_many_leaves(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    few = pairs(0, [(64, 5)] * 3 + [(96, 8)] * 2)
    assert launches(replacement.replace_if, jnp.array(True), few, few) == 2


def test_inside_shard_map_too_where_each_device_decides():
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def replaced(adds, new, old):
        return replacement.replace_if(adds[0], new, old)

    split = P("d"), P(None, "d"), P(None, "d")
    mapped = jax.shard_map(replaced, mesh=mesh, in_specs=split, out_specs=P(None, "d"))
    new, old = ([(x, x + 1) for x, _ in pairs(seed, [(64, 5)] * 2)] for seed in range(2))
    assert launches(mapped, jnp.array([True, False]), new, old) == 1
    found = mapped(jnp.array([True, False]), new, old)
    check(found, jax.tree.map(lambda a, b: jnp.concatenate([a[:, :32], b[:, 32:]], axis=1), new, old))
