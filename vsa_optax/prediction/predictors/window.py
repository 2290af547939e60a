"""A window of the last W gradients, uncompressed or kept by a codec, and the line through them.

A codec encodes every record with the same key. So similar records have similar errors, which cancel in the slope of the
line. A prediction is a weighted sum of records, so the payloads are summed and decoded only once.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax.codecs import codec as codecs
from vsa_optax.core import trees
from vsa_optax.core.axis_names import with_axis_in_front
from vsa_optax.core.types import Tree
from vsa_optax.kernels import inner_products, numerics
from vsa_optax.prediction.fits import line_fit
from vsa_optax.prediction.predictors import base
from vsa_optax.prediction.predictors.base import HistoryState, OwnScalars
from vsa_optax.prediction.predictors.line import LineScalars


class WindowHistoryState(NamedTuple):
    """A ring of the last W records.

    Attributes:
        records: tree of ``[W, *shape]``, in the leaf's dtype or the history's; slots not yet written are 0.
        steps: ``[W] int32``, the step of each record.
        num_records: ``[] int32``, records written so far; the next goes to slot ``num_records % W``.
    """

    records: Tree
    steps: jax.Array
    num_records: jax.Array


@dataclasses.dataclass(frozen=True)
class WindowHistory:
    """Weighted least squares over the last ``length`` records, without approximation.

    State cost: ``length`` times the parameters, plus 4 bytes per slot.
    """

    length: int
    decay: float
    dtype: jnp.dtype | None
    num_features: ClassVar[int] = 3  # The mean, the slope, and the newest record.
    encodes: ClassVar[bool] = False

    def init(self, params: optax.Params) -> HistoryState:
        """The empty window, with the parameters' sharding."""

        def empty(leaf: jax.Array) -> jax.Array:
            zeros = jnp.zeros_like(leaf, dtype=numerics.stored_dtype(leaf, self.dtype))
            return jnp.broadcast_to(zeros[None], (self.length, *zeros.shape))

        records = with_axis_in_front(jax.tree.map(empty, params))
        return WindowHistoryState(records, *self._empty_ring())

    def _empty_ring(self) -> tuple[jax.Array, jax.Array]:
        """The steps and the number of records of the empty window."""
        return jnp.zeros([self.length], jnp.int32), jnp.zeros([], jnp.int32)

    def check_state(self, state: HistoryState) -> None:
        """``ValueError`` unless the state is a `WindowHistoryState` with the same W."""
        base.check_history(state, WindowHistoryState)
        base.check_settings(length=(state.steps.shape[0], self.length))

    def example(self, state: HistoryState) -> tuple[optax.Updates, int]:
        """The tree of records, whose leaves have one leading axis."""
        return state.records, 1

    def scalars(self, state: HistoryState, step: jax.Array) -> LineScalars:
        """The scalars of ``step``, with one coefficient per slot."""
        newest = (state.num_records - 1) % self.length
        rank = (newest - jnp.arange(self.length, dtype=jnp.int32)) % self.length
        weights = jnp.where(rank < state.num_records, jnp.float32(self.decay) ** rank.astype(jnp.float32), 0.0)
        ages = (state.steps - state.steps[newest]).astype(jnp.float32)
        horizon = (step - state.steps[newest]).astype(jnp.float32)
        mean, slope, age = line_fit.line_weights(ages, weights, newest)
        last = (rank == 0) & (weights > 0)
        return LineScalars(
            horizon,
            mean + (horizon - age) * slope,
            features=jnp.stack([mean, slope, last.astype(jnp.float32)]),
            reach=jnp.ones([3], jnp.float32).at[1].set(horizon - age),
        )

    def record(
        self,
        state: HistoryState,
        tree: optax.Updates,
        params: optax.Params | None,
        step: jax.Array,
        scalars: OwnScalars,
        is_recorded: jax.Array,
    ) -> HistoryState:
        """Overwrites the oldest slot."""
        del params, scalars
        slot = state.num_records % self.length

        def written(records: jax.Array, new: jax.Array) -> jax.Array:
            new = numerics.saturating_cast(new, records.dtype)
            return records.at[slot].set(jnp.where(is_recorded, new, records[slot]))

        return state._replace(
            records=trees.map_leaves(written, state.records, tree),
            steps=state.steps.at[slot].set(jnp.where(is_recorded, step, state.steps[slot])),
            num_records=jnp.where(is_recorded, optax.safe_increment(state.num_records), state.num_records),
        )

    def terms(self, state: HistoryState, scalars: LineScalars) -> tuple[list[jax.Array], list[optax.Updates]]:
        """The terms of the prediction, one per slot."""
        slots = range(self.length)
        records = [jax.tree.map(lambda r, i=i: r[i], state.records) for i in slots]
        return [scalars.coefficients[i] for i in slots], records

    def init_gram(self, num_leaves: int) -> jax.Array | None:
        """Zeros for the records' inner products, which are kept so that a true step reads each record once."""
        return jnp.zeros([num_leaves, self.length, self.length], jnp.float32)

    def combine(self, state: HistoryState, scalars: LineScalars, weights: jax.Array) -> optax.Updates:
        """The weighted sum of the features, in one pass over the records."""
        leaves, treedef = jax.tree.flatten(state.records)
        of_records = jnp.matmul(weights, scalars.features, precision="highest")
        slots = range(self.length)
        sums = [
            numerics.linear_combination([of_records[leaf, i] for i in slots], [r[i] for i in slots])
            for leaf, r in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, sums)

    def products(
        self,
        state: HistoryState,
        scalars: LineScalars,
        gram: jax.Array | None,
        tree: optax.Updates,
        squared_norms: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The inner products of the features, in one pass over the records."""
        assert gram is not None
        leaves = zip(jax.tree.leaves(state.records), jax.tree.leaves(tree), strict=True)
        with_tree = jnp.stack([inner_products.inner_of_records(r, x) for r, x in leaves])
        features = scalars.features
        of_features = jnp.einsum("ia,lab,jb->lij", features, gram, features, precision="highest")
        slot = state.num_records % self.length
        row = with_tree.at[:, slot].set(squared_norms)
        grown = gram.at[:, slot, :].set(row).at[:, :, slot].set(row)
        return of_features, jnp.einsum("ia,la->li", features, with_tree, precision="highest"), grown


class CodedWindowHistoryState(NamedTuple):
    """A ring of the last W records as payloads of a codec.

    Attributes:
        records: a payload, each of its arrays ``[W, ...]``; slots not yet written are 0.
        steps: ``[W] int32``, the step of each record.
        num_records: ``[] int32``, records written so far; the next goes to slot ``num_records % W``.
    """

    records: codecs.Payload
    steps: jax.Array
    num_records: jax.Array


@dataclasses.dataclass(frozen=True)
class CodedWindowHistory(WindowHistory):
    """Weighted least squares over the last records, as the codec decodes them.

    State cost: ``length`` payloads of the codec, plus 4 bytes per slot.
    """

    codec: codecs.Codec
    encodes: ClassVar[bool] = True

    def init(self, params: optax.Params) -> CodedWindowHistoryState:
        """The empty window."""
        return CodedWindowHistoryState(codecs.zero_payload(self.codec, params, self.length), *self._empty_ring())

    def check_state(self, state: HistoryState) -> None:
        """``ValueError`` unless the state is a `CodedWindowHistoryState` with the same W; the codec checks the rest."""
        base.check_history(state, CodedWindowHistoryState)
        base.check_settings(length=(state.steps.shape[0], self.length))

    def example(self, state: CodedWindowHistoryState) -> tuple[optax.Updates, int]:
        """The shapes and dtypes of the records, which have no leading axis."""
        return codecs.shapes_of(self.codec.specs(state.records)), 0

    def record(
        self,
        state: CodedWindowHistoryState,
        tree: optax.Updates,
        params: optax.Params | None,
        step: jax.Array,
        scalars: OwnScalars,
        is_recorded: jax.Array,
    ) -> CodedWindowHistoryState:
        """Overwrites the oldest slot."""
        shapes, _ = self.example(state)
        kept = trees.map_leaves(lambda x, s: numerics.saturating_cast(x, s.dtype), tree, shapes)
        return super().record(state, self.codec.encode(kept), params, step, scalars, is_recorded)

    def terms(
        self, state: CodedWindowHistoryState, scalars: LineScalars
    ) -> tuple[list[jax.Array], list[optax.Updates]]:
        """A single term, the decoded sum."""
        coefficients = scalars.coefficients[: self.length]
        return [jnp.ones([], jnp.float32)], [self.codec.decode_sum(state.records, coefficients)]

    def init_gram(self, num_leaves: int) -> None:
        """None, since a coded window keeps no inner products."""
        del num_leaves

    def combine(self, state: CodedWindowHistoryState, scalars: LineScalars, weights: jax.Array) -> optax.Updates:
        """The weighted sum of the features; each is decoded, since weights differ by leaf and codecs may mix leaves."""
        return trees.combine_trees(weights, self._features(state, scalars))

    def products(
        self,
        state: CodedWindowHistoryState,
        scalars: LineScalars,
        gram: jax.Array | None,
        tree: optax.Updates,
        squared_norms: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The inner products of the decoded features."""
        del gram, squared_norms
        return *trees.products_of_trees(self._features(state, scalars), tree), None

    def _features(self, state: CodedWindowHistoryState, scalars: LineScalars) -> list[optax.Updates]:
        return [self.codec.decode_sum(state.records, row) for row in scalars.features]
