"""The state of the phase machine: named scalars while a step decides, and a few arrays between steps.

A program takes time for every array that enters and leaves it: about 3 µs on a GPU's host, where a predicted step of a
small model takes 0.3 ms (benchmarks/dispatch_gpu.log and phase_in_flight_gpu.log). So between steps the machine's two
dozen scalars are kept in two arrays.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from vsa_optax.core.kinds import Marks
from vsa_optax.prediction.guard import GuardState
from vsa_optax.prediction.predictors.base import Calibration

Node = TypeVar("Node", bound=tuple[jax.Array, ...])


class AdaptiveLengthsState(NamedTuple):
    """Phase lengths that follow the loss.

    Attributes:
        full_length: ``[] int32``, the number of steps in the present FULL phase.
        predict_length: ``[] int32``, the number of steps in the coming PREDICT phase.
        num_losses: ``[] int32``, the number of losses so far; the next goes to slot ``num_losses % 100``.
        losses: ``[100] float32``, a ring of the most recent losses.
    """

    full_length: jax.Array
    predict_length: jax.Array
    num_losses: jax.Array
    losses: jax.Array


class PredictionErrorState(NamedTuple):
    """Relative errors ``||x - x̂|| / ||x||`` of predicted gradients or updates, at CORRECT steps.

    With the guard or calibration, they are measured at all true steps that follow a prediction.

    Attributes:
        num_measured: ``[] int32``, the number of errors measured.
        mean: ``[] float32``, their mean.
        last: ``[] float32``, the latest error.
    """

    num_measured: jax.Array
    mean: jax.Array
    last: jax.Array


class Machine(NamedTuple):
    """The machine's scalars by name.

    Attributes:
        phase: ``[] int32``, the `Phase` of the coming step.
        steps_in_phase: ``[] int32``, the number of steps done in this phase (PREDICT and CORRECT together); in WARMUP,
            the number of recorded gradients.
        warmup_steps: ``[] int32``, the number of steps taken in WARMUP so far.
        full_steps: ``[] int32``, the number of steps taken in FULL.
        predict_steps: ``[] int32``, the number of steps taken in PREDICT.
        correct_steps: ``[] int32``, the number of CORRECT steps taken.
        cycles: ``[] int32``, the number of PREDICT phases completed.
        nonfinite_count: ``[] int32``, the number of steps skipped because of a NaN or an infinity.
        ignored_gradients: ``[] int32``, the number of PREDICT steps that received a non-zero gradient.
        has_value: ``[] bool``, whether a finite ``value=`` was received in a true step.
        value: ``[] float32``, the last one; meaningless before ``has_value``.
        errors: `PredictionErrorState`, or None if no step is ever predicted.
        adaptive: `AdaptiveLengthsState` with `AdaptiveCycle`, else None.
        guard: `GuardState` with `Guarded`, else None.
        calibration: `CalibrationState`, `SecantCalibrationState` or `MomentumCalibrationState`; None with a line that
            is not calibrated.
    """

    phase: jax.Array
    steps_in_phase: jax.Array
    warmup_steps: jax.Array
    full_steps: jax.Array
    predict_steps: jax.Array
    correct_steps: jax.Array
    cycles: jax.Array
    nonfinite_count: jax.Array
    ignored_gradients: jax.Array
    has_value: jax.Array
    value: jax.Array
    errors: PredictionErrorState | None
    adaptive: AdaptiveLengthsState | None
    guard: GuardState | None
    calibration: Calibration | None

    def packed(self) -> "PhaseMachineState":
        """The state to keep between steps."""
        return PhaseMachineState(
            self.phase,
            jnp.stack([jnp.asarray(x, jnp.int32) for x in self._scalars(COUNTS)], axis=-1),
            jnp.stack(self._scalars(NUMBERS), axis=-1),
            None if self.adaptive is None else self.adaptive.losses,
            self.calibration,
        )

    def _scalars(self, names: dict[str, tuple[str, ...]]) -> list[jax.Array]:
        nodes = {part: self if part == "" else getattr(self, part) for part in names}
        return [getattr(nodes[part], name) for part in names if nodes[part] is not None for name in names[part]]


# The fields of the machine and of its parts, in the order of the packed arrays.
COUNTS = {
    "": Machine._fields[1:10],
    "errors": ("num_measured",),
    "adaptive": ("full_length", "predict_length", "num_losses"),
    "guard": ("leap", "hopeless", "asleep", "sleep", "action"),
}
NUMBERS = {"": ("value",), "errors": ("mean", "last"), "guard": ("length", "constant", "way", "pace", "drift")}

_OWN_NUMBERS = len(NUMBERS[""])


class PhaseMachineState(NamedTuple):
    """The machine between steps; every query finds it by this type.

    Attributes:
        phase: ``[] int32``, the `Phase` of the coming step.
        counts: ``[9] int32``, the other integers and ``has_value`` of `Machine`, in the order of its fields. If steps
            are ever predicted, then ``num_measured``; with `AdaptiveCycle`, then the three integers of
            `AdaptiveLengthsState`; with `Guarded`, then the five integers of `GuardState`.
        numbers: ``[1] float32``, ``value``. If steps are ever predicted, then ``mean`` and ``last`` of
            `PredictionErrorState`; with `Guarded`, then the five numbers of `GuardState`.
        losses: ``[100] float32``, those of `AdaptiveLengthsState`, or None.
        calibration: as in `Machine`.
    """

    phase: jax.Array
    counts: jax.Array
    numbers: jax.Array
    losses: jax.Array | None
    calibration: Calibration | None

    def marks(self) -> Marks:
        """The arrays on which the kinds of the coming steps depend, for `core.kinds`."""
        return self.phase, self.counts, self.numbers, self.losses

    def unpacked(self) -> Machine:
        """The scalars by name; on each device, if the arrays have leading axes."""
        apart = _apart if isinstance(self.counts, jax.Array) else _elements
        of_counts, of_numbers = apart(self.counts), apart(self.numbers)
        counts, numbers = iter(of_counts), iter(of_numbers)
        own = {name: next(counts) for name in COUNTS[""]} | {name: next(numbers) for name in NUMBERS[""]}
        own["has_value"] = own["has_value"].astype(bool)
        errors, adaptive, guard = None, None, None
        if len(of_numbers) > _OWN_NUMBERS:
            errors = PredictionErrorState(next(counts), next(numbers), next(numbers))
        if self.losses is not None:
            adaptive = AdaptiveLengthsState(next(counts), next(counts), next(counts), self.losses)
        if len(of_numbers) > _OWN_NUMBERS + len(NUMBERS["errors"]):
            named = dict(zip(COUNTS["guard"], counts, strict=True)) | dict(zip(NUMBERS["guard"], numbers, strict=True))
            guard = GuardState(**named)
        return Machine(
            phase=self.phase, errors=errors, adaptive=adaptive, guard=guard, calibration=self.calibration, **own
        )


def _elements(packed: jax.Array) -> list[jax.Array]:
    return [packed[..., i] for i in range(packed.shape[-1])]


_apart = jax.jit(_elements, inline=True)  # Outside a trace it is one call instead of one for each scalar.
