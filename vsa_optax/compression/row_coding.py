"""How the rows of a vector become bytes, and their averages again.

`TritRows` is for `TritCodec`, in few passes over memory: on a GPU its kernels read rows and bytes in place, and scales
show whether a row is finite. `PayloadRows` is for every other codec, including a subclass of `TritCodec`.

Axes: n devices, each of which averages one row; w coordinates; m bytes.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.codecs.codec import Codec
from vsa_optax.codecs.trit import TritCodec
from vsa_optax.core.trees import all_finite
from vsa_optax.kernels import signs, trit_averages, trit_blocks

_ALIGNMENT = 16  # Bytes that a GPU loads at once.


class RowCoding(Protocol):
    """A code for rows of a vector."""

    def encode(self, rows: jax.Array, indices: jax.Array, step: jax.Array, *, is_last: bool = False) -> jax.Array:
        """``[k, m] uint8``: the bytes of ``rows[indices]``; ``is_last`` for an average, which all devices decode."""

    def average(self, wire: jax.Array, steps: jax.Array, rows: jax.Array, own: jax.Array) -> jax.Array:
        """``[w] f32``: the mean of ``rows[own]`` and of the other devices' bytes.

        It is not finite if a value that enters it was not finite when it was encoded.

        Args:
            wire: ``[n, m] uint8``, the bytes from each device; row ``own`` is not read.
            steps: ``[n] int32``, with which they were encoded.
            rows: ``[n, w] f32``.
            own: ``[] int32``.
        """

    def relay(self, wire: jax.Array, steps: jax.Array, rows: jax.Array, own: jax.Array, step: jax.Array) -> jax.Array:
        """``[m] uint8``: the bytes of `average`, encoded with ``step``; for all devices to decode."""

    def decode(self, wire: jax.Array, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``[k, w] f32`` of ``[k, m] uint8``, and ``[] bool``: whether all are finite; if one is not, all are zeros."""


def coding_of(codec: Codec, width: int) -> RowCoding:
    """The code for rows of so many coordinates."""
    if type(codec) is TritCodec and width >= codec.block_size:
        return TritRows(codec, width)
    return PayloadRows(codec, width)


def others_than(own: jax.Array, num: int) -> jax.Array:
    """``[num - 1] int32``: the other devices in a device's own order, which begins with its successor."""
    return (own + 1 + jnp.arange(num - 1, dtype=jnp.int32)) % num


def take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """``rows[index]``."""
    return lax.dynamic_index_in_dim(rows, index, keepdims=False)


def rows_at(x: jax.Array, indices: jax.Array) -> jax.Array:
    """``x[indices]``."""
    return x.at[indices].get(mode="promise_in_bounds")


