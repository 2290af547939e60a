"""What an exchange needs of a codec for the rows of a vector, in few passes over memory.

`TritCodec` reads a row in place, averages it with another one while that is decoded, and shows by its scales whether a
payload is finite. Every other codec, including a subclass of `TritCodec`, encodes copies of rows and decodes them.

Axes: n rows; w coordinates; k payloads.
"""

import dataclasses
from typing import TypeGuard

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.codecs.codec import Codec, LeafSpec, Payload, Settings
from vsa_optax.codecs.trit import CodedLeaf, RawLeaf, TritCodec, TritPayload
from vsa_optax.core.trees import all_finite
from vsa_optax.kernels import signs, trit_blocks


def encode_row(codec: Codec, rows: jax.Array, index: jax.Array, step: jax.Array) -> Payload:
    """``codec.encode(rows[index], step)`` for rows ``[n, w] f32``."""
    if not _codes_in_place(codec, rows):
        return codec.encode(take(rows, index), step)
    coded = trit_blocks.encode(
        rows,
        _key(codec, step),
        index,
        trits=codec.trits,
        block_size=codec.block_size,
        unbiased=codec.unbiased,
    )
    spec = LeafSpec(rows.shape[1:], "float32")
    return TritPayload(step, CodedLeaf(*coded), spec, Settings(tuple(dataclasses.asdict(codec).items())))


def average_with_row(codec: Codec, payloads: Payload, rows: jax.Array, index: jax.Array) -> jax.Array:
    """``[w] f32``: the mean of ``rows[index]`` and of n - 1 payloads, stacked on a leading axis."""
    num = len(rows)
    if num == 2 and _codes_in_place(codec, rows):
        other = jax.tree.map(lambda x: x[0], payloads)
        return trit_blocks.average_of_two(
            *other.leaves,
            rows,
            index,
            _key(codec, other.step),
            block_size=codec.block_size,
            unbiased=codec.unbiased,
        )
    decoded = jax.vmap(codec.decode)(payloads)
    return take(rows, index) / num + jnp.sum(decoded / num, axis=0)


def finite_by_scales(codec: Codec, payload: Payload) -> jax.Array | None:
    """``[] bool``: whether a payload, or a stack of payloads, was encoded from finite values and decodes to such.

    None for a codec whose payloads do not show it.
    """
    if type(codec) is not TritCodec:
        return None
    if isinstance(payload.leaves, RawLeaf):
        return all_finite(payload.leaves)
    largest = trit_blocks.largest_scale(codec.trits, codec.block_size)
    return jnp.all(jnp.abs(payload.leaves.scales.astype(jnp.float32)) <= largest)  # False for a NaN.


def take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """``rows[index]``."""
    return lax.dynamic_index_in_dim(rows, index, keepdims=False)


def _codes_in_place(codec: Codec, rows: jax.Array) -> TypeGuard[TritCodec]:
    return type(codec) is TritCodec and rows.shape[1] >= codec.block_size


def _key(codec: TritCodec, step: jax.Array) -> jax.Array:
    """The key of the only leaf of a payload."""
    return signs.stream(codec.seed, step, 0)
