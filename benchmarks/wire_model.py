"""The cost of an exchange of gradients by formula: bytes that a device sends, and seconds on a link."""

import math

import collective_rivals as rivals
import jax
import jax.numpy as jnp

from vsa_optax import HypervectorCodec


def sent_by_codec(codec, shapes, num):
    """Rows of one vector of all leaves cross in the all-to-all, and again in the all-gather."""
    if isinstance(codec, HypervectorCodec):
        return rivals.all_reduced(codec.nbytes(shapes) - 4, num)  # The step is known to all.
    width = -(-rivals.size_of(shapes) // num)
    coded = codec.nbytes(jax.ShapeDtypeStruct((max(width, codec.block_size),), jnp.float32)) - 4
    is_coded = width >= codec.block_size or coded <= 4 * width
    # A coded row is padded, so that a GPU loads several bytes at once; an uncoded one has the step and a flag.
    row = -(-coded // 16) * 16 if is_coded else 4 * width + 4 + 1
    return 2 * rivals.gathered(num * row, num)


def exchange_seconds(sent, link, size=0, encode=math.inf, decode=math.inf):
    """Of sending ``sent`` bytes at ``link`` bytes a second, and then of coding, nothing beside anything else.

    A device encodes the others' rows and the mean of its own. It decodes the others' parts of its own row and all
    means, nearly twice the gradient. ``encode`` and ``decode`` are bytes of f32 a second, ``size`` is in bytes.
    """
    return sent / link + size / encode + 2 * size / decode
