"""Straight lines through gradients: weighted least squares in closed form.

The line ``b + v * (t - t_last)`` is fitted to records ``g_i`` at ages ``t_i - t_last <= 0`` with weights ``w_i``, and
evaluated at a later step. Both coefficients are linear in the records. So a prediction is a sum of records weighted by
a few scalars, and no model is stored.

The normal equations are solved by Cramer's rule in coordinates centred on the weighted mean time ``m``,

    v = sum w (t - m) g / S,    b = sum w g / sum w - v * m,    S = sum w (t - m)^2,

which is the same solution as in raw time, without the difference of two large numbers in the determinant. If ``S`` is
zero (fewer than two distinct steps), the newest record is the prediction.

Axes: W records in the window; ``*shape`` of one leaf.
"""

import jax
import jax.numpy as jnp


def line_weights(ages: jax.Array, weights: jax.Array, newest: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes ``m``, ``v`` and a mean age for which ``sum_i (m_i + (h - age) v_i) g_i`` is the line h steps ahead.

    Args:
        ages: ``[W]`` float, steps from the newest record, ``<= 0``.
        weights: ``[W]`` float, ``>= 0``; 0 leaves a record out.
        newest: ``[]`` int, the index of the newest record.

    Returns:
        ``m``, ``[W]`` float, whose sum over the records is their weighted mean; ``v``, ``[W]``, whose sum is the line's
        slope; and the weighted mean of the ages, ``[]``. All are zero if all weights are.
    """
    total = jnp.sum(weights)
    share = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)
    mean = jnp.sum(share * ages)
    spread = jnp.sum(share * (ages - mean) ** 2)
    has_slope = spread > 0
    slope = jnp.where(has_slope, share * (ages - mean) / jnp.where(has_slope, spread, 1.0), 0.0)
    alone = (jnp.arange(ages.size, dtype=newest.dtype) == newest) & (weights > 0)
    return jnp.where(has_slope, share, alone.astype(share.dtype)), slope, mean


def forget_and_add(
    weight: jax.Array,
    lag: jax.Array,
    spread: jax.Array,
    elapsed: jax.Array,
    decay: float,
    *,
    mean_first: bool,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """Adds one record, with all earlier weights multiplied by ``decay``: the new moments, and the gains of the line.

    The line is kept as the records' weighted mean ``m`` and its slope ``v``; its value is ``m + v * (t - mean time)``.
    A record ``x`` moves them, exactly, by

        v <- keep * v + velocity_gain * (x - m),    m <- m + mean_gain * (x - m).

    With ``mean_first``, the velocity's gain applies to the distance that remains after the mean has moved. Both are
    equal in exact arithmetic; in f32 the velocity loses a factor of about ``1 / decay`` in precision.

    Args:
        weight: ``[]`` float, ``sum w``.
        lag: ``[]`` float, the newest record's step minus the weighted mean step, ``>= 0``.
        spread: ``[]`` float, ``sum w (t - mean)^2``.
        elapsed: ``[]`` float, steps from the newest record to the one added.
        decay: forgetting factor in (0, 1].
        mean_first: whether ``m`` in the first equation is the new mean.

    Returns:
        ``(weight, lag, spread)`` with respect to the added record, and ``(mean_gain, keep, velocity_gain)``. If the
        spread is zero, the gains are ``(1, 0, 0)``, which makes the record itself the line.
    """
    kept = decay * weight
    new_weight = kept + 1.0
    distance = lag + elapsed
    new_lag = distance * (kept / new_weight)
    kept_spread = decay * spread
    new_spread = kept_spread + new_lag * distance
    has_slope = new_spread > 0
    safe = jnp.where(has_slope, new_spread, 1.0)
    gains = (
        jnp.where(has_slope, 1.0 / new_weight, 1.0),
        jnp.where(has_slope, kept_spread / safe, 0.0),
        jnp.where(has_slope, (distance if mean_first else new_lag) / safe, 0.0),
    )
    return (new_weight, new_lag, new_spread), gains
