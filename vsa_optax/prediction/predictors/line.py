"""Predicts with a line in time, evaluated at a later step, plus the averaged error of earlier predictions.

ĝ(t) = b + v (t - t_last) + γ^(t - t_last) r
r    <- γ r + (1 - γ) (g - ĝ)                     at CORRECT steps

A calibrated line has no residual. Instead, the records' mean, the line's slope and the newest record have separate
coefficients in each leaf, which `prediction.fits.calibration` fits.

Axes: L leaves, K features, W records.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from vsa_optax.codecs import codec as codecs
from vsa_optax.core import trees
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics
from vsa_optax.prediction.fits import calibration
from vsa_optax.prediction.predictors import base
from vsa_optax.prediction.predictors.base import Comparison, Experience, History, HistoryState, PredictionQuality


class LineScalars(NamedTuple):
    """The scalars of one step for a line in time.

    Attributes:
        horizon: ``[] float32``, the number of steps from the newest record.
        coefficients: ``[terms] float32``, the coefficients of the terms in the prediction.
        features: ``[K, terms] float32``, the coefficients of the terms in each feature of a calibrated prediction: the
            records' mean, the line's slope and, with a window, the newest record.
        reach: ``[K] float32``, the factors of the features: 1, the steps from the mean record, 1.
        moments: ``weight, lag, spread`` after a record at this step; None for the window.
        gains: ``mean_gain, keep, velocity_gain`` of such a record; None for the window.
    """

    horizon: jax.Array
    coefficients: jax.Array
    features: jax.Array
    reach: jax.Array
    moments: tuple[jax.Array, jax.Array, jax.Array] | None = None
    gains: tuple[jax.Array, jax.Array, jax.Array] | None = None

    @property
    def distance(self) -> None:
        """The distance is None, since a line does not read the parameters."""
        return


class LineHistory(History, Protocol):
    """A history whose prediction is a line in time, the weighted sum of numbers and trees.

    Attributes:
        num_features: K, the number of features of a calibrated prediction.
    """

    num_features: ClassVar[int]

    def scalars(self, state: HistoryState, step: jax.Array) -> LineScalars:
        """The scalars of ``step``."""

    def terms(self, state: HistoryState, scalars: LineScalars) -> tuple[list[jax.Array], list[optax.Updates]]:
        """The coefficients and trees whose weighted sum is the prediction; it is zero before the first record."""

    def init_gram(self, num_leaves: int) -> jax.Array | None:
        """Zeros for the records' inner products, ``[L, W, W] float32``; None if they are not kept."""

    def combine(self, state: HistoryState, scalars: LineScalars, weights: jax.Array) -> optax.Updates:
        """The sum of the features with weights ``[L, K]``, in at least f32."""

    def products(
        self,
        state: HistoryState,
        scalars: LineScalars,
        gram: jax.Array | None,
        tree: optax.Updates,
        squared_norms: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Inner products of the features with each other, ``[L, K, K]``, and with ``tree``, ``[L, K]``.

        The features are not multiplied by their reach. The third result is the gram after the tree with these
        ``squared_norms`` has been recorded, or None if it is not kept.
        """


class CalibrationState(NamedTuple):
    """The measured errors of past predictions.

    Attributes:
        sums: `prediction.fits.calibration.Sums`, a few scalars per leaf.
        gram: ``[L, W, W] float32``, the inner products of the window's records; None for other histories.
    """

    sums: calibration.Sums
    gram: jax.Array | None

    def quality(self) -> PredictionQuality:
        """The coefficients in use, and R² of each leaf."""
        r_squared = calibration.r_squared(self.sums.error, self.sums.weight)
        return PredictionQuality(calibration.coefficients(self.sums), None, r_squared, jnp.mean(r_squared))


@dataclasses.dataclass(frozen=True)
class LinePredictor:
    """Predicts with the line of a history, calibrated or with a residual.

    Attributes:
        history: the history of records.
        dtype: the dtype of the residual; None keeps each leaf's own.
        codec: the codec that keeps the residual as a payload, encoded again at CORRECT steps; None keeps it as arrays.
        residual_decay: γ, the decay of the averaged error that is added; None adds nothing.
        calibrates: whether each leaf has coefficients for the features.
    """

    history: LineHistory
    dtype: jnp.dtype | None
    codec: codecs.Codec | None
    residual_decay: float | None
    calibrates: bool
    reads_params: ClassVar[bool] = False

    @property
    def has_residual(self) -> bool:
        """Whether the averaged error is added to predictions."""
        return self.residual_decay is not None

    def init_experience(self, params: optax.Params) -> Experience:
        """The experience before any comparison; the residual is zero."""
        residual, measured = None, None
        if self.has_residual:
            residual = (
                codecs.zero_payload(self.codec, params) if self.codec else base.zeros_as_stored(params, self.dtype)
            )
        if self.calibrates:
            num_leaves = base.num_measured_leaves(params)
            sums = calibration.zeros(num_leaves, self.history.num_features)
            measured = CalibrationState(sums, self.history.init_gram(num_leaves))
        return Experience(residual, measured)

    def scalars(self, history: HistoryState, step: jax.Array, params: optax.Params | None) -> LineScalars:
        """The scalars of ``step``, with the residual's coefficient as the last one."""
        del params
        scalars = self.history.scalars(history, step)
        if self.residual_decay is None:
            return scalars
        faded = jnp.float32(self.residual_decay) ** scalars.horizon
        return scalars._replace(coefficients=jnp.append(scalars.coefficients, faded))

    def weights(self, state: CalibrationState | None, scalars: LineScalars) -> jax.Array | None:
        """``[L, K]``: the coefficients of the features in a calibrated prediction."""
        return None if state is None else calibration.coefficients(state.sums) * scalars.reach[None]

    def predict(
        self, history: HistoryState, residual: Tree, scalars: LineScalars, weights: jax.Array | None
    ) -> optax.Updates:
        """The predictions; zeros before the first record."""
        if weights is not None:
            return self.history.combine(history, scalars, weights)
        coefficients, terms = self.history.terms(history, scalars)
        if self.has_residual:
            coefficients, terms = [*coefficients, scalars.coefficients[-1]], [*terms, self._decoded(residual)]
        return trees.map_leaves(lambda *arrays: numerics.linear_combination(coefficients, arrays), *terms)

    def compare(
        self,
        history: HistoryState,
        experience: Experience,
        scalars: LineScalars,
        target: optax.Updates,
        predicted: Callable[[], optax.Updates],
    ) -> Comparison:
        """Compares a target with its prediction; a calibrated line does not compute the prediction for this."""
        state: CalibrationState | None = experience.calibration
        if state is None:
            return self._compare_with(predicted(), experience.residual, target)
        if not jax.tree.leaves(target):
            return base.not_measured(experience)
        squared_norms = trees.squared_norms(target)
        gram, products, grown = self.history.products(history, scalars, state.gram, target, squared_norms)
        # The sums are those of the features times their reach.
        reach = scalars.reach
        reached = gram * reach[None, :, None] * reach[None, None], products * reach[None]
        theta = calibration.coefficients(state.sums)
        sums, squared = calibration.measure(state.sums, theta, *reached, squared_norms, calibration.FORGET)
        # Before the first record there was no prediction.
        has_records = jnp.any(scalars.features != 0)
        sums = trees.tree_where(has_records, sums, state.sums)
        total = jnp.sum(squared_norms)
        is_defined = (total > 0) & jnp.isfinite(total)
        ratio = jnp.sum(squared) / jnp.where(is_defined, total, 1)
        error = numerics.saturating_cast(jnp.sqrt(ratio), jnp.float32)
        return Comparison(
            Experience(experience.residual, CalibrationState(sums, grown)), error, is_defined & has_records
        )

    def _compare_with(self, prediction: optax.Updates, residual: Tree, target: optax.Updates) -> Comparison:
        error, is_defined = numerics.relative_distance(jax.tree.leaves(target), jax.tree.leaves(prediction))
        if self.residual_decay is None:
            return Comparison(Experience(), error, is_defined)
        decay = jnp.float32(self.residual_decay)

        def moved(r: jax.Array, g: jax.Array, p: jax.Array) -> jax.Array:
            averaged = numerics.linear_combination([decay, 1 - decay, decay - 1], [r, g, p])
            return numerics.saturating_cast(averaged, r.dtype)

        averaged = trees.map_leaves(moved, self._decoded(residual), target, prediction)
        if self.codec:
            # A rotation may overflow although the numbers do not: such a block is stored as zeros.
            coded = self.codec.encode(averaged)
            averaged = trees.map_leaves(lambda _, x: numerics.saturating_cast(x, x.dtype), residual, coded)
        return Comparison(Experience(averaged), error, is_defined)

    def _decoded(self, residual: Tree) -> optax.Updates:
        return self.codec.decode(residual) if self.codec else residual
