"""A tree of micro-batch gradients summed in one, two or three trits a coordinate.

With S the coded sum, R a random rotation, one for the whole window of K micro-batches, and Q the quantiser,

    S <- Q(deQ(S) + R g_k)
    sum = R^-1 deQ(S)

A leaf smaller than a block is summed in at least f32.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Literal, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vsa_optax.accumulation import packed_rows
from vsa_optax.codecs import codec as codecs
from vsa_optax.codecs.trit import RawLeaf
from vsa_optax.core import checks
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics, signs

Rounding: TypeAlias = Literal["nearest", "stochastic"]
# How many micro-batches make a mean, by the number of means so far.
EveryK: TypeAlias = Callable[[jax.Array], ArrayLike]
NewLeaf = TypeVar("NewLeaf")

_MANY_FOR_ONE_TRIT = 32
# Micro-batches up to which training came out as with f32 when their mean was kept in two trits.
_FEW_ENOUGH_FOR_TWO_TRITS = 8
# The largest gradient is 5e33: a hundred thousand such can be added in one place.
_HEADROOM = np.float32(2**16)


@dataclasses.dataclass(frozen=True)
class SummedLeaf:
    """The coded sum of one array, its trits in the order of `packed_rows`.

    It is not a `codecs.trit.CodedLeaf`, although it has the same fields: those trits lie in another order.

    Attributes:
        codes: ``[t, m] uint8``.
        scales: ``[b] bfloat16``.
        spec: static, shape and dtype of the array.
    """

    codes: jax.Array
    scales: jax.Array
    spec: codecs.LeafSpec


jax.tree_util.register_dataclass(SummedLeaf, data_fields=["codes", "scales"], meta_fields=["spec"])


@dataclasses.dataclass(frozen=True)
class TernarySum:
    """The settings of a coded sum, and what can be done with one.

    A sum is a tree like the gradients, with a `SummedLeaf` or, if it is small, a `RawLeaf` for each.
    """

    trits: int
    rounding: Rounding
    block_size: int
    seed: int

    def zeros(self, like: Tree) -> Tree:
        """The empty sum for arrays like the leaves of ``like``."""

        def empty(leaf: ArrayLike) -> SummedLeaf | RawLeaf:
            spec = codecs.spec_of(leaf)
            if spec.num_reals < self.block_size:
                return RawLeaf(jnp.zeros_like(leaf, dtype=_wide(spec)), spec)
            nothing = packed_rows.zeros(spec.num_reals, trits=self.trits, block_size=self.block_size)
            return SummedLeaf(nothing.codes, nothing.scales, spec)

        return jax.tree.map(empty, like)

    def takes(self, total: Tree, gradients: Tree) -> jax.Array:
        """``[] bool``: whether the gradients are finite, and those to be coded below 5e33, so that sums stay finite.

        ``ValueError`` if they are not those of ``zeros``.
        """
        checks.check_same_tree(self.shapes(total), gradients, what="gradients")

        def takes_leaf(leaf: SummedLeaf | RawLeaf, gradient: ArrayLike) -> jax.Array:
            array = jnp.asarray(gradient)
            if isinstance(leaf, RawLeaf):
                return numerics.is_finite(array)
            # In its own shape: sharded, each device looks at what it has.
            coded_as = jnp.complex64 if jnp.iscomplexobj(array) else jnp.float32
            return numerics.is_finite(array.astype(coded_as) * _HEADROOM)

        taken = jax.tree.leaves(jax.tree.map(takes_leaf, total, gradients, is_leaf=_is_leaf))
        return functools.reduce(jnp.logical_and, taken, jnp.array(True))

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
                return RawLeaf(leaf.values + jnp.asarray(gradient, leaf.values.dtype), leaf.spec)
            grown = packed_rows.add(
                packed_rows.Coded(leaf.codes, leaf.scales),
                codecs.as_reals(gradient),
                words,
                None if rounding_key is None else jax.random.fold_in(rounding_key, index),
                block_size=self.block_size,
            )
            return SummedLeaf(grown.codes, grown.scales, leaf.spec)

        return self._map(added, total, window, gradients)

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
                whole = leaf.values + gradient
                return codecs.as_decoded(whole / divisor.astype(jnp.finfo(whole.dtype).dtype), spec)
            reals = packed_rows.finish(
                packed_rows.Coded(leaf.codes, leaf.scales),
                codecs.as_reals(gradient),
                words,
                divisor.astype(jnp.float32),
                block_size=self.block_size,
                nearest=self.rounding == "nearest",
            )
            return codecs.as_decoded(codecs.from_reals(reals, leaf.spec), spec)

        return self._map(finished, total, window, last)

    def shapes(self, total: Tree) -> Tree:
        """Shapes and dtypes of the arrays that are summed."""
        return codecs.shapes_of(jax.tree.map(lambda leaf: leaf.spec, total, is_leaf=_is_leaf))

    def _map(
        self,
        fun: Callable[[SummedLeaf | RawLeaf, jax.Array, int, jax.Array], NewLeaf],
        total: Tree,
        window: jax.Array,
        gradients: Tree,
    ) -> Tree:
        """``fun(leaf, words, index, gradient)`` for each leaf of the sum, with the random words of its rotation.

        The words of all leaves are drawn at once: a generator for each would take most of the time to compile.
        """
        sizes = [
            packed_rows.num_words(leaf.spec.num_reals, self.block_size) if isinstance(leaf, SummedLeaf) else 0
            for leaf in jax.tree.leaves(total, is_leaf=_is_leaf)
        ]
        words = jax.random.bits(signs.stream(self.seed, window, 0), (sum(sizes),), jnp.uint32)
        ends = np.cumsum(sizes)

        def of_leaf(leaf: SummedLeaf | RawLeaf, index: int, gradient: jax.Array) -> NewLeaf:
            return fun(leaf, words[ends[index] - sizes[index] : ends[index]], index, gradient)

        indices = jax.tree.unflatten(jax.tree.structure(total, is_leaf=_is_leaf), range(len(sizes)))
        return jax.tree.map(of_leaf, total, indices, gradients, is_leaf=_is_leaf)


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


def _wide(spec: codecs.LeafSpec) -> jnp.dtype:
    return jnp.promote_types(spec.dtype, jnp.float32)


def _is_leaf(node: object) -> bool:
    return isinstance(node, SummedLeaf | RawLeaf)
