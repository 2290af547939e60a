"""The gradient as a linear function of the parameters: least squares through their last few changes, in closed form.

Over the last W records the parameters changed by ``s_i`` and the gradient by ``y_i``. A step ``d`` away from the newest
record, with gradient ``g``,

    c = argmin ||d - sum_i c_i s_i||² + ε sum_i (c_i ||s_i||)²,        ĝ = g + sum_i c_i y_i,

With a small ridge ε, this is exact on a quadratic loss for any ``d`` in the span of the ``s_i``: there ``y_i = H s_i``
for the Hessian H, whatever steps the optimizer takes, oscillations included. The part of ``d`` outside the span does
not change the prediction. No Hessian is formed: the normal equations need the inner products of the ``s_i`` with ``d``
and with each other, W² numbers to which each record adds a row.

If the parameters drift in one direction, the ``s_i`` are almost parallel, and the solution multiplies small differences
of the ``y_i`` by large numbers of both signs. Their error is measured: each true gradient is compared with the
predictions of all ridges. This needs only the inner products of the ``y_i`` with each other and with the newest change.
The ridge with the smallest average error makes the prediction. The last ridge is infinite: it predicts the newest
gradient.

Axes: W records, L leaves, R ridges.

References:
    H. Fang and Y. Saad, "Two classes of multisecant methods for nonlinear acceleration", Numerical Linear Algebra with
    Applications 16 (2009): the multisecant condition ``H S = Y``. There it gives a quasi-Newton step; here it predicts
    the gradient that the optimizer receives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vsa_optax.kernels import small_systems

# The smallest ridge is above the rounding of f32 products, which resolve the square of an angle to about 1e-6. Factors
# of ten are chosen by hand, as are the next two constants (benchmarks/constants.log varies them).
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))
FORGET = 0.9  # The decay of the scores per measurement: an average over about ten.
_MOST_ERROR = 4.0  # The largest error of one measurement in an average: a single step must not decide for long.


class Scores(NamedTuple):
    """Out-of-sample errors of the predictions, as exponential moving averages of ``||g - ĝ||² / ||g||²``.

    Attributes:
        of_ridges: ``[R] float32``, the error of each ridge over the whole tree.
        of_leaves: ``[L] float32``, the error of each leaf with the ridge that predicted.
        weight: ``[] float32``, the weight of the averages: 0 before the first measurement, and 1 in the limit.
    """

    of_ridges: jax.Array
    of_leaves: jax.Array
    weight: jax.Array


def no_scores(num_leaves: int) -> Scores:
    """The scores before any measurement."""
    return Scores(
        jnp.zeros([len(RIDGES)], jnp.float32), jnp.zeros([num_leaves], jnp.float32), jnp.zeros([], jnp.float32)
    )


def coefficients(gram: jax.Array, products: jax.Array) -> jax.Array:
    """``[R, W] float32``: c for each ridge; zeros if they would not be finite, and for changes of zero length.

    Args:
        gram: ``[W, W] float32``, ``<s_i, s_j>``.
        products: ``[W] float32``, ``<s_i, d>``.
    """
    lengths = jnp.sqrt(jnp.diagonal(gram))
    is_used = (lengths > 0) & jnp.isfinite(lengths)
    inverse = jnp.where(is_used, 1 / jnp.where(is_used, lengths, 1), 0)
    unit = jnp.eye(lengths.size, dtype=jnp.float32)
    cosines = jnp.where(is_used[:, None] & is_used[None], gram * inverse[:, None] * inverse[None], 0) * (1 - unit)
    ridges = jnp.asarray(RIDGES[:-1], jnp.float32)[:, None, None]
    right = jnp.broadcast_to(jnp.where(is_used, products * inverse, 0), (ridges.size, lengths.size))
    solved = small_systems.solve(cosines[None] + (1 + ridges) * unit[None], right) * inverse[None]
    finite = jnp.where(jnp.all(jnp.isfinite(solved), -1, keepdims=True), solved, 0)
    return jnp.concatenate([finite, jnp.zeros([1, lengths.size], jnp.float32)])


def best(scores: Scores) -> jax.Array:
    """``[] int32``: the index of the ridge with the smallest error; the smallest ridge before any measurement."""
    return jnp.argmin(scores.of_ridges)


def errors(coefficients: jax.Array, gram: jax.Array, products: jax.Array, squared_norms: jax.Array) -> jax.Array:
    """``[R, L]``: ``||y - sum_i c_i y_i||²``, the squared error in the newest change ``y``.

    Args:
        coefficients: ``[R, W]``.
        gram: ``[L, W, W]``, ``<y_i, y_j>``.
        products: ``[L, W]``, ``<y_i, y>``.
        squared_norms: ``[L]``, ``<y, y>``.
    """
    linear = jnp.einsum("rw,lw->rl", coefficients, products, precision="highest")
    quadratic = jnp.einsum("rv,lvw,rw->rl", coefficients, gram, coefficients, precision="highest")
    return jnp.maximum(squared_norms[None] - 2 * linear + quadratic, 0)


def scored(scores: Scores, squared: jax.Array, squared_norms: jax.Array, forget: float) -> Scores:
    """Adds one measurement to the averages.

    Args:
        scores: the scores before the measurement, which chose the ridge.
        squared: ``[R, L]``, the squared errors.
        squared_norms: ``[L]``, the squared norms of the predicted gradient's leaves.
        forget: the decay of the averages, in (0, 1].
    """

    def relative(error: jax.Array, whole: jax.Array) -> jax.Array:
        # For a zero target, the error counts as that of predicting zero.
        ratio = jnp.where(whole > 0, error / jnp.where(whole > 0, whole, 1), 1.0)
        return jnp.where(ratio < _MOST_ERROR, ratio, _MOST_ERROR)

    def moved(average: jax.Array, new: jax.Array) -> jax.Array:
        return forget * average + (1 - forget) * new

    return Scores(
        moved(scores.of_ridges, relative(jnp.sum(squared, 1), jnp.sum(squared_norms))),
        moved(scores.of_leaves, relative(squared[best(scores)], squared_norms)),
        moved(scores.weight, jnp.ones([], jnp.float32)),
    )
