"""The settings of the phase machine, which decide when to predict, as objects that check themselves."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from vsa_optax.core import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guarded:
    """Predicts as many steps at a time as keep the error within a tolerance, and none if gradients are unpredictable.

    Each true gradient is compared with its prediction. `prediction.guard` gives the rule, and says when the comparison
    is suspended. The guard does not need the loss. On mini-batches it usually never predicts.

    Attributes:
        tolerance: the largest relative error of a prediction, ``||x - x̂|| / ||x||``, in ``(0, 1]``. It is a ratio of
            norms, not of their squares. If the rate is so low that most steps are predicted, 0.05 stays closer to the
            loss of plain training (``benchmarks/tolerance.log``).
        longest: the largest number of steps predicted in a row, ``>= 1``.
        warmup_steps: the number of true gradients recorded before the first prediction, ``>= 2``.

    State cost:
        40 bytes.

    Raises:
        ValueError: if an attribute is outside its range.

    Example:
        >>> import optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.adamw(1e-3), phases=vsa_optax.Guarded(tolerance=0.05))
    """

    tolerance: float = 0.14
    longest: int = 20
    warmup_steps: int = 10

    def __post_init__(self) -> None:
        tolerance = checks.check_real("tolerance", self.tolerance, low=0.0, high=1.0, low_open=True)
        object.__setattr__(self, "tolerance", tolerance)
        object.__setattr__(self, "longest", checks.check_integer("longest", self.longest, 1))
        object.__setattr__(self, "warmup_steps", checks.check_integer("warmup_steps", self.warmup_steps, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycle:
    """Predicts in a fixed cycle, however accurate the predictions are.

    After the warm-up, phases of true steps alternate with phases of predicted steps. Within a predicted phase, a true
    gradient corrects the predictor at regular intervals.

    Attributes:
        warmup_steps: the number of true gradients recorded before the first FULL phase, ``>= 0``. With 0 a run starts
            in FULL.
        full_steps: the number of steps in a FULL phase, ``>= 1``.
        predict_steps: the number of steps in a PREDICT phase, corrections included, ``>= 0``. 0 never predicts.
        correct_every: in PREDICT, a true gradient is taken when the step within the phase is a positive multiple of
            this number, ``>= 1``. A multiple at the end of the phase makes the phase one step longer.

    Raises:
        ValueError: if an attribute is outside its range.

    Example:
        >>> import optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.adamw(1e-3), phases=vsa_optax.Cycle(full_steps=2, predict_steps=4))
    """

    warmup_steps: int = 10
    full_steps: int = 5
    predict_steps: int = 20
    correct_every: int = 5

    def __post_init__(self) -> None:
        for name, minimum in (("warmup_steps", 0), ("full_steps", 1), ("predict_steps", 0), ("correct_every", 1)):
            object.__setattr__(self, name, checks.check_integer(name, getattr(self, name), minimum))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveCycle(Cycle):
    """A `Cycle` whose phase lengths follow the loss.

    While the loss rises, FULL phases grow and PREDICT phases shrink; while it falls, they do the reverse. Every
    ``update`` needs the loss as ``value=``. FULL stays between 3 and 30 steps and PREDICT between 5 and 50; a setting
    beyond a bound widens that bound.

    Attributes:
        warmup_steps: the number of true gradients recorded before the first FULL phase, ``>= 0``. With 0 a run starts
            in FULL.
        full_steps: the initial number of steps in a FULL phase, ``>= 1``.
        predict_steps: the initial number of steps in a PREDICT phase, corrections included, ``>= 0``. 0 never predicts.
        correct_every: in PREDICT, a true gradient is taken when the step within the phase is a positive multiple of
            this number, ``>= 1``.
        loss_threshold: the relative rise of the loss that counts as worse, ``>= 0``.

    State cost:
        412 bytes.

    Raises:
        ValueError: if an attribute is outside its range; at ``update``, if ``value`` is missing.

    Example:
        >>> import optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.adamw(1e-3), phases=vsa_optax.AdaptiveCycle(loss_threshold=0.05))
    """

    loss_threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        threshold = checks.check_real("loss_threshold", self.loss_threshold, low=0.0, high=float("inf"))
        object.__setattr__(self, "loss_threshold", threshold)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LegacyCycle(AdaptiveCycle):
    """The `AdaptiveCycle` of the Rust crate's legacy trainer: longer phases, larger adaptations, no warm-up.

    When the loss rises, FULL becomes 5 steps longer, up to 50, and PREDICT 10 shorter, down to 10. When it falls by
    5 %, FULL becomes 2 steps shorter, down to 5, and PREDICT 5 longer, up to 100. A bound applies in its own direction
    and to every setting: a FULL phase of 60 steps that should grow becomes 50. For fixed lengths, use
    ``Cycle(warmup_steps=0, full_steps=10, predict_steps=40, correct_every=10)``.

    Attributes:
        warmup_steps: the number of true gradients recorded before the first FULL phase, ``>= 0``. With 0 a run starts
            in FULL.
        full_steps: the initial number of steps in a FULL phase, ``>= 1``.
        predict_steps: the initial number of steps in a PREDICT phase, corrections included, ``>= 0``. 0 never predicts.
        correct_every: in PREDICT, a true gradient is taken when the step within the phase is a positive multiple of
            this number, ``>= 1``.
        loss_threshold: the relative rise of the loss that counts as worse, ``>= 0``.

    State cost:
        412 bytes.

    Raises:
        ValueError: if an attribute is outside its range; at ``update``, if ``value`` is missing.

    Example:
        >>> import optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.adamw(1e-3), phases=vsa_optax.LegacyCycle())

    References:
        ``PhaseTrainer`` of vsa-optim-rs 0.1.1.
    """

    warmup_steps: int = 0
    full_steps: int = 10
    predict_steps: int = 40
    correct_every: int = 10
    shortest_full: ClassVar[int] = 5

    def moved(
        self, full: jax.Array, predict: jax.Array, is_worse: jax.Array, is_better: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """``[] int32`` each: the next lengths of FULL and PREDICT, from the previous ones and the trend of the loss."""
        longer, shorter = jnp.minimum(full + 5, 50), jnp.maximum(full - 2, self.shortest_full)
        fewer, more = jnp.maximum(predict - 10, 10), jnp.minimum(predict + 5, 100)
        full = jnp.where(is_worse, longer, jnp.where(is_better, shorter, full)).astype(jnp.int32)
        return full, jnp.where(is_worse, fewer, jnp.where(is_better, more, predict)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityCycle(Cycle):
    """Alternates one true step with a leap of predicted steps while the last true steps were predicted well.

    The first two steps are true. Each leap then follows a single true step. If ten errors are known and their mean is
    above the bound, all steps are true until the mean is below the bound again. This cycle needs
    ``predictor=Momentum()``, which keeps these errors.

    Attributes:
        predict_steps: the number of steps in a leap, ``>= 1``. With the default 4, 4 of 5 steps are predicted.
        most_error: the bound of the mean of ``||x - x̂|| / ||x||`` at the last ten true steps, ``> 0``.

    Raises:
        ValueError: if an attribute is outside its range, or if the predictor is another one.

    Example:
        >>> import optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(
        ...     optax.adamw(1e-3), predictor=vsa_optax.Momentum(), phases=vsa_optax.QualityCycle()
        ... )

    References:
        ``GradientPredictor.should_compute_full`` of vsa-optim-rs 0.1.1, whose error is not relative.
    """

    # One step of WARMUP and one of FULL are the first two steps. A leap has no CORRECT steps.
    warmup_steps: int = dataclasses.field(default=1, init=False, repr=False)
    full_steps: int = dataclasses.field(default=1, init=False, repr=False)
    predict_steps: int = 4
    correct_every: int = dataclasses.field(default=2**31 - 1, init=False, repr=False)
    most_error: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_integer("predict_steps", self.predict_steps, 1)
        most_error = checks.check_real("most_error", self.most_error, low=0.0, high=float("inf"), low_open=True)
        object.__setattr__(self, "most_error", most_error)
