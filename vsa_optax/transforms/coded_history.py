"""A window whose records are kept as a codec's payloads.

Every record is encoded with the same key. So records that are alike err alike, and their errors cancel in the slope of
the line; and the weighted sum that a prediction is can be taken of payloads, and decoded once.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vsa_optax.codecs import codec as codecs
from vsa_optax.kernels import numerics
from vsa_optax.transforms.history import CodedWindowHistoryState, Scalars
from vsa_optax.transforms.leafwise import combine_trees, products_of_trees
from vsa_optax.transforms.window_history import WindowHistory


@dataclasses.dataclass(frozen=True)
class CodedWindowHistory:
    """Weighted least squares over the last records, each as the codec decodes it.

    State cost: ``length`` payloads of the codec, plus 4 bytes a slot.
    """

    window: WindowHistory
    codec: codecs.Codec

    def describe(self) -> str:
        """Window and length; the codec compares its own settings with those of the records."""
        return f"coded {self.window.describe()}"

    def init(self, params: Any) -> CodedWindowHistoryState:
        """The empty window."""
        records = codecs.zero_payload(self.codec, params, self.window.length)
        return CodedWindowHistoryState(records, *self.window.init_ring())

    def example(self, state: CodedWindowHistoryState) -> tuple[Any, int]:
        """Shapes and dtypes of the records."""
        return codecs.shapes_of(self.codec.specs(state.records)), 0

    def scalars(self, state: CodedWindowHistoryState, step: jax.Array) -> Scalars:
        """One coefficient a slot."""
        return self.window.scalars(state, step)

    def terms(self, state: CodedWindowHistoryState, scalars: Scalars) -> tuple[list[jax.Array], list[Any]]:
        """One term, the decoded sum."""
        coefficients = scalars.coefficients[: self.window.length]
        return [jnp.ones([], jnp.float32)], [self.codec.decode_sum(state.records, coefficients)]

    def record(
        self, state: CodedWindowHistoryState, tree: Any, step: jax.Array, scalars: Scalars
    ) -> CodedWindowHistoryState:
        """Overwrites the oldest slot."""
        shapes, _ = self.example(state)
        kept = jax.tree.map(lambda x, s: numerics.saturating_cast(x, s.dtype), tree, shapes)
        return self.window.record(state, self.codec.encode(kept), step, scalars)

    def num_features(self) -> int:
        """The mean, the slope, and the newest record."""
        return self.window.num_features()

    def init_gram(self, num_leaves: int) -> jax.Array | None:
        """Not kept."""
        del num_leaves
        return None

    def combine(self, state: CodedWindowHistoryState, scalars: Scalars, weights: jax.Array) -> Any:
        """Decodes each feature: leaves weigh them differently, and a codec may mix leaves."""
        return combine_trees(weights, self._features(state, scalars))

    def products(
        self, state: CodedWindowHistoryState, scalars: Scalars, gram: jax.Array | None, tree: Any, energy: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Those of the decoded features."""
        del gram, energy
        return *products_of_trees(self._features(state, scalars), tree), None

    def _features(self, state: CodedWindowHistoryState, scalars: Scalars) -> list[Any]:
        return [self.codec.decode_sum(state.records, row) for row in scalars.features]
