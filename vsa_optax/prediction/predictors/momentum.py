"""Prediction by the last difference: the newest record, moved on by a share of how it differed from the one before.

    ĝ = g_last + μ (g_last - g_before)

Every step of a leap has the same prediction. The true gradient that ends a leap is corrected by what was missed, and
that leaves in its place; what is recorded is the true gradient itself:

    g + ω (g - ĝ)

The errors of the last true steps are kept for `QualityCycle`, which stops to predict while they are large.

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
    """What one step is to the history.

    Attributes:
        horizon: ``[] float32``, steps from the newest record.
        coefficients: ``[2] float32``, of the records in the prediction; zeros before the first record.
        num_records: ``[] int32``, so far.
    """

    horizon: jax.Array
    coefficients: jax.Array
    num_records: jax.Array

    @property
    def distance(self) -> None:
        """Momentum does not read the parameters."""
        return


class MomentumCalibrationState(NamedTuple):
    """What past predictions were worth; no coefficient is learned from it.

    Attributes:
        error: ``[L] float32``, sum of ``||x - x̂||² / ||x||²`` whose terms fade.
        weight: ``[L] float32``, sum of ones that fade alike.
        recent: ``[E] float32``, errors ``||x - x̂|| / ||x||`` of the last true steps behind two records, in a ring.
        num_recent: ``[] int32``, such errors so far; the next goes to slot ``num_recent % E``.
    """

    error: jax.Array
    weight: jax.Array
    recent: jax.Array
    num_recent: jax.Array

    def quality(self) -> PredictionQuality:
        """R² by leaf."""
        r_squared = calibration.r_squared(self.error, self.weight)
        return PredictionQuality(None, None, r_squared, jnp.mean(r_squared))

    def exceeds(self, most_error: float) -> jax.Array:
        """``[] bool``: E errors are known, and their mean is larger."""
        return (self.num_recent >= _NUM_ERRORS) & (jnp.mean(self.recent) > most_error)


@dataclasses.dataclass(frozen=True)
class MomentumHistory:
    """The last two records.

    State cost: twice the parameters, and 8 bytes.
    """

    def init(self, params: optax.Params) -> MomentumHistoryState:
        """The empty history; its leaves are laid out on the devices as the parameters are."""
        zeros = base.zeros_as_stored(params, None)
        records = with_axis_in_front(jax.tree.map(lambda x: jnp.broadcast_to(x[None], (2, *x.shape)), zeros))
        return MomentumHistoryState(records, jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def check_state(self, state: base.HistoryState) -> None:
        """The kind of history."""
        base.check_history(state, MomentumHistoryState)

    def example(self, state: MomentumHistoryState) -> tuple[optax.Updates, int]:
        """The records."""
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
        """Overwrites the older one."""
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
    """Moves on from the newest record.

    It is compared at every true step, has no residual, and learns nothing but what it is worth.

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
        """Nothing measured."""
        num_leaves = base.num_measured_leaves(params)
        error, weight = jnp.zeros([num_leaves], jnp.float32), jnp.zeros([num_leaves], jnp.float32)
        recent, num_recent = jnp.zeros([_NUM_ERRORS], jnp.float32), jnp.zeros([], jnp.int32)
        return Experience(calibration=MomentumCalibrationState(error, weight, recent, num_recent))

    def scalars(self, history: MomentumHistoryState, step: jax.Array, params: optax.Params | None) -> MomentumScalars:
        """Of a single record the coefficient is 1."""
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
        """None: what it is worth changes no prediction."""
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
        """Measures the prediction, and keeps its error."""
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
        """What leaves in the place of a true ``target`` that ends a leap: corrected by what was missed of it."""
        weight = jnp.where(scalars.num_records > 0, jnp.float32(self.correction_weight), 0)
        coefficients = [1 + weight, -weight * scalars.coefficients[0], -weight * scalars.coefficients[1]]

        def moved(x: jax.Array, records: jax.Array) -> jax.Array:
            corrected = numerics.linear_combination(coefficients, [x, records[0], records[1]])
            return numerics.saturating_cast(corrected, x.dtype)

        return trees.map_leaves(moved, target, history.records)
