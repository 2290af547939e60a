"""A physics-informed network for Poisson's equation in the unit square, its Laplacian by one forward sweep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from noiseless_task import FullBatch, dense, num_params

BOUNDARY_WEIGHT = 100.0


def with_derivatives(params, points):
    """``[points]`` values of the network and of its Laplacian.

    Values, both first derivatives and the Laplacian go through the layers together: ``tanh(z)`` has the Laplacian
    ``tanh'(z) Δz + tanh''(z) |∇z|²``. That is four products with each kernel, where nested derivatives take more.
    """
    hidden = jnp.stack([points, *jnp.broadcast_to(jnp.eye(2)[:, None], (2, *points.shape)), jnp.zeros_like(points)])
    for layer in params[:-1]:
        z, z_x, z_y, laplacian = hidden @ layer["kernel"]
        value = jnp.tanh(z + layer["bias"])
        slope = 1 - value**2
        laplacian = slope * laplacian - 2 * value * slope * (z_x**2 + z_y**2)
        hidden = jnp.stack([value, slope * z_x, slope * z_y, laplacian])
    ends = hidden[jnp.array([0, 3])] @ params[-1]["kernel"]
    return ends[0, :, 0] + params[-1]["bias"], ends[1, :, 0]


def value(params, points):
    hidden = points
    for layer in params[:-1]:
        hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"])
    return (hidden @ params[-1]["kernel"])[:, 0] + params[-1]["bias"]


@functools.cache
def poisson(width, num_points, depth=4):
    """``Δu = -f`` with the solution ``sin(πx) sin(2πy)``, zero on the boundary."""
    rng, num_boundary = np.random.default_rng(0), num_points // 16
    inside = jnp.asarray(rng.random((num_points, 2)), jnp.float32)
    along, side = rng.random(num_boundary), np.arange(num_boundary) % 4
    edges = [[along, 0 * along], [along, 0 * along + 1], [0 * along, along], [0 * along + 1, along]]
    boundary = jnp.asarray(np.array(edges)[side, :, np.arange(num_boundary)], jnp.float32)
    source = 5 * jnp.pi**2 * jnp.sin(jnp.pi * inside[:, 0]) * jnp.sin(2 * jnp.pi * inside[:, 1])
    sizes = [2, *[width] * depth, 1]

    def init(seed):
        keys = jax.random.split(jax.random.key(seed), depth + 1)
        return [dense(key, m, n) for key, m, n in zip(keys, sizes, sizes[1:], strict=False)]

    def loss(params, data):
        del data
        _, laplacian = with_derivatives(params, inside)
        return jnp.mean((laplacian + source) ** 2) + BOUNDARY_WEIGHT * jnp.mean(value(params, boundary) ** 2)

    return FullBatch(
        f"Poisson PINN: {num_params(init):,} parameters, {num_points} points inside and {num_boundary} on the boundary",
        init=init,
        loss=loss,
        budgets=(250, 500, 1000),
        rates=(0, 2, 4, 6, 8),
        floor=1e-7,
        is_for_gpu=width > 64,
    )


CASES = {
    "Poisson PINN, small": lambda: poisson(64, 1024),
    "Poisson PINN, 4 x 256": lambda: poisson(256, 8192),
}
