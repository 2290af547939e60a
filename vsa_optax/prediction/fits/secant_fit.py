"""The gradient as a linear function of the parameters: least squares through their last few changes, in closed form.

Over the last W records the parameters changed by ``s_i`` and the gradient by ``y_i``. A step ``d`` away from the newest
record, with gradient ``g``,

    c = argmin ||d - sum_i c_i s_i||² + ε sum_i (c_i ||s_i||)²,        ĝ = g + sum_i c_i y_i,

which with a small ridge ε is exact on a quadratic loss wherever ``d`` lies among the ``s_i``: there ``y_i = H s_i`` for
its Hessian H, whatever steps the optimizer takes, oscillations included. What lies beside them adds nothing to the
gradient, and no Hessian is formed: the normal equations need the products of the ``s_i`` with each other, W² numbers
that grow by a row a record, and with ``d``.

Where the parameters drift one way, the ``s_i`` are all but parallel, and the solution weighs small differences of the
``y_i`` by large numbers of both signs. How much to trust them is measured: each true gradient is compared with the
predictions of all ridges, without forming them, from the products of the ``y_i`` with each other and with the newest
change, and the ridge of the least average error predicts. The last of them is infinite: the newest gradient as it is.

Axes: W records, L leaves, R ridges.

References:
    H. Fang and Y. Saad, "Two classes of multisecant methods for nonlinear acceleration", Numerical Linear Algebra with
    Applications 16 (2009): the multisecant condition ``H S = Y``. There it gives a quasi-Newton step; here it predicts
    what the optimizer is fed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The smallest lies above the rounding of products in f32, which know the square of an angle to about 1e-6; steps of ten
# are chosen by hand, as are the next two (benchmarks/constants.log has them moved).
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))
FORGET = 0.9  # Of the scores, a measurement: an average over about ten.
_MOST_ERROR = 4.0  # Of one measurement in an average: a single step must not decide for long.


class Scores(NamedTuple):
    """What the predictions were worth, out of sample, as forgetful averages of ``||g - ĝ||² / ||g||²``.

    Attributes:
        of_ridges: ``[R] float32``, over the whole tree.
        of_leaves: ``[L] float32``, of the ridge that predicted.
        weight: ``[] float32``, of the averages: 0 before the first measurement, towards 1 later.
    """

    of_ridges: jax.Array
    of_leaves: jax.Array
    weight: jax.Array


def no_scores(num_leaves: int) -> Scores:
    """Nothing measured."""
    return Scores(
        jnp.zeros([len(RIDGES)], jnp.float32), jnp.zeros([num_leaves], jnp.float32), jnp.zeros([], jnp.float32)
    )


def coefficients(gram: jax.Array, products: jax.Array) -> jax.Array:
    """``[R, W] float32``: c for each ridge; zeros where they would not be finite, and for changes of no length.

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
    right = jnp.broadcast_to(jnp.where(is_used, products * inverse, 0)[None, :, None], (ridges.size, lengths.size, 1))
    solved = jnp.linalg.solve(cosines[None] + (1 + ridges) * unit[None], right)[..., 0] * inverse[None]
    finite = jnp.where(jnp.all(jnp.isfinite(solved), -1, keepdims=True), solved, 0)
    return jnp.concatenate([finite, jnp.zeros([1, lengths.size], jnp.float32)])


def best(scores: Scores) -> jax.Array:
    """``[] int32``: the ridge of the least error, the smallest before any is measured."""
    return jnp.argmin(scores.of_ridges)


def errors(coefficients: jax.Array, gram: jax.Array, products: jax.Array, squared_norms: jax.Array) -> jax.Array:
    """``[R, L]``: ``||y - sum_i c_i y_i||²``, what is missed of the newest change ``y``.

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
    """The averages with one more measurement.

    Args:
        scores: those of before, by which the ridge was chosen.
        squared: ``[R, L]``, errors.
        squared_norms: ``[L]``, of what was predicted.
        forget: of the averages, in (0, 1].
    """

    def relative(error: jax.Array, whole: jax.Array) -> jax.Array:
        # Where there is nothing to predict, predicting is worth what predicting zero is.
        ratio = jnp.where(whole > 0, error / jnp.where(whole > 0, whole, 1), 1.0)
        return jnp.where(ratio < _MOST_ERROR, ratio, _MOST_ERROR)

    def moved(average: jax.Array, new: jax.Array) -> jax.Array:
        return forget * average + (1 - forget) * new

    return Scores(
        moved(scores.of_ridges, relative(jnp.sum(squared, 1), jnp.sum(squared_norms))),
        moved(scores.of_leaves, relative(squared[best(scores)], squared_norms)),
        moved(scores.weight, jnp.ones([], jnp.float32)),
    )
