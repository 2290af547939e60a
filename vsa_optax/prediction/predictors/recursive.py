"""An exact recursion over all gradients so far, which keeps two trees, however long its memory is."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax.core import trees
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics
from vsa_optax.prediction.fits import line_fit
from vsa_optax.prediction.predictors import base
from vsa_optax.prediction.predictors.line import LineScalars


class RecursiveHistoryState(NamedTuple):
    """The fitted line itself, and the moments of the record times that the next update needs.

    Attributes:
        mean: tree of ``[*shape]``, the weighted mean of the records, which is the line's value at their mean step.
        velocity: tree of ``[*shape]``, the line's change per step.
        weight: ``[] float32``, the sum of all weights.
        lag: ``[] float32``, the newest record's step minus the weighted mean step.
        spread: ``[] float32``, the weighted sum of squared deviations from the mean step.
        last_step: ``[] int32``, the newest record's step.
    """

    mean: Tree
    velocity: Tree
    weight: jax.Array
    lag: jax.Array
    spread: jax.Array
    last_step: jax.Array


@dataclasses.dataclass(frozen=True)
class RecursiveHistory:
    """Weighted least squares over every record so far, with weights that decay by ``decay`` per record.

    The sums of the normal equations are kept as their solution, mean and velocity. A new record moves both by its
    distance from the mean times scalar gains. This gives the same numbers without sums that overflow f32.

    State cost: twice the parameters, plus 16 bytes.
    """

    decay: float
    dtype: jnp.dtype | None
    num_features: ClassVar[int] = 2  # The mean and the slope.
    encodes: ClassVar[bool] = False

    @property
    def _mean_first(self) -> bool:
        # If both are computed from the old mean, XLA copies it. With a smaller decay, precision matters more.
        return self.decay >= 0.5

    def init(self, params: optax.Params) -> RecursiveHistoryState:
        """The empty recursion."""
        return RecursiveHistoryState(
            mean=base.zeros_as_stored(params, self.dtype),
            velocity=base.zeros_as_stored(params, self.dtype),
            weight=jnp.zeros([], jnp.float32),
            lag=jnp.zeros([], jnp.float32),
            spread=jnp.zeros([], jnp.float32),
            last_step=jnp.zeros([], jnp.int32),
        )

    def check_state(self, state: base.HistoryState) -> None:
        """``ValueError`` unless the state is a `RecursiveHistoryState`."""
        base.check_history(state, RecursiveHistoryState)

    def example(self, state: RecursiveHistoryState) -> tuple[optax.Updates, int]:
        """The tree of means, whose leaves have no leading axis."""
        return state.mean, 0

    def scalars(self, state: RecursiveHistoryState, step: jax.Array) -> LineScalars:
        """The coefficients of mean and velocity, and the gains of a record at ``step``."""
        horizon = (step - state.last_step).astype(jnp.float32)
        moments, gains = line_fit.forget_and_add(
            state.weight, state.lag, state.spread, horizon, self.decay, mean_first=self._mean_first
        )
        one = jnp.ones([], jnp.float32)
        return LineScalars(
            horizon,
            jnp.stack([one, horizon + state.lag]),
            features=jnp.eye(2, dtype=jnp.float32),
            reach=jnp.stack([one, horizon + state.lag]),
            moments=moments,
            gains=gains,
        )

    def record(
        self,
        state: RecursiveHistoryState,
        tree: optax.Updates,
        params: optax.Params | None,
        step: jax.Array,
        scalars: LineScalars,
        is_recorded: jax.Array,
    ) -> RecursiveHistoryState:
        """Moves mean and velocity by the record's distance from the mean."""
        del params
        assert scalars.moments is not None
        assert scalars.gains is not None
        weight, lag, spread = scalars.moments
        mean_gain, keep, velocity_gain = scalars.gains

        def moved_mean(m: jax.Array, x: jax.Array) -> jax.Array:
            moved = numerics.linear_combination([1 - mean_gain, mean_gain], [m, x])
            return jnp.where(is_recorded, numerics.saturating_cast(moved, m.dtype), m)

        def moved_velocity(v: jax.Array, m: jax.Array, x: jax.Array) -> jax.Array:
            terms = [keep, velocity_gain, -velocity_gain], [v, x, m]
            return jnp.where(is_recorded, numerics.saturating_cast(numerics.linear_combination(*terms), v.dtype), v)

        mean = jax.tree.map(moved_mean, state.mean, tree)
        seen_mean = mean if self._mean_first else state.mean
        return RecursiveHistoryState(
            mean=mean,
            velocity=jax.tree.map(moved_velocity, state.velocity, seen_mean, tree),
            weight=jnp.where(is_recorded, weight, state.weight),
            lag=jnp.where(is_recorded, lag, state.lag),
            spread=jnp.where(is_recorded, spread, state.spread),
            last_step=jnp.where(is_recorded, step, state.last_step),
        )

    def terms(self, state: RecursiveHistoryState, scalars: LineScalars) -> tuple[list[jax.Array], list[optax.Updates]]:
        """The mean and the velocity with their coefficients."""
        return [scalars.coefficients[0], scalars.coefficients[1]], [state.mean, state.velocity]

    def init_gram(self, num_leaves: int) -> None:
        """None, since the recursion keeps no inner products."""
        del num_leaves

    def combine(self, state: RecursiveHistoryState, scalars: LineScalars, weights: jax.Array) -> optax.Updates:
        """The weighted sum of the features, in one pass over mean and velocity."""
        del scalars
        return trees.combine_trees(weights, [state.mean, state.velocity])

    def products(
        self,
        state: RecursiveHistoryState,
        scalars: LineScalars,
        gram: jax.Array | None,
        tree: optax.Updates,
        squared_norms: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The inner products of mean and velocity, computed from the arrays."""
        del gram, squared_norms, scalars
        return *trees.products_of_trees([state.mean, state.velocity], tree), None
