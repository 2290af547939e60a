"""Compares a Johnson-Lindenstrauss random projection with a `HypervectorCodec` of the same size.

Run `python benchmarks/projection.py | tee benchmarks/projection.log`; it takes a minute on two cores.

A vector of N numbers is kept as D numbers, and estimated from them in four ways:

- the codec;
- a dense Gaussian matrix and its transpose, with the factor of least error;
- the same matrix with least squares;
- the pipeline of the Rust crate vsa-optim-rs, which projects, makes ternary, binds and bundles with its own two bits
  per dimension.

Then the script measures how well lengths and inner products survive without shrinkage, which is the subject of the
lemma.
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from codec_rivals import gaussian_sketch, vsa_optim_rs
from codec_tasks import print_header, print_row

from vsa_optax import HypervectorCodec, demo

RATIOS = (0.05, 0.1, 0.25, 0.5, 1.0)
SEEDS = 10
WIDTHS = [30, 18, 18, 18, 18]


def vectors():
    """Vectors of one length: noise, a real gradient, few large numbers, and two equal numbers that share a place."""
    params, logits = demo.make_network(0, hidden=(48,))
    images, labels = demo.load_digits()[0]

    def loss(params):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels))

    gradient = np.asarray(jax.flatten_util.ravel_pytree(jax.grad(loss)(params))[0])
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(gradient.size).astype(np.float32)
    few = noise * (rng.random(gradient.size) < 0.01)
    return {"Gaussian noise": noise, "a gradient of the digits": gradient, "1 % of it not zero": few}


def transposed(x, ratio, rng):
    """The best multiple of ``A.T A x`` for Gaussian entries of variance 1 / D."""
    num = math.ceil(ratio * x.size)
    matrix = rng.standard_normal((num, x.size), np.float32) / np.float32(math.sqrt(num))
    return matrix.T @ (matrix @ x) * (num / (x.size + num + 1))


def by_codec(x, ratio, seed):
    codec = HypervectorCodec(ratio, seed=seed)
    return np.asarray(codec.decode(codec.encode(jnp.asarray(x))))


def by_crate(x, ratio, rng):
    """Its scale is not meant to keep lengths: with the best one."""
    (decoded,), _ = vsa_optim_rs([x], math.ceil(ratio * x.size), rng)
    return decoded * (decoded @ x / max(decoded @ decoded, 1e-30))


def error(x, estimate):
    return float(np.sum((x - estimate) ** 2) / np.sum(x**2))


def mean_and_error(values):
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.4f}"


def print_errors(name, x):
    print(f"\n{name}, N = {x.size}: ||x - estimate||^2 / ||x||^2")
    print_row(WIDTHS, ["D / N; 1 - D / N", "codec", "dense, transposed", "dense, least squares", "vsa-optim-rs"])
    for ratio in RATIOS:
        rngs = [np.random.default_rng(seed) for seed in range(SEEDS)]
        found = [
            [error(x, by_codec(x, ratio, seed)) for seed in range(SEEDS)],
            [error(x, transposed(x, ratio, rng)) for rng in rngs],
            # A square system of noise loses all digits.
            [error(x, gaussian_sketch(x, ratio, rng)) for rng in rngs[:3]] if ratio < 1 else None,
            [error(x, by_crate(x, ratio, rng)) for rng in rngs[:3]],
        ]
        cells = ["" if values is None else mean_and_error(values) for values in found]
        print_row(WIDTHS, [f"{ratio:g}; {1 - ratio:.4f}", *cells])


def print_lengths(cases):
    num = 400
    print(f"\nLengths and inner products behind a sketch of D = 0.1 N, n = {num} seeds, as shares of the true ones:")
    print("mean and standard deviation of ||S x||^2 / ||x||^2, and of (<S x, S y> - <x, y>) / (||x|| ||y||)")
    print_row([30, 22, 22, 22, 22], ["", "codec, length", "dense, length", "codec, product", "dense, product"])
    for name, (x, y) in cases.items():
        size = math.ceil(0.1 * x.size)

        def codec(seed, x=x, y=y):
            codec = HypervectorCodec(0.1)
            # Another step is another key.
            return codec.encode(x, seed).bundle, codec.encode(y, seed).bundle

        def dense(seed, x=x, y=y, size=size):
            matrix = jax.random.normal(jax.random.key(seed), (size, x.size)) / math.sqrt(size)
            return matrix @ x, matrix @ y

        cells = [[], []]
        for sketch in (codec, dense):

            def measured(seed, sketch=sketch, x=x, y=y):
                a, b = sketch(seed)
                norms = jnp.linalg.norm(x) * jnp.linalg.norm(y)
                return jnp.sum(a**2) / jnp.sum(x**2), (jnp.vdot(a, b) - jnp.vdot(x, y)) / norms

            pairs = jax.jit(lambda seeds, measured=measured: jax.lax.map(measured, seeds))(jnp.arange(num))
            for column, values in zip(cells, pairs, strict=True):
                column.append(f"{np.mean(values):.4f}, {np.std(values, ddof=1):.4f}")
        print_row([30, 22, 22, 22, 22], [name, *cells[0], *cells[1]])


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began = time.perf_counter()
    print_header(
        "Errors of linear sketches of equal size",
        f"mean ± standard error; n = {SEEDS} seeds, 3 of the last two columns",
    )
    found = vectors()
    for name, x in found.items():
        print_errors(name, x)
    x = found["Gaussian noise"]
    other = np.random.default_rng(1).standard_normal(x.size).astype(np.float32)
    size = math.ceil(0.1 * x.size)
    meeting = np.zeros_like(x)
    meeting[[5, 5 + size]] = 1
    gradient = found["a gradient of the digits"]
    print_lengths(
        {
            "Gaussian noise": (x, other),
            "a gradient, and noise": (gradient, other),
            "two that meet, and noise": (meeting, other),
        }
    )
    rows = math.ceil(0.1 * x.size)
    print(f"\nA dense matrix for D = 0.1 N here: {4 * rows * x.size / 2**20:.1f} MiB; the codec keeps none")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
