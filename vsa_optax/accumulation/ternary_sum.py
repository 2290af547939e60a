"""Sums a tree of micro-batch gradients in one, two or three trits a coordinate.

Let S be the coded sum, R a random rotation for the whole window of K micro-batches, and Q the quantiser:

    S <- Q(deQ(S) + R g_k)
    sum = R^-1 deQ(S)

A leaf smaller than a block is summed in at least f32. Leaves that are smaller than five blocks are coded together, each
in its own row.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vsa_optax.accumulation import packed_rows
from vsa_optax.codecs import codec as codecs
from vsa_optax.codecs.trit import RawLeaf
from vsa_optax.core import checks
from vsa_optax.core.axis_names import without_names
from vsa_optax.core.mesh import varying_axes
from vsa_optax.core.trees import is_placeholder
from vsa_optax.core.types import Tree
from vsa_optax.kernels import alike, numerics, replacement, signs, trit_blocks

Rounding: TypeAlias = Literal["nearest", "stochastic"]
# The number of micro-batches in a mean, as a function of the number of means so far.
EveryK: TypeAlias = Callable[[jax.Array], ArrayLike]

_MANY_FOR_ONE_TRIT = 32
# Up to this many micro-batches, training with their mean in two trits reached the loss of f32.
_FEW_ENOUGH_FOR_TWO_TRITS = 8
# The product with the root of the largest block's size is far from overflow, and so are the numbers made from it.
LARGEST_SCALE = float(np.finfo(np.float32).max) / 2**16


class SummedLeaf(NamedTuple):
    """The coded sum of one array, its trits in the order of `packed_rows`.

    It is not a `codecs.trit.CodedLeaf`, although it has the same fields: the order of the trits is different.

    Attributes:
        codes: ``[t, m] uint8``, the packed trits.
        scales: ``[b] bfloat16``, the scale of each block.
    """

    codes: jax.Array
    scales: jax.Array


class _Member(NamedTuple):
    """A coded leaf.

    Attributes:
        number: static, the index of the leaf.
        size: static, the number of coordinates.
        coded: its sum.
        first_word: static, the index of its first random word.
        num_words: static, the number of its random words.
    """

    number: int
    size: int
    coded: packed_rows.Coded
    first_word: int
    num_words: int


class _Group(NamedTuple):
    """Leaves that are coded together: one leaf, or several, each in its own row.

    Attributes:
        members: the leaves.
        padded_size: static, the number of coordinates of each, including padding.
        coded: their sums, one after the other.
        words: ``[...] uint32``, random words, which include those of the leaves.
        first_word: static, the index of the first random word of the leaves.
        block_size: static, the number of coordinates in a block.
    """

    members: list[_Member]
    padded_size: int
    coded: packed_rows.Coded
    words: jax.Array
    first_word: int
    block_size: int

    def joined(self, leaves: Sequence[ArrayLike]) -> jax.Array:
        """``[n] f32``: the coordinates of the group's members, taken from all leaves of a tree."""
        return _concatenated(
            [jnp.pad(codecs.as_reals(leaves[m.number]), (0, self.padded_size - m.size)) for m in self.members]
        )

    def apart(self, reals: jax.Array) -> dict[int, jax.Array]:
        """Coordinates by the leaf's number, the inverse of `joined`."""
        parts = jnp.split(reals, len(self.members))
        return {m.number: part[: m.size] for m, part in zip(self.members, parts, strict=True)}

    def sums(self, coded: packed_rows.Coded) -> dict[int, list[jax.Array]]:
        """The arrays of sums by the leaf's number."""
        parts = [jnp.split(array, len(self.members), axis=-1) for array in coded]
        return {m.number: list(arrays) for m, *arrays in zip(self.members, *parts, strict=True)}


