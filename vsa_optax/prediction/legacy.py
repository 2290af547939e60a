"""The legacy pair: prediction by momentum, and the rhythm that the Rust crate vsa-optim-rs has for it."""

from typing import Literal, NamedTuple, get_args

from vsa_optax.core import checks
from vsa_optax.prediction.phases import Cycle, LegacyCycle, QualityCycle
from vsa_optax.prediction.predictors.factory import Momentum, Predicted

Schedule = Literal["trainer", "predictor"]


class MomentumSettings(NamedTuple):
    """What `momentum_predictor` gives to `phase_switched` or `predict_gradients`.

    Attributes:
        predictor: what predicts.
        phases: when: `LegacyCycle` or `QualityCycle`.
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
    """Momentum and its rhythm, as the legacy half of vsa-optim-rs 0.1.1 has them: to compare with, not to train with.

    Both rhythms end at a higher loss than plain Adam does with as many backward passes, on both tasks that were tried
    (benchmarks/momentum.log). Under the guard, ``phase_switched(opt, predictor=Momentum())``, it did no harm there.

    Args:
        schedule: ``"trainer"`` is `vsa_optax.LegacyCycle`: 10 true steps, then 40 of which each tenth is corrected;
            lengths follow the loss, so that every ``update`` needs ``value=``. ``"predictor"`` is
            `vsa_optax.QualityCycle`: one true step in five, as long as predictions are good enough.
        momentum: as in `vsa_optax.Momentum`.
        correction_weight: as in `vsa_optax.Momentum`.
        predicts: as in `vsa_optax.Momentum`.

    Returns:
        A NamedTuple of ``predictor`` and ``phases``. For other lengths write both settings yourself.

    State cost:
        twice the parameters, and less than 700 bytes of scalars.

    Raises:
        ValueError: an argument outside its range.

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
