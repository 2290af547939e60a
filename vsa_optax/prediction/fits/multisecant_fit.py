"""A damped Newton step from the last few changes of parameters and gradients, in closed form.

Over the last W moves the parameters changed by ``s_i`` and the gradient by ``y_i``; ``g`` is the newest gradient and
``b`` the optimizer's step. Norms use the metric of a positive diagonal D, such as Adam's: ``||s||² = s'D⁻¹s`` for a
displacement and ``||g||² = g'Dg`` for a gradient, so ``y's`` needs no D. With ``s_i`` scaled to unit length:

1. Compute an eigenbasis ``u_j`` of their span from the Gram matrix ``G = S D⁻¹ S'`` with eigenvalues ``e_j``. A
   direction with a small ``e_j`` is a small difference of long moves: its curvature is the least certain.
2. Estimate the Hessian in the span, in closed form: the symmetric B that minimises
   ``sum_j ||B u_j √e_j - y_j||² + ρ ||B - κ I||²``, where ``y_j`` is projected to the ``u_j``. The two measurements of
   an element are weighted by their certainty. Unmeasured directions get κ, the curvature outside the span. Eigenvalues
   enter by their magnitude, so that a saddle is left downhill.
3. Minimise ``g's + ½ s'Hs + ½ λκ ||s - b||²`` over the leap s, with H = B inside the span and H = κ outside. Outside,
   g is the gradient that the ``y_i`` predict for the end of the leap's part inside. A large λ gives b, and a small one
   Newton's step.

Outside the span only κ is known. It is measured as the part of the gradient at the end of a leap that the span did not
predict, divided by the length of the step outside.

References:
    H. Fang and Y. Saad, "Two classes of multisecant methods for nonlinear acceleration", Numerical Linear Algebra with
    Applications 16 (2009): all secants are solved for together, as in Anderson acceleration. There, B is not symmetric,
    the step is not damped, and the step outside the span is a fixed multiple of the residual.
    K. Levenberg, "A method for the solution of certain non-linear problems in least squares", Quarterly of Applied
    Mathematics 2 (1944): the damping. There it is towards a zero step; here it is towards the optimizer's step.
    Y. Dauphin et al., "Identifying and attacking the saddle point problem", NeurIPS 2014, arXiv:1406.2572: the use of
    the eigenvalues' magnitude.

Axes: W secants.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

RIDGE = 1e-5  # ρ, relative to a secant's squared length; chosen by hand among 1e-6 to 1e-2, which differ little.
_LEAST_EIGENVALUE = 1e-6  # Relative to the largest: the precision of a Gram matrix in f32.


class Products(NamedTuple):
    """The inner products of arrays of the parameters' size; the fit needs nothing else of them.

    Attributes:
        gram: ``[W, W]``, ``s_i' D⁻¹ s_j``.
        cross: ``[W, W]``, ``s_i' y_j``.
        gradient: ``[W]``, ``s_i' g``.
        step: ``[W]``, ``s_i' D⁻¹ b``.
    """

    gram: jax.Array
    cross: jax.Array
    gradient: jax.Array
    step: jax.Array


class Leap(NamedTuple):
    """The leap, the gradient and the step within the span, as coefficients of the secants.

    Attributes:
        inside: ``[W]``, coefficients of the ``s_i``: the leap's part in the span.
        change: ``[W]``, coefficients of the ``y_i``: the change of the gradient by that part.
        gradient: ``[W]``, coefficients of the ``s_i``: the part in the span of D times the changed gradient.
        step: ``[W]``, coefficients of the ``s_i``: the part of b in the span.
        dimension: ``[] int32``, the dimension of the span.
    """

    inside: jax.Array
    change: jax.Array
    gradient: jax.Array
    step: jax.Array
    dimension: jax.Array


def solve(products: Products, curvature: jax.Array, damping: jax.Array) -> Leap:
    """Solves for the part of the leap in the span of the secants.

    Args:
        products: the inner products of secants, gradient and step.
        curvature: ``[]``, κ > 0.
        damping: ``[]``, λ >= 0, in units of κ; infinite for the optimizer's step itself.

    Returns:
        The coefficients. They are zero for secants of zero length, and all zero if any value is not finite.
    """
    squared = jnp.diagonal(products.gram)
    is_used = (squared > 0) & jnp.isfinite(squared)
    inverse = jnp.where(is_used, 1 / jnp.sqrt(jnp.where(is_used, squared, 1)), 0)
    used = jnp.where(is_used[:, None] & is_used[None], inverse[:, None] * inverse[None], 0)
    gram, cross = _product(products.gram, used), _product(products.cross, used)
    gradient, step = _product(products.gradient, inverse), _product(products.step, inverse)

    eigenvalues, vectors = _eigh(gram)
    is_known = eigenvalues > _LEAST_EIGENVALUE * jnp.maximum(eigenvalues[-1], 0.5)
    eigenvalues = jnp.where(is_known, eigenvalues, 1)
    roots = jnp.sqrt(eigenvalues)
    basis = jnp.where(is_known[None], vectors / roots[None], 0)  # Columns: the u_j as combinations of the s_i.

    hessian = _hessian(_matmul(_matmul(vectors.T, cross), vectors), eigenvalues, curvature)
    hessian = jnp.where(
        is_known[:, None] & is_known[None], hessian, curvature * jnp.eye(squared.size, dtype=hessian.dtype)
    )
    curvatures, axes = _eigh(hessian)
    own_gradient, own_step = _matmul(basis.T, gradient), _matmul(basis.T, step)

    weight = damping * curvature
    newton = (_matmul(axes.T, weight * own_step) - _matmul(axes.T, own_gradient)) / (jnp.abs(curvatures) + weight)
    own = jnp.where(jnp.isinf(damping), own_step, _matmul(axes, newton))
    own = jnp.where(is_known, own, 0)
    change = _matmul(vectors, jnp.where(is_known, own * roots / (eigenvalues + RIDGE), 0))
    changed = own_gradient + _matmul(basis.T, _matmul(cross, change))

    solved = [_matmul(basis, own), change, _matmul(basis, jnp.where(is_known, changed, 0)), _matmul(basis, own_step)]
    is_finite = jnp.all(jnp.isfinite(jnp.stack(solved)))
    inside, change, changed, own_step = (jnp.where(is_finite, x * inverse, 0) for x in solved)
    return Leap(inside, change, changed, own_step, jnp.where(is_finite, jnp.sum(is_known), 0).astype(jnp.int32))


def _hessian(cross: jax.Array, eigenvalues: jax.Array, curvature: jax.Array) -> jax.Array:
    """The Hessian B: each element is the mean of its two measurements and the prior, weighted by their certainty.

    Args:
        cross: ``[W, W]``, ``√e_i u_i' y_j``.
        eigenvalues: ``[W]``, ``e_i``.
        curvature: ``[]``, κ.
    """
    roots = jnp.sqrt(eigenvalues)
    weighted = cross * roots[None] / roots[:, None]
    prior = 2 * RIDGE * curvature * jnp.eye(eigenvalues.size, dtype=cross.dtype)
    return (weighted + weighted.T + prior) / (eigenvalues[:, None] + eigenvalues[None] + 2 * RIDGE)


def _eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The eigenvalues in ascending order, and the vectors; a GPU uses QR, which is faster for such small matrices."""

    def by_qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors, values = jax.lax.linalg.eigh(x, implementation=jax.lax.linalg.EighImplementation.QR)
        return values, vectors

    def by_default(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, vectors = jnp.linalg.eigh(x)
        return values, vectors

    return jax.lax.platform_dependent(x, cuda=by_qr, default=by_default)


def _product(x: jax.Array, inverse: jax.Array) -> jax.Array:
    """``x * inverse``; 0 where ``inverse`` is 0, whatever x is."""
    return jnp.where(inverse > 0, x * inverse, 0)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision="highest")
