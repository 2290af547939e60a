"""What the predictor remembers of past gradients: the last W of them, or an exact recursion over all.

Two histories with one interface: ``init(params)``; ``scalars(state, step)``, all that is known of a step before any
leaf is touched; ``terms(state, scalars)``, the numbers and trees whose weighted sum is the prediction; and
``record(state, tree, step, scalars)``.

The scalars are a function of their own because they must be computed outside the conditionals that use them: fused into
a loop over a leaf, XLA computes them anew for each element.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax

from vsa_optax.kernels import numerics, wls


class WindowHistoryState(NamedTuple):
    """The last W records, in a ring.

    Attributes:
        records: tree of ``[W, *shape]``, in the leaf's dtype or ``history_dtype``; slots not yet written are 0.
        steps: ``[W] int32``, the step of each record.
        num_records: ``[] int32``, records written so far; the next goes to slot ``num_records % W``.
    """

    records: Any
    steps: jax.Array
    num_records: jax.Array


class CodedWindowHistoryState(NamedTuple):
    """The last W records as payloads of a codec, in a ring.

    Attributes:
        records: a payload, each of its arrays ``[W, ...]``; slots not yet written are 0.
        steps: ``[W] int32``, the step of each record.
        num_records: ``[] int32``, records written so far; the next goes to slot ``num_records % W``.
    """

    records: Any
    steps: jax.Array
    num_records: jax.Array


class RecursiveHistoryState(NamedTuple):
    """The fitted line itself, and the moments of the record times that the next update needs.

    Attributes:
        mean: tree of ``[*shape]``, the weighted mean of the records, which is the line's value at their mean step.
        velocity: tree of ``[*shape]``, the line's change a step.
        weight: ``[] float32``, sum of all weights.
        lag: ``[] float32``, the newest record's step minus the weighted mean step.
        spread: ``[] float32``, weighted sum of squared deviations from the mean step.
        last_step: ``[] int32``, the newest record's step.
    """

    mean: Any
    velocity: Any
    weight: jax.Array
    lag: jax.Array
    spread: jax.Array
    last_step: jax.Array


_Ring = TypeVar("_Ring", WindowHistoryState, CodedWindowHistoryState)


class Scalars(NamedTuple):
    """What one step is to the history.

    Attributes:
        horizon: ``[] float32``, steps from the newest record.
        coefficients: ``[terms] float32``, the prediction's weights.
        moments: ``weight, lag, spread`` as they will be after a record at this step; None for the window.
        gains: ``mean_gain, keep, velocity_gain`` of such a record; None for the window.
    """

    horizon: jax.Array
    coefficients: jax.Array
    moments: tuple[jax.Array, jax.Array, jax.Array] | None = None
    gains: tuple[jax.Array, jax.Array, jax.Array] | None = None


def describe_state(state: Any) -> str:
    """Which history ``state`` belongs to, as `History.describe` says it."""
    if isinstance(state, WindowHistoryState | CodedWindowHistoryState):
        coded = "coded " if isinstance(state, CodedWindowHistoryState) else ""
        return f"{coded}window of {state.steps.shape[0]}"
    return "recursive" if isinstance(state, RecursiveHistoryState) else type(state).__name__


class History(Protocol):
    """A memory of gradients that predicts the coming one."""

    def describe(self) -> str:
        """The settings that the shape of the state depends on."""

    def init(self, params: Any) -> Any:
        """The empty history for ``params``."""

    def example(self, state: Any) -> tuple[Any, int]:
        """A tree of the parameters' structure, and how many axes its leaves have before theirs."""

    def scalars(self, state: Any, step: jax.Array) -> Scalars:
        """What ``step`` is to the history."""

    def terms(self, state: Any, scalars: Scalars) -> tuple[list[jax.Array], list[Any]]:
        """Numbers and trees whose weighted sum is the prediction; it is zero while nothing is recorded."""

    def record(self, state: Any, tree: Any, step: jax.Array, scalars: Scalars) -> Any:
        """The history with one more record, taken at ``step``."""


def zeros_as_stored(params: Any, dtype: jnp.dtype | None) -> Any:
    """Zeros for ``params`` in the dtypes that records of them are kept in."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=numerics.stored_dtype(leaf, dtype)), params)


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
        return Scalars(horizon, wls.extrapolation_weights(ages, weights, newest, horizon))

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
        coefficients = jnp.stack([jnp.ones([], jnp.float32), horizon + state.lag])
        return Scalars(horizon, coefficients, moments, gains)

    def terms(self, state: RecursiveHistoryState, scalars: Scalars) -> tuple[list[jax.Array], list[Any]]:
        """Mean and velocity."""
        return [scalars.coefficients[0], scalars.coefficients[1]], [state.mean, state.velocity]

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
