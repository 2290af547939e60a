"""Ready-made optimizers: AdamW that skips backward passes, with more or less trust in what it predicts.

All three are `vsa_optax.phase_switched` around ``optax.adamw``, and differ in how large an error the guard bears and in
how many changes predictions are made of. State cost: AdamW's 8 bytes a parameter, and 4 times ``2 W + 2``.
"""

from typing import NamedTuple

import optax

from vsa_optax.prediction.api import phase_switched
from vsa_optax.prediction.learning_rate import check_learning_rate
from vsa_optax.prediction.phases import Guarded
from vsa_optax.prediction.predictors.factory import Secants


class Preset(NamedTuple):
    """What a ready-made optimizer gives to `phase_switched`.

    Attributes:
        predictor: what predicts.
        phases: when.
    """

    predictor: Secants
    phases: Guarded


# benchmarks/prediction.log has all three beside each other; other settings were not searched there.
CONSERVATIVE = Preset(Secants(window=8), Guarded(tolerance=0.07))
BALANCED = Preset(Secants(), Guarded())
AGGRESSIVE = Preset(Secants(window=24), Guarded(tolerance=0.32, longest=40))


def conservative(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """AdamW that skips a step only where it is all but certain; half of the memory of `balanced`.

    Args:
        learning_rate: a number, or a schedule over all steps, skipped ones included.

    Returns:
        ``phase_switched(optax.adamw(learning_rate), predictor=Secants(window=8), phases=Guarded(tolerance=0.07))``: use
        it with `vsa_optax.value_and_grad_by_phase`, and give ``params`` to ``update``.

    State cost:
        80 bytes a float32 parameter: AdamW's 8, and 18 copies of the parameters.

    Raises:
        ValueError: a ``learning_rate`` that is neither a number ``>= 0`` nor a schedule.

    Example:
        >>> import jax.numpy as jnp, vsa_optax
        >>> opt = vsa_optax.conservative(1e-3)
        >>> bool(vsa_optax.needs_backward(opt.init(jnp.zeros(3))))
        True
    """
    return _adamw(learning_rate, CONSERVATIVE)


def balanced(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """AdamW with the defaults of `phase_switched`: it skips what it predicts to within 14 % of the gradient's norm.

    Args:
        learning_rate: a number, or a schedule over all steps, skipped ones included.

    Returns:
        ``phase_switched(optax.adamw(learning_rate))``.

    State cost:
        144 bytes a float32 parameter: AdamW's 8, and 34 copies of the parameters.

    Raises:
        ValueError: a ``learning_rate`` that is neither a number ``>= 0`` nor a schedule.

    Example:
        >>> import jax.numpy as jnp, vsa_optax
        >>> opt = vsa_optax.balanced(1e-3)
        >>> bool(vsa_optax.needs_backward(opt.init(jnp.zeros(3))))
        True
    """
    return _adamw(learning_rate, BALANCED)


def aggressive(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """AdamW that skips what it predicts to within 32 % of the gradient's norm.

    Up to 40 steps are skipped at a time, where a loss has no noise and the guard lets it. The loss may end above plain
    AdamW's, where the way oscillates.

    Args:
        learning_rate: a number, or a schedule over all steps, skipped ones included.

    Returns:
        ``phase_switched(optax.adamw(learning_rate), predictor=Secants(window=24), phases=Guarded(tolerance=0.32,
        longest=40))``.

    State cost:
        208 bytes a float32 parameter: AdamW's 8, and 50 copies of the parameters.

    Raises:
        ValueError: a ``learning_rate`` that is neither a number ``>= 0`` nor a schedule.

    Example:
        >>> import jax.numpy as jnp, vsa_optax
        >>> opt = vsa_optax.aggressive(1e-3)
        >>> bool(vsa_optax.needs_backward(opt.init(jnp.zeros(3))))
        True
    """
    return _adamw(learning_rate, AGGRESSIVE)


def _adamw(learning_rate: optax.ScalarOrSchedule, preset: Preset) -> optax.GradientTransformationExtraArgs:
    if learning_rate is None:
        raise ValueError("learning_rate must be a number >= 0 or a schedule, got None")
    check_learning_rate(learning_rate)
    return phase_switched(optax.adamw(learning_rate), predictor=preset.predictor, phases=preset.phases)
