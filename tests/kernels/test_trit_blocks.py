import jax.numpy as jnp
import numpy as np
import pytest
import reference
from samples import draw

from vsa_optax.kernels import blocks, lloyd_max, rotation, signs, trit_blocks

KEY = signs.stream(0, 1, 2)


def test_each_block_and_round_has_words_of_its_own():
    runs = blocks.split_into_blocks(5 * 64 + 32, 64)
    of_runs = trit_blocks.random_words(signs.stream(0, 1, 2), runs, rounds=2)
    assert [[words.shape for words in of_run] for of_run in of_runs] == [[(5, 2)] * 2, [(1, 1)] * 2]
    words = np.concatenate([np.ravel(words) for of_run in of_runs for words in of_run])
    assert len(set(words.tolist())) == 2 * (5 * 2 + 1)


def test_a_large_vector_lies_in_whole_rows():
    """Digit j of byte i of a row belongs to coordinate i of block j; zeros pad the last row."""
    size, block_size = 27 * 5 * 1024 - 3000, 1024
    assert blocks.fills_rows(size, block_size)
    assert not blocks.fills_rows((1 << 17) - 1, 32)
    assert not blocks.fills_rows(25 * 5 * 4096 - 1, 4096)
    assert blocks.split_into_blocks(size, block_size) == (blocks.BlockRun(27 * 5, block_size),)
    x, key = draw(0, size), signs.stream(0, 1, 2)
    codes, scales = trit_blocks.encode(x, key, trits=2, block_size=block_size, unbiased=False)
    assert trit_blocks.coded_sizes(size, 2, block_size) == (codes.size, scales.size)
    assert codes.shape == (2, 27 * 1024)
    assert scales.shape == (27 * 5,)
    row, block = 7, 3
    words = trit_blocks.random_words(key, blocks.split_into_blocks(size, block_size), rounds=1)[0][0][5 * row + block]
    place = slice((5 * row + block) * 1024, (5 * row + block + 1) * 1024)
    expected, scale = reference.quantize(
        reference.rotate(x[place], [np.asarray(words)]), lloyd_max.levels(2).astype(np.float64), False
    )
    digits = np.asarray(codes, np.int64)[:, row * 1024 : (row + 1) * 1024] // 3**block % 3
    assert np.mean(digits[0] + 3 * digits[1] != expected) < 0.01
    assert float(scales[5 * row + block]) == pytest.approx(scale, rel=0.01)
    decoded = trit_blocks.decode_sum(
        codes[None], scales[None], np.ones(1, np.float32), key, size=size, block_size=block_size, unbiased=False
    )
    assert np.sum((decoded - x) ** 2) < 0.029 * np.sum(x**2)


def test_a_row_is_coded_with_room_behind_the_codes():
    rows, settings, room = draw(1, 3, 300), {"block_size": 64, "unbiased": True}, 16
    found, found_scales = trit_blocks.encode(rows, KEY, np.int32(1), trits=2, room=room, **settings)
    codes, scales = trit_blocks.encode(rows[1], KEY, trits=2, **settings)
    assert trit_blocks.coded_sizes(300, 2, 64) == (codes.size, scales.size)
    np.testing.assert_array_equal(found[:-room], codes.reshape(-1))
    np.testing.assert_array_equal(found_scales, scales)
    one = np.ones(1, np.float32)
    decoded = trit_blocks.decode_sum(codes[None], scales[None], one, KEY, size=300, **settings)
    flat = trit_blocks.decode_sum(found[None], scales[None], one, KEY, size=300, trits=2, **settings)
    np.testing.assert_array_equal(flat, decoded)


@pytest.mark.parametrize(("trits", "block_size"), [(1, 32), (2, 1024), (3, 4096)])
def test_no_block_with_the_largest_scale_decodes_to_infinity(trits, block_size):
    """Not even one that decodes to a single coordinate; with eight times that scale, it does."""
    signs_of_row = rotation.hadamard_matrix(block_size)[5]
    (words,) = trit_blocks.random_words(KEY, blocks.split_into_blocks(block_size, block_size), rounds=1)[0]
    numbers = np.where(signs_of_row > 0, 3**trits - 1, 0).astype(np.uint8)
    codes = trit_blocks.pack_numbers(numbers, trits)
    limit = trit_blocks.largest_scale(trits, block_size)

    def largest(scale):
        scales, one = jnp.full((1, 1), scale, jnp.bfloat16), np.ones(1, np.float32)
        settings = {"size": block_size, "block_size": block_size, "unbiased": False}
        return float(np.max(np.abs(trit_blocks.decode_sum(codes[None], scales, one, KEY, **settings))))

    assert words.shape == (1, block_size // 32)
    assert 1e38 < largest(limit) < np.inf
    assert largest(8 * limit) == np.inf
    assert limit > 1e35  # The magnitude up to which the codec promises to work.
