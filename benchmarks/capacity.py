"""How many items can be recovered from a bundle? Ours, torchhd's and the published curve against dimension; a plot.

Run `python benchmarks/capacity.py --plot benchmarks/capacity.png | tee benchmarks/capacity.log`; it takes four minutes
on two cores. It needs torchhd beside this package: `pip install "vsa-optax[torchhd]" matplotlib`.

There are two ways to keep K items, out of a memory of N bipolar hypervectors, in one:

- pairs: the sum of `bind(key_i, item_i)`; item i is the most similar to `unbind(sum, key_i)`;
- a sequence: the sum of `permute(item_i, i)`; item i is the most similar to `permute(sum, -i)`.

Both libraries draw their own hypervectors, and clean up against the whole memory. `bundle_capacity.py` has other
bundles and other keys.
"""

import argparse
import importlib.metadata
import math
import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchhd
from bundle_capacity import dimension_for, published

from vsa_optax import vsa

DIMS = (32, 64, 128, 256, 512, 1024, 2048)
ITEMS = (10, 20, 50)
CANDIDATES = 1000
SEEDS = 50
WAYS = ("pairs", "sequence")


def ours(dim):
    """``[seeds, ways, numbers of items]``: items that came back."""

    def one(seed):
        for_rows, for_items, for_keys = jax.random.split(jax.random.key(seed), 3)
        memory = vsa.random_hypervectors(for_rows, CANDIDATES, dim)
        chosen = jax.random.randint(for_items, [max(ITEMS)], 0, CANDIDATES)
        keys = vsa.random_hypervectors(for_keys, max(ITEMS), dim)

        def pairs(num):
            trace = vsa.bundle(vsa.bind(keys[:num], memory[chosen[:num]]))
            return vsa.cleanup(vsa.unbind(trace, keys[:num]), memory).item

        def sequence(num):
            trace = vsa.bundle(jnp.stack([vsa.permute(memory[chosen[i]], i) for i in range(num)]))
            return vsa.cleanup(jnp.stack([vsa.permute(trace, -i) for i in range(num)]), memory).item

        return jnp.array([[jnp.sum(way(num) == chosen[:num]) for num in ITEMS] for way in (pairs, sequence)])

    return np.asarray(jax.jit(lambda seeds: jax.lax.map(one, seeds))(jnp.arange(SEEDS)))


def theirs(dim):
    """The same by torchhd's Multiply-Add-Permute."""
    found = np.zeros((SEEDS, len(WAYS), len(ITEMS)))
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        memory = torchhd.random(CANDIDATES, dim, "MAP", generator=generator)
        keys = torchhd.random(max(ITEMS), dim, "MAP", generator=generator)
        chosen = torch.randint(CANDIDATES, [max(ITEMS)], generator=generator)
        for column, num in enumerate(ITEMS):
            items = memory[chosen[:num]]
            pairs = torchhd.multibundle(torchhd.bind(keys[:num], items))
            sequence = torchhd.multibundle(torch.stack([torchhd.permute(x, shifts=i) for i, x in enumerate(items)]))
            queries = (
                torchhd.bind(pairs.unsqueeze(0), keys[:num]),
                torch.stack([torchhd.permute(sequence, shifts=-i) for i in range(num)]),
            )
            for row, query in enumerate(queries):
                nearest = torch.argmax(torchhd.dot_similarity(query, memory), dim=-1)
                found[seed, row, column] = int(torch.sum(nearest == chosen[:num]))
    return found


def cell(counts):
    return f"{counts.mean():6.2f} ± {counts.std(ddof=1) / math.sqrt(len(counts)):.2f}"


def draw(curves, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    dense = np.unique(np.geomspace(min(DIMS), max(DIMS), 60).round()).astype(int)
    for row, (way, axis) in enumerate(zip(WAYS, figure.subplots(1, 2, sharey=True), strict=True)):
        for column, (num, colour) in enumerate(zip(ITEMS, ("#0b5fa5", "#1b7f3b", "#b3261e"), strict=True)):
            axis.plot(dense, [num * published(dim, num) for dim in dense], color=colour, linewidth=1, linestyle="--")
            for name, marker, filled in (("ours", "o", colour), ("torchhd", "s", "none")):
                counts = np.array([curves[name][dim][:, row, column] for dim in DIMS])
                error = counts.std(axis=1, ddof=1) / math.sqrt(SEEDS)
                style = {
                    "marker": marker,
                    "color": colour,
                    "markerfacecolor": filled,
                    "markersize": 6 + 3 * (name != "ours"),
                }
                axis.errorbar(DIMS, counts.mean(axis=1), error, linestyle="", **style)
            axis.axhline(num, color=colour, linewidth=0.5)
            axis.annotate(f"{num} items", (DIMS[-1], num), (0, 3), textcoords="offset points", ha="right", color=colour)
        axis.set(xscale="log", xlabel="dimension", title=f"{way}: items that come back")
        axis.set_xticks(DIMS, [str(dim) for dim in DIMS], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axis = figure.axes[0]
    axis.plot([], [], "o", color="0.3", label="vsa_optax")
    axis.plot([], [], "s", color="0.3", markerfacecolor="none", markersize=9, label="torchhd")
    axis.plot([], [], "--", color="0.3", label="Frady, Kleyko & Sommer (2018)")
    axis.legend(loc="upper left")
    axis.set_ylim(0, 1.12 * max(ITEMS))
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", help="a PNG to write")
    options = parser.parse_args()
    began = time.perf_counter()
    names = ("jax", "numpy", "torch", "torch-hd")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}; {versions}")
    print(f"K items out of a memory of N = {CANDIDATES} bipolar hypervectors; n = {SEEDS} seeds, 0 to {SEEDS - 1}")
    print("items that come back: mean over seeds ± its standard error")
    print("published: the closed form of Frady, Kleyko & Sommer (2018), times K\n")
    curves = {"ours": {dim: ours(dim) for dim in DIMS}, "torchhd": {dim: theirs(dim) for dim in DIMS}}
    largest = 0.0
    for row, way in enumerate(WAYS):
        for column, num in enumerate(ITEMS):
            print(f"{way}, K = {num}\n{'D':>6} {'published':>10} {'vsa_optax':>16} {'torchhd':>16}")
            for dim in DIMS:
                both = [curves[name][dim][:, row, column] for name in curves]
                error = math.sqrt(sum(counts.var(ddof=1) / SEEDS for counts in both))
                if error:
                    largest = max(largest, abs(both[0].mean() - both[1].mean()) / error)
                cells = " ".join(f"{cell(counts):>16}" for counts in both)
                print(f"{dim:6d} {num * published(dim, num):10.2f} {cells}", flush=True)
            print()
    print(
        f"largest difference of the two libraries: {largest:.1f} standard errors, "
        f"in {len(WAYS) * len(ITEMS) * len(DIMS)}"
    )
    for num in ITEMS:
        needed = dimension_for(0.99, lambda dim, num=num: published(dim, num))
        print(f"published, for 99 % of {num} items: {needed} dimensions")
    print(f"{time.perf_counter() - began:.0f} s in all")
    if options.plot:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