@dataclasses.dataclass(frozen=True)
class TernarySum:
    """The settings of a coded sum, and its operations.

    A sum is a tree like the gradients, with a `SummedLeaf` for each leaf, or a `RawLeaf` for a small one. A container
    may replace these nodes with its own: only the arrays and their order are read. Shapes and dtypes are those of the
    gradients.
    """

    trits: int
    rounding: Rounding
    block_size: int
    seed: int

    def zeros(self, like: Tree) -> Tree:
        """The empty sum for arrays like the leaves of ``like``."""
        return jnp.zeros([]) if is_placeholder(like) else jax.tree.map(self._empty, without_names(like))

    def _empty(self, leaf: ArrayLike) -> SummedLeaf | RawLeaf:
        if self._is_small(leaf):
            return RawLeaf(jnp.zeros_like(leaf, dtype=_wide(leaf)))
        return SummedLeaf(*packed_rows.zeros(_num_reals(leaf), trits=self.trits, block_size=self.block_size))

    def add(self, total: Tree, gradients: Tree, window: jax.Array, position: jax.Array) -> tuple[Tree, jax.Array]:
        """Adds one micro-batch to the sum, and checks whether the result may be kept.

        Each leaf is added before the others are checked: the result must be dropped if one of them is not finite.

        Args:
            total: the sum.
            gradients: tree of ``[*shape]``.
            window: ``[] int32``, which selects the rotation.
            position: ``[] int32``, the number of the micro-batch in the window.

        Returns:
            The new sum, and ``[] bool``: whether it is finite and none of its scales exceeds 5e33, so that the numbers
            made from it are also finite.
        """
        is_stochastic = self.rounding == "stochastic"
        rounding_key = signs.stream(self.seed, window, 1, position) if is_stochastic else None
        leaves = list(map(jnp.asarray, jax.tree.leaves(gradients)))
        raw, groups = self._sorted(jax.tree.leaves(total), leaves, window)
        arrays: dict[int, list[jax.Array]] = {}
        found, scales = [], []
        values, numbers = list(raw.values()), list(raw)
        for same in alike.numbers_of_alike(values, [leaves[i] for i in numbers]):
            old, new = jnp.stack([values[i] for i in same]), jnp.stack([leaves[numbers[i]] for i in same])
            sums = old + new.astype(old.dtype)
            found.append(numerics.is_finite(sums))
            arrays |= {numbers[i]: [of_leaf] for i, of_leaf in zip(same, sums, strict=True)}
        for group in groups:
            coded = packed_rows.add(
                group.coded,
                group.joined(leaves),
                group.words,
                None if rounding_key is None else jax.random.fold_in(rounding_key, group.members[0].number),
                group.first_word,
                block_size=group.block_size,
            )
            scales.append(coded.scales)
            arrays |= group.sums(coded)
        # A non-finite gradient makes a scale NaN, so the gradients need not be read again.
        limit = jnp.asarray(LARGEST_SCALE, jnp.bfloat16)
        found += [jnp.all(jnp.stack([scales[i] for i in same]) <= limit) for same in alike.numbers_of_alike(scales)]
        is_finite = functools.reduce(jnp.logical_and, found, jnp.array(True))
        grown = [array for i in range(len(leaves)) for array in arrays[i]]
        return jax.tree.unflatten(jax.tree.structure(total), grown), is_finite

    def settle(self, total: Tree, grown: Tree, gradients: Tree, adds: jax.Array) -> Tree:
        """``grown``, which `add` returned for a sum and gradients, if ``adds``; otherwise the sum.

        Small leaves are added again to the present sum: otherwise XLA would make two copies of each.
        """
        old, new = iter(jax.tree.leaves(total)), iter(jax.tree.leaves(grown))
        settled: dict[int, Sequence[jax.Array]] = {}
        large: dict[int, tuple[packed_rows.Coded, packed_rows.Coded]] = {}
        for i, leaf in enumerate(leaves := jax.tree.leaves(gradients)):
            if self._is_small(leaf):
                was, _ = next(old), next(new)
                settled[i] = [jnp.where(adds, was + jnp.asarray(leaf, was.dtype), was)]
                continue
            becomes, was = (packed_rows.Coded(next(arrays), next(arrays)) for arrays in (new, old))
            if trit_blocks.suits_gpu(_num_reals(leaf), self.block_size):
                large[i] = becomes, was
            else:
                settled[i] = [jnp.where(adds, b, a) for b, a in zip(becomes, was, strict=True)]
        if large:
            grown_sums, sums = zip(*large.values(), strict=True)
            settled |= zip(large, replacement.replace_if(adds, grown_sums, sums), strict=True)
        arrays = [array for i in range(len(leaves)) for array in settled[i]]
        return jax.tree.unflatten(jax.tree.structure(total), arrays)

    def finish(self, last: Tree, total: Tree, window: jax.Array, divisor: jax.Array) -> Tree:
        """``(total + last) / divisor``, in the dtypes of ``last``.

        Args:
            last: tree of ``[*shape]``, a micro-batch that is not quantised.
            total: the sum of the others.
            window: ``[] int32``, which selects the rotation.
            divisor: ``[] int32``, the divisor of the sum.
        """
        leaves, treedef = jax.tree.flatten(last)
        raw, groups = self._sorted(jax.tree.leaves(total), leaves, window)
        means: dict[int, jax.Array] = {}
        for i, values in raw.items():
            spec = codecs.spec_of(leaves[i])
            wide = numerics.promoted(values.dtype, spec.dtype)
            whole = values.astype(wide) + jnp.asarray(leaves[i], wide)
            means[i] = codecs.as_decoded(whole / divisor.astype(jnp.finfo(wide).dtype).astype(wide), spec)
        for group in groups:
            reals = packed_rows.finish(
                group.coded,
                group.joined(leaves),
                group.words,
                divisor.astype(jnp.float32),
                group.first_word,
                block_size=group.block_size,
                nearest=self.rounding == "nearest",
            )
            for i, of_leaf in group.apart(reals).items():
                spec = codecs.spec_of(leaves[i])
                means[i] = codecs.as_decoded(codecs.from_reals(of_leaf, spec), spec)
        return jax.tree.unflatten(treedef, [means[i] for i in range(len(leaves))])

    def _is_small(self, leaf: ArrayLike) -> bool:
        return _num_reals(leaf) < self.block_size

    def _sorted(
        self, arrays: Sequence[jax.Array], leaves: Sequence[ArrayLike], window: jax.Array
    ) -> tuple[dict[int, jax.Array], list[_Group]]:
        """The sums of small leaves by number, and groups of the others; leaves smaller than a row share a group.

        The random words of all leaves are drawn at once: a generator for each would take most of the compile time.
        """
        sizes = [_num_reals(leaf) for leaf in leaves]
        nums = [0 if size < self.block_size else packed_rows.num_words(size, self.block_size) for size in sizes]
        words = signs.random_bits(signs.stream(self.seed, window, 0), (sum(nums),))
        rest = iter(arrays)
        raw: dict[int, jax.Array] = {}
        of_kinds: dict[Hashable, list[_Member]] = {}
        for i, (leaf, size, num) in enumerate(zip(leaves, sizes, nums, strict=True)):
            if not num:
                raw[i] = next(rest)
                continue
            fills_a_row = size >= packed_rows.BLOCKS * self.block_size
            # Inside a shard_map, replicated leaves must not be joined with varying ones.
            kind = i if fills_a_row else (num, varying_axes(leaf))
            coded = packed_rows.Coded(next(rest), next(rest))
            of_kinds.setdefault(kind, []).append(_Member(i, size, coded, sum(nums[:i]), num))
        return raw, [_joined(members, words, self.block_size) for members in of_kinds.values()]

    def check_same(self, total: Tree, gradients: Tree) -> None:
        """``ValueError`` that names the leaf, unless the sum belongs to arrays like the gradients.

        The sum shows the number of coordinates of a coded array, up to a row of blocks, but not its shape.
        """
        gradient_at = dict(jax.tree_util.tree_leaves_with_path(gradients))

        def summed(path: tuple[Hashable, ...], node: Tree) -> ArrayLike:
            kept = jax.tree.leaves(node)
            if len(kept) == 1 or path not in gradient_at:
                return kept[0]
            gradient = gradient_at[path]
            if [x.shape for x in kept] != [x.shape for x in jax.tree.leaves(jax.eval_shape(self._empty, gradient))]:
                raise ValueError(
                    f"gradients: leaf {jax.tree_util.keystr(path) or '(the tree is one leaf)'} has shape "
                    f"{jnp.shape(gradient)}, but init saw a parameter of another one, of at most "
                    f"{packed_rows.BLOCKS * kept[0].shape[-1]} coordinates"
                )
            return gradient

        expected = jax.tree_util.tree_map_with_path(summed, total, is_leaf=_holds_arrays)
        checks.check_same_tree(expected, gradients, what="gradients")


