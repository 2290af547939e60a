"""What is remembered of past gradients: the states, and what is asked of a history.

What a step is to a history is computed before any leaf is touched, and outside the conditionals that use it: fused into
a loop over a leaf, XLA computes scalars anew for each element.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from vsa_optax.kernels import numerics


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


class SecantHistoryState(NamedTuple):
    """The newest record, and the changes that led to it, in a ring.

    Attributes:
        params: tree of ``[*shape]``, the parameters of the newest record.
        gradient: tree of ``[*shape]``, its gradient.
        diff_params: tree of ``[W, *shape]``, from record to record; slots not yet written are 0.
        diff_gradients: tree of ``[W, *shape]``, likewise.
        gram: ``[W, W] float32``, inner products of ``diff_params``.
        num_records: ``[] int32``, records so far; the next change goes to slot ``num_records % W``.
        last_step: ``[] int32``, the newest record's step.
    """

    params: Any
    gradient: Any
    diff_params: Any
    diff_gradients: Any
    gram: jax.Array
    num_records: jax.Array
    last_step: jax.Array


class Scalars(NamedTuple):
    """What one step is to a line in time.

    Attributes:
        horizon: ``[] float32``, steps from the newest record.
        coefficients: ``[terms] float32``, the prediction's weights.
        features: ``[K, terms] float32``, those of a calibrated prediction's parts: the records' mean, the line's slope,
            and, with a window, the newest record.
        reach: ``[K] float32``, what the features are multiplied by: 1, the steps from the mean record, 1.
        moments: ``weight, lag, spread`` as they will be after a record at this step; None for the window.
        gains: ``mean_gain, keep, velocity_gain`` of such a record; None for the window.
    """

    horizon: jax.Array
    coefficients: jax.Array
    features: jax.Array
    reach: jax.Array
    moments: tuple[jax.Array, jax.Array, jax.Array] | None = None
    gains: tuple[jax.Array, jax.Array, jax.Array] | None = None


def describe_state(state: Any) -> str:
    """Which history ``state`` belongs to, as `History.describe` says it."""
    if isinstance(state, WindowHistoryState | CodedWindowHistoryState):
        coded = "coded " if isinstance(state, CodedWindowHistoryState) else ""
        return f"{coded}window of {state.steps.shape[0]}"
    if isinstance(state, SecantHistoryState):
        return f"secant of {state.gram.shape[0]}"
    return "recursive" if isinstance(state, RecursiveHistoryState) else type(state).__name__


class History(Protocol):
    """A memory of gradients."""

    def describe(self) -> str:
        """The settings that the shape of the state depends on."""

    def init(self, params: Any) -> Any:
        """The empty history for ``params``."""

    def example(self, state: Any) -> tuple[Any, int]:
        """A tree of the parameters' structure, and how many axes its leaves have before theirs."""


class LineHistory(History, Protocol):
    """A history whose prediction is a line in time, the weighted sum of numbers and trees."""

    def scalars(self, state: Any, step: jax.Array) -> Scalars:
        """What ``step`` is to the history."""

    def record(self, state: Any, tree: Any, step: jax.Array, scalars: Scalars) -> Any:
        """The history with one more record, taken at ``step``."""

    def terms(self, state: Any, scalars: Scalars) -> tuple[list[jax.Array], list[Any]]:
        """Numbers and trees whose weighted sum is the prediction; it is zero while nothing is recorded."""

    def num_features(self) -> int:
        """K, the parts of a calibrated prediction."""

    def init_gram(self, num_leaves: int) -> jax.Array | None:
        """The records' products with each other, if they are kept: ``[L, W, W] float32``."""

    def combine(self, state: Any, scalars: Scalars, weights: jax.Array) -> Any:
        """The features' sum with weights ``[L, K]``, in at least f32."""

    def products(
        self, state: Any, scalars: Scalars, gram: jax.Array | None, tree: Any, energy: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Of the features, without their reach, with each other and with ``tree``: ``[L, K, K]`` and ``[L, K]``.

        And the gram, if it is kept, as it will be once the tree is recorded, whose squared norms are ``energy``.
        """


def zeros_as_stored(params: Any, dtype: jnp.dtype | None) -> Any:
    """Zeros for ``params`` in the dtypes that records of them are kept in."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=numerics.stored_dtype(leaf, dtype)), params)
