"""A running sum of vectors as packed trits: add a vector to it, and finish it with the last one.

    S <- Q(deQ(S) + R x)            add
    (R^-1 deQ(S) + x) / divisor     finish

for a random rotation R of each block and a quantiser Q.

The trits are stored in rows that can be unpacked, changed and packed again in place, a few at a time. A row is five
blocks of a vector, which share its bytes: digit ``j`` of byte ``i`` belongs to coordinate ``i`` of block ``j``. The
remainder of a vector after whole rows becomes one more row, of narrower blocks. With a few rows at a time, no memory of
the vector's size is needed besides the vector and its trits.

For vectors of at least 2^17 coordinates and 25 rows, `kernels.trit_blocks` has the same order. For smaller vectors the
orders differ, and neither module can read the trits of the other.

On an NVIDIA GPU, `kernels.gpu.trit_kernels` add and finish vectors in whole rows of blocks of 1024.

Axes: n coordinates, t trits, m bytes, b blocks.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.kernels import blocks, lloyd_max, packing, platforms, rotation, trit_blocks, uniform

BLOCKS = blocks.BLOCKS_IN_ROW
_NARROWEST = 32
# The number of coordinates at a time: those that a core's cache holds, and those that keep a GPU busy.
_AT_ONCE_ON_CPU, _AT_ONCE = 1 << 18, 1 << 23


class Rows(NamedTuple):
    """Consecutive rows of the same width.

    Attributes:
        num: the number of rows.
        width: the number of coordinates in each of their five blocks, a power of two.
    """

    num: int
    width: int

    @property
    def num_blocks(self) -> int:
        """The number of blocks in all rows."""
        return BLOCKS * self.num

    @property
    def size(self) -> int:
        """The number of coordinates in all rows."""
        return BLOCKS * self.num * self.width

    @property
    def num_bytes(self) -> int:
        """The number of bytes for one trit of each coordinate."""
        return self.num * self.width

    @property
    def num_words(self) -> int:
        """The number of random words for a sign of each coordinate."""
        return self.num_blocks * -(-self.width // 32)


class Coded(NamedTuple):
    """A vector, or some rows of it, in trits.

    Attributes:
        codes: ``[t, m] uint8``, the base-three digits of the level numbers, lowest digit first.
        scales: ``[b] bfloat16``, the scale of each block.
    """

    codes: jax.Array
    scales: jax.Array


class Piece(NamedTuple):
    """The data of some rows.

    Attributes:
        rows: static, the rows.
        first: ``[] int``, the index of the first row.
        x: ``[n] f32``, their coordinates.
        words: ``[num_words] uint32``, their random words.
        coded: their trits.
    """

    rows: Rows
    first: int | jax.Array
    x: jax.Array
    words: jax.Array
    coded: Coded


Result = TypeVar("Result")
Operands = TypeVarTuple("Operands")


class Stage(Protocol):
    """Runs a function on operands once: code that reads the result does not repeat the work."""

    def __call__(self, fun: Callable[[*Operands], Result], /, *operands: *Operands) -> Result: ...  # noqa: D102


# The function returns new coordinates and trits, or None for those that do not change.
PieceFunction: TypeAlias = Callable[[Piece, Stage], tuple[jax.Array | None, Coded | None]]


def rows_of(size: int, block_size: int) -> tuple[Rows, Rows]:
    """The rows of whole blocks, and one row for the remainder, of the narrowest blocks of at least 32 that suffice.

    In vectors of at least 2^17 coordinates and 25 rows, the row for the remainder has whole blocks, too.
    """
    num, rest = divmod(size, BLOCKS * block_size)
    if blocks.fills_rows(size, block_size):
        return Rows(num, block_size), Rows(int(rest > 0), block_size)
    narrow = max(1 << (-(-rest // BLOCKS) - 1).bit_length(), min(_NARROWEST, block_size)) if rest else block_size
    return Rows(num, block_size), Rows(int(rest > 0), narrow)


def num_words(size: int, block_size: int) -> int:
    """The number of random words for a sign of each coordinate, including padding."""
    return sum(rows.num_words for rows in rows_of(size, block_size))


def zeros(size: int, *, trits: int, block_size: int) -> Coded:
    """A coded vector of ``size`` zeros."""
    all_rows = rows_of(size, block_size)
    num_bytes, num_blocks = sum(rows.num_bytes for rows in all_rows), sum(rows.num_blocks for rows in all_rows)
    return Coded(jnp.zeros([trits, num_bytes], jnp.uint8), jnp.zeros([num_blocks], jnp.bfloat16))


@functools.partial(jax.jit, static_argnames=("block_size",))
def add(
    total: Coded,
    x: jax.Array,
    words: jax.Array,
    rounding_key: jax.Array | None,
    first_word: int | jax.Array = 0,
    *,
    block_size: int,
) -> Coded:
    """Rotates ``x``, adds the decoded sum, and quantises the result.

    Args:
        total: the sum.
        x: ``[n] f32``.
        words: ``[...] uint32``, of which `num_words` are the rotation. All vectors added to a sum have the same.
        rounding_key: for stochastic rounding to the levels of `uniform`; with None, the nearest one of `lloyd_max`.
        first_word: ``[] int32``, the index of the first word of the rotation.
        block_size: a power of two.
    """
    trits = total.codes.shape[0]

    def grow(x: jax.Array, words: jax.Array, old: Coded, rows: Rows) -> jax.Array:
        blocks, of_blocks = x.reshape(rows.num_blocks, -1), words.reshape(rows.num_blocks, -1)
        return rotation.rotate(blocks, [of_blocks]) + _decode(old, rows, nearest=rounding_key is None)

    def quantize(
        rounding_key: jax.Array | None, grown: jax.Array, first: int | jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if rounding_key is None:
            numbers, scales = lloyd_max.quantize(grown, trits, unbiased=False)
            return numbers, scales.astype(jnp.bfloat16)
        return uniform.quantize_stochastically(grown, trits, jax.random.fold_in(rounding_key, first))

    def add_piece(rounding_key: jax.Array | None, piece: Piece, stage: Stage) -> tuple[None, Coded]:
        grown = stage(functools.partial(grow, rows=piece.rows), piece.x, piece.words, piece.coded)
        numbers, scales = stage(functools.partial(quantize, rounding_key), grown, jnp.asarray(piece.first))
        codes = trit_blocks.pack_numbers(numbers.reshape(piece.rows.num, -1), trits)
        return None, Coded(codes.reshape(trits, -1), scales)

    def anywhere(
        total: Coded, x: jax.Array, words: jax.Array, first_word: jax.Array, rounding_key: jax.Array | None
    ) -> Coded:
        own = _own_words(words, first_word, x.size, block_size)
        return _by_rows(functools.partial(add_piece, rounding_key), x, own, total, block_size)[1]

    def on_gpu(
        total: Coded, x: jax.Array, words: jax.Array, first_word: jax.Array, rounding_key: jax.Array | None
    ) -> Coded:
        from vsa_optax.kernels.gpu import trit_kernels  # It imports Pallas, which few users need.

        key_data = None if rounding_key is None else jax.random.key_data(rounding_key)
        return Coded(*trit_kernels.add(x, words[None], key_data, *total, first_word=first_word))

    operands = total, x, words, jnp.asarray(first_word, jnp.int32), rounding_key
    if trit_blocks.suits_gpu(x.size, block_size):
        return platforms.on_each_gpu_or_anywhere(on_gpu, anywhere, *operands)
    return anywhere(*operands)


@functools.partial(jax.jit, static_argnames=("block_size", "nearest"))
def finish(
    total: Coded,
    x: jax.Array,
    words: jax.Array,
    divisor: jax.Array,
    first_word: int | jax.Array = 0,
    *,
    block_size: int,
    nearest: bool,
) -> jax.Array:
    """``[n] f32``: the sum, rotated back, plus ``x``, over ``divisor``; ``nearest`` must be that of the rounding."""

    def finish_piece(divisor: jax.Array, piece: Piece, stage: Stage) -> tuple[jax.Array, None]:
        rows = piece.rows
        decoded = stage(functools.partial(_decode, rows=rows, nearest=nearest), piece.coded)
        turned = rotation.rotate_back(decoded, [piece.words.reshape(rows.num_blocks, -1)])
        return (turned.reshape(-1) + piece.x) / divisor, None

    def anywhere(total: Coded, x: jax.Array, words: jax.Array, first_word: jax.Array, divisor: jax.Array) -> jax.Array:
        own = _own_words(words, first_word, x.size, block_size)
        return _by_rows(functools.partial(finish_piece, divisor), x, own, total, block_size)[0]

    def on_gpu(total: Coded, x: jax.Array, words: jax.Array, first_word: jax.Array, divisor: jax.Array) -> jax.Array:
        from vsa_optax.kernels.gpu import trit_kernels  # It imports Pallas, which few users need.

        return trit_kernels.finish(*total, x, words[None], divisor, first_word=first_word, nearest=nearest)

    operands = total, x, words, jnp.asarray(first_word, jnp.int32), divisor
    if trit_blocks.suits_gpu(x.size, block_size):
        return platforms.on_each_gpu_or_anywhere(on_gpu, anywhere, *operands)
    return anywhere(*operands)


def _own_words(words: jax.Array, first_word: jax.Array, size: int, block_size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(words, first_word, num_words(size, block_size))


def _decode(total: Coded, rows: Rows, *, nearest: bool) -> jax.Array:
    """``[b, width] f32``."""
    trits = total.codes.shape[0]
    # Of a block's width each, the digits of a byte need no concatenation here, in which XLA would do them one by one.
    planes = packing.digits_of(total.codes.reshape(trits, rows.num, -1), BLOCKS).swapaxes(0, 1)
    of_blocks = trit_blocks.numbers_of(planes).swapaxes(0, 1).reshape(rows.num_blocks, -1)
    decoded = lloyd_max.decode(of_blocks, trits) if nearest else uniform.decode(of_blocks, trits)
    return total.scales[:, None].astype(jnp.float32) * decoded


def _by_rows(
    fun: PieceFunction, x: jax.Array, words: jax.Array, coded: Coded, block_size: int
) -> tuple[jax.Array, Coded]:
    """``x`` and ``coded`` after ``fun`` on a few rows at a time, in place."""
    # This is true, but the compiler cannot know it.
    is_true = jnp.maximum(words[0], jnp.uint32(1)) > 0

    def in_a_loop(fun: Callable[[*Operands], Result], *operands: *Operands) -> Result:
        return _in_a_loop(is_true, fun, *operands)

    def over_all(stage: Stage, at_once: int, x: jax.Array, words: jax.Array, coded: Coded) -> tuple[jax.Array, Coded]:
        whole, last = rows_of(x.size, block_size)
        if whole.num:
            # XLA dissolves a loop of one iteration, and a CPU then works on many leaves at once, each with its memory.
            begins = is_true if stage is in_a_loop else True
            at_once = max(1, at_once // (BLOCKS * block_size))
            x, coded = _in_turns(fun, stage, whole, at_once, begins, x, words, coded)
        if last.num:
            x, coded = _on_last(fun, stage, whole, last, x, words, coded)
        return x, coded

    return lax.platform_dependent(
        x,
        words,
        coded,
        cpu=functools.partial(over_all, in_a_loop, _AT_ONCE_ON_CPU),
        default=functools.partial(over_all, _directly, _AT_ONCE),
    )


def _in_turns(
    fun: PieceFunction,
    stage: Stage,
    rows: Rows,
    at_once: int,
    begins: jax.Array | bool,
    x: jax.Array,
    words: jax.Array,
    coded: Coded,
) -> tuple[jax.Array, Coded]:
    """Applies ``fun`` to at most ``at_once`` rows at a time, if ``begins``.

    If too few rows remain for the last turn, it also takes some that are done, which do not change.
    """
    num_turns = -(-rows.num // at_once)
    few = Rows(-(-rows.num // num_turns), rows.width)

    def turn(i: jax.Array, carry: tuple[jax.Array, Coded]) -> tuple[jax.Array, Coded]:
        x, coded = carry
        first = jnp.minimum(i * few.num, rows.num - few.num)
        is_new = first + jnp.arange(few.num) >= i * few.num

        def take(array: jax.Array, in_all: int) -> jax.Array:
            per_row = in_all // rows.num
            return lax.dynamic_slice_in_dim(array, first * per_row, few.num * per_row, axis=-1)

        def put(array: jax.Array, new: jax.Array, old: jax.Array, in_all: int) -> jax.Array:
            per_row = in_all // rows.num
            # `jnp.repeat` does the same, but not on a mesh with explicit axes before JAX 0.10.
            where = jnp.broadcast_to(is_new[:, None], (few.num, per_row)).reshape(-1)
            return _put(array, jnp.where(where, new, old), first * per_row)

        old = Coded(take(coded.codes, rows.num_bytes), take(coded.scales, rows.num_blocks))
        piece = Piece(few, first, take(x, rows.size), take(words, rows.num_words), old)
        new_x, new = fun(piece, stage)
        if new_x is not None:
            x = put(x, new_x, piece.x, rows.size)
        if new is not None:
            codes = put(coded.codes, new.codes, old.codes, rows.num_bytes)
            coded = Coded(codes, put(coded.scales, new.scales, old.scales, rows.num_blocks))
        return x, coded

    return lax.fori_loop(0, num_turns if begins is True else jnp.where(begins, num_turns, 0), turn, (x, coded))


def _on_last(
    fun: PieceFunction, stage: Stage, whole: Rows, last: Rows, x: jax.Array, words: jax.Array, coded: Coded
) -> tuple[jax.Array, Coded]:
    """Applies ``fun`` to the row after the ``whole`` ones."""
    rest = x[whole.size :]
    padded = jnp.pad(rest, (0, last.size - rest.size))
    old = Coded(coded.codes[:, whole.num_bytes :], coded.scales[whole.num_blocks :])
    new_rest, new = fun(Piece(last, whole.num, padded, words[whole.num_words :], old), stage)
    if new_rest is not None:
        x = _put(x, new_rest[: rest.size], whole.size)
    if new is not None:
        scales = _put(coded.scales, new.scales, whole.num_blocks)
        coded = Coded(_put(coded.codes, new.codes, whole.num_bytes), scales)
    return x, coded


def _put(array: jax.Array, part: jax.Array, start: int | jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, part, start, axis=-1)


def _directly(fun: Callable[[*Operands], Result], *operands: *Operands) -> Result:
    return fun(*operands)


def _in_a_loop(is_true: jax.Array, fun: Callable[[*Operands], Result], *operands: *Operands) -> Result:
    """``fun(*operands)`` in a loop of one iteration.

    Without it XLA, on a CPU, fuses what ``fun`` does into each of the loops that read its result, and does it again in
    each, which takes several times as long. Any barrier but a loop is dropped before that.
    """
    # Zeros that under shard_map vary over the devices if an operand does.
    nothing = functools.reduce(jnp.logical_or, [_is_zero(x) & False for x in jax.tree.leaves(operands)])
    zeros_of = jax.tree.map(
        lambda out: jnp.broadcast_to(nothing.astype(out.dtype), out.shape), jax.eval_shape(fun, *operands)
    )

    def turn(loop: tuple[jax.Array, Result, tuple[*Operands]]) -> tuple[jax.Array, Result, tuple[*Operands]]:
        return jnp.logical_and(loop[0], False), fun(*loop[2]), loop[2]

    return lax.while_loop(lambda loop: loop[0], turn, (is_true, zeros_of, operands))[1]


def _is_zero(x: jax.Array) -> jax.Array:
    return x.reshape(-1)[0] == 0
