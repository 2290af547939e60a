"""An exact recursion over all gradients so far: two trees, whatever the memory's length."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vsa_optax.kernels import numerics, wls
from vsa_optax.transforms.history import RecursiveHistoryState, Scalars, zeros_as_stored
from vsa_optax.transforms.leafwise import combine_trees, products_of_trees


@dataclasses.dataclass(frozen=True)
class RecursiveHistory:
    """Weighted least squares over every record so far, the weights fading by ``decay`` a record.

    The normal equations' sums are kept in the form of their solution, mean and velocity, which a new record moves by
    its distance from the mean times scalar gains: the same numbers, without sums that outgrow f32.

    State cost: twice the parameters, plus 16 bytes.
    """

    decay: float
    dtype: jnp.dtype | None

    @property
    def _mean_first(self) -> bool:
        # With both computed from the old mean, XLA copies it; a decay this small needs the digits more.
        return self.decay >= 0.5

    def describe(self) -> str:
        """Recursive."""
        return "recursive"

    def init(self, params: Any) -> RecursiveHistoryState:
        """The empty recursion."""
        return RecursiveHistoryState(
            mean=zeros_as_stored(params, self.dtype),
            velocity=zeros_as_stored(params, self.dtype),
            weight=jnp.zeros([], jnp.float32),
            lag=jnp.zeros([], jnp.float32),
            spread=jnp.zeros([], jnp.float32),
            last_step=jnp.zeros([], jnp.int32),
        )

    def example(self, state: RecursiveHistoryState) -> tuple[Any, int]:
        """The mean."""
        return state.mean, 0

    def scalars(self, state: RecursiveHistoryState, step: jax.Array) -> Scalars:
        """Coefficients of mean and velocity, and what a record at ``step`` would do."""
        horizon = (step - state.last_step).astype(jnp.float32)
        moments, gains = wls.forget_and_add(
            state.weight, state.lag, state.spread, horizon, self.decay, mean_first=self._mean_first
        )
        one = jnp.ones([], jnp.float32)
        return Scalars(
            horizon,
            jnp.stack([one, horizon + state.lag]),
            features=jnp.eye(2, dtype=jnp.float32),
            reach=jnp.stack([one, horizon + state.lag]),
            moments=moments,
            gains=gains,
        )

    def terms(self, state: RecursiveHistoryState, scalars: Scalars) -> tuple[list[jax.Array], list[Any]]:
        """Mean and velocity."""
        return [scalars.coefficients[0], scalars.coefficients[1]], [state.mean, state.velocity]

    def num_features(self) -> int:
        """The mean and the slope."""
        return 2

    def init_gram(self, num_leaves: int) -> jax.Array | None:
        """Not kept."""
        del num_leaves
        return None

    def combine(self, state: RecursiveHistoryState, scalars: Scalars, weights: jax.Array) -> Any:
        """One pass over mean and velocity."""
        del scalars
        return combine_trees(weights, [state.mean, state.velocity])

    def products(
        self, state: RecursiveHistoryState, scalars: Scalars, gram: jax.Array | None, tree: Any, energy: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Those of mean and velocity, taken anew."""
        del gram, energy, scalars
        return *products_of_trees([state.mean, state.velocity], tree), None

    def record(
        self, state: RecursiveHistoryState, tree: Any, step: jax.Array, scalars: Scalars
    ) -> RecursiveHistoryState:
        """Moves mean and velocity by the record's distance from the mean."""
        assert scalars.moments is not None
        assert scalars.gains is not None
        weight, lag, spread = scalars.moments
        mean_gain, keep, velocity_gain = scalars.gains

        def moved_mean(m: jax.Array, x: jax.Array) -> jax.Array:
            return numerics.saturating_cast(wls.combine([1 - mean_gain, mean_gain], [m, x]), m.dtype)

        def moved_velocity(v: jax.Array, m: jax.Array, x: jax.Array) -> jax.Array:
            terms = [keep, velocity_gain, -velocity_gain], [v, x, m]
            return numerics.saturating_cast(wls.combine(*terms), v.dtype)

        mean = jax.tree.map(moved_mean, state.mean, tree)
        seen_mean = mean if self._mean_first else state.mean
        return RecursiveHistoryState(
            mean=mean,
            velocity=jax.tree.map(moved_velocity, state.velocity, seen_mean, tree),
            weight=weight,
            lag=lag,
            spread=spread,
            last_step=step,
        )
