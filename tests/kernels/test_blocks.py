import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import draw

from vsa_optax.kernels import blocks, lloyd_max, rotation, signs

POWERS = [1 << i for i in range(1, 13)]


def bits_of(widths):
    return sum(8 * width // 5 + 16 for width in widths)


@functools.cache
def fewest_bits(rest, smallest):
    """Over every way to cut ``rest`` coordinates into powers of two, of which the last is padded."""
    if rest == 0:
        return 0
    choices, width = [], smallest
    while True:
        choices.append(bits_of([width]) + (fewest_bits(rest - width, smallest) if width < rest else 0))
        if width >= rest:
            return min(choices)
        width *= 2


@settings(max_examples=500)
@given(size=st.integers(1, 20_000), block_size=st.sampled_from([2, 8, 32, 64, 256, 1024, 4096, 65536]))
def test_blocks_cover_a_vector_at_the_least_cost(size, block_size):
    runs = blocks.split_into_blocks(size, block_size)
    widths = [width for num, width in runs for _ in range(num)]
    assert all(num > 0 for num, _ in runs)
    assert all(width & (width - 1) == 0 and width <= block_size for width in widths)
    assert widths == sorted(widths, reverse=True)
    assert widths.count(block_size) >= size // block_size
    smallest = min(32, block_size)
    assert min(widths) >= smallest
    assert blocks.padded_size(runs) == sum(widths) >= size
    assert sum(run.num for run in runs) == len(widths)
    assert sum(widths) - widths[-1] < size  # Only the last block is padded,
    rest = size % block_size
    assert sum(widths) - size < max(smallest, rest)  # and never to twice the remainder, unless to the smallest.
    whole_blocks = -(-size // block_size)
    assert bits_of(widths) <= bits_of([block_size] * whole_blocks)
    if rest:
        tail = widths[size // block_size :]
        assert bits_of(tail) == fewest_bits(rest, smallest)


@pytest.mark.parametrize(
    ("size", "block_size", "runs"),
    [
        (1024, 1024, [(1, 1024)]),
        (3048, 1024, [(3, 1024)]),
        (2600, 1024, [(2, 1024), (1, 512), (1, 64)]),
        (1025, 1024, [(1, 1024), (1, 32)]),
        (5, 1024, [(1, 32)]),
        (7, 2, [(4, 2)]),
    ],
)
def test_how_some_vectors_are_cut(size, block_size, runs):
    assert list(blocks.split_into_blocks(size, block_size)) == runs


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("size", [1, 64, 200])
def test_mapping_the_identity_inverts_cut(size, batch):
    runs = blocks.split_into_blocks(size, 64)
    x = draw(size, *batch, size)
    pieces = blocks.cut(x, runs)
    assert [piece.shape for piece in pieces] == [(*batch, num, width) for num, width in runs]
    if not batch:
        joined = np.asarray(blocks.map_runs(lambda block: block, [(piece,) for piece in pieces], runs))
        np.testing.assert_array_equal(joined[:size], x)
        assert not joined[size:].any()
    flat = np.concatenate([np.reshape(piece, (*batch, -1)) for piece in pieces], axis=-1)
    np.testing.assert_array_equal(flat[..., :size], x)
    numbers = draw(0, *batch, sum(run.num for run in runs))
    scales = blocks.cut_scales(numbers, runs)
    assert [scale.shape for scale in scales] == [(*batch, num) for num, _ in runs]
    np.testing.assert_array_equal(np.concatenate(scales, axis=-1), numbers)


def test_piece_by_piece_the_bits_are_those_of_the_whole():
    """Above 2^18 coordinates, and with a last piece that is not full."""
    num, width = 300, 1024
    assert num * width > 1 << 18
    x = draw(12, num, width)
    words = [signs.random_words(jax.random.key(i), (num, width)) for i in range(2)]

    def encode_block(block, words):
        return lloyd_max.quantize(rotation.rotate(block, words), 2, unbiased=True)

    runs = [blocks.BlockRun(num, width)]
    piecewise = jax.jit(lambda *arrays: blocks.map_runs(encode_block, [arrays], runs))(x, words)
    whole = jax.jit(jax.vmap(encode_block))(x, words)
    for a, b in zip(piecewise, whole, strict=True):
        np.testing.assert_array_equal(a, b.reshape(-1))
