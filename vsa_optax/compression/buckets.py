"""Packs the leaves of a gradient into a few flat vectors, the buckets, and unpacks them.

A bucket is coded and sent as a whole: it needs one call of a codec and two collectives, however many leaves it has.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Vectors = list[jax.Array]
# A leaf of at least this many blocks shares at most an eighth of its blocks with others, wherever it begins.
_BLOCKS_OF_A_LARGE_LEAF = 16


class Piece(NamedTuple):
    """A part of a leaf, in its place in a bucket.

    Attributes:
        leaf: the leaf's index.
        start: the index of its first coordinate in the leaf.
        stop: the index after its last coordinate.
    """

    leaf: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Assigns the coordinates of all leaves to buckets.

    Large leaves come first in the order of the tree, so that a bucket holds neighbours, whose gradients a backward pass
    finishes one after the other. Small leaves follow, the largest first. All coordinates of a block share one scale,
    so in this order only the smallest leaves share a scale with many others.

    Attributes:
        sizes: the number of coordinates of each leaf.
        pieces: the pieces in each bucket, in order; empty leaves have no piece.
    """

    sizes: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]

    @classmethod
    def of_leaves(cls, sizes: Sequence[int]) -> "Buckets":
        """Puts each leaf into its own bucket, which needs no copy."""
        return cls(tuple(sizes), tuple((Piece(i, 0, size),) for i, size in enumerate(sizes) if size))

    @classmethod
    def of_size(cls, sizes: Sequence[int], block: int, unit: int, limit: int | None) -> "Buckets":
        """Makes buckets of about the same size.

        Args:
            sizes: the number of coordinates of each leaf.
            block: the number of coordinates of a bucket that share a scale.
            unit: the size of every bucket but the last is a multiple of this number.
            limit: the largest number of coordinates in a bucket, at least ``unit``; None for one bucket.
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
        """Packs leaves ``[size] f32`` into buckets ``[width] f32``."""
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
        """Applies ``fun`` to leaf index and coordinates of each piece of bucket ``number``, and joins the results."""
        ends = itertools.accumulate(stop - start for _, start, stop in self.pieces[number])
        parts = jnp.split(bucket, list(ends)[:-1])
        return _joined([fun(piece.leaf, part) for piece, part in zip(self.pieces[number], parts, strict=True)])


def _joined(parts: Vectors) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
