"""Prediction by a line in time: read at a later step, and the averaged error of earlier predictions on top.

ĝ(t) = b + v (t - t_last) + γ^(t - t_last) r
r    <- γ r + (1 - γ) (g - ĝ)                     at CORRECT steps

Calibrated, it has no residual, and the records' mean, the line's slope and the newest record have coefficients of their
own in each leaf: see `kernels.calibration`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vsa_optax.codecs import codec as codecs
from vsa_optax.kernels import calibration, numerics, wls
from vsa_optax.transforms.comparison import Comparison, Memory, no_comparison, num_rows
from vsa_optax.transforms.history import LineHistory, Scalars, zeros_as_stored
from vsa_optax.transforms.leafwise import energies

_FORGET = 0.95  # Of the calibration, a measurement.


class CalibrationState(NamedTuple):
    """What past predictions were worth.

    Attributes:
        sums: `kernels.calibration.Sums`, a few scalars a leaf.
        gram: ``[L, W, W] float32``, the products of the window's records; None for other histories.
    """

    sums: calibration.Sums
    gram: jax.Array | None


@dataclasses.dataclass(frozen=True)
class LinePredictor:
    """A history, and the residual's settings.

    With a codec the residual is a payload, encoded anew at CORRECT steps.
    """

    history: LineHistory
    dtype: jnp.dtype | None
    codec: codecs.Codec | None
    has_residual: bool
    residual_decay: float
    calibrates: bool

    @property
    def reads_params(self) -> bool:
        """It does not."""
        return False

    def init_calibration(self, params: Any) -> CalibrationState | None:
        """Nothing measured; None if it is switched off."""
        if not self.calibrates:
            return None
        num_leaves = num_rows(params)
        sums = calibration.zeros(num_leaves, self.history.num_features())
        return CalibrationState(sums, self.history.init_gram(num_leaves))

    def init_residual(self, params: Any) -> Any:
        """Zeros: a tree, or a payload if there is a codec; None if there is no residual."""
        if not self.has_residual:
            return None
        return codecs.zero_payload(self.codec, params) if self.codec else zeros_as_stored(params, self.dtype)

    def scalars(self, history: Any, step: jax.Array, params: Any) -> Scalars:
        """What ``step`` is to the history, and the residual's coefficient as the last one."""
        del params
        scalars = self.history.scalars(history, step)
        if not self.has_residual:
            return scalars
        faded = jnp.float32(self.residual_decay) ** scalars.horizon
        return scalars._replace(coefficients=jnp.append(scalars.coefficients, faded))

    def record(self, history: Any, tree: Any, params: Any, step: jax.Array, scalars: Scalars) -> Any:
        """The history with one more record."""
        del params
        return self.history.record(history, tree, step, scalars)

    def weights(self, state: CalibrationState | None, scalars: Scalars) -> jax.Array | None:
        """``[L, K]``: what a calibrated prediction takes of each feature."""
        return None if state is None else calibration.coefficients(state.sums) * scalars.reach

    def predict(self, history: Any, residual: Any, scalars: Scalars, weights: jax.Array | None) -> Any:
        """Tree of predictions, in at least f32; zeros while nothing is recorded."""
        if weights is not None:
            return self.history.combine(history, scalars, weights)
        coefficients, trees = self.history.terms(history, scalars)
        if self.has_residual:
            coefficients, trees = [*coefficients, scalars.coefficients[-1]], [*trees, self._decoded(residual)]
        return jax.tree.map(lambda *arrays: wls.combine(coefficients, arrays), *trees)

    def compare(self, memory: Memory, scalars: Scalars, target: Any, predicted: Callable[[], Any]) -> Comparison:
        """Of ``target``, which is to be recorded, with its prediction; calibrated, without forming that."""
        if memory.calibration is None:
            return self._compare(memory.residual, target, predicted())
        state = memory.calibration
        if not jax.tree.leaves(target):
            return no_comparison(memory)
        energy = energies(target)
        gram, products, grown = self.history.products(memory.history, scalars, state.gram, target, energy)
        # The sums are those of the features as far as they reach.
        reach = scalars.reach
        reached = gram * reach[:, None] * reach, products * reach
        theta = calibration.coefficients(state.sums)
        sums, squared = calibration.measure(state.sums, theta, *reached, energy, _FORGET)
        # Nothing is recorded before the first.
        has_records = jnp.any(scalars.features != 0)
        sums = jax.tree.map(lambda new, old: jnp.where(has_records, new, old), sums, state.sums)
        total = jnp.sum(energy)
        is_defined = (total > 0) & jnp.isfinite(total)
        ratio = jnp.sum(squared) / jnp.where(is_defined, total, 1)
        error = numerics.saturating_cast(jnp.sqrt(ratio), jnp.float32)
        return Comparison(memory.residual, CalibrationState(sums, grown), error, is_defined & has_records)

    def _compare(self, residual: Any, target: Any, prediction: Any) -> Comparison:
        error, is_defined = numerics.relative_distance(jax.tree.leaves(target), jax.tree.leaves(prediction))
        if not self.has_residual:
            return Comparison(None, None, error, is_defined)
        decay = jnp.float32(self.residual_decay)

        def moved(r: jax.Array, g: jax.Array, p: jax.Array) -> jax.Array:
            return numerics.saturating_cast(wls.combine([decay, 1 - decay, decay - 1], [r, g, p]), r.dtype)

        averaged = jax.tree.map(moved, self._decoded(residual), target, prediction)
        if self.codec:
            # A rotation may overflow where the numbers do not: such a block is kept as zeros.
            coded = self.codec.encode(averaged)
            averaged = jax.tree.map(lambda x: numerics.saturating_cast(x, x.dtype), coded)
        return Comparison(averaged, None, error, is_defined)

    def _decoded(self, residual: Any) -> Any:
        return self.codec.decode(residual) if self.codec else residual
