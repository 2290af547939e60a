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
    kernel, launched = functools.partial(replacement_kernel.replace_if, interpret=not ON_GPU), []

    def counted(replaces, new, old):
        launched.append(len(old))
        return kernel(replaces, new, old)

    monkeypatch.setattr(replacement_kernel, "replace_if", counted)
    monkeypatch.setattr(platforms, "on_each_gpu_or_anywhere", lambda on_gpu, anywhere, *operands: on_gpu(*operands))
    new, old = pairs(0), pairs(1)
    check(replacement.replace_if.__wrapped__(jnp.array(replaces), new, old), new if replaces else old)
    assert sorted(launched) == [2 * 3, 2 * 9, 2 * 9]


def kernels(function, *arguments):
    text = jax.jit(lambda *given: function(*given)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.count('"replace_if"')


def test_a_gpu_has_a_kernel_for_leaves_of_the_same_types(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    few = pairs(0, [(64, 5)] * 3 + [(96, 8)] * 2)
    assert kernels(replacement.replace_if, jnp.array(True), few, few) == 2


def test_inside_shard_map_too_where_each_device_decides():
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def replaced(adds, new, old):
        return replacement.replace_if(adds[0], new, old)

    split = P("d"), P(None, "d"), P(None, "d")
    mapped = jax.shard_map(replaced, mesh=mesh, in_specs=split, out_specs=P(None, "d"))
    new, old = ([(x, x + 1) for x, _ in pairs(seed, [(64, 5)] * 2)] for seed in range(2))
    assert kernels(mapped, jnp.array([True, False]), new, old) == 1
    found = mapped(jnp.array([True, False]), new, old)
    check(found, jax.tree.map(lambda a, b: jnp.concatenate([a[:, :32], b[:, 32:]], axis=1), new, old))
