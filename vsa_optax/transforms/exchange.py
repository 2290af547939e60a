"""The mean of vectors over devices, sent in a codec's bits.

A codec whose payloads do not add makes a reduce-scatter and an all-gather of them:

    cut      each device cuts its vectors into n rows; row r is device r's to average
    scatter  it encodes its rows, and ``all_to_all`` brings each to its owner
    average  the owner decodes n rows and averages them
    gather   it encodes the average, ``all_gather`` brings it to all devices, and they decode

Payloads cross as bytes, so that there are two collectives whatever the number of leaves. Each device and each stage has
a step of its own, hence random keys of its own: the errors of n devices average out. A hypervector is simply summed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.codecs.codec import Codec, LeafSpec, as_decoded, as_reals, from_reals
from vsa_optax.codecs.hypervector import HypervectorCodec
from vsa_optax.core import versions
from vsa_optax.kernels import byte_rows
from vsa_optax.kernels.shard_rows import RowLayout
from vsa_optax.transforms.finite import all_finite
from vsa_optax.transforms.replicated import axis_size, varying_axes

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


def mean_over(
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
    layout = _layout_for(codec, [x.size for x in vectors], num)
    rows = layout.cut(vectors)
    first_step = 2 * (num * step + own)

    payload = encode_all(rows, first_step)
    arrays, treedef = jax.tree.flatten(payload)
    flags = jnp.broadcast_to(all_finite(vectors).astype(jnp.uint8), (num, 1))
    wire = lax.all_to_all(byte_rows.to_bytes([*arrays, flags]), axes, 0, 0, tiled=True)
    *arrays, flags = byte_rows.from_bytes(wire, [*arrays, flags])
    # What a device has for itself need be neither sent nor coded.
    decoded = decode_all(jax.tree.unflatten(treedef, arrays))
    from_all = [_put(d, own, _take(x, own)) for d, x in zip(decoded, rows, strict=True)]
    average = [jnp.sum(of_devices / num, axis=0) for of_devices in from_all]

    arrays, treedef = jax.tree.flatten(jax.tree.map(lambda x: x[None], codec.encode(average, first_step + 1)))
    flags = jnp.all(flags > 0).astype(jnp.uint8).reshape(1, 1)
    wire = _all_gather(byte_rows.to_bytes([*arrays, flags])[0], axes)
    *arrays, flags = byte_rows.from_bytes(wire, [*arrays, flags])
    mean = rounded(layout.join(decode_all(jax.tree.unflatten(treedef, arrays))))

    unsent = []
    if keeps_unsent:
        # What the code of the average lost stays with its owner, n times, since the next average divides it by n.
        lost = [x - d for x, d in zip(rows, decode_all(payload), strict=True)]
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
    decoded = codec.decode(dataclasses.replace(payload, bundle=lax.psum(payload.bundle / axis_size(axes), axes)))
    mean = rounded(decoded)
    unsent = []
    if keeps_unsent:
        lost = [x - d for x, d in zip(vectors, codec.decode(payload), strict=True)]
        unsent = [x + (d - m) for x, d, m in zip(lost, decoded, mean, strict=True)]
    return Exchanged(mean, unsent, all_finite(mean))


def _layout_for(codec: Codec, sizes: Sequence[int], num: int) -> RowLayout:
    """A codec that leaves small arrays as they are says by its ``block_size`` which are small."""
    block = getattr(codec, "block_size", 1)
    coded_bytes = codec.nbytes([jax.ShapeDtypeStruct((block,), jnp.float32)])
    return RowLayout(tuple(sizes), num, block, worth_padding=-(-coded_bytes // 4))


def _all_gather(row: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """``[n, m]``: the rows ``[m] uint8`` of all devices, known as the same on all if ``shard_map`` checks that."""
    return versions.all_gather_invarying(row, axes) if varying_axes(row) else lax.all_gather(row, axes)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, index, keepdims=False)


def _put(x: jax.Array, index: jax.Array, row: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, row, index, 0)
