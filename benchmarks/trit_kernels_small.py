"""The kernels that add to a coded sum and finish it, on vectors of the size of a model's leaves: each tuning's time.

Run `python benchmarks/trit_kernels_small.py | tee benchmarks/trit_kernels_small_gpu.log`. A program has `CALLS` calls
of a kernel on `ARRAYS` vectors, and runs `IN_FLIGHT` times. The time is the median duration of a kernel in JAX's
profiler: on the clock, a call on one row takes 10 to 18 us, which is the host's. A line has the best tuning and the one
that the library takes. The last two lines are a vector of one row.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib.metadata
import itertools
import os
import pathlib
import platform
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from vsa_optax.kernels.gpu import levels, rows, trit_kernels
from vsa_optax.kernels.gpu.rows import Tuning

CALLS, ARRAYS, IN_FLIGHT = 30, 24, 5
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


def kernel_seconds(operation, runs, xs, sums, of_rows):
    """By tuning the median seconds of a kernel, as a profiler of the GPU sees it; None without a GPU.

    ``runs`` have a program and whether it replaces vectors.
    """
    with tempfile.TemporaryDirectory() as folder:
        for folder_of_turn in (None, folder):  # The first turn only warms up.
            with jax.profiler.trace(folder_of_turn) if folder_of_turn else contextlib.nullcontext():
                for run, replaces_xs in runs.values():
                    for _ in range(IN_FLIGHT):
                        result = run(xs, sums, of_rows)
                        xs = result if replaces_xs else xs
                    jax.block_until_ready(result)
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        lines = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
        events = [event for line in lines if line.name.startswith("Stream") for event in line.events]
    # The programs run one after the other, each with the same number of kernels.
    of_kernel = sorted((e.start_ns, e.duration_ns) for e in events if e.name.startswith(f"trit_{operation}"))
    if len(of_kernel) != len(runs) * IN_FLIGHT * CALLS:
        return None
    times = np.array([duration for _, duration in of_kernel]).reshape(len(runs), -1)
    return dict(zip(runs, 1e-9 * np.median(times, axis=1), strict=True))


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
    floors = [(operation, rows.ROW, 1, OPERATIONS[operation][1]) for operation in OPERATIONS]
    start = time.perf_counter()
    programs = compiled([*cases, *floors], ARRAYS, options.interpret)
    print(f"{len(programs)} programs compiled in {time.perf_counter() - start:.0f} s", flush=True)
    print(f"microseconds of a kernel: median of {IN_FLIGHT} runs of a program with {CALLS} calls on {ARRAYS} vectors")
    print("operation  coordinates   rows  trits    best  with                         present  with")
    for size, trits in [*groups, (rows.ROW, 1)]:
        report(size, trits, programs, options.all)


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
        seconds = kernel_seconds(operation, runs, xs, sums, words)
        if seconds is None:
            print(f"{operation}, {size} coordinates: no kernels in the profile")
            continue
        fastest, own = min(seconds, key=seconds.get), OPERATIONS[operation][trits]
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
