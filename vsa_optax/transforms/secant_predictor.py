"""Prediction by secants: from the parameters, with the ridge that served best so far; see `kernels.secant`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vsa_optax.kernels import inner_products, numerics, secant, wls
from vsa_optax.transforms.comparison import Comparison, Memory, no_comparison, num_rows
from vsa_optax.transforms.history import SecantHistoryState
from vsa_optax.transforms.leafwise import energies
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
    def reads_params(self) -> bool:
        """It does."""
        return True

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

    def record(
        self, history: SecantHistoryState, tree: Any, params: Any, step: jax.Array, scalars: SecantScalars
    ) -> SecantHistoryState:
        """The history with one more record."""
        return self.history.record(history, tree, params, step, scalars)

    def weights(self, state: SecantCalibrationState, scalars: SecantScalars) -> jax.Array:
        """``[W]``: those of the changes, by the best ridge."""
        return scalars.coefficients[secant.best(state.scores)]

    def predict(self, history: SecantHistoryState, residual: None, scalars: SecantScalars, weights: jax.Array) -> Any:
        """The newest gradient and its weighted changes, one pass over them, in at least f32."""
        del residual, scalars
        coefficients = [jnp.ones([], jnp.float32), *(weights[i] for i in range(self.history.length))]

        def combined(gradient: jax.Array, changes: jax.Array) -> jax.Array:
            return wls.combine(coefficients, [gradient, *(changes[i] for i in range(self.history.length))])

        return jax.tree.map(combined, history.gradient, history.diff_gradients)

    def compare(self, memory: Memory, scalars: SecantScalars, target: Any, predicted: Callable[[], Any]) -> Comparison:
        """Of ``target``, which is to be recorded, with the predictions of all ridges; one pass over the changes."""
        del predicted
        if not jax.tree.leaves(target):
            return no_comparison(memory)
        history, state = memory.history, memory.calibration
        change = jax.tree.map(difference, target, history.gradient)
        pairs = zip(jax.tree.leaves(history.diff_gradients), jax.tree.leaves(change), strict=True)
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
        return Comparison(None, SecantCalibrationState(scores, gram), error, is_defined)
