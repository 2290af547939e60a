"""Replaces several arrays by others in one launch, or leaves all as they are; for one GPU.

    old_i <- new_i    if replaces

A launch for each array would take longer than its work. Each program takes a part of each array. If nothing is
replaced, nothing is loaded or stored, since the old arrays are already in their place.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vsa_optax.kernels import platforms
from vsa_optax.kernels.gpu.tiles import Ref

# A thread takes 16 bytes of each of the largest arrays, the most that it can load at once.
_BYTES_AT_ONCE = 2048
_WARPS = 4


@functools.partial(jax.jit, static_argnames=("interpret",))
def replace_if(
    replaces: jax.Array, new: Sequence[jax.Array], old: Sequence[jax.Array], *, interpret: bool = False
) -> list[jax.Array]:
    """``new`` if ``replaces``, else ``old``, in the memory of ``old``.

    Args:
        replaces: ``[] bool``.
        new: arrays, each with fewer than 2^30 elements. The registers of a thread suffice for about 20 large ones.
        old: arrays of the same shapes and dtypes.
        interpret: whether to run without a GPU, for tests.
    """
    num, sizes = len(old), sorted({x.size for x in old})
    programs = pl.cdiv(max(x.nbytes for x in old), _BYTES_AT_ONCE)

    def kernel(replaces: Ref, *refs: Ref) -> None:
        parts = {size: _part(size, programs) for size in sizes}
        masks = {size: replaces[0] & inside for size, (_, inside) in parts.items()}
        # Everything is loaded before anything is stored, so that all loads are under way at once.
        loaded = [
            triton.load(x.at[parts[x.size][0]], mask=masks[x.size], other=np.zeros((), x.dtype)) for x in refs[:num]
        ]
        for x, value in zip(refs[2 * num :], loaded, strict=True):
            triton.store(x.at[parts[x.size][0]], value, mask=masks[x.size])

    flat = [x.reshape(-1) for x in (*new, *old)]
    replaced = pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=[
            platforms.shape_like((x.size,), x.dtype, [replaces, becomes, x])
            for becomes, x in zip(new, old, strict=True)
        ],
        input_output_aliases={1 + num + i: i for i in range(num)},
        name="replace_if",
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
    )(replaces.reshape(1), *flat)
    return [x.reshape(was.shape) for x, was in zip(replaced, old, strict=True)]


def _part(size: int, programs: int) -> tuple[slice | pl.Slice, jax.Array]:
    """The part of an array that this program takes, ``[w]``, and which of its elements are before the array's end."""
    width = pl.next_power_of_2(pl.cdiv(size, programs))
    start = pl.program_id(0) * width
    return pl.ds(start, width), start + lax.iota(jnp.int32, width) < size
