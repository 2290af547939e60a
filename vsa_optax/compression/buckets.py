"""Leaves of a gradient in a few flat vectors, the buckets, and back.

What is coded and sent is a bucket: one call of a codec and two collectives, whatever the number of leaves in it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Vectors = list[jax.Array]
# From this many blocks on a leaf shares at most an eighth of its blocks with others, wherever it begins.
_BLOCKS_OF_A_LARGE_LEAF = 16


class Piece(NamedTuple):
    """A part of a leaf, in its place in a bucket.

    Attributes:
        leaf: the leaf's index.
        start: of its first coordinate in the leaf.
        stop: behind its last one.
    """

    leaf: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Which coordinates of which leaves are in which bucket.

    Large leaves come first, in the order of the tree, so that a bucket has neighbours, whose gradients a backward pass
    finishes one after the other. Small ones follow, the largest first: a block has one scale for all its coordinates,
    so that only the smallest leaves share theirs with many.

    Attributes:
        sizes: coordinates of each leaf.
        pieces: for each bucket what is in it, in order; none for empty leaves.
    """

    sizes: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]

    @classmethod
    def of_leaves(cls, sizes: Sequence[int]) -> "Buckets":
        """Each leaf in a bucket of its own, which costs no copy."""
        return cls(tuple(sizes), tuple((Piece(i, 0, size),) for i, size in enumerate(sizes) if size))

    @classmethod
    def of_size(cls, sizes: Sequence[int], block: int, unit: int, limit: int | None) -> "Buckets":
        """Buckets of about the same size.

        Args:
            sizes: coordinates of each leaf.
            block: how many coordinates of a bucket share a scale.
            unit: coordinates of which each bucket but the last has a multiple.
            limit: coordinates that a bucket has at most, at least ``unit``; None for one bucket.
        """
        is_small = [size < _BLOCKS_OF_A_LARGE_LEAF * block for size in sizes]
        order = sorted(range(len(sizes)), key=lambda i: (is_small[i], -sizes[i] if is_small[i] else 0))
        total = sum(sizes)
        if not total:
            return cls(tuple(sizes), ())
        num = 1 if limit is None else -(-total // (limit // unit * unit))
        width = total if num == 1 else -(-total // (num * unit)) * unit
        ends = list(itertools.accumulate(sizes[i] for i in order))
        places = list(zip(order, [0, *ends[:-1]], ends, strict=True))
        pieces = [
            tuple(
                Piece(i, max(low, begin) - begin, min(low + width, end) - begin)
                for i, begin, end in places
                if max(low, begin) < min(low + width, end)
            )
            for low in range(0, total, width)
        ]
        return cls(tuple(sizes), tuple(pieces))

    def pack(self, leaves: Vectors) -> Vectors:
        """The buckets, ``[width] f32`` each, of leaves ``[size] f32``."""
        return [_joined([leaves[i][start:stop] for i, start, stop in pieces]) for pieces in self.pieces]

    def unpack(self, buckets: Vectors) -> Vectors:
        """The inverse of `pack`."""
        parts: list[Vectors] = [[] for _ in self.sizes]
        for pieces, bucket in zip(self.pieces, buckets, strict=True):
            begin = 0
            for i, start, stop in pieces:
                parts[i].append(bucket[begin : begin + stop - start])
                begin += stop - start
        return [_joined(of_leaf) if of_leaf else jnp.zeros([0], jnp.float32) for of_leaf in parts]

    def map_pieces(self, fun: Callable[[int, jax.Array], jax.Array], number: int, bucket: jax.Array) -> jax.Array:
        """``fun`` of each piece's leaf and coordinates, in the pieces' places in the bucket of that number."""
        ends = itertools.accumulate(stop - start for _, start, stop in self.pieces[number])
        parts = jnp.split(bucket, list(ends)[:-1])
        return _joined([fun(piece.leaf, part) for piece, part in zip(self.pieces[number], parts, strict=True)])


def _joined(parts: Vectors) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
