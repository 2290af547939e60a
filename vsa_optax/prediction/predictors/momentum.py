"""Predicts the newest record plus a fraction of its difference from the record before it.

    ĝ = g_last + μ (g_last - g_before)

Every step of a leap has the same prediction. The true gradient that ends a leap is recorded as it is, and emitted with
a correction by the prediction's error:

    g + ω (g - ĝ)

The errors of the last true steps are kept for `QualityCycle`, which does not predict while they are large.

Axes: L leaves, E = 10 errors.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax.core import trees
from vsa_optax.core.axis_names import with_axis_in_front
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics
from vsa_optax.prediction.fits import calibration
from vsa_optax.prediction.predictors import base
from vsa_optax.prediction.predictors.base import Comparison, Experience, OwnScalars, PredictionQuality

_NUM_ERRORS = 10  # E, as in the Rust crate vsa-optim-rs 0.1.1.


class MomentumHistoryState(NamedTuple):
    """The last two records.

    Attributes:
        records: tree of ``[2, *shape]`` in the leaf's dtype; slots not yet written are 0.
        num_records: ``[] int32``, records written so far; the next goes to slot ``num_records % 2``.
        last_step: ``[] int32``, the newest record's step.
    """

    records: Tree
    num_records: jax.Array
    last_step: jax.Array


class MomentumScalars(NamedTuple):
    """The scalars of one step.

    Attributes:
        horizon: ``[] float32``, the number of steps from the newest record.
        coefficients: ``[2] float32``, the coefficients of the records in the prediction; zeros before the first record.
        num_records: ``[] int32``, the number of records so far.
    """

    horizon: jax.Array
    coefficients: jax.Array
    num_records: jax.Array

    @property
    def distance(self) -> None:
        """The distance is None, since momentum does not read the parameters."""
        return


class MomentumCalibrationState(NamedTuple):
    """Errors of past predictions; no coefficient is learned from them.

    Attributes:
        error: ``[L] float32``, the exponentially decaying sum of ``||x - x̂||² / ||x||²``.
        weight: ``[L] float32``, the sum of ones with the same decay.
        recent: ``[E] float32``, a ring of the errors ``||x - x̂|| / ||x||`` of the last true steps that followed two
            records.
        num_recent: ``[] int32``, the number of such errors so far; the next goes to slot ``num_recent % E``.
    """

    error: jax.Array
    weight: jax.Array
    recent: jax.Array
    num_recent: jax.Array

    def quality(self) -> PredictionQuality:
        """R² of each leaf."""
        r_squared = calibration.r_squared(self.error, self.weight)
        return PredictionQuality(None, None, r_squared, jnp.mean(r_squared))

    def exceeds(self, most_error: float) -> jax.Array:
        """``[] bool``: whether E errors are known and their mean exceeds ``most_error``."""
        return (self.num_recent >= _NUM_ERRORS) & (jnp.mean(self.recent) > most_error)


@dataclasses.dataclass(frozen=True)
class MomentumHistory:
    """The last two records.

    State cost: twice the parameters, and 8 bytes.
    """

    encodes: ClassVar[bool] = False

    def init(self, params: optax.Params) -> MomentumHistoryState:
        """The empty history, with the parameters' sharding."""
        zeros = base.zeros_as_stored(params, None)
        records = with_axis_in_front(jax.tree.map(lambda x: jnp.broadcast_to(x[None], (2, *x.shape)), zeros))
        return MomentumHistoryState(records, jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def check_state(self, state: base.HistoryState) -> None:
        """``ValueError`` unless the state is a `MomentumHistoryState`."""
        base.check_history(state, MomentumHistoryState)

    def example(self, state: MomentumHistoryState) -> tuple[optax.Updates, int]:
        """The tree of records, whose leaves have one leading axis."""
        return state.records, 1

    def record(
        self,
        state: MomentumHistoryState,
        tree: optax.Updates,
        params: optax.Params | None,
        step: jax.Array,
        scalars: MomentumScalars,
        is_recorded: jax.Array,
    ) -> MomentumHistoryState:
        """Overwrites the older of the two records."""
        del params, scalars
        slot = state.num_records % 2

        def written(records: jax.Array, new: jax.Array) -> jax.Array:
            new = numerics.saturating_cast(new, records.dtype)
            return records.at[slot].set(jnp.where(is_recorded, new, records[slot]))

        return MomentumHistoryState(
            records=trees.map_leaves(written, state.records, tree),
            num_records=jnp.where(is_recorded, optax.safe_increment(state.num_records), state.num_records),
            last_step=jnp.where(is_recorded, step, state.last_step),
        )


@dataclasses.dataclass(frozen=True)
class MomentumPredictor:
    """Extrapolates from the newest record.

    The prediction is compared at every true step. It has no residual, and only its errors are kept.

    Attributes:
        momentum: μ.
        correction_weight: ω.
    """

    momentum: float
    correction_weight: float
    history: ClassVar[MomentumHistory] = MomentumHistory()
    reads_params: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    has_residual: ClassVar[bool] = False

    def init_experience(self, params: optax.Params) -> Experience:
        """The experience before any comparison."""
        num_leaves = base.num_measured_leaves(params)
        error, weight = jnp.zeros([num_leaves], jnp.float32), jnp.zeros([num_leaves], jnp.float32)
        recent, num_recent = jnp.zeros([_NUM_ERRORS], jnp.float32), jnp.zeros([], jnp.int32)
        return Experience(calibration=MomentumCalibrationState(error, weight, recent, num_recent))

    def scalars(self, history: MomentumHistoryState, step: jax.Array, params: optax.Params | None) -> MomentumScalars:
        """The coefficients of the records; a single record has coefficient 1."""
        del params
        num, momentum = history.num_records, jnp.float32(self.momentum)
        newest = jnp.where(num > 1, 1 + momentum, num.astype(jnp.float32))
        before = jnp.where(num > 1, -momentum, jnp.float32(0))
        return MomentumScalars(
            horizon=(step - history.last_step).astype(jnp.float32),
            coefficients=jnp.where(jnp.arange(2, dtype=jnp.int32) == (num - 1) % 2, newest, before),
            num_records=num,
        )

    def weights(self, state: MomentumCalibrationState, scalars: MomentumScalars) -> None:
        """None, since past errors do not change a prediction."""
        del state, scalars

    def predict(
        self, history: MomentumHistoryState, residual: None, scalars: MomentumScalars, weights: jax.Array | None
    ) -> optax.Updates:
        """One pass over the records; zeros while nothing is recorded."""
        del residual, weights
        coefficients = [scalars.coefficients[0], scalars.coefficients[1]]
        return jax.tree.map(
            lambda records: numerics.linear_combination(coefficients, [records[0], records[1]]), history.records
        )

    def compare(
        self,
        history: MomentumHistoryState,
        experience: Experience,
        scalars: MomentumScalars,
        target: optax.Updates,
        predicted: Callable[[], optax.Updates],
    ) -> Comparison:
        """Measures the prediction and keeps its error."""
        del history
        if not jax.tree.leaves(target):
            return base.not_measured(experience)
        state: MomentumCalibrationState = experience.calibration
        prediction = predicted()
        error, is_defined = numerics.relative_distance(jax.tree.leaves(target), jax.tree.leaves(prediction))
        is_measured = is_defined & (scalars.num_records > 0)
        signs = [jnp.float32(1), jnp.float32(-1)]
        difference = trees.map_leaves(lambda *pair: numerics.linear_combination(signs, pair), target, prediction)
        missed = trees.squared_norms(difference)
        squared_norms = trees.squared_norms(target)
        ratio = missed / jnp.where(squared_norms > 0, squared_norms, 1)
        is_usable = is_measured & (squared_norms > 0) & jnp.isfinite(squared_norms) & jnp.isfinite(ratio)
        is_kept = is_measured & (scalars.num_records > 1)
        slot = state.num_recent % _NUM_ERRORS
        learned = MomentumCalibrationState(
            error=jnp.where(is_usable, calibration.FORGET * state.error + ratio, state.error),
            weight=jnp.where(is_usable, calibration.FORGET * state.weight + 1, state.weight),
            recent=state.recent.at[slot].set(jnp.where(is_kept, error, state.recent[slot])),
            num_recent=jnp.where(is_kept, optax.safe_increment(state.num_recent), state.num_recent),
        )
        return Comparison(Experience(experience.residual, learned), error, is_measured)

    def corrected(self, history: MomentumHistoryState, scalars: OwnScalars, target: optax.Updates) -> optax.Updates:
        """The true ``target`` that ends a leap, corrected by the error of its prediction."""
        weight = jnp.where(scalars.num_records > 0, jnp.float32(self.correction_weight), 0)
        coefficients = [1 + weight, -weight * scalars.coefficients[0], -weight * scalars.coefficients[1]]

        def moved(x: jax.Array, records: jax.Array) -> jax.Array:
            corrected = numerics.linear_combination(coefficients, [x, records[0], records[1]])
            return numerics.saturating_cast(corrected, x.dtype)

        return trees.map_leaves(moved, target, history.records)
