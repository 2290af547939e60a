"""A window: the last W gradients as they are, and the line through them."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from vsa_optax.kernels import inner_products, numerics, wls
from vsa_optax.transforms.history import CodedWindowHistoryState, Scalars, WindowHistoryState

_Ring = TypeVar("_Ring", WindowHistoryState, CodedWindowHistoryState)


@dataclasses.dataclass(frozen=True)
class WindowHistory:
    """Weighted least squares over the last ``length`` records, exactly.

    State cost: ``length`` times the parameters, plus 4 bytes a slot.
    """

    length: int
    decay: float
    dtype: jnp.dtype | None

    def describe(self) -> str:
        """Window and length."""
        return f"window of {self.length}"

    def init(self, params: Any) -> WindowHistoryState:
        """The empty window; its leaves are laid out on the devices as the parameters are."""

        def empty(leaf: jax.Array) -> jax.Array:
            zeros = jnp.zeros_like(leaf, dtype=numerics.stored_dtype(leaf, self.dtype))
            return jnp.broadcast_to(zeros[None], (self.length, *zeros.shape))

        steps, num_records = self.init_ring()
        return WindowHistoryState(jax.tree.map(empty, params), steps, num_records)

    def init_ring(self) -> tuple[jax.Array, jax.Array]:
        """Steps and number of records of the empty window."""
        return jnp.zeros([self.length], jnp.int32), jnp.zeros([], jnp.int32)

    def example(self, state: WindowHistoryState) -> tuple[Any, int]:
        """The records."""
        return state.records, 1

    def scalars(self, state: WindowHistoryState | CodedWindowHistoryState, step: jax.Array) -> Scalars:
        """One coefficient a slot."""
        newest = (state.num_records - 1) % self.length
        rank = (newest - jnp.arange(self.length, dtype=jnp.int32)) % self.length
        weights = jnp.where(rank < state.num_records, jnp.float32(self.decay) ** rank, 0.0)
        ages = (state.steps - state.steps[newest]).astype(jnp.float32)
        horizon = (step - state.steps[newest]).astype(jnp.float32)
        mean, slope, age = wls.line_weights(ages, weights, newest)
        last = (rank == 0) & (weights > 0)
        return Scalars(
            horizon,
            mean + (horizon - age) * slope,
            features=jnp.stack([mean, slope, last.astype(jnp.float32)]),
            reach=jnp.ones([3], jnp.float32).at[1].set(horizon - age),
        )

    def terms(self, state: WindowHistoryState, scalars: Scalars) -> tuple[list[jax.Array], list[Any]]:
        """One term a slot."""
        slots = range(self.length)
        rows = [jax.tree.map(lambda r, i=i: r[i], state.records) for i in slots]
        return [scalars.coefficients[i] for i in slots], rows

    def record(self, state: _Ring, tree: Any, step: jax.Array, scalars: Scalars) -> _Ring:
        """Overwrites the oldest slot."""
        del scalars
        slot = state.num_records % self.length
        return state._replace(
            records=jax.tree.map(
                lambda r, x: r.at[slot].set(numerics.saturating_cast(x, r.dtype)), state.records, tree
            ),
            steps=state.steps.at[slot].set(step),
            num_records=optax.safe_increment(state.num_records),
        )

    def num_features(self) -> int:
        """The mean, the slope, and the newest record."""
        return 3

    def init_gram(self, num_leaves: int) -> jax.Array | None:
        """Kept, so that a true step reads each record once."""
        return jnp.zeros([num_leaves, self.length, self.length], jnp.float32)

    def combine(self, state: WindowHistoryState, scalars: Scalars, weights: jax.Array) -> Any:
        """One pass over the records."""
        leaves, treedef = jax.tree.flatten(state.records)
        of_records = weights @ scalars.features
        sums = [
            wls.combine([of_records[leaf, i] for i in range(self.length)], [r[i] for i in range(self.length)])
            for leaf, r in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, sums)

    def products(
        self, state: WindowHistoryState, scalars: Scalars, gram: jax.Array | None, tree: Any, energy: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """One pass over the records."""
        assert gram is not None
        leaves = zip(jax.tree.leaves(state.records), jax.tree.leaves(tree), strict=True)
        with_tree = jnp.stack([inner_products.inner_of_records(r, x) for r, x in leaves])
        features = scalars.features
        of_features = jnp.einsum("ia,lab,jb->lij", features, gram, features, precision="highest")
        slot = state.num_records % self.length
        row = with_tree.at[:, slot].set(energy)
        grown = gram.at[:, slot, :].set(row).at[:, :, slot].set(row)
        return of_features, jnp.einsum("ia,la->li", features, with_tree, precision="highest"), grown
