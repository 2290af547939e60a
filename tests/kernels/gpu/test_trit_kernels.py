"""The kernels beside NumPy and XLA: compiled where there is a GPU, interpreted elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from samples import draw

from vsa_optax.accumulation import packed_rows
from vsa_optax.kernels import blocks, lloyd_max, trit_blocks
from vsa_optax.kernels.gpu import relay_kernel, trit_kernels

ON_GPU = jax.default_backend() == "gpu"
SIZE = 5 * 1024 + 2000  # A row, and one that is not full.
BLOCKS = 10
ROOM = 32  # Bytes.
OWN, OTHER = np.int32(1), np.int32(0)
# Operands of the rotation are rounded to bfloat16, twice.
OF_ROUNDING = 8e-6


@functools.cache
def compiled(name, **settings):
    return jax.jit(functools.partial(getattr(trit_kernels, name), interpret=not ON_GPU, **settings))


@functools.cache
def words(rounds=1, size=SIZE):
    num = 32 * 5 * trit_kernels.num_rows(size)
    with jax.ensure_compile_time_eval():  # Its first call may be inside a trace.
        return jax.random.bits(jax.random.key(7), (rounds, num), jnp.uint32)


def vector(seed=0, size=SIZE):
    """Blocks of different magnitudes."""
    return draw(seed, size) * np.exp2(np.arange(size) // 1024 % 5, dtype=np.float32)


def numbers_of(codes):
    """``[blocks, 1024]``, by the rule of rows: digit j of byte i belongs to coordinate i of block j."""
    rows = np.asarray(codes, np.int64).reshape(len(codes), -1, 1, 1024)
    digits = rows // 3 ** np.arange(5).reshape(1, 1, 5, 1) % 3
    return sum(3**i * of_trit for i, of_trit in enumerate(digits)).reshape(-1, 1024)


def words_of_blocks(of_rounds):
    return [list(np.asarray(of_rounds).reshape(len(of_rounds), -1, 32)[:, i]) for i in range(BLOCKS)]


def decoded_by_numpy(numbers, scales, of_rounds, trits):
    scales = np.asarray(scales, np.float64)
    levels = np.float64(lloyd_max.levels(trits))
    return reference.decode_trits(
        numbers.reshape(-1), scales, SIZE, [1024] * BLOCKS, words_of_blocks(of_rounds), levels
    )


def share(difference, x):
    """The share of the energy of x."""
    return np.sum(np.square(np.asarray(difference, np.float64))) / np.sum(np.square(np.asarray(x, np.float64)))


@pytest.mark.parametrize(("trits", "unbiased"), [(1, False), (2, True), (3, False)])
def test_encode_and_decode_are_those_of_numpy(trits, unbiased):
    x, of_rounds = vector(trits), words(1 + unbiased)
    codes, scales = compiled("encode", trits=trits, unbiased=unbiased)(x, of_rounds)
    levels = np.float64(lloyd_max.levels(trits))
    expected, expected_scales = reference.encode_trits(x, [1024] * BLOCKS, words_of_blocks(of_rounds), levels, unbiased)
    assert (codes.shape, codes.dtype) == ((trits, 2 * 1024), np.uint8)
    assert scales.dtype == (np.float32 if unbiased else jnp.bfloat16)
    numbers = numbers_of(codes)
    off = np.abs(numbers.reshape(-1) - expected)
    assert off.max() <= 1  # To either side of a tie
    assert np.mean(off > 0) < 0.02
    # and of a last row's blocks without coordinates, all are in the middle.
    assert (numbers[7:] == len(levels) // 2).all()
    np.testing.assert_allclose(np.float64(scales), expected_scales, rtol=8e-3)
    factors = np.float32(scales)
    decode = compiled("decode_sum", size=SIZE)
    found = decode(codes[None], np.ones((1, BLOCKS), np.float32), factors, of_rounds)
    by_numpy = decoded_by_numpy(numbers, factors, of_rounds, trits)
    assert (found.shape, found.dtype) == ((SIZE,), np.float32)
    assert share(found - by_numpy, x) < (1 + unbiased) * OF_ROUNDING
    best = decoded_by_numpy(expected, expected_scales, of_rounds, trits)
    assert share(found - x, x) == pytest.approx(share(best - x, x), rel=0.01)


def test_a_weighted_sum_is_that_of_numpy():
    coded = [compiled("encode", trits=2, unbiased=False)(vector(seed), words()) for seed in range(3)]
    weights = np.array([[0.3], [-1.0], [2.0]]) * np.stack([np.float32(scales) for _, scales in coded])
    largest = np.abs(weights).max(axis=0)
    found = compiled("decode_sum", size=SIZE)(
        np.stack([codes for codes, _ in coded]),
        np.float32(weights / np.where(largest > 0, largest, 1)),
        np.float32(largest),
        words(),
    )
    of_each = zip(coded, weights, strict=True)
    expected = sum(decoded_by_numpy(numbers_of(codes), w, words(), 2) for (codes, _), w in of_each)
    assert share(found - expected, expected) < OF_ROUNDING


@pytest.mark.parametrize("trits", [1, 3])
def test_a_sum_grows_and_is_finished_as_that_of_numpy(trits):
    first, second, last = vector(0), vector(1), vector(2)
    codes, scales = compiled("encode", trits=trits, unbiased=False)(first, words())
    levels, signs = np.float64(lloyd_max.levels(trits)), words_of_blocks(words())
    new_codes, new_scales = compiled("add")(second, words(), None, codes, scales)
    padded = np.append(second, np.zeros(BLOCKS * 1024 - SIZE)).reshape(-1, 1024)
    grown = [
        np.float64(scale) * levels[number] + reference.rotate(block, sign)
        for scale, number, block, sign in zip(np.float32(scales), numbers_of(codes), padded, signs, strict=True)
    ]
    expected = [reference.quantize(block, levels, False) for block in grown]
    off = np.abs(numbers_of(new_codes) - np.stack([number for number, _ in expected]))
    assert off.max() <= 1
    assert np.mean(off > 0) < 0.02
    np.testing.assert_allclose(np.float32(new_scales), [scale for _, scale in expected], rtol=8e-3)
    finished = compiled("finish", nearest=True)(new_codes, new_scales, last, words(), np.float32(4))
    total = decoded_by_numpy(numbers_of(new_codes), np.float32(new_scales), words(), trits)
    assert share(finished - (total + last) / 4, finished) < OF_ROUNDING


def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average():
    x, trits = vector(3), 2
    empty = jnp.zeros((trits, 2 * 1024), jnp.uint8), jnp.zeros(BLOCKS, jnp.bfloat16)
    add, finish = compiled("add"), compiled("finish", nearest=False)
    means = []
    for seed in range(12):
        codes, scales = add(x, words(), jax.random.key_data(jax.random.key(seed)), *empty)
        means.append(np.float64(finish(codes, scales, np.zeros_like(x), words(), np.float32(1))))
    highest = (3**trits - 1) // 2
    peaks = [
        np.abs(reference.rotate(block, sign)).max()
        for block, sign in zip(
            np.append(x, np.zeros(BLOCKS * 1024 - SIZE)).reshape(-1, 1024), words_of_blocks(words()), strict=True
        )
    ]
    np.testing.assert_allclose(np.float32(scales), peaks, rtol=1e-2)
    assert numbers_of(codes).max() == 2 * highest
    assert numbers_of(codes).min() == 0
    assert len({mean.tobytes() for mean in means}) == 12
    one, all_of_them = (share(decoded - x, x) for decoded in (means[0], np.mean(means, axis=0)))
    assert all_of_them == pytest.approx(one / 12, rel=0.1)


def test_zeros_stay_and_what_is_not_finite_is_a_block_of_nan():
    x = vector(0)
    x[1024:2048] = 0
    x[2048 + 5] = np.nan
    x[3 * 1024 + 7] = np.inf
    one = np.ones((1, BLOCKS), np.float32)
    codes, scales = compiled("encode", trits=2, unbiased=False)(x, words())
    found = np.asarray(compiled("decode_sum", size=SIZE)(codes[None], one, np.float32(scales), words()))
    assert not found[1024:2048].any()
    assert np.isnan(found[2048:4096]).all()
    assert np.isfinite(np.delete(found, np.arange(2048, 4096))).all()
    for key in (None, jax.random.key_data(jax.random.key(0))):
        _, scales = compiled("add")(x, words(), key, np.full_like(codes, 121), jnp.zeros(BLOCKS, jnp.bfloat16))
        assert np.isnan(np.float32(scales)).tolist() == [False, False, True, True] + 6 * [False]


def test_magnitudes_survive():
    x = draw(0, SIZE)
    run, decode = compiled("encode", trits=3, unbiased=False), compiled("decode_sum", size=SIZE)
    for magnitude in (1e-35, 1e-20, 1e20, 1e35):
        codes, scales = run(np.float32(magnitude) * x, words())
        found = decode(codes[None], np.ones((1, BLOCKS), np.float32), np.float32(scales), words())
        assert share(np.float64(found) / magnitude - x, x) == pytest.approx(0.0035, rel=0.1)


def test_xla_reads_what_a_kernel_wrote_and_the_reverse(monkeypatch):
    """The same order of coordinates, and the same levels, in the codec and in a sum."""
    trits = 2
    monkeypatch.setattr(blocks, "fills_rows", lambda size, block_size: size >= block_size)
    x, settings = vector(0), {"size": SIZE, "block_size": 1024, "unbiased": False}
    key = jax.random.key(0)
    (of_run,) = trit_blocks.random_words(key, blocks.split_into_blocks(SIZE, 1024), rounds=1)
    own = of_run[0].reshape(1, -1)
    monkeypatch.setattr(trit_blocks, "suits_gpu", lambda *_: False)
    codes, scales = compiled("encode", trits=trits, unbiased=False)(x, own)
    one = jnp.ones(1)
    # Traced anew, since what was traced before may have chosen otherwise.
    decode = jax.jit(lambda codes, scales: trit_blocks.decode_sum.__wrapped__(codes, scales, one, key, **settings))
    by_xla = decode(codes[None], scales[None])
    by_kernel = compiled("decode_sum", size=SIZE)(codes[None], one[None], np.float32(scales), own)
    assert share(by_kernel - by_xla, by_xla) < OF_ROUNDING
    add = jax.jit(lambda total: packed_rows.add.__wrapped__(total, x, own[0], None, block_size=1024))
    added = add(packed_rows.Coded(codes, scales))
    # The kernels find the words among those of other vectors.
    among, place = np.concatenate([~np.asarray(own)[:, :96], own], axis=1), np.int32(96)
    by_kernel = compiled("add")(x, among, None, codes, scales, first_word=place)
    off = np.abs(numbers_of(added.codes) - numbers_of(by_kernel[0]))
    assert off.max() <= 1
    assert np.mean(off > 0) < 0.02
    finish = jax.jit(
        lambda total: packed_rows.finish.__wrapped__(total, x, own[0], jnp.float32(3), block_size=1024, nearest=True)
    )
    by_kernel = compiled("finish", nearest=True)(*added, x, among, np.float32(3), first_word=place)
    assert share(by_kernel - finish(added), by_kernel) < OF_ROUNDING


def test_warps_and_unrolling_do_not_change_a_sum():
    x, total = vector(1), (jnp.full((2, 2 * 1024), 121, jnp.uint8), jnp.ones(BLOCKS, jnp.bfloat16))
    tuning = trit_kernels.Tuning(8, is_unrolled=True)
    usual, other = (compiled("add", **settings)(x, words(), None, *total) for settings in ({}, {"tuning": tuning}))
    off = np.abs(numbers_of(usual[0]) - numbers_of(other[0]))  # A compiler may round a sum in another way.
    assert off.max() <= 1
    assert np.mean(off > 0) < 0.01
    np.testing.assert_allclose(np.float32(usual[1]), np.float32(other[1]), rtol=8e-3)
    finished = [
        compiled("finish", nearest=True, **settings)(*usual, x, words(), np.float32(2))
        for settings in ({}, {"tuning": tuning})
    ]
    assert share(finished[1] - finished[0], x) < OF_ROUNDING


def test_rows_one_after_the_other_are_the_same():
    """Also where the last program has fewer rows."""
    x, settings = vector(0, 3 * 5 * 1024), {"trits": 1, "unbiased": False}
    of_rows = words(size=x.size)
    codes, scales = compiled("encode", **settings)(x, of_rows)
    in_turns = compiled("encode", tuning=trit_kernels.Tuning(1, rows=2), **settings)
    found_codes, found_scales = in_turns(x, of_rows)
    np.testing.assert_array_equal(found_codes, codes)
    np.testing.assert_array_equal(found_scales, scales)


def test_a_vector_among_others_is_read_where_it_lies():
    """It is coded, and averaged with a coded one, as if it were alone; also one for each program of a batch."""
    vectors, which, room = np.stack([vector(seed) for seed in range(3)]), np.array([2, 0], np.int32), 48
    encode, in_place = (compiled("encode", trits=2, unbiased=False, room=room) for room in (0, room))
    finish = compiled("finish", nearest=True)
    wire, scales = jax.vmap(lambda i: in_place(vectors, words(), which=i))(which)
    assert wire.shape == (2, 2 * 2 * 1024 + room)
    for place, i in enumerate(which):
        codes, own_scales = encode(vectors[i], words())
        np.testing.assert_array_equal(wire[place, :-room].reshape(codes.shape), codes)
        np.testing.assert_array_equal(scales[place], own_scales)
        average = compiled("finish", nearest=True, trits=2)(
            wire, own_scales, vectors, words(), np.float32(2), which=(np.int32(place), np.int32(1))
        )
        assert average.shape == (SIZE,)
        np.testing.assert_array_equal(average, finish(codes, own_scales, vectors[1], words(), np.float32(2)))
        one, factors = np.ones((1, BLOCKS), np.float32), np.float32(own_scales)
        decoded = compiled("decode_sum", size=SIZE, trits=2)(wire[place][None], one, factors, words())
        expected = compiled("decode_sum", size=SIZE)(codes[None], one, factors, words())
        np.testing.assert_array_equal(decoded, expected)


def new_words(rounds):
    return ~words(rounds) ^ jnp.uint32(0x0F0F3355)


@functools.cache
def relay(trits, unbiased):
    run = functools.partial(relay_kernel.relay, trits=trits, unbiased=unbiased, room=ROOM, interpret=not ON_GPU)
    return jax.jit(run)


def received(trits, unbiased):
    """Two rows of bytes, of which the first is coded, its scales, and two vectors."""
    encode = compiled("encode", trits=trits, unbiased=unbiased, room=ROOM)
    wire, scales = encode(vector(0), words(1 + unbiased))
    return jnp.stack([wire, ~wire]), jnp.asarray(scales, jnp.bfloat16), np.stack([vector(1), vector(2)])


@pytest.mark.parametrize(("trits", "unbiased"), [(1, True), (2, False), (3, False)])
def test_an_average_is_coded_again_as_by_numpy(trits, unbiased):
    wire, scales, rows = received(trits, unbiased)
    old, new = words(1 + unbiased), new_words(1 + unbiased)
    codes, new_scales = relay(trits, unbiased)(wire, scales, rows, (OTHER, OWN), old, new)
    assert codes.shape == (trits * 2 * 1024 + ROOM,)
    levels = np.float64(lloyd_max.levels(trits))
    numbers = numbers_of(np.asarray(wire[OTHER, :-ROOM]).reshape(trits, -1))
    average = (decoded_by_numpy(numbers, np.float32(scales), old, trits) + rows[OWN]) / 2
    expected, expected_scales = reference.encode_trits(average, [1024] * BLOCKS, words_of_blocks(new), levels, unbiased)
    off = np.abs(numbers_of(np.asarray(codes[:-ROOM]).reshape(trits, -1)).reshape(-1) - expected)
    assert off.max() <= 1
    assert np.mean(off > 0) < 0.03
    np.testing.assert_allclose(np.float64(new_scales), expected_scales, rtol=8e-3)


def test_a_relay_does_the_work_of_two_kernels():
    trits, unbiased = 2, False
    wire, scales, rows = received(trits, unbiased)
    found = relay(trits, unbiased)(wire, scales, rows, (OTHER, OWN), words(), new_words(1))
    finish = compiled("finish", nearest=True, trits=trits)
    average = finish(wire, scales, rows, words(), np.float32(2), which=(OTHER, OWN))
    codes, new_scales = compiled("encode", trits=trits, unbiased=unbiased, room=ROOM)(average, new_words(1))
    numbers, expected = (numbers_of(np.asarray(x[:-ROOM]).reshape(trits, -1)) for x in (found[0], codes))
    off = np.abs(numbers - expected)  # A compiler may round a sum in another way.
    assert off.max() <= 1
    assert np.mean(off > 0) < 0.01
    np.testing.assert_allclose(np.float32(found[1]), np.float32(new_scales), rtol=8e-3)


def test_what_is_not_finite_in_a_relay_makes_a_scale_nan():
    wire, scales, rows = received(2, False)
    rows[OWN, 2048 + 7], rows[1 - OWN] = np.inf, np.nan
    scales = scales.at[5].set(jnp.nan)
    _, found = relay(2, False)(wire, scales, rows, (OTHER, OWN), words(), new_words(1))
    assert np.flatnonzero(np.isnan(np.float32(found))).tolist() == [2, 5]


def test_each_kernel_lowers_for_cuda():
    """On any machine: Triton's programs are written when they are lowered."""
    x, codes, scales = jnp.ones(SIZE), jnp.zeros((2, 2 * 1024), jnp.uint8), jnp.zeros(BLOCKS, jnp.bfloat16)
    one, key, half = jnp.ones((1, BLOCKS)), jnp.zeros(2, jnp.uint32), jnp.float32(2)
    rows, places = jnp.ones((3, SIZE)), (jnp.int32(1), jnp.int32(2))
    in_place = functools.partial(trit_kernels.encode, trits=1, unbiased=False, room=16)
    calls = [
        lambda: trit_kernels.encode(x, words(2), trits=3, unbiased=True),
        lambda: trit_kernels.decode_sum(codes[None], one, one[0], words(), size=SIZE),
        lambda: trit_kernels.decode_sum(jnp.stack([codes] * 3), jnp.ones((3, BLOCKS)), one[0], words(), size=SIZE),
        lambda: trit_kernels.add(x, words(), None, codes, scales),
        lambda: trit_kernels.add(x, words(), key, codes, scales),
        lambda: trit_kernels.finish(codes, scales, x, words(), half, nearest=True),
        lambda: jax.vmap(lambda i: in_place(rows, words(), which=i))(jnp.arange(2)),
        lambda: relay_kernel.relay(codes, scales, rows, places, words(2), words(2), trits=1, unbiased=True, room=ROOM),
        lambda: trit_kernels.finish(codes, scales, rows, words(), half, nearest=True, trits=1, which=places),
    ]
    for call in calls:
        assert "triton" in jax.jit(call).trace().lower(lowering_platforms=("cuda",)).as_text()
