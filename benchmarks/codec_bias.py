"""The bias of the unbiased TritCodec on sparse blocks, whose rotations are furthest from Gaussian.

Run `python benchmarks/codec_bias.py | tee benchmarks/codec_bias.log`; it takes a minute or two on two cores.

The mean of `decode(encode(x, step))` over steps is compared with x at each coordinate. Without bias, the squared
distances in units of their standard errors would have a mean of 1, and the bias would shrink with more rotations.
"""

import argparse
import importlib.metadata
import os
import platform

import jax
import jax.numpy as jnp
import numpy as np

from vsa_optax import TritCodec
from vsa_optax.kernels import lloyd_max, rotation, signs

ROTATIONS = 20_480
AT_ONCE = 2048
SUPPORTS = {"one-hot": (1.0,), "1, 1/2": (1.0, 0.5), "1, 1, 1/2": (1.0, 1.0, 0.5)}


def moments(decoded, size):
    """Mean and standard error ``[size]`` over all rotations of what ``decoded(step)`` returns."""
    many = jax.jit(jax.vmap(decoded))
    total, squares = np.zeros(size), np.zeros(size)
    for begin in range(0, ROTATIONS, AT_ONCE):
        values = np.asarray(many(jnp.arange(begin, begin + AT_ONCE)), np.float64)
        total += values.sum(axis=0)
        squares += (values**2).sum(axis=0)
    mean = total / ROTATIONS
    return mean, np.sqrt(np.maximum(squares / ROTATIONS - mean**2, 0.0) / ROTATIONS)


def one_round(x):
    """The unbiased quantiser after a single round, for comparison."""

    def decoded(step):
        words = [signs.random_words(signs.stream(0, step), x.shape)]
        numbers, scale = lloyd_max.quantize(rotation.rotate(x, words), 1, unbiased=True)
        return rotation.rotate_back(scale * jnp.asarray(lloyd_max.levels(1))[numbers], words)

    return decoded


def print_row(name, width, support, decoded):
    x = np.zeros(width, np.float32)
    x[: len(support)] = support
    mean, error = moments(decoded(jnp.asarray(x)), width)
    off = mean - x
    scores = np.abs(off[error > 1e-9] / error[error > 1e-9])
    worst = np.abs(off).max() / np.linalg.norm(x)
    noise = error.max() / np.linalg.norm(x)
    score = f"{scores.max():8.1f} {np.mean(scores**2):9.2f}" if scores.size else f"{'exact':>8s} {'':9s}"
    print(f"{name:26s} {width:6d}  {worst:10.4f} {noise:10.4f} {score}", flush=True)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "numpy"))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}; {versions}")
    print(
        f"one trit; n = {ROTATIONS} rotations (steps 0 to {ROTATIONS - 1}); blocks with few coordinates that are not 0"
    )
    print("off: largest |mean - x|, and the largest standard error of a mean, both over ||x||")
    print("score: |mean - x| in standard errors, the largest and the mean square\n")
    print(f"{'coordinates':26s} {'block':>6s}  {'off':>10s} {'SE':>10s} {'largest':>8s} {'square':>9s}")
    for name, support in SUPPORTS.items():
        for width in (1024, 64, 32, 16, 8, 4):
            codec = TritCodec(1, block_size=width, unbiased=True)
            print_row(name, width, support, lambda x, c=codec: lambda step: c.decode(c.encode(x, step)))
        print_row(f"{name}, one round", 1024, support, one_round)


if __name__ == "__main__":
    main()
