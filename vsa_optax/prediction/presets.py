"""Ready-made optimizers: AdamW that skips backward passes with a strict, the default, or a loose tolerance.

All three are `vsa_optax.phase_switched` around ``optax.adamw``. They differ in the guard's tolerance and in W, the
number of changes that predictions use. State cost: 8 bytes per float32 parameter for AdamW, and ``4 * (2 * W + 2)``, or
``4 * (W + 2)`` in leaves of at least 262,144 coordinates, whose changes are kept in float16.
"""

from typing import NamedTuple

import optax

from vsa_optax.prediction.api import phase_switched
from vsa_optax.prediction.learning_rate import check_learning_rate
from vsa_optax.prediction.phases import Guarded
from vsa_optax.prediction.predictors.factory import Secants


class Preset(NamedTuple):
    """The settings that a ready-made optimizer passes to `phase_switched`.

    Attributes:
        predictor: predicts the gradients.
        phases: decides when to predict.
    """

    predictor: Secants
    phases: Guarded


# benchmarks/prediction.log compares the three. No other settings were searched there.
CONSERVATIVE = Preset(Secants(window=8), Guarded(tolerance=0.07))
BALANCED = Preset(Secants(), Guarded())
AGGRESSIVE = Preset(Secants(window=24), Guarded(tolerance=0.32, longest=40))


def conservative(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """AdamW that skips a step only if the prediction is within 7 % of the gradient's norm; needs the least memory.

    Args:
        learning_rate: a number ``>= 0``, or a schedule over all steps, including skipped ones.

    Returns:
        ``phase_switched(optax.adamw(learning_rate), predictor=Secants(window=8), phases=Guarded(tolerance=0.07))``.
        Use it with `vsa_optax.value_and_grad_by_phase`, and pass ``params`` to ``update``.

    State cost:
        80 bytes per float32 parameter: 8 for AdamW, and 18 copies of the parameters. In leaves of at least 262,144
        coordinates, 48 bytes per parameter.

    Raises:
        ValueError: if ``learning_rate`` is neither a number ``>= 0`` nor a schedule.

    Example:
        >>> import jax.numpy as jnp, vsa_optax
        >>> opt = vsa_optax.conservative(1e-3)
        >>> bool(vsa_optax.needs_backward(opt.init(jnp.zeros(3))))
        True
    """
    return _adamw(learning_rate, CONSERVATIVE)


def balanced(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """AdamW with the defaults of `phase_switched`: it skips steps predicted to within 14 % of the gradient's norm.

    Args:
        learning_rate: a number ``>= 0``, or a schedule over all steps, including skipped ones.

    Returns:
        ``phase_switched(optax.adamw(learning_rate))``. Use it with `vsa_optax.value_and_grad_by_phase`, and pass
        ``params`` to ``update``.

    State cost:
        144 bytes per float32 parameter: 8 for AdamW, and 34 copies of the parameters. In leaves of at least 262,144
        coordinates, 80 bytes per parameter.

    Raises:
        ValueError: if ``learning_rate`` is neither a number ``>= 0`` nor a schedule.

    Example:
        >>> import jax.numpy as jnp, vsa_optax
        >>> opt = vsa_optax.balanced(1e-3)
        >>> bool(vsa_optax.needs_backward(opt.init(jnp.zeros(3))))
        True
    """
    return _adamw(learning_rate, BALANCED)


def aggressive(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """AdamW that skips steps predicted to within 32 % of the gradient's norm.

    On a loss without noise it skips up to 40 steps at a time, as far as the guard allows. If the trajectory oscillates,
    the final loss may be higher than with plain AdamW.

    Args:
        learning_rate: a number ``>= 0``, or a schedule over all steps, including skipped ones.

    Returns:
        ``phase_switched(optax.adamw(learning_rate), predictor=Secants(window=24), phases=Guarded(tolerance=0.32,
        longest=40))``. Use it with `vsa_optax.value_and_grad_by_phase`, and pass ``params`` to ``update``.

    State cost:
        208 bytes per float32 parameter: 8 for AdamW, and 50 copies of the parameters. In leaves of at least 262,144
        coordinates, 112 bytes per parameter.

    Raises:
        ValueError: if ``learning_rate`` is neither a number ``>= 0`` nor a schedule.

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
