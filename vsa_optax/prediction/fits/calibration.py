"""Calibrates the coefficients of a prediction's features by least squares on past errors, one small system per leaf.

A prediction of ``y`` has K features ``f_k``: the records' weighted mean, the line's change from there to the predicted
step, and the newest record. At each true ``y``, before it is recorded, every leaf updates

    A <- φ A + <f_i, f_j> / <y, y>,    c <- φ c + <f_i, y> / <y, y>

so that each measurement has the same weight, whatever its size. The best coefficients in hindsight are

    θ = (D^-1/2 A D^-1/2 + ε)^-1 (D^-1/2 c + ε D^1/2 θ_0) D^-1/2,    D = diag(A),

with a ridge ε towards θ_0 in units in which every feature has length one. The products with y are unbiased under
mini-batch noise, so θ measures the correlation of the features with the expected gradient. On a clean line θ is (1, 1);
in noise around a constant, the slope's coefficient vanishes. θ is not bounded: on oscillating trajectories, only the
difference of the newest record and the line predicts well.

Axes: L leaves, K features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Chosen by hand; benchmarks/constants.log has each of the three moved.
FORGET = 0.95  # The decay of the sums per measurement: an average over about twenty.
RIDGE = 1e-4  # In units in which every feature has length one.
# A feature whose squared length is below this fraction of the first feature's is ignored: f32 products lose it.
FLOOR = 1e-6


class Sums(NamedTuple):
    """Exponentially forgotten sums over the measurements, relative to each target's squared norm.

    Attributes:
        gram: ``[L, K, K] float32``, A.
        products: ``[L, K] float32``, c.
        error: ``[L] float32``, the sum of ``||y - ŷ||² / ||y||²``, each ŷ with the coefficients before its measurement.
        weight: ``[L] float32``, the sum of ones.
    """

    gram: jax.Array
    products: jax.Array
    error: jax.Array
    weight: jax.Array


def zeros(num_leaves: int, num_features: int) -> Sums:
    """The sums before any measurement."""
    return Sums(
        jnp.zeros([num_leaves, num_features, num_features], jnp.float32),
        jnp.zeros([num_leaves, num_features], jnp.float32),
        jnp.zeros([num_leaves], jnp.float32),
        jnp.zeros([num_leaves], jnp.float32),
    )


def coefficients(sums: Sums) -> jax.Array:
    """The coefficients θ, ``[L, K]``. Before any measurement they are θ_0, which uses the mean alone."""
    num_features = sums.products.shape[-1]
    squared_lengths = jnp.diagonal(sums.gram, axis1=-2, axis2=-1)
    scale = jnp.sqrt(jnp.maximum(squared_lengths, 0) + FLOOR * jnp.maximum(squared_lengths[:, :1], 0))
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    unit = jnp.eye(num_features, dtype=jnp.float32)
    # The equation of a feature that was always zero is separate, and its solution is θ_0.
    matrix = sums.gram * inverse[:, :, None] * inverse[:, None, :] * (1 - unit)[None] + (1 + RIDGE) * unit[None]
    prior = jnp.zeros([num_features], jnp.float32).at[0].set(1)
    right = sums.products * inverse + RIDGE * scale * prior[None]
    solved = solve(matrix, right) * inverse
    is_measured = (sums.weight > 0)[:, None] & (scale[:, :1] > 0) & jnp.all(jnp.isfinite(solved), -1, keepdims=True)
    return jnp.where(is_measured, solved, prior[None])


def measure(
    sums: Sums,
    theta: jax.Array,
    gram: jax.Array,
    products: jax.Array,
    squared_norms: jax.Array,
    forget: float,
) -> tuple[Sums, jax.Array]:
    """Adds one measurement to the sums, and computes its error in each leaf.

    Args:
        sums: the sums before the measurement.
        theta: ``[L, K]``, the coefficients of the prediction.
        gram: ``[L, K, K]``, ``<f_i, f_j>``.
        products: ``[L, K]``, ``<f_i, y>``.
        squared_norms: ``[L]``, ``<y, y>``.
        forget: φ, in (0, 1].

    Returns:
        The new sums, and the squared errors ``||y - ŷ||²``, ``[L]``. The sums of a leaf do not change if its target is
        zero or its products exceed f32's range.
    """
    quadratic = jnp.einsum("li,lij,lj->l", theta, gram, theta, precision="highest")
    squared = squared_norms - 2 * jnp.sum(theta * products, -1) + quadratic
    squared = jnp.maximum(squared, 0)
    inverse = 1 / jnp.where(squared_norms > 0, squared_norms, 1)
    new = Sums(
        forget * sums.gram + gram * inverse[:, None, None],
        forget * sums.products + products * inverse[:, None],
        forget * sums.error + squared * inverse,
        forget * sums.weight + 1,
    )
    is_usable = (squared_norms > 0) & (inverse > 0)
    for part in new:
        is_usable &= jnp.all(jnp.isfinite(part.reshape(part.shape[0], -1)), -1)
    kept = [jnp.where(is_usable.reshape(-1, *[1] * (n.ndim - 1)), n, o) for n, o in zip(new, sums, strict=True)]
    return Sums(*kept), squared


def r_squared(error: jax.Array, weight: jax.Array) -> jax.Array:
    """``[L]``: ``1 - mean of ||y - ŷ||² / ||y||²`` from the sum of errors and the sum of their weights.

    It is 0, as for predicting zero, before any measurement.
    """
    return jnp.where(weight > 0, 1 - error / jnp.where(weight > 0, weight, 1), 0)


def solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """Solves positive definite systems ``[L, K]`` by elimination without pivoting, in a few fused scalars.

    ``jnp.linalg.solve`` and Cholesky's method are equally accurate. They take two to four times as long on a GPU, and
    up to four times on a CPU (benchmarks/small_solves_gpu.log, small_solves.log).
    """
    num = right.shape[-1]
    rows = [[matrix[:, i, j] for j in range(num)] + [right[:, i]] for i in range(num)]
    for i in range(num):
        for j in range(i + 1, num):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    solved: list[jax.Array] = [right[:, 0]] * num
    for i in reversed(range(num)):
        rest = rows[i][num]
        for j in range(i + 1, num):
            rest = rest - rows[i][j] * solved[j]
        solved[i] = rest / rows[i][i]
    return jnp.stack(solved, -1)
