"""Prediction by secants: from the parameters, with the ridge that served best so far; see `kernels.secant`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vsa_optax.kernels import inner_products, numerics, secant, wls
from vsa_optax.transforms.history import SecantHistoryState
from vsa_optax.transforms.leafwise import energies
from vsa_optax.transforms.measurement import Measurement, nothing_measured, num_rows
from vsa_optax.transforms.secant_history import SecantHistory, SecantScalars, difference

_FORGET = 0.9  # Of the scores, a measurement.


class SecantCalibrationState(NamedTuple):
    """What past predictions were worth, and what the next are judged by.

    Attributes:
        scores: `kernels.secant.Scores`.
        gram: ``[L, W, W] float32``, inner products of the changes of the gradient.
    """

    scores: secant.Scores
    gram: jax.Array


@dataclasses.dataclass(frozen=True)
class SecantPredictor:
    """It is always calibrated, and has no residual."""

    history: SecantHistory

    @property
    def calibrates(self) -> bool:
        """It does."""
        return True

    @property
    def has_residual(self) -> bool:
        """It has none."""
        return False

    def init_calibration(self, params: Any) -> SecantCalibrationState:
        """Nothing measured."""
        num_leaves = num_rows(params)
        length = self.history.length
        return SecantCalibrationState(
            secant.no_scores(num_leaves), jnp.zeros([num_leaves, length, length], jnp.float32)
        )

    def init_residual(self, params: Any) -> None:
        """None."""
        del params

    def scalars(self, history: SecantHistoryState, step: jax.Array, params: Any) -> SecantScalars:
        """What the parameters are to the history."""
        return self.history.scalars(history, step, params)

    def predict(self, history: SecantHistoryState, residual: Any, scalars: SecantScalars) -> Any:
        """The newest gradient, as with an infinite ridge."""
        del residual, scalars
        return history.gradient

    def measure(self, residual: Any, target: Any, prediction: Any) -> tuple[Any, jax.Array, jax.Array]:
        """No residual, and the relative error."""
        del residual
        return None, *numerics.relative_distance(jax.tree.leaves(target), jax.tree.leaves(prediction))

    def weights(self, state: SecantCalibrationState, scalars: SecantScalars) -> jax.Array:
        """``[W]``: those of the changes, by the best ridge."""
        return scalars.coefficients[secant.best(state.scores)]

    def predict_calibrated(self, history: SecantHistoryState, scalars: SecantScalars, weights: jax.Array) -> Any:
        """The newest gradient and its weighted changes, one pass over them, in at least f32."""
        del scalars
        coefficients = [jnp.ones([], jnp.float32), *(weights[i] for i in range(self.history.length))]

        def combined(gradient: jax.Array, changes: jax.Array) -> jax.Array:
            return wls.combine(coefficients, [gradient, *(changes[i] for i in range(self.history.length))])

        return jax.tree.map(combined, history.gradient, history.changes)

    def calibrate(
        self, state: SecantCalibrationState, history: SecantHistoryState, scalars: SecantScalars, target: Any
    ) -> Measurement:
        """Compares ``target``, which is to be recorded, with its predictions; one pass over the changes."""
        if not jax.tree.leaves(target):
            return nothing_measured(state)
        change = jax.tree.map(difference, target, history.gradient)
        pairs = zip(jax.tree.leaves(history.changes), jax.tree.leaves(change), strict=True)
        products = jnp.stack([inner_products.inner_of_records(records, x) for records, x in pairs])
        missed, energy = energies(change), energies(target)
        squared = secant.errors(scalars.coefficients, state.gram, products, missed)
        # Before the first record nothing was predicted, and what is recorded is no change.
        has_record = history.num_records > 0
        total = jnp.sum(energy)
        is_defined = has_record & (total > 0) & jnp.isfinite(total) & jnp.all(jnp.isfinite(squared))
        scores = secant.scored(state.scores, squared, energy, _FORGET)
        scores = jax.tree.map(lambda new, old: jnp.where(is_defined, new, old), scores, state.scores)
        slot = history.num_records % self.history.length
        row = products.at[:, slot].set(missed)
        row = jnp.where(has_record & jnp.all(jnp.isfinite(row)), row, 0)
        gram = state.gram.at[:, slot, :].set(row).at[:, :, slot].set(row)
        ratio = jnp.sum(squared[secant.best(state.scores)]) / jnp.where(total > 0, total, 1)
        error = numerics.saturating_cast(jnp.sqrt(ratio), jnp.float32)
        return Measurement(SecantCalibrationState(scores, gram), error, is_defined)
