"""A tree of micro-batch gradients summed in one, two or three trits a coordinate.

With S the coded sum, R a random rotation, one for the whole window of K micro-batches, and Q the quantiser,

    S <- Q(deQ(S) + R g_k)
    sum = R^-1 deQ(S)

A leaf smaller than a block is summed in at least f32.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vsa_optax.accumulation import packed_rows
from vsa_optax.codecs import codec as codecs
from vsa_optax.codecs.trit import RawLeaf
from vsa_optax.core import checks
from vsa_optax.core.axis_names import without_names
from vsa_optax.core.trees import is_placeholder
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics, signs

Rounding: TypeAlias = Literal["nearest", "stochastic"]
# How many micro-batches make a mean, by the number of means so far.
EveryK: TypeAlias = Callable[[jax.Array], ArrayLike]

_MANY_FOR_ONE_TRIT = 32
# Micro-batches up to which training came out as with f32 when their mean was kept in two trits.
_FEW_ENOUGH_FOR_TWO_TRITS = 8
# The largest gradient is 5e33: a hundred thousand such can be added in one place.
_HEADROOM = np.float32(2**16)


class SummedLeaf(NamedTuple):
    """The coded sum of one array, its trits in the order of `packed_rows`.

    It is not a `codecs.trit.CodedLeaf`, although it has the same fields: those trits lie in another order.

    Attributes:
        codes: ``[t, m] uint8``.
        scales: ``[b] bfloat16``.
    """

    codes: jax.Array
    scales: jax.Array


@dataclasses.dataclass(frozen=True)
class TernarySum:
    """The settings of a coded sum, and what can be done with one.

    A sum is a tree like the gradients, with a `SummedLeaf` or, if it is small, a `RawLeaf` for each. A container may
    put nodes of its own in their place: only the arrays, and their order, are read. Shapes and dtypes are those of the
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

    def takes(self, total: Tree, gradients: Tree) -> jax.Array:
        """``[] bool``: whether the gradients are finite, and those to be coded below 5e33, so that sums stay finite.

        ``ValueError`` if they are not those of ``zeros``.
        """
        self._check_same(total, gradients)

        def takes_leaf(gradient: ArrayLike) -> jax.Array:
            array = jnp.asarray(gradient)
            if self._is_small(array):
                return numerics.is_finite(array)
            # In its own shape: sharded, each device looks at what it has.
            coded_as = jnp.complex64 if jnp.iscomplexobj(array) else jnp.float32
            return numerics.is_finite(array.astype(coded_as) * coded_as(_HEADROOM))

        return functools.reduce(jnp.logical_and, map(takes_leaf, jax.tree.leaves(gradients)), jnp.array(True))

    def add(self, total: Tree, gradients: Tree, window: jax.Array, position: jax.Array) -> Tree:
        """The sum with one more micro-batch.

        Args:
            total: the sum.
            gradients: tree of ``[*shape]``.
            window: ``[] int32``, which rotation.
            position: ``[] int32``, the micro-batch's number in the window.
        """
        is_stochastic = self.rounding == "stochastic"
        rounding_key = signs.stream(self.seed, window, 1, position) if is_stochastic else None

        def added(
            leaf: SummedLeaf | RawLeaf, words: jax.Array, index: int, gradient: jax.Array
        ) -> SummedLeaf | RawLeaf:
            if isinstance(leaf, RawLeaf):
                return RawLeaf(leaf.values + jnp.asarray(gradient, leaf.values.dtype))
            grown = packed_rows.add(
                packed_rows.Coded(*leaf),
                codecs.as_reals(gradient),
                words,
                None if rounding_key is None else jax.random.fold_in(rounding_key, index),
                block_size=self.block_size,
            )
            return SummedLeaf(*grown)

        grown = jax.tree.leaves(self._map(added, total, window, gradients))
        return jax.tree.unflatten(jax.tree.structure(total), grown)

    def finish(self, last: Tree, total: Tree, window: jax.Array, divisor: jax.Array) -> Tree:
        """``(total + last) / divisor``, in the dtypes of ``last``.

        Args:
            last: tree of ``[*shape]``, a micro-batch that is not quantised.
            total: the sum of the others.
            window: ``[] int32``, which rotation.
            divisor: ``[] int32``.
        """

        def finished(leaf: SummedLeaf | RawLeaf, words: jax.Array, index: int, gradient: jax.Array) -> jax.Array:
            del index
            spec = codecs.spec_of(gradient)
            if isinstance(leaf, RawLeaf):
                wide = numerics.promoted(leaf.values.dtype, spec.dtype)
                whole = leaf.values.astype(wide) + jnp.asarray(gradient, wide)
                return codecs.as_decoded(whole / divisor.astype(jnp.finfo(wide).dtype).astype(wide), spec)
            reals = packed_rows.finish(
                packed_rows.Coded(*leaf),
                codecs.as_reals(gradient),
                words,
                divisor.astype(jnp.float32),
                block_size=self.block_size,
                nearest=self.rounding == "nearest",
            )
            return codecs.as_decoded(codecs.from_reals(reals, spec), spec)

        return self._map(finished, total, window, last)

    def _is_small(self, leaf: ArrayLike) -> bool:
        return _num_reals(leaf) < self.block_size

    def _map(
        self,
        fun: Callable[[SummedLeaf | RawLeaf, jax.Array, int, jax.Array], Any],
        total: Tree,
        window: jax.Array,
        gradients: Tree,
    ) -> Tree:
        """Tree of ``fun(leaf, words, index, gradient)`` for each gradient: its sum, the random words of its rotation.

        The words of all leaves are drawn at once: a generator for each would take most of the time to compile.
        """
        leaves, treedef = jax.tree.flatten(gradients)
        sizes = [0 if self._is_small(g) else packed_rows.num_words(_num_reals(g), self.block_size) for g in leaves]
        words = signs.random_bits(signs.stream(self.seed, window, 0), (sum(sizes),))
        ends = np.cumsum(sizes)
        arrays = iter(jax.tree.leaves(total))
        results = []
        for index, (gradient, size) in enumerate(zip(leaves, sizes, strict=True)):
            leaf = RawLeaf(next(arrays)) if self._is_small(gradient) else SummedLeaf(next(arrays), next(arrays))
            results.append(fun(leaf, words[ends[index] - size : ends[index]], index, gradient))
        return jax.tree.unflatten(treedef, results)

    def _check_same(self, total: Tree, gradients: Tree) -> None:
        """``ValueError`` that names the leaf, unless the sum is one of arrays like the gradients.

        Of an array that is coded the sum tells how many coordinates it has, to a row of blocks, but not its shape.
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


def make_ternary_sum(
    every_k_schedule: int | EveryK, *, trits: checks.NumTrits | None, rounding: Rounding, block_size: int, seed: int
) -> TernarySum:
    """The sum of these settings, checked; ranges as in `vsa_optax.accumulate_ternary`.

    Without ``trits`` two, or three where the micro-batches are many or their number is a function. Warns where the sum
    is known to come out badly.
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
    """``ValueError`` for a number that ``optax.inject_hyperparams`` has made an array of."""
    if isinstance(value, refused):
        raise ValueError(
            f"{name} must be Python's own integer, since it is part of the program, got {value!r}. Let "
            "optax.inject_hyperparams inject only what opt takes: inject_hyperparams(lambda learning_rate: "
            "ternary_multi_steps(optax.adam(learning_rate), 4))(learning_rate=1e-3)"
        )


def _holds_arrays(node: Tree) -> bool:
    """Whether all children of a node are arrays, as of each node that a sum has for an array, whatever its type."""
    children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    return bool(children) and jax.tree_util.all_leaves(children)


def _wide(leaf: ArrayLike) -> jnp.dtype:
    return numerics.promoted(jnp.result_type(leaf), jnp.float32)


def _num_reals(leaf: ArrayLike) -> int:
    """Coordinates, a complex number counting as two."""
    is_complex = jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating)
    return math.prod(jnp.shape(leaf)) * (2 if is_complex else 1)
