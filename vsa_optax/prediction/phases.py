"""When to predict: the settings of the phase machine, as objects that check themselves."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from vsa_optax.core import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guarded:
    """Predicts as many steps at a time as keep the error within a tolerance, and none where nothing can be predicted.

    Each true gradient is compared with its prediction; the rule, and when the guard stops looking, are in
    `prediction.guard`. It needs no loss. On mini-batches it usually never predicts.

    Attributes:
        tolerance: the largest error of a prediction, ``||x - x̂|| / ||x||`` (a ratio of norms, not of their squares),
            in ``(0, 1]``.
        longest: the most steps predicted in a row, ``>= 1``.
        warmup_steps: true gradients to record before anything is predicted, ``>= 2``.

    State cost:
        40 bytes.

    Raises:
        ValueError: an attribute outside its range.

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
    """Predicts in a fixed rhythm, whatever the predictions are worth.

    After the warm-up, phases of true and of predicted steps alternate. A predicted phase takes a true gradient now and
    then, which corrects the predictor.

    Attributes:
        warmup_steps: true gradients to record before the first FULL phase, ``>= 0``; with 0 a run starts in FULL.
        full_steps: steps of a FULL phase, ``>= 1``.
        predict_steps: steps of a PREDICT phase, its corrections included, ``>= 0``; 0 never predicts.
        correct_every: in PREDICT, a true gradient is taken when the step within the phase is a positive multiple of
            this, ``>= 1``. A multiple at the end of the phase makes it one step longer.

    Raises:
        ValueError: an attribute outside its range.

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
    """A `Cycle` whose phases follow the loss.

    FULL grows and PREDICT shrinks while the loss rises, the reverse while it falls. Every ``update`` needs the loss, as
    ``value=``. Lengths stay within 3 to 30 and 5 to 50 steps; a setting beyond such a bound widens it.

    Attributes:
        warmup_steps: as in `Cycle`.
        full_steps: at the start; then it follows the loss.
        predict_steps: at the start; then it follows the loss.
        correct_every: as in `Cycle`.
        loss_threshold: the relative rise of the loss that counts as worse, ``>= 0``.

    State cost:
        412 bytes.

    Raises:
        ValueError: an attribute outside its range; at ``update``, no ``value``.

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
    """The `AdaptiveCycle` of the Rust crate's legacy trainer: longer phases, larger moves, no warm-up.

    A rise of the loss makes FULL 5 steps longer, up to 50, and PREDICT 10 shorter, down to 10; a fall by 5 % makes FULL
    2 shorter, down to 5, and PREDICT 5 longer, up to 100. A bound holds in its own direction, and for every setting: a
    FULL of 60 steps that is to grow becomes 50. For fixed lengths write ``Cycle(warmup_steps=0, full_steps=10,
    predict_steps=40, correct_every=10)``.

    Attributes:
        warmup_steps: as in `Cycle`; 0 starts in FULL.
        full_steps: at the start; then it follows the loss.
        predict_steps: at the start; then it follows the loss.
        correct_every: as in `Cycle`.
        loss_threshold: as in `AdaptiveCycle`.

    State cost:
        412 bytes.

    Raises:
        ValueError: an attribute outside its range; at ``update``, no ``value``.

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
        """``[] int32`` each: the coming lengths of FULL and PREDICT, from those before and how the loss went."""
        longer, shorter = jnp.minimum(full + 5, 50), jnp.maximum(full - 2, self.shortest_full)
        fewer, more = jnp.maximum(predict - 10, 10), jnp.minimum(predict + 5, 100)
        full = jnp.where(is_worse, longer, jnp.where(is_better, shorter, full)).astype(jnp.int32)
        return full, jnp.where(is_worse, fewer, jnp.where(is_better, more, predict)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityCycle(Cycle):
    """One true step, then some predicted ones, as long as the last true steps were predicted well.

    The first two steps are true. Then each leap follows a single true step, unless ten errors are known and their mean
    is above the bound: then steps are true until the mean is below it again. Needs ``predictor=Momentum()``, which
    keeps these errors.

    Attributes:
        predict_steps: steps of a leap, ``>= 1``; 4 of 5 steps are then predicted.
        most_error: of the mean of ``||x - x̂|| / ||x||`` at the last ten true steps, ``> 0``.

    Raises:
        ValueError: an attribute outside its range; another predictor.

    Example:
        >>> import optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(
        ...     optax.adamw(1e-3), predictor=vsa_optax.Momentum(), phases=vsa_optax.QualityCycle()
        ... )

    References:
        ``GradientPredictor.should_compute_full`` of vsa-optim-rs 0.1.1, whose error is not relative.
    """

    # One step of WARMUP and one of FULL are the two that come first. Nothing is corrected in between.
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
