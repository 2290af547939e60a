"""The calibration's K × K systems, one per leaf: unrolled elimination compared with library solvers.

Run `python benchmarks/small_solves.py | tee benchmarks/small_solves.log`. Calls are in flight; the host does not wait
for each. Each call receives the result of the last one, so that XLA cannot remove any.
"""

import argparse
import time

import codec_tasks
import jax
import jax.numpy as jnp
import numpy as np

from vsa_optax.prediction.fits import calibration

CALLS, ROUNDS = 200, 7


def by_cholesky(matrix, right):
    factor = jnp.linalg.cholesky(matrix)
    half = jax.scipy.linalg.solve_triangular(factor, right[..., None], lower=True)
    return jax.scipy.linalg.solve_triangular(factor, half, lower=True, trans=1)[..., 0]


SOLVERS = {
    "elimination, written out": calibration.solve,
    "jnp.linalg.solve": lambda matrix, right: jnp.linalg.solve(matrix, right[..., None])[..., 0],
    "Cholesky": by_cholesky,
}


def systems(num_leaves, num_features):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(num_leaves, 4 * num_features, num_features))
    gram = np.einsum("lki,lkj->lij", rows, rows) / (4 * num_features)
    return jnp.asarray(gram + 0.1 * np.eye(num_features), jnp.float32), jnp.ones([num_leaves, num_features])


def microseconds(step, matrix, right):
    """Of a call, the median round."""
    taken = []
    for _ in range(ROUNDS):
        x = jax.block_until_ready(step(matrix, right))
        began = time.perf_counter()
        for _ in range(CALLS):
            x = step(matrix, x)
        jax.block_until_ready(x)
        taken.append((time.perf_counter() - began) / CALLS * 1e6)
    return np.median(taken), min(taken), max(taken)


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    codec_tasks.print_header(
        "Positive definite systems of K = 3, one a leaf: microseconds a call, and the residual's largest entry",
        f"n = {ROUNDS} rounds of {CALLS} calls: median [smallest, largest]",
    )
    widths = [28, *[30] * 3]
    sizes = (4, 12, 148)
    codec_tasks.print_row(widths, ["solver", *(f"{size} leaves" for size in sizes)])
    for name, solve in SOLVERS.items():
        cells = []
        for size in sizes:
            matrix, right = systems(size, 3)
            # Scaled, so that what is solved again and again stays of one size.
            step = jax.jit(lambda a, b, solve=solve: solve(a, b) / jnp.linalg.norm(b, axis=-1, keepdims=True))
            median, low, high = microseconds(step, matrix, right)
            wrong = jnp.max(jnp.abs(jnp.einsum("lij,lj->li", matrix, jax.jit(solve)(matrix, right)) - right))
            cells.append(f"{median:.1f} [{low:.1f}, {high:.1f}] {wrong:.0e}")
        codec_tasks.print_row(widths, [name, *cells])


if __name__ == "__main__":
    main()
