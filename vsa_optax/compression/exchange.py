"""The mean of one vector over devices, sent as payloads of a codec.

If the payloads of a codec do not add, the mean is a reduce-scatter and an all-gather of payloads:

    cut      each device cuts its vector into n rows; device r averages row r
    scatter  it encodes the other devices' rows, and ``all_to_all`` sends each to its device (``all_gather`` if n = 2)
    average  each device decodes n - 1 rows and averages them with its own
    gather   it encodes the average, ``all_gather`` sends it to all devices, and they decode it

Rows are sent as the bytes of a `row_coding`, so two collectives are enough. Each device and each stage has its own
step, hence its own random keys: the errors of n devices average out. Hypervectors add, so they are summed directly.

Axes: n rows, one per device; w coordinates; m bytes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.codecs.codec import Codec
from vsa_optax.codecs.hypervector import HypervectorCodec
from vsa_optax.compression import row_coding
from vsa_optax.core import versions
from vsa_optax.core.mesh import axis_size, varying_axes
from vsa_optax.core.trees import all_finite


class Exchanged(NamedTuple):
    """The result of an exchange on one device.

    Attributes:
        mean: ``[size] f32``, the decoded mean, rounded to the leaves' dtypes; the same on all devices, and zeros if any
            value is non-finite.
        unsent: ``[size] f32``, whose mean over devices is the error of the mean; None if it is not kept.
        is_finite: ``[] bool``, the same on all devices: whether all sent values and the mean are finite.
    """

    mean: jax.Array
    unsent: jax.Array | None
    is_finite: jax.Array


def averaged(
    axes: tuple[str, ...],
    codec: Codec,
    vector: jax.Array,
    step: jax.Array,
    rounded: Callable[[jax.Array], jax.Array],
    *,
    keeps_unsent: bool,
) -> Exchanged:
    """The mean of ``vector`` over the devices along ``axes``.

    With one device nothing is sent, so nothing is encoded.

    Args:
        axes: the mesh axes.
        codec: the codec of the payloads.
        vector: ``[size] f32``, of size at least 1.
        step: ``[] int32``, the same on all devices, and different for each vector and step.
        rounded: a function that rounds a vector to the dtypes of its leaves.
        keeps_unsent: whether to compute the coding error of this device.
    """
    if axis_size(axes) == 1:
        mean = rounded(lax.psum(vector, axes))
        return _exchanged(mean, vector - mean if keeps_unsent else None)
    if isinstance(codec, HypervectorCodec) and not codec.use_ternary:
        return _mean_of_bundles(axes, codec, vector, step, rounded, keeps_unsent)
    return _mean_of_payloads(axes, codec, vector, step, rounded, keeps_unsent)


def block_of(codec: Codec) -> int:
    """The smallest size of an array that the codec codes: its ``block_size``, or 1 if it has none."""
    return int(getattr(codec, "block_size", 1))


def _mean_of_payloads(
    axes: tuple[str, ...],
    codec: Codec,
    vector: jax.Array,
    step: jax.Array,
    rounded: Callable[[jax.Array], jax.Array],
    keeps_unsent: bool,
) -> Exchanged:
    """The mean for payloads that must be decoded before they are averaged."""
    num, own = axis_size(axes), lax.axis_index(axes)
    width = row_width(codec, vector.size, num)
    rows, coding = _cut(vector, num, width), row_coding.coding_of(codec, width)
    # A device's own row need be neither coded nor sent. In the device's order of rows, its own comes last.
    others_of = row_coding.others_than(own, num)
    place_of = (jnp.arange(num, dtype=jnp.int32) - own - 1) % num
    steps = 2 * (num * step + jnp.arange(num, dtype=jnp.int32))
    own_step = row_coding.take(steps, own)
    last_step = own_step + 1

    sent = coding.encode(rows, others_of, own_step)
    if num == 2:  # Gathering moves the same bytes, and an all-to-all of NCCL moves fewer bytes per second.
        wire = lax.all_gather(sent[0], axes)
    else:
        wire = row_coding.rows_at(jnp.pad(sent, ((0, 1), (0, 0))), place_of)
        wire = lax.all_to_all(wire, axes, 0, 0, tiled=True)
    # An average is finite only if all that entered it is, so no more flags are needed.
    if keeps_unsent:
        average = coding.average(wire, steps, rows, own)
        average_sent = row_coding.encode_vector(coding, average, last_step)
    else:
        average_sent = coding.relay(wire, steps, rows, own, last_step)
    means, is_finite = coding.decode(_all_gather(average_sent, axes), steps + 1)
    mean = rounded(means.reshape(-1)[: vector.size])

    unsent = None
    if keeps_unsent:
        # The error of the coded average stays with the device that averages. It is multiplied by n, since the next
        # average divides it by n.
        of_average = num * (average - row_coding.take(_cut(mean, num, width), own))
        received, _ = coding.decode(sent, jnp.broadcast_to(own_step, (num - 1,)))
        lost = jnp.concatenate([row_coding.rows_at(rows, others_of) - received, of_average[None]])
        unsent = row_coding.rows_at(lost, place_of).reshape(-1)[: vector.size]
    return Exchanged(mean, unsent, is_finite)


def _mean_of_bundles(
    axes: tuple[str, ...],
    codec: HypervectorCodec,
    vector: jax.Array,
    step: jax.Array,
    rounded: Callable[[jax.Array], jax.Array],
    keeps_unsent: bool,
) -> Exchanged:
    """The mean for hypervectors, which are summed without decoding; all devices use the same keys."""
    payload = codec.encode(vector, step)
    decoded = codec.decode(payload._replace(bundle=lax.psum(payload.bundle / axis_size(axes), axes)))
    mean = rounded(decoded)
    unsent = (vector - codec.decode(payload)) + (decoded - mean) if keeps_unsent else None
    return _exchanged(mean, unsent)


def _exchanged(mean: jax.Array, unsent: jax.Array | None) -> Exchanged:
    is_finite = all_finite(mean)
    return Exchanged(jnp.where(is_finite, mean, jnp.zeros_like(mean)), unsent, is_finite)


def row_width(codec: Codec, size: int, num: int) -> int:
    """The coordinates in each of ``num`` rows of a vector; a row is padded to a block if its code then takes less."""
    width, block = -(-size // num), block_of(codec)
    worth_padding = -(-codec.nbytes(jax.ShapeDtypeStruct((block,), jnp.float32)) // 4)
    return block if worth_padding <= width < block else width


def _cut(vector: jax.Array, num: int, width: int) -> jax.Array:
    """Cuts a vector into rows ``[n, w]``, padded with zeros at the end."""
    return jnp.pad(vector, (0, num * width - vector.size)).reshape(num, width)


def _all_gather(own: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """``[n, m]``: the bytes ``[m]`` of all devices, marked as replicated if ``shard_map`` checks replication."""
    return versions.all_gather_invarying(own, axes) if varying_axes(own) else lax.all_gather(own, axes)
