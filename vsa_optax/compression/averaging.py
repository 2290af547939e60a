"""The mean of many leaves over devices: leaves are packed into buckets, averaged by bucket, and unpacked."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vsa_optax.codecs.codec import Codec, LeafSpec, as_decoded
from vsa_optax.compression import exchange
from vsa_optax.compression.buckets import Buckets, Vectors
from vsa_optax.core.mesh import axis_size, varying_axes


class Averaged(NamedTuple):
    """The result of an exchange on one device.

    Attributes:
        means: vectors, the same on all devices; zeros for leaves in a bucket with a non-finite value.
        unsent: vectors whose mean over devices is the error of the means; empty if they are not kept.
        is_finite: ``[] bool``, the same on all devices along the axes: whether all sent values are finite.
        num_buckets: the number of buckets.
    """

    means: Vectors
    unsent: Vectors
    is_finite: jax.Array
    num_buckets: int


def averaged(
    axes: tuple[str, ...],
    codec: Codec,
    vectors: Vectors,
    specs: Sequence[LeafSpec],
    step: jax.Array,
    bucket_bytes: int | None,
    *,
    keeps_unsent: bool,
) -> Averaged:
    """The means of ``vectors`` over the devices along ``axes``.

    Args:
        axes: the mesh axes.
        codec: the codec of the payloads.
        vectors: ``[size] f32``, the leaves as vectors.
        specs: the shapes and dtypes of these leaves.
        step: ``[] int32``, the same on all devices.
        bucket_bytes: the largest size of a bucket in f32; None for one bucket.
        keeps_unsent: whether to compute the coding error of this device.
    """
    groups = _alike(vectors, axes)
    layouts = [_layout([vectors[i].size for i in group], axes, codec, bucket_bytes) for group in groups]
    num_buckets = sum(len(buckets.pieces) for buckets in layouts)
    numbers, is_finite = itertools.count(), jnp.array(True)
    empty = jnp.zeros([0], jnp.float32)
    means, unsent = ([empty] * len(vectors) for _ in range(2))
    for group, buckets in zip(groups, layouts, strict=True):
        held = functools.partial(_as_held, [specs[i] for i in group])
        found = []
        for place, bucket in enumerate(buckets.pack([vectors[i] for i in group])):
            rounded = functools.partial(buckets.map_pieces, held, place)
            # Each bucket has its own step, so that it has its own random keys.
            own_step = num_buckets * step + next(numbers)
            found.append(exchange.averaged(axes, codec, bucket, own_step, rounded, keeps_unsent=keeps_unsent))
            is_finite &= found[-1].is_finite
        _put(means, group, buckets.unpack([part.mean for part in found]))
        if keeps_unsent:
            _put(unsent, group, buckets.unpack([part.unsent for part in found if part.unsent is not None]))
    return Averaged(means, unsent if keeps_unsent else [], is_finite, num_buckets)


def _alike(vectors: Vectors, axes: tuple[str, ...]) -> list[list[int]]:
    """Groups the indices of vectors that vary over the same axes besides ``axes``; empty vectors are left out.

    A bucket varies over every axis over which one of its vectors varies.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for i, vector in enumerate(vectors):
        if vector.size:  # On a CPU, XLA of JAX 0.11 crashes if some of the arrays are empty.
            groups.setdefault(varying_axes(vector) - set(axes), []).append(i)
    return list(groups.values())


def _layout(sizes: Sequence[int], axes: tuple[str, ...], codec: Codec, bucket_bytes: int | None) -> Buckets:
    num = axis_size(axes)
    if num == 1:
        return Buckets.of_leaves(sizes)
    block = exchange.block_of(codec)
    limit = None if bucket_bytes is None else bucket_bytes // 4
    if limit is not None and limit < num * block:
        raise ValueError(
            f"bucket_bytes must be at least {4 * num * block} with blocks of {block} coordinates on {num} devices, "
            f"each of which averages a part of a bucket, got {bucket_bytes}: choose some MiB, or None for one bucket"
        )
    return Buckets.of_size(sizes, block, num * block, limit)


def _as_held(specs: Sequence[LeafSpec], leaf: int, part: jax.Array) -> jax.Array:
    """A part of a leaf, rounded to the leaf's dtype; complex64 and float64 hold f32 exactly."""
    spec = specs[leaf]
    if spec.dtype.itemsize >= 4:
        return part
    return as_decoded(part, spec).astype(jnp.float32)


def _put(vectors: Vectors, group: Sequence[int], found: Vectors) -> None:
    for i, vector in zip(group, found, strict=True):
        vectors[i] = vector