class TritRows(NamedTuple):
    """Rows as trits: the codes, followed by the scales.

    Attributes:
        codec: the codec.
        width: the number of coordinates, at least a block.
    """

    codec: TritCodec
    width: int

    def encode(self, rows: jax.Array, indices: jax.Array, step: jax.Array, *, is_last: bool = False) -> jax.Array:
        """See `RowCoding`; a scale is NaN if a coordinate of its block is not finite."""

        def of_row(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            return trit_blocks.encode(rows, self._key(step), index, room=self._room(), **self._settings())

        return self._wire(*jax.vmap(of_row)(indices))

    def average(self, wire: jax.Array, steps: jax.Array, rows: jax.Array, own: jax.Array) -> jax.Array:
        """See `RowCoding`."""
        num = len(rows)
        others = others_than(own, num)
        if num == 2:
            return trit_averages.average_of_two(*self._with_other(wire, steps, rows, own), **self._settings())
        received = rows_at(wire, others)
        decoded = self._decoded(received, self._scales(received), rows_at(steps, others))
        return take(rows, own) / num + jnp.sum(decoded / num, axis=0)

    def relay(self, wire: jax.Array, steps: jax.Array, rows: jax.Array, own: jax.Array, step: jax.Array) -> jax.Array:
        """See `RowCoding`."""
        if len(rows) > 2:
            return encode_vector(self, self.average(wire, steps, rows, own), step)
        of_two = self._with_other(wire, steps, rows, own)
        codes, scales = trit_averages.relay(*of_two, self._key(step), room=self._room(), **self._settings())
        return self._wire(codes[None], scales[None])[0]

    def decode(self, wire: jax.Array, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `RowCoding`."""
        scales = self._scales(wire)
        largest = trit_blocks.largest_scale(self.codec.trits, self.codec.block_size)
        is_finite = jnp.all(jnp.abs(scales.astype(jnp.float32)) <= largest)  # False for a NaN.
        return self._decoded(wire, jnp.where(is_finite, scales, jnp.zeros_like(scales)), steps), is_finite

    def _decoded(self, wire: jax.Array, scales: jax.Array, steps: jax.Array) -> jax.Array:
        def of_row(codes: jax.Array, scales: jax.Array, step: jax.Array) -> jax.Array:
            one, key = jnp.ones([1], jnp.float32), self._key(step)
            return trit_blocks.decode_sum(codes[None], scales[None], one, key, size=self.width, **self._settings())

        return jax.vmap(of_row)(wire, scales, steps)

    def _with_other(
        self, wire: jax.Array, steps: jax.Array, rows: jax.Array, own: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
        """The arguments of the functions in `trit_averages`, between two devices."""
        (other,) = others_than(own, 2)
        return wire, take(self._scales(wire), other), rows, (other, own), self._key(take(steps, other))

    def _wire(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        """``[k, m] uint8``: codes, in whose room scales are written in place, since nothing else reads them."""
        return lax.dynamic_update_slice(codes, jax.vmap(lambda x: to_bytes([x]))(scales), (0, self._sizes()[0]))

    def _room(self) -> int:
        """The bytes behind the codes: two for each scale, and up to a multiple for loads of several bytes."""
        num_codes, num_scales = self._sizes()
        return 2 * num_scales + -(num_codes + 2 * num_scales) % _ALIGNMENT

    def _scales(self, wire: jax.Array) -> jax.Array:
        """``[k, blocks] bfloat16``."""
        num_codes, num_scales = self._sizes()
        like = [jax.ShapeDtypeStruct((num_scales,), jnp.bfloat16)]
        return jax.vmap(lambda part: from_bytes(part, like)[0])(wire[:, num_codes : num_codes + 2 * num_scales])

    def _sizes(self) -> tuple[int, int]:
        return trit_blocks.coded_sizes(self.width, self.codec.trits, self.codec.block_size)

    def _settings(self) -> dict[str, int]:
        return {"trits": self.codec.trits, "block_size": self.codec.block_size, "unbiased": self.codec.unbiased}

    def _key(self, step: jax.Array) -> jax.Array:
        return signs.stream(self.codec.seed, step, 0)


class PayloadRows(NamedTuple):
    """Rows as payloads of any codec: their arrays, followed by a flag that says whether the row is finite.

    Attributes:
        codec: the codec.
        width: the number of coordinates.
    """

    codec: Codec
    width: int

    def encode(self, rows: jax.Array, indices: jax.Array, step: jax.Array, *, is_last: bool = False) -> jax.Array:
        """See `RowCoding`. Only what is decoded on all devices is checked after coding, too."""

        def of_row(index: jax.Array) -> jax.Array:
            row = take(rows, index)
            payload = self.codec.encode(row, step)
            is_finite = all_finite(row) & (all_finite(self.codec.decode(payload)) if is_last else True)
            return to_bytes([*jax.tree.leaves(payload), is_finite.astype(jnp.uint8)])

        return jax.vmap(of_row)(indices)

    def average(self, wire: jax.Array, steps: jax.Array, rows: jax.Array, own: jax.Array) -> jax.Array:
        """See `RowCoding`."""
        arrays, is_finite = self._arrays(rows_at(wire, others_than(own, len(rows))))
        decoded = self._decoded(arrays)
        average = take(rows, own) / len(rows) + jnp.sum(decoded / len(rows), axis=0)
        return jnp.where(is_finite, average, jnp.nan)

    def relay(self, wire: jax.Array, steps: jax.Array, rows: jax.Array, own: jax.Array, step: jax.Array) -> jax.Array:
        """See `RowCoding`."""
        return encode_vector(self, self.average(wire, steps, rows, own), step)

    def decode(self, wire: jax.Array, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `RowCoding`."""
        arrays, is_finite = self._arrays(wire)
        return self._decoded([jnp.where(is_finite, x, jnp.zeros_like(x)) for x in arrays]), is_finite

    def _decoded(self, arrays: Sequence[jax.Array]) -> jax.Array:
        return jax.vmap(self.codec.decode)(jax.tree.unflatten(jax.tree.structure(self._payload()), arrays))

    def _arrays(self, wire: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """The payloads' arrays ``[k, ...]``, and whether all rows are finite."""
        like = [*jax.tree.leaves(self._payload()), jax.ShapeDtypeStruct((), jnp.uint8)]
        *arrays, flags = jax.vmap(functools.partial(from_bytes, like=like))(wire)
        return arrays, jnp.all(flags > 0)

    def _payload(self) -> object:
        """A payload with shapes in the place of arrays."""
        shapes = jax.ShapeDtypeStruct((self.width,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        return jax.eval_shape(self.codec.encode, *shapes)


def encode_vector(coding: RowCoding, average: jax.Array, step: jax.Array) -> jax.Array:
    """``[m] uint8``: the bytes of an average, for all devices to decode."""
    return coding.encode(average[None], jnp.zeros([1], jnp.int32), step, is_last=True)[0]


def to_bytes(arrays: Sequence[jax.Array]) -> jax.Array:
    """``[m] uint8``: the bytes of the arrays, one array after the other."""
    return jnp.concatenate(
        [(x if x.dtype == jnp.uint8 else lax.bitcast_convert_type(x, jnp.uint8)).reshape(-1) for x in arrays]
    )


def from_bytes(wire: jax.Array, like: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """The inverse of `to_bytes`, with the shapes and dtypes of the arrays."""
    arrays, start = [], 0
    for array in like:
        size, width = math.prod(array.shape), array.dtype.itemsize
        bits = wire[start : start + size * width]
        start += size * width
        if array.dtype == jnp.uint8:
            arrays.append(bits.reshape(array.shape))
        else:
            bits = bits.reshape(*array.shape, *([width] if width > 1 else []))
            arrays.append(lax.bitcast_convert_type(bits, array.dtype))
    return arrays