def _joined(members: list[_Member], words: jax.Array, block_size: int) -> _Group:
    if len(members) == 1:
        (leaf,) = members
        return _Group(members, leaf.size, leaf.coded, words, leaf.first_word, block_size)
    row = packed_rows.rows_of(members[0].size, block_size)[1]
    coded = packed_rows.Coded(*(_concatenated(arrays) for arrays in zip(*(m.coded for m in members), strict=True)))
    words = _concatenated([words[m.first_word : m.first_word + m.num_words] for m in members])
    return _Group(members, row.size, coded, words, 0, row.width)


def _concatenated(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(arrays, axis=-1) if len(arrays) > 1 else arrays[0]


def make_ternary_sum(
    every_k_schedule: int | EveryK, *, trits: checks.NumTrits | None, rounding: Rounding, block_size: int, seed: int
) -> TernarySum:
    """Checks the settings of a sum, with the ranges of `vsa_optax.accumulate_ternary`, and returns the sum.

    The default of ``trits`` is two, or three if there are many micro-batches or their number is a function. A warning
    is shown if the sum is known to be inaccurate.
    """
    _check_static("block_size", block_size, jax.Array)
    num = None if callable(every_k_schedule) else int(every_k_schedule)
    if trits is None:
        trits = 2 if num is not None and num <= _FEW_ENOUGH_FOR_TWO_TRITS else 3
    checks.check_trits("trits", trits)
    checks.check_choice("rounding", rounding, get_args(Rounding))
    checks.check_block_size("block_size", block_size)
    checks.check_integer("seed", seed, 0)
    if trits == 1 and num is not None and num > _MANY_FOR_ONE_TRIT:
        warnings.warn(
            f"{num} micro-batches in one trit: the mean of pure noise loses over 70 % of its energy; take trits=2",
            UserWarning,
            stacklevel=3,
        )
    return TernarySum(trits, rounding, block_size, seed)


def check_every_k(every_k_schedule: int | EveryK) -> EveryK:
    """``every_k_schedule`` as a function of the gradient step."""
    if callable(every_k_schedule):
        return every_k_schedule
    _check_static("every_k_schedule", every_k_schedule, jax.core.Tracer)
    num = checks.check_integer("every_k_schedule", every_k_schedule, 1)
    return lambda gradient_step: num


def _check_static(name: str, value: object, refused: type) -> None:
    """``ValueError`` for a number that ``optax.inject_hyperparams`` has turned into an array."""
    if isinstance(value, refused):
        raise ValueError(
            f"{name} must be Python's own integer, since it is part of the program, got {value!r}. Let "
            "optax.inject_hyperparams inject only what opt takes: inject_hyperparams(lambda learning_rate: "
            "ternary_multi_steps(optax.adam(learning_rate), 4))(learning_rate=1e-3)"
        )


def _holds_arrays(node: Tree) -> bool:
    """Whether all children of a node are arrays, as for each node that represents an array in a sum."""
    children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    return bool(children) and jax.tree_util.all_leaves(children)


def _wide(leaf: ArrayLike) -> jnp.dtype:
    return numerics.promoted(jnp.result_type(leaf), jnp.float32)


def _num_reals(leaf: ArrayLike) -> int:
    """The number of coordinates; a complex number counts as two."""
    is_complex = jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating)
    return math.prod(jnp.shape(leaf)) * (2 if is_complex else 1)
