"""The time that a codec takes on one CPU core.

Run `python benchmarks/codec_times.py | tee benchmarks/codec_times.log` on an otherwise idle machine.

All variants take turns, so that other load on the machine affects all of them.
"""

# ruff: noqa: E402 # JAX reads the flags, and counts the cores, when it is imported.

import os

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import argparse
import time

import jax
import numpy as np
from codec_tasks import print_header, print_row, quartiles, verdict

from vsa_optax import HypervectorCodec, TritCodec

SIZE = 1 << 20
SIZES = [1 << power for power in range(14, 25, 2)]
MOST_MS, HOPED_MS = {"encode": 15.0, "decode": 15.0}, {"encode": 8.0, "decode": 10.0}
MOST_RATIO = 1.5


def milliseconds(calls, rounds):
    """``{name: [rounds]}``, each call timed once a round, after one for compilation."""
    taken = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - begin))
    return taken


def calls_of(codec, x):
    encode, decode = jax.jit(codec.encode), jax.jit(codec.decode)
    payload = encode(x, 1)
    return {"encode": lambda: encode(x, 1), "decode": lambda: decode(payload)}


def in_place(function, x, repeats=1):
    """A call that applies the function to the array repeatedly, in the same memory."""
    compiled = jax.jit(function, donate_argnums=0)
    kept = [x]

    def call():
        for _ in range(repeats):
            kept[0] = compiled(kept[0]).block_until_ready()
        return kept[0]

    return call


def encode_and_decode(rounds):
    x = jax.random.normal(jax.random.key(0), [SIZE])
    add = jax.jit(lambda x: x + 1)
    calls = {("x + 1", ""): lambda: add(x), ("x + 1, in place", ""): in_place(lambda x: x + 1, x + 0)}
    codecs = {f"TritCodec({t}{', unbiased' * u})": TritCodec(t, unbiased=u) for t in (1, 2, 3) for u in (False, True)}
    codecs |= {f"HypervectorCodec({r})": HypervectorCodec(r) for r in (0.1, 0.25)}
    codecs["HypervectorCodec(0.1, use_ternary)"] = HypervectorCodec(0.1, use_ternary=True)
    for name, codec in codecs.items():
        calls |= {(name, part): call for part, call in calls_of(codec, x).items()}
    taken = milliseconds(calls, rounds)
    print(f"Milliseconds for {SIZE:,} coordinates")
    widths = [34, 26, 26]
    print_row(widths, ["", "encode", "decode"])
    for name in ("x + 1", "x + 1, in place"):
        print_row(widths, [name, quartiles(taken[name, ""]), ""])
    for name in codecs:
        print_row(widths, [name, *(quartiles(taken[name, part]) for part in ("encode", "decode"))])
    for part in ("encode", "decode"):
        middle = np.median(taken["TritCodec(1)", part])
        met, stretch = (verdict(middle <= limit[part]) for limit in (MOST_MS, HOPED_MS))
        print(
            f"target, one trit, {part} <= {MOST_MS[part]:g}: {middle:.3g}, {met}; stretch {HOPED_MS[part]:g}: {stretch}"
        )
    print(flush=True)


def by_size(rounds):
    print("Nanoseconds a coordinate for decode(encode(x)) in one jit, x donated; below 2^20 of several calls in a row")
    widths = [24, *[20] * len(SIZES), 10]
    print_row(widths, ["", *(f"2^{size.bit_length() - 1}" for size in SIZES), "largest / smallest"])
    for name, codec in {"TritCodec(1)": TritCodec(1), "TritCodec(2)": TritCodec(2), "x + 1": None}.items():

        def whole(x, codec=codec):
            return codec.decode(codec.encode(x, 1)) if codec else x + 1

        repeats = {size: max(1, SIZE // size) for size in SIZES}
        taken = {}
        for size in SIZES:  # One after the other: memory that a large call gives back makes the next small one slower.
            x = jax.random.normal(jax.random.key(0), [size])
            taken |= milliseconds({size: in_place(whole, x, repeats[size])}, rounds)
        costs = {size: 1e6 * np.array(values) / (size * repeats[size]) for size, values in taken.items()}
        middles = [np.median(values) for values in costs.values()]
        ratio = max(middles) / min(middles)
        print_row(widths, [name, *(quartiles(values) for values in costs.values()), f"{ratio:.2f}"])
        if codec:
            print(f"target, {name}, largest / smallest <= {MOST_RATIO}: {ratio:.2f}, {verdict(ratio <= MOST_RATIO)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    print_header(f"times on one core; n = {options.rounds} interleaved calls; median [quartiles]")
    encode_and_decode(options.rounds)
    by_size(options.rounds)


if __name__ == "__main__":
    main()
