"""How many key-value pairs does a bundle hold? Recall against dimension, measured and in closed form.

Run `python benchmarks/bundle_capacity.py | tee benchmarks/bundle_capacity.log`; it takes about 90 s on two cores.

K values, out of a codebook of N bipolar hypervectors, are bound to K random keys and bundled. Each is then unbound with
its key and cleaned up against the codebook; recall is the share of values found. There are four variants: bipolar keys
and the plain sum; its sign, with ties by parity or left at zero; ternary keys and the plain sum.
"""

import argparse
import functools
import importlib.metadata
import math
import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from vsa_optax import vsa

DIMS = (64, 128, 256, 512, 1024, 2048, 4096)
PAIRS = (5, 10, 20, 50)
CANDIDATES = 1000
SEEDS = 100
METHODS = {
    "sum": ("bipolar", None),
    "bipolar majority": ("bipolar", "bipolar"),
    "ternary majority": ("bipolar", "ternary"),
    "ternary keys, sum": ("ternary", None),
}


def measure(dim, cases):
    """``[seeds, cases]``: recall of every ``(pairs, method)``; one codebook and one set of keys a seed."""

    def one(seed):
        for_rows, for_items, for_keys = jax.random.split(jax.random.key(seed), 3)
        codebook = vsa.random_hypervectors(for_rows, CANDIDATES, dim)
        items = jax.random.randint(for_items, [max(PAIRS)], 0, CANDIDATES)
        shares = []
        for pairs, method in cases:
            model, majority = METHODS[method]
            keys = vsa.random_hypervectors(for_keys, max(PAIRS), dim, model)[:pairs]
            trace = vsa.bundle(vsa.bind(keys, codebook[items[:pairs]]), majority=majority)
            found = vsa.cleanup(vsa.unbind(trace, keys), codebook)
            shares.append(jnp.mean(found.item == items[:pairs]))
        return jnp.stack(shares)

    return np.asarray(jax.jit(lambda seeds: jax.lax.map(one, seeds))(jnp.arange(SEEDS)))


def probability(mean, variance):
    """That a normal number of this mean and variance exceeds CANDIDATES - 1 standard normal ones."""
    h = np.linspace(-9, 9, 1801)
    phi = np.array([0.5 * math.erfc(-(mean + math.sqrt(variance) * x) / math.sqrt(2)) for x in h])
    return float(np.sum(np.exp(-h * h / 2) * phi ** (CANDIDATES - 1)) * (h[1] - h[0]) / math.sqrt(2 * math.pi))


@functools.cache
def moments(pairs, method):
    """The first four moments of ``z``, one coordinate of the unbound trace times that of the right value."""
    model, majority = METHODS[method]
    step = np.array([1, 0, 1]) / 2 if model == "bipolar" else np.ones(3) / 3  # Another pair's part, key not 0.
    z, p = 1.0 + np.arange(-(pairs - 1), pairs), np.ones(1)
    for _ in range(pairs - 1):
        p = np.convolve(p, step)
    if model == "ternary":
        z, p = np.append(z, 0.0), np.append(2 / 3 * p, 1 / 3)
    if majority is not None:
        tie = p[z == 0].sum() / 2 if majority == "bipolar" else 0.0
        z, p = np.array([1.0, -1.0]), np.array([p[z > 0].sum() + tie, p[z < 0].sum() + tie])
    return [float(np.sum(p * z**power)) for power in (1, 2, 3, 4)]


def predicted(dim, pairs, method):
    """The right row wins if ``t = sum z / sqrt(sum z^2)`` exceeds the others' scores, which are standard normal.

    t has mean ``sqrt(dim) m / sqrt(q)`` with ``m = E z`` and ``q = E z^2``; its variance is the delta method's.
    """
    m, q, third, fourth = moments(pairs, method)
    variance = (q - m * m) / q - m * (third - m * q) / q**2 + m * m * (fourth - q * q) / (4 * q**3)
    return probability(m * math.sqrt(dim / q), variance)


def published(dim, pairs):
    """Frady, Kleyko & Sommer (2018) for bipolar keys and the sum: sensitivity ``sqrt(dim / pairs)``, variance 1."""
    return probability(math.sqrt(dim / pairs), 1.0)


def dimension_for(recall, of_dimension):
    """The smallest dimension that reaches it."""
    low, high = 1, 1 << 20
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if of_dimension(middle) >= recall else (middle + 1, high)
    return low


def cell(shares):
    return f"{shares.mean():6.4f} ± {shares.std(ddof=1) / math.sqrt(len(shares)):.4f}"


def table_row(cells):
    return "   ".join(f"{text:24s}" for text in cells).rstrip()


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began = time.perf_counter()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "numpy"))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}; {versions}")
    print(f"K pairs, values out of N = {CANDIDATES} bipolar hypervectors; n = {SEEDS} seeds (0 to {SEEDS - 1})")
    print("recall: mean over seeds ± its standard error, from the seeds' scatter (closed form, see `predicted`)")
    print("published: the closed form of Frady, Kleyko & Sommer (2018) for the sum with bipolar keys\n")

    cases = [(pairs, method) for pairs in PAIRS for method in METHODS]
    curves = {dim: dict(zip(cases, measure(dim, cases).T, strict=True)) for dim in DIMS}
    for pairs in PAIRS:
        print(f"K = {pairs}\n{'D':>6} {'published':>9}   " + table_row(METHODS))
        for dim in DIMS:
            cells = [f"{cell(curves[dim][pairs, m])} ({predicted(dim, pairs, m):.4f})" for m in METHODS]
            print(f"{dim:6d} {published(dim, pairs):9.4f}   " + table_row(cells), flush=True)
        print()

    print("Dimension for 99 %: by the closed form, and the recall measured there")
    print(f"{'K':>6} {'published':>9}   " + table_row(METHODS))
    for pairs in PAIRS:
        cells = []
        for method in METHODS:
            dim = dimension_for(0.99, functools.partial(predicted, pairs=pairs, method=method))
            cells.append(f"{dim:5d}: {cell(measure(dim, [(pairs, method)])[:, 0])}")
        least = dimension_for(0.99, functools.partial(published, pairs=pairs))
        print(f"{pairs:6d} {least:9d}   " + table_row(cells), flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
