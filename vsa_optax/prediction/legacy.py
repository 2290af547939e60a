"""The legacy pair: prediction by momentum, and the cycles that the Rust crate vsa-optim-rs uses with it."""

from typing import Literal, NamedTuple, get_args

from vsa_optax.core import checks
from vsa_optax.prediction.phases import Cycle, LegacyCycle, QualityCycle
from vsa_optax.prediction.predictors.factory import Momentum, Predicted

Schedule = Literal["trainer", "predictor"]


class MomentumSettings(NamedTuple):
    """The settings that `momentum_predictor` returns, for `phase_switched` or `predict_gradients`.

    Attributes:
        predictor: predicts gradients or updates.
        phases: decides when to predict: a `LegacyCycle` or a `QualityCycle`.
    """

    predictor: Momentum
    phases: Cycle


def momentum_predictor(
    schedule: Schedule = "trainer",
    *,
    momentum: float = 0.9,
    correction_weight: float = 0.5,
    predicts: Predicted = "gradient",
) -> MomentumSettings:
    """Momentum and its cycle from the legacy half of vsa-optim-rs 0.1.1, for comparison rather than for training.

    On both tasks that were tried, both cycles end at a higher loss than plain Adam with as many backward passes
    (benchmarks/momentum.log). With the guard, ``phase_switched(opt, predictor=Momentum())``, the loss was no worse.

    Args:
        schedule: ``"trainer"`` is `vsa_optax.LegacyCycle`: 10 true steps, then 40 predicted ones, of which each tenth
            is corrected. The lengths follow the loss, so every ``update`` needs ``value=``. ``"predictor"`` is
            `vsa_optax.QualityCycle`: one true step in five, while predictions are good enough.
        momentum: μ in ``x_last + μ (x_last - x_before)``, ``>= 0``. 0 repeats the newest record.
        correction_weight: ω in ``x + ω (x - x̂)``, ``>= 0``. It corrects the true step that ends a leap; 0 corrects
            nothing.
        predicts: ``"update"`` records the updates of the wrapped optimizer, which does not run in PREDICT;
            ``"gradient"`` records gradients, and the optimizer runs at every step.

    Returns:
        A NamedTuple of ``predictor`` and ``phases``. For other lengths, construct both settings yourself.

    State cost:
        twice the parameters, and less than 700 bytes of scalars.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> import optax, vsa_optax
        >>> pair = vsa_optax.momentum_predictor("predictor")
        >>> pair.phases
        QualityCycle(predict_steps=4, most_error=0.5)
        >>> opt = vsa_optax.phase_switched(optax.adamw(1e-3), **pair._asdict())
    """
    checks.check_choice("schedule", schedule, get_args(Schedule))
    predictor = Momentum(momentum=momentum, correction_weight=correction_weight, predicts=predicts)
    return MomentumSettings(predictor, LegacyCycle() if schedule == "trainer" else QualityCycle())
