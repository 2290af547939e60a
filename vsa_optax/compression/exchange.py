"""The mean of vectors over devices, sent in a codec's bits.

A codec whose payloads do not add makes a reduce-scatter and an all-gather of them:

    cut      each device cuts its vectors into n shards; shard r is device r's to average
    scatter  it encodes its shards, and ``all_to_all`` brings each to its owner
    average  the owner decodes n shards and averages them
    gather   it encodes the average, ``all_gather`` brings it to all devices, and they decode

Payloads cross as bytes, so that there are two collectives whatever the number of leaves. Each device and each stage has
a step of its own, hence random keys of its own: the errors of n devices average out. A hypervector is simply summed.

Axes: n shards, one a device; w coordinates; m bytes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.codecs.codec import Codec, LeafSpec, as_decoded, as_reals, from_reals
from vsa_optax.codecs.hypervector import HypervectorCodec
from vsa_optax.core import versions
from vsa_optax.core.mesh import axis_size, varying_axes
from vsa_optax.core.trees import all_finite

Vectors = list[jax.Array]


class Exchanged(NamedTuple):
    """What a device has after an exchange.

    Attributes:
        mean: vectors, as all devices decode them and their leaves' dtypes hold them: the same everywhere.
        unsent: vectors, whose mean over devices is what the mean lacks; empty if they are not kept.
        is_finite: ``[] bool``, the same everywhere: whether all that was sent, and the mean, is finite.
    """

    mean: Vectors
    unsent: Vectors
    is_finite: jax.Array


def averaged(
    axes: tuple[str, ...],
    codec: Codec,
    vectors: Vectors,
    specs: Sequence[LeafSpec],
    step: jax.Array,
    *,
    keeps_unsent: bool,
) -> Exchanged:
    """The mean of ``vectors`` over the devices along ``axes``.

    With one device nothing is sent, so nothing is encoded.

    Args:
        axes: of the mesh.
        codec: of the payloads.
        vectors: ``[size] f32``.
        specs: of the leaves that they will be again.
        step: ``[] int32``, the same on all devices.
        keeps_unsent: whether to find out what was lost.
    """

    def rounded(mean: Vectors) -> Vectors:
        return [as_reals(as_decoded(from_reals(x, spec), spec)) for x, spec in zip(mean, specs, strict=True)]

    if axis_size(axes) == 1:
        mean = rounded([lax.psum(x, axes) for x in vectors])
        unsent = [x - m for x, m in zip(vectors, mean, strict=True)] if keeps_unsent else []
        return Exchanged(mean, unsent, all_finite(mean))
    if isinstance(codec, HypervectorCodec) and not codec.use_ternary:
        return _mean_of_bundles(axes, codec, vectors, step, rounded, keeps_unsent)
    return _mean_of_payloads(axes, codec, vectors, step, rounded, keeps_unsent)


def _mean_of_payloads(
    axes: tuple[str, ...],
    codec: Codec,
    vectors: Vectors,
    step: jax.Array,
    rounded: Callable[[Vectors], Vectors],
    keeps_unsent: bool,
) -> Exchanged:
    """By payloads that are decoded before they are averaged."""
    num, own = axis_size(axes), lax.axis_index(axes)
    encode_all, decode_all = jax.vmap(codec.encode, in_axes=(0, None)), jax.vmap(codec.decode)
    layout = _ShardLayout.for_codec(codec, [x.size for x in vectors], num)
    shards = layout.cut(vectors)
    first_step = 2 * (num * step + own)

    payload = encode_all(shards, first_step)
    arrays, treedef = jax.tree.flatten(payload)
    flags = jnp.broadcast_to(all_finite(vectors).astype(jnp.uint8), (num, 1))
    wire = lax.all_to_all(_to_bytes([*arrays, flags]), axes, 0, 0, tiled=True)
    *arrays, flags = _from_bytes(wire, [*arrays, flags])
    # What a device has for itself need be neither sent nor coded.
    decoded = decode_all(jax.tree.unflatten(treedef, arrays))
    from_all = [_put(d, own, _take(x, own)) for d, x in zip(decoded, shards, strict=True)]
    average = [jnp.sum(of_devices / num, axis=0) for of_devices in from_all]

    arrays, treedef = jax.tree.flatten(jax.tree.map(lambda x: x[None], codec.encode(average, first_step + 1)))
    flags = jnp.all(flags > 0).astype(jnp.uint8).reshape(1, 1)
    wire = _all_gather(_to_bytes([*arrays, flags])[0], axes)
    *arrays, flags = _from_bytes(wire, [*arrays, flags])
    mean = rounded(layout.join(decode_all(jax.tree.unflatten(treedef, arrays))))

    unsent = []
    if keeps_unsent:
        # What the code of the average lost stays with its owner, n times, since the next average divides it by n.
        lost = [x - d for x, d in zip(shards, decode_all(payload), strict=True)]
        of_average = [num * (a - _take(m, own)) for a, m in zip(average, layout.cut(mean), strict=True)]
        unsent = layout.join([_put(x, own, e) for x, e in zip(lost, of_average, strict=True)])
    return Exchanged(mean, unsent, jnp.all(flags > 0) & all_finite(mean))


def _mean_of_bundles(
    axes: tuple[str, ...],
    codec: HypervectorCodec,
    vectors: Vectors,
    step: jax.Array,
    rounded: Callable[[Vectors], Vectors],
    keeps_unsent: bool,
) -> Exchanged:
    """By hypervectors, which are summed as they are; all devices take the same keys."""
    payload = codec.encode(vectors, step)
    decoded = codec.decode(payload._replace(bundle=lax.psum(payload.bundle / axis_size(axes), axes)))
    mean = rounded(decoded)
    unsent = []
    if keeps_unsent:
        lost = [x - d for x, d in zip(vectors, codec.decode(payload), strict=True)]
        unsent = [x + (d - m) for x, d, m in zip(lost, decoded, mean, strict=True)]
    return Exchanged(mean, unsent, all_finite(mean))


def _all_gather(own: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """``[n, m]``: the bytes ``[m]`` of all devices, known as the same on all if ``shard_map`` checks that."""
    return versions.all_gather_invarying(own, axes) if varying_axes(own) else lax.all_gather(own, axes)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, index, keepdims=False)


def _put(x: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, new, index, 0)


@dataclasses.dataclass(frozen=True)
class _ShardLayout:
    """How vectors are cut into shards.

    A vector of ``num_shards * block`` coordinates or more is cut by itself. The others are put together, the largest
    first, so that only the smallest of them share their blocks with many: their shards alone would be too short to
    code.

    Attributes:
        sizes: coordinates of each vector.
        num_shards: n.
        block: coordinates from which on a shard is coded.
        worth_padding: coordinates from which on a shorter shard costs less if it is padded to a block, and coded.
    """

    sizes: tuple[int, ...]
    num_shards: int
    block: int
    worth_padding: int

    @classmethod
    def for_codec(cls, codec: Codec, sizes: Sequence[int], num_shards: int) -> "_ShardLayout":
        """A codec that leaves small arrays as they are says by its ``block_size`` which are small."""
        block = getattr(codec, "block_size", 1)
        coded_bytes = codec.nbytes([jax.ShapeDtypeStruct((block,), jnp.float32)])
        return cls(tuple(sizes), num_shards, block, worth_padding=-(-coded_bytes // 4))

    def cut(self, vectors: Vectors) -> Vectors:
        """Arrays ``[n, w]``, zeros behind the coordinates, of the vectors ``[size] f32``; none for empty vectors."""
        shards = []
        for group in self._groups():
            flat = jnp.concatenate([vectors[i] for i in group])
            width = self._width(flat.size)
            padded = jnp.pad(flat, (0, self.num_shards * width - flat.size))
            shards.append(padded.reshape(self.num_shards, width))
        return shards

    def join(self, shards: Vectors) -> Vectors:
        """The inverse of `cut`."""
        vectors = [jnp.zeros([0], jnp.float32)] * len(self.sizes)
        for group, of_group in zip(self._groups(), shards, strict=True):
            flat, start = of_group.reshape(-1), 0
            for i in group:
                vectors[i] = flat[start : start + self.sizes[i]]
                start += self.sizes[i]
        return vectors

    def _groups(self) -> list[list[int]]:
        """Which vectors are cut together."""
        by_size = sorted((i for i, size in enumerate(self.sizes) if size), key=lambda i: -self.sizes[i])
        alone = [[i] for i in by_size if self.sizes[i] >= self.num_shards * self.block]
        together = by_size[len(alone) :]
        return [*alone, together] if together else alone

    def _width(self, size: int) -> int:
        width = -(-size // self.num_shards)
        return self.block if self.worth_padding <= width < self.block else width


def _to_bytes(arrays: Sequence[jax.Array]) -> jax.Array:
    """``[n, m] uint8``: the bits of the arrays ``[n, ...]``, those of one array behind those of the other."""
    parts = []
    for array in arrays:
        bits = array if array.dtype == jnp.uint8 else lax.bitcast_convert_type(array, jnp.uint8)
        parts.append(bits.reshape(bits.shape[0], -1))
    return jnp.concatenate(parts, axis=1)


def _from_bytes(wire: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """The inverse of `_to_bytes`, for any n.

    Args:
        wire: ``[n, m] uint8``.
        like: arrays with the shapes, but for the leading axis, and dtypes of those that were turned into bytes.
    """
    arrays, start = [], 0
    for array in like:
        size, width = math.prod(array.shape[1:]), array.dtype.itemsize
        bits = wire[:, start : start + size * width]
        start += size * width
        if array.dtype == jnp.uint8:
            arrays.append(bits.reshape(-1, *array.shape[1:]))
        else:
            bits = bits.reshape(-1, *array.shape[1:], *([width] if width > 1 else []))
            arrays.append(lax.bitcast_convert_type(bits, array.dtype))
    return arrays
