"""What one step of a phase machine comes to."""

from typing import Any, NamedTuple

import jax


class StepResult(NamedTuple):
    """What one step comes to, before it is recorded.

    Attributes:
        target: tree, what the recorded transformation emitted, or its prediction; of no use if not finite.
        inner_state: the recorded transformation's state.
        is_finite: ``[] bool``, false if a gradient, or what the transformation made of it, holds a NaN or an infinity.
        residual: as in `comparison.Memory`, and so is the next.
        calibration: None if there is none.
        error: ``[] float32``, the relative prediction error.
        is_measured: ``[] bool``, whether ``error`` was measured: at CORRECT steps, or, calibrated or with the guard, at
            all true steps.
    """

    target: Any
    inner_state: Any
    is_finite: jax.Array
    residual: Any = None
    calibration: Any = None
    error: jax.Array | None = None
    is_measured: jax.Array | None = None
