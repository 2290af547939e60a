"""Replaces many arrays by others, or none of them, by one condition."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from vsa_optax.kernels import platforms

# Arrays that belong together, such as a leaf's codes and scales.
Arrays: TypeAlias = tuple[jax.Array, ...]

_MOST_AT_ONCE = 16


@jax.jit
def replace_if(replaces: jax.Array, new: Sequence[Arrays], old: Sequence[Arrays]) -> list[Arrays]:
    """``new`` if ``[] bool`` ``replaces``, else ``old``.

    On an NVIDIA GPU, tuples of the same types share a launch, up to 16, and the old arrays are replaced in place.
    """
    return platforms.on_each_gpu_or_anywhere(_on_gpu, _anywhere, replaces, list(new), list(old))


def _on_gpu(replaces: jax.Array, new: list[Arrays], old: list[Arrays]) -> list[Arrays]:
    from vsa_optax.kernels.gpu import replacement_kernel  # It imports Pallas, which few users need.

    result = list(old)
    for batch in batches(old):
        flat = replacement_kernel.replace_if(
            replaces, [x for i in batch for x in new[i]], [x for i in batch for x in old[i]]
        )
        for i in batch:
            result[i], flat = tuple(flat[: len(old[i])]), flat[len(old[i]) :]
    return result


def _anywhere(replaces: jax.Array, new: list[Arrays], old: list[Arrays]) -> list[Arrays]:
    return [
        tuple(jnp.where(replaces, b, a) for b, a in zip(becomes, was, strict=True))
        for becomes, was in zip(new, old, strict=True)
    ]


def batches(tuples: Sequence[Arrays]) -> list[list[int]]:
    """Indices of tuples of the same types, in groups of at most 16 of nearly the same number."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, arrays in enumerate(tuples):
        alike.setdefault(tuple(map(jax.typeof, arrays)), []).append(i)
    divided = []
    for numbers in alike.values():
        # Groups of the same number share a compiled kernel.
        num = -(-len(numbers) // _MOST_AT_ONCE)
        divided += [numbers[len(numbers) * i // num : len(numbers) * (i + 1) // num] for i in range(num)]
    return divided
