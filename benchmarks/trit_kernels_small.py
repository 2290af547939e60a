"""The kernels that add to a coded sum and finish it, on vectors of the size of a model's leaves: each tuning's time.

Run `python benchmarks/trit_kernels_small.py | tee benchmarks/trit_kernels_small_gpu.log`. A program has `CALLS` calls
of a kernel on `ARRAYS` vectors, so the time is that of the kernel and not of the host. It runs `IN_FLIGHT` times before
the host waits, in `ROUNDS` rounds in which all tunings take turns; the best round counts. A line has the best tuning
and the one that the library takes. The last two lines are a vector of one row, where the time is that of a launch.
"""

import argparse
import concurrent.futures
import functools
import importlib.metadata
import itertools
import math
import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from vsa_optax.kernels.gpu import levels, rows, trit_kernels
from vsa_optax.kernels.gpu.rows import Tuning

CALLS, ARRAYS, IN_FLIGHT, ROUNDS = 30, 24, 5, 3
SIZES = 589_824, 1_769_472, 2_359_296, 38_597_376
OPERATIONS = {"add": trit_kernels.ADD, "finish": trit_kernels.FINISH}
WARPS = 1, 2, 4, 8
TUNINGS = [
    *(Tuning(num, num_stages=stages) for num, stages in itertools.product(WARPS, (1, 2))),
    *(Tuning(num, is_unrolled=True) for num in WARPS),
]


def program(operation, tuning, interpret):
    """A function of vectors, which are donated, their sums, and random words: what replaces vectors or sums."""

    # Calls of one compiled function share a kernel.
    @jax.jit
    def call(x, codes, scales, words):
        if operation == "add":
            return trit_kernels.add(x, words, None, codes, scales, tuning=tuning, interpret=interpret)
        divisor = jnp.float32(8)
        return trit_kernels.finish(codes, scales, x, words, divisor, nearest=True, tuning=tuning, interpret=interpret)

    def run(xs, sums, words):
        xs, sums = list(xs), list(sums)
        for i in range(CALLS):
            place = i % len(xs)
            result = call(xs[place], *sums[place], words)
            if operation == "add":
                sums[place] = result
            else:
                xs[place] = result
        return sums if operation == "add" else xs

    return jax.jit(run, donate_argnums=0 if operation == "finish" else ())


@functools.partial(jax.jit, static_argnums=(1, 2))
def arrays(seed, size, trits):
    """A vector, and its coded sum, of random bytes."""
    count = rows.num_rows(size)
    keys = jax.random.split(jax.random.key(seed), 2)
    codes = jax.random.randint(keys[0], (trits, count * rows.WIDTH), 0, 243, jnp.int32).astype(jnp.uint8)
    return jax.random.normal(keys[1], (size,)), (codes, jnp.ones(count * levels.BLOCKS, jnp.bfloat16))


def num_words(size):
    return rows.num_rows(size) * rows.ROW // 32


def shapes(size, trits, num):
    x, total = jax.eval_shape(functools.partial(arrays, 0, size, trits))
    return [x] * num, [total] * num, jax.ShapeDtypeStruct((1, num_words(size)), jnp.uint32)


def compiled(cases, num, interpret):
    """By case its program, or an error; in threads."""

    def compile_one(case):
        operation, size, trits, tuning = case
        try:
            return program(operation, tuning, interpret).lower(*shapes(size, trits, num)).compile()
        except Exception as error:  # A tuning may not fit the GPU.
            return error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(cases, pool.map(compile_one, cases), strict=True))


def best_seconds(runs, xs, sums, of_rows):
    """By name the seconds of a kernel in the best round. ``runs`` have a program and whether it replaces vectors."""
    best = dict.fromkeys(runs, math.inf)
    for round_ in range(ROUNDS + 1):
        for name, (run, replaces_xs) in runs.items():
            start = time.perf_counter()
            for _ in range(IN_FLIGHT):
                result = run(xs, sums, of_rows)
                if replaces_xs:
                    xs = result
            jax.block_until_ready(result)
            if round_:  # The first one only warms up.
                best[name] = min(best[name], (time.perf_counter() - start) / IN_FLIGHT / CALLS)
    return best


def words_of(tuning):
    how = "unrolled" if tuning.is_unrolled else f"loop, {tuning.num_stages} stage{'s' * (tuning.num_stages > 1)}"
    return f"{tuning.num_warps} warp{'s' * (tuning.num_warps > 1)}, {how}"


def versions():
    packages = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "numpy"))
    print(f"machine: {platform.machine()}, {jax.devices()[0].device_kind}; {packages}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES, help="coordinates")
    parser.add_argument("--trits", nargs="*", type=int, default=(1, 2))
    parser.add_argument("--all", action="store_true", help="a line for each tuning, too")
    parser.add_argument("--interpret", action="store_true", help="to try the script without a GPU, on few coordinates")
    options = parser.parse_args()
    versions()
    groups = list(itertools.product(options.sizes, options.trits))
    cases = [(operation, *group, tuning) for group in groups for operation in OPERATIONS for tuning in TUNINGS]
    floors = [(operation, rows.ROW, 1, present(operation, rows.ROW, 1)) for operation in OPERATIONS]
    start = time.perf_counter()
    programs = compiled([*cases, *floors], ARRAYS, options.interpret)
    print(f"{len(programs)} programs compiled in {time.perf_counter() - start:.0f} s", flush=True)
    print(f"microseconds of a call, {CALLS} in a program on {ARRAYS} vectors, {IN_FLIGHT} programs in flight, best of")
    print(f"{ROUNDS} rounds")
    print("operation  coordinates   rows  trits    best  with                         present  with")
    for size, trits in [*groups, (rows.ROW, 1)]:
        report(size, trits, programs, options.all)


def present(operation, size, trits):
    return rows.tuning_for(OPERATIONS[operation], trits, rows.num_rows(size))


def report(size, trits, programs, shows_all):
    xs, sums = zip(*(arrays(seed, size, trits) for seed in range(ARRAYS)), strict=True)
    of_size = {case: run for case, run in programs.items() if case[1:3] == (size, trits)}
    xs, sums = list(xs), list(sums)
    # Vectors that a program replaces cannot be read again, so the additions come first.
    for operation in OPERATIONS:
        runs = {case[3]: run for case, run in of_size.items() if case[0] == operation}
        for tuning, run in runs.items():
            if isinstance(run, Exception):
                print(f"  {operation}, {words_of(tuning)}: {str(run)[:200]}", flush=True)
        runs = {t: (run, operation == "finish") for t, run in runs.items() if not isinstance(run, Exception)}
        words = jax.random.bits(jax.random.key(7), (1, num_words(size)), jnp.uint32)
        seconds = best_seconds(runs, xs, sums, words)
        fastest, own = min(seconds, key=seconds.get), present(operation, size, trits)
        print(
            f"{operation:9s}  {size:11d}  {rows.num_rows(size):5d}  {trits:5d}  {1e6 * seconds[fastest]:6.2f}  "
            f"{words_of(fastest):27s}  {1e6 * seconds.get(own, np.nan):7.2f}  {words_of(own)}",
            flush=True,
        )
        if shows_all:
            for tuning, of_tuning in sorted(seconds.items(), key=lambda pair: pair[1]):
                print(f"    {words_of(tuning):27s}  {1e6 * of_tuning:7.2f}", flush=True)


if __name__ == "__main__":
    main()
