"""What one step of a phase machine comes to."""

from typing import Any, NamedTuple

import jax

from vsa_optax.transforms.predictor import CalibrationState


class StepResult(NamedTuple):
    """What one step comes to, before it is recorded.

    Attributes:
        target: tree, what the recorded transformation emitted, or its prediction; of no use if not finite.
        inner_state: the recorded transformation's state.
        residual: tree or None, the predictor's residual.
        is_finite: ``[] bool``, false if a gradient, or what the transformation made of it, holds a NaN or an infinity.
        error: ``[] float32``, the relative prediction error.
        is_measured: ``[] bool``, whether ``error`` was measured, which it is at CORRECT steps, or, if predictions are
            calibrated, at true steps.
        calibration: the predictor's calibration, or None.
    """

    target: Any
    inner_state: Any
    residual: Any
    is_finite: jax.Array
    error: jax.Array | None = None
    is_measured: jax.Array | None = None
    calibration: CalibrationState | None = None
