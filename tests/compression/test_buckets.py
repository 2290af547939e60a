"""Leaves in buckets: each coordinate once, in the documented order, and back."""

import numpy as np
import pytest

from vsa_optax.compression.buckets import Buckets

SIZES = (40, 700, 0, 3, 64, 512, 1, 40)  # With blocks of 32 leaves of 512 or more are large.


def leaves_of(sizes):
    """Every coordinate another number."""
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end, dtype=np.float32) for size, end in zip(sizes, ends, strict=True)]


def widths(buckets):
    return [sum(stop - start for _, start, stop in pieces) for pieces in buckets.pieces]


@pytest.mark.parametrize("limit", [None, 64, 100, 500, 680, 10_000])
def test_out_comes_what_went_in(limit):
    buckets, leaves = Buckets.of_size(SIZES, 32, 64, limit), leaves_of(SIZES)
    packed = buckets.pack(leaves)
    # Large leaves in their order, then small ones by size, those of one size in their order.
    expected = np.concatenate([leaves[i] for i in (1, 5, 4, 0, 7, 3, 6)])
    np.testing.assert_array_equal(np.concatenate(packed), expected)
    for a, b in zip(leaves, buckets.unpack(packed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [len(bucket) for bucket in packed] == widths(buckets)


@pytest.mark.parametrize("limit", [64, 100, 500, 680, 10_000])
def test_buckets_are_alike_and_within_the_limit(limit):
    """All but the last, which is no larger, have a multiple of the unit."""
    *whole, last = widths(Buckets.of_size(SIZES, 32, 64, limit))
    assert max([*whole, last]) <= limit
    assert len({*whole, 64 * (limit // 64)}) <= 2
    assert all(width % 64 == 0 and width >= last > 0 for width in whole)
    assert len(whole) + 1 == -(-sum(SIZES) // (limit // 64 * 64))


def test_a_bucket_for_each_leaf_and_none_for_nothing():
    buckets, leaves = Buckets.of_leaves(SIZES), leaves_of(SIZES)
    packed = buckets.pack(leaves)
    assert [len(bucket) for bucket in packed] == [size for size in SIZES if size]
    for a, b in zip(leaves, buckets.unpack(packed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert Buckets.of_size((0, 0), 32, 64, None).pieces == Buckets.of_leaves(()).pieces == ()


def test_pieces_are_told_their_leaf():
    buckets = Buckets.of_size((600, 600, 5), 32, 64, 700)
    packed = buckets.pack([np.full(size, i, np.float32) for i, size in enumerate((600, 600, 5))])
    for number, bucket in enumerate(packed):
        told = buckets.map_pieces(lambda leaf, part: part * 0 + leaf, number, bucket)
        np.testing.assert_array_equal(told, bucket)
