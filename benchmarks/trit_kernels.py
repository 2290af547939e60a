"""How fast trits are coded, added and decoded on a GPU, beside a copy of the array, XLA's way, and other codecs.

Run `python benchmarks/trit_kernels.py | tee benchmarks/trit_kernels_gpu.log`; with `--tune`, each kernel as it can be
compiled, `| tee benchmarks/trit_kernels_tuning.log`. Calls are in flight, as in training: `CALLS` are issued without
waiting. Rates count the bytes that must move, of the vector and of its code, and stand as shares of what `x + 1` moves.
"""

import argparse
import functools
import importlib.metadata
import itertools
import math
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from vsa_optax.accumulation import packed_rows
from vsa_optax.kernels import lloyd_max, rotation, signs, trit_blocks
from vsa_optax.kernels.gpu import levels, trit_kernels
from vsa_optax.kernels.gpu.trit_kernels import Tuning

BLOCK = 1024
CALLS, ROUNDS = 10, 7
SIZE = 1 << 27
OPERATIONS = "encode", "decode", "add", "finish"


def bytes_moved(operation, size, bits):
    """Of f32 in or out, and of codes of so many bits a coordinate in or out."""
    code = size * bits / 8
    return {
        "copy": 8 * size,
        "encode": 4 * size + code,
        "decode": 4 * size + code,
        "add": 4 * size + 2 * code,
        "finish": 8 * size + code,
    }[operation]


def bits_of(trits):
    return 1.6 * trits + 16 / BLOCK


def seconds_of(call, state, calls=CALLS):
    """Of one call among many in flight; ``call`` takes what it gave back last."""
    start = time.perf_counter()
    for _ in range(calls):
        state = call(state)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / calls, state


def medians(calls, rounds=ROUNDS, number=CALLS):
    """For each name the quartiles of seconds a call; ``calls`` are pairs of a function and what it is first given."""
    states, taken = {}, {name: [] for name in calls}
    for name, (call, first) in calls.items():
        start = time.perf_counter()
        states[name] = jax.block_until_ready(call(first))
        print(f"# {name}: first call after {time.perf_counter() - start:.1f} s", flush=True)
        _, states[name] = seconds_of(call, states[name], number)
    for _ in range(rounds):
        for name, (call, _) in calls.items():
            seconds, states[name] = seconds_of(call, states[name], number)
            taken[name].append(seconds)
    return {name: np.percentile(values, [25, 50, 75]) for name, values in taken.items()}


@functools.cache
def vector(size):
    return jax.random.normal(jax.random.key(0), (size,))


def key():
    return signs.stream(0, 1)


def counters(rounds=1):
    return jnp.stack([signs.counter(jax.random.fold_in(key(), i)) for i in range(rounds)])


def repeated(call):
    """A call that does not depend on the last one."""
    return lambda _: call()


@functools.cache
def coded(trits, size):
    run = jax.jit(lambda x, c: trit_kernels.encode(x, c, trits=trits, unbiased=False))
    return jax.block_until_ready(run(vector(size), counters()))


def kernels_of(trits, size, tunings):
    """The calls of our kernels alone, without random words or scalars that are made for them."""
    x, one = vector(size), counters()
    codes, scales = coded(trits, size)
    factors = scales.astype(jnp.float32)
    shares = jnp.ones_like(factors)[None]
    out = {}
    for operation, tuning in tunings:
        name = f"{operation}, {trits} trits, {tuning.num_warps} warps, " + (
            "unrolled" if tuning.is_unrolled else f"loop, {tuning.num_stages} stages"
        )
        name += f", {tuning.rows} rows"
        if operation == "encode":
            run = jax.jit(lambda x, c, t=tuning: trit_kernels.encode(x, c, trits=trits, unbiased=False, tuning=t))
            out[name] = repeated(lambda run=run: run(x, one)), None
        elif operation == "decode":
            run = jax.jit(lambda *a, t=tuning: trit_kernels.decode_sum(*a, size=size, tuning=t))
            out[name] = repeated(lambda run=run: run(codes[None], shares, factors, one)), None
        elif operation == "add":
            run = jax.jit(
                lambda total, x, c, t=tuning: trit_kernels.add(x, c, None, *total, tuning=t), donate_argnums=0
            )
            out[name] = (lambda total, run=run: run(total, x, one)), (jnp.array(codes), jnp.array(scales))
        else:
            run = jax.jit(lambda *a, t=tuning: trit_kernels.finish(*a, jnp.float32(8), nearest=True, tuning=t))
            out[name] = repeated(lambda run=run: run(codes, scales, x, one)), None
    return out


def tune(size, operations, trits):
    print(f"tuning, {size} coordinates, {CALLS} calls in flight, best of 3 rounds; share of the rate of x + 1")
    add_one, x = jax.jit(lambda x: x + 1), vector(size)
    _, copy, _ = medians({"copy": (repeated(lambda: add_one(x)), None)})["copy"]
    copied = bytes_moved("copy", size, 0) / copy
    print(f"x + 1: {1e3 * copy:.3f} ms, {copied / 1e9:.0f} GB/s moved", flush=True)
    choices = [Tuning(warps) for warps in (1, 2, 4, 8)] + [Tuning(2, rows=4)]
    looped = [Tuning(warps, False, 1, stages) for warps, stages in itertools.product((1, 2, 4), (1, 2))]
    for num, operation in itertools.product(trits, operations):
        for tuning in choices + (looped if operation in ("encode", "add") else []):
            try:
                ((name, (call, first)),) = kernels_of(num, size, [(operation, tuning)]).items()
                start = time.perf_counter()
                state = jax.block_until_ready(call(first))
                compiling = time.perf_counter() - start
                best = math.inf
                for _ in range(3):
                    seconds, state = seconds_of(call, state)
                    best = min(best, seconds)
                share = bytes_moved(operation, size, bits_of(num)) / best / copied
                print(f"  {name:55s} {1e3 * best:7.3f} ms  {share:5.1%}  compiled in {compiling:.2f} s", flush=True)
            except Exception as error:  # noqa: BLE001 # The others still tell something.
                print(f"  {operation} {num} {tuning}: {type(error).__name__} {str(error)[:200]}", flush=True)


def versions():
    packages = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "numpy"))
    print(f"machine: {platform.machine()}, {jax.devices()[0].device_kind}; {packages}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="all ways to compile each kernel, instead of the table")
    parser.add_argument("--size", type=int, default=SIZE, help="coordinates")
    parser.add_argument("--operations", nargs="*", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--trits", nargs="*", type=int, default=(1, 2, 3))
    options = parser.parse_args()
    versions()
    if options.tune:
        tune(options.size, options.operations, options.trits)


if __name__ == "__main__":
    main()
