"""The largest transformer that can be trained in a card's memory, by the way in which micro-batches are accumulated.

Run `python benchmarks/largest_model.py | tee benchmarks/largest_model_gpu.log` on a GPU. JAX gets as much of its memory
as a smaller card has, by `XLA_PYTHON_CLIENT_MEM_FRACTION`. The depth of a transformer grows by whole layers, and each
trial is a process of its own.

1. Memory grows with depth by the same amount a layer. Each method's first trial compiles two depths, foretells the
   largest by XLA's analysis of memory, and runs `FEW` micro-steps there. Others follow, one layer and more away. Their
   times do not count, so as many run side by side as the GPU has memory for.
2. Alone on the GPU, each method then runs three emissions at the largest depth found, or at one layer less if that
   fails. Last, trits and `optax.MultiSteps` in float32 take turns at the largest depth of the latter.

XLA is told not to measure which algorithm of a matrix product is the fastest. All methods have the same products, so
this changes no ratio, and compiling takes less time. `--tune` leaves it to XLA.

On a CPU, which has no such limit, a trial fails if XLA's analysis is above it. To try the script there, add `--budget
0.05 --width 64 --head 32 --vocabulary 256 --context 64 --every-k 2`.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

GIGABYTE = 1e9
FEW, EMISSIONS = 3, 3
MULTI_STEPS = "MultiSteps, float32"
METHODS = ("none", MULTI_STEPS, "MultiSteps, bfloat16", "1 trit", "2 trits", "3 trits")
LAYOUTS = ("scan", "leaves")
PRECISIONS = ("float32", "bfloat16")
WIDTHS = {"scan": 1536, "leaves": 2048}
UNTUNED = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
OUT_OF_MEMORY = ("resource_exhausted", "out of memory", "out_of_memory", "failed to allocate")
TRIAL = pathlib.Path(__file__).with_name("largest_model_trial.py")
BEGAN = time.monotonic()


def is_out_of_memory(text):
    return any(words in text.lower() for words in OUT_OF_MEMORY)


class Trials:
    """Runs trials of one table, each in a process of its own, and prints a line for each."""

    def __init__(self, setup, environment):
        self._setup = setup
        self._environment = environment
        self._lock = threading.Lock()

    def run(self, method, depth, steps, deadline):
        """The result of a trial, with a key `out_of_memory` if it failed; None if it took too long or broke."""
        setup = self._setup | {"method": method, "depth": depth, "steps": steps}
        command = [sys.executable, TRIAL, json.dumps(setup)]
        seconds = deadline - time.monotonic()
        if seconds < 1:
            return None
        child = subprocess.Popen(
            command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            out, err = child.communicate(timeout=seconds)
            in_time = True
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            in_time = False
        lines = [json.loads(line.removeprefix("RESULT ")) for line in out.splitlines() if line.startswith("RESULT ")]
        result = lines[-1] if lines else {"depth": depth, "out_of_memory": "not known"}
        if "out_of_memory" not in result:
            said = f"ran {sum(steps)} micro-steps, {result['tokens_a_second']:.0f} tokens/s"
        elif not in_time:
            said, result = "no time left", None
        elif is_out_of_memory(err):
            said = "out of memory"
        else:
            said, result = "broke: " + " | ".join(err.strip().splitlines()[-4:])[-600:], None
        known = (result or (lines[-1] if lines else {})) or {}
        at = known.get("depth") or depth or "?"
        by = (
            f", {known['foretold'] / GIGABYTE:.3f} of {known['limit'] / GIGABYTE:.3f} GB foretold"
            if "limit" in known
            else ""
        )
        peak = f", peak {known['peak'] / GIGABYTE:.3f} GB" if known.get("peak") else ""
        compiled = f", compiled in {known['compile_seconds']:.0f} s" if "compile_seconds" in known else ""
        with self._lock:
            print(
                f"  [{time.monotonic() - BEGAN:4.0f} s] {method}, {at} layers: {said}{by}{peak}{compiled}", flush=True
            )
        return result

    def largest(self, method, deadline):
        """The result at the deepest depth that ran, and the shallowest that did not."""
        ran, failed, depth, stride = None, None, None, 1
        while depth != 0:
            result = self.run(method, depth, [FEW], deadline)
            if result is None or result["depth"] is None:
                break
            depth = result["depth"]
            if "out_of_memory" in result:
                failed = depth
            else:
                ran = result
            if ran and failed:
                if failed - ran["depth"] <= 1:
                    break
                depth = (ran["depth"] + failed) // 2
            else:
                depth = depth + stride if ran else max(0, depth - stride)
                stride *= 2
        return ran, failed

    def confirmed(self, method, found, steps, deadline):
        """`largest`'s answer after all these steps. If no time is left, it is the one from before."""
        ran, failed = found
        depth = ran["depth"] if ran else 0
        while depth:
            result = self.run(method, depth, steps, deadline)
            if result is None:
                return (ran if depth == ran["depth"] else None), failed
            if "out_of_memory" not in result:
                return result | {"is_confirmed": True}, failed
            depth, failed = depth - 1, depth
        return None, failed


def gpu():
    """Its bytes of memory and its name; None on a CPU."""
    query = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None, "cpu, by XLA's analysis"
    total, name = found.splitlines()[0].split(", ")
    return float(total) * 2**20, name


def print_header(options, name):
    import importlib.metadata

    versions = ", ".join(f"{m} {importlib.metadata.version(m)}" for m in ("jax", "jaxlib", "optax"))
    print(f"device: {name}; versions: python {sys.version.split()[0]}, {versions}")
    print(
        f"Micro-batches of {options.batch} x {options.context} tokens, K = {options.every_k}, AdamW, activations in "
        f"bfloat16, layers recomputed in the backward pass; vocabulary {options.vocabulary}"
    )
    print("float32: parameters and both moments; bfloat16: parameters and both moments")
    print(f"XLA's flags: {'its own' if options.tune else UNTUNED}\n", flush=True)


def print_row(cells):
    widths = (30, 8, 8, 12, 8, 16, 12, 10)
    first, *others = zip(cells, widths, strict=True)
    text = f"{first[0]!s:<{first[1]}}" + "".join(f"  {cell!s:>{width}}" for cell, width in others)
    print(text.rstrip(), flush=True)


def table(budget, layout, precision, options, seconds, cache):
    total, _ = gpu()
    environment = dict(os.environ) | {"JAX_COMPILATION_CACHE_DIR": cache}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TF_CPP_MIN_LOG_LEVEL": "2"}
    at_once = 1
    if total:
        # A process takes memory of its own, for CUDA and libraries, besides what JAX gets.
        at_once = max(1, min(options.at_once, int(total // (budget * GIGABYTE + 1.5e9))))
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{budget * GIGABYTE / total:.5f}"
        if not options.tune:
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {UNTUNED}".strip()
    setup = {
        "budget": budget, "layout": layout, "precision": precision, "width": options.width or WIDTHS[layout],
        "head": options.head, "vocabulary": options.vocabulary, "context": options.context, "batch": options.batch,
        "every_k": options.every_k,
    }  # fmt: skip
    now = time.monotonic()
    search_ends, ends = now + 0.6 * seconds, now + seconds
    place = "layers in one leaf, by scan" if layout == "scan" else "layers in leaves of their own"
    title = f"{budget:g} GB, {precision}, {place}, width {setup['width']}"
    print(f"{title}: trials, at most {at_once} at once", flush=True)
    trials = Trials(setup, environment)
    compared = [method for method in options.methods if "trit" in method]
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        searches = {method: pool.submit(trials.largest, method, search_ends) for method in options.methods}
        found = {method: search.result() for method, search in searches.items()}
        base = found.get(MULTI_STEPS, (None, None))[0]
        if base:  # To have it compiled.
            list(pool.map(lambda method: trials.run(method, base["depth"], [1], ends), compared))
    print(f"{title}: alone on the device", flush=True)
    steps = [options.every_k] * EMISSIONS
    results = {method: trials.confirmed(method, found[method], steps, ends) for method in options.methods}
    base = results.get(MULTI_STEPS, (None, None))[0]
    ratios = {method: [] for method in compared}
    for _ in range(options.rounds if base else 0):
        taken = {
            method: (trials.run(method, base["depth"], steps, ends) or {}).get("tokens_a_second")
            for method in (MULTI_STEPS, *compared)
        }
        for method in compared:
            if taken[method] and taken[MULTI_STEPS]:
                ratios[method].append(taken[method] / taken[MULTI_STEPS])
    print(f"\n{title}")
    print_row(["", "layers", "not", "parameters", "ratio", "tokens/s", "peak, GB", "compiled"])
    for method, (result, failed) in results.items():
        if result is None:
            print_row([method, "none" if failed == 1 else "?", failed or "?", "", "", "", "", ""])
            continue
        ratio = f"{result['num'] / base['num']:.3f}" if base else ""
        peak = f"{(result['peak'] or result['foretold']) / GIGABYTE:.2f}"
        compiled = f"{(found[method][0] or result)['compile_seconds']:.0f} s"
        number, rate = f"{result['num'] / 1e6:.0f} M", f"{result['tokens_a_second']:.0f}"
        depth = f"{result['depth']}{'' if 'is_confirmed' in result else '*'}"
        print_row([method, depth, failed or "?", number, ratio, rate, peak, compiled])
    for method, values in ratios.items():
        if values:
            text = ", ".join(f"{value:.3f}" for value in values)
            print(f"{method} at {base['depth']} layers: tokens/s, as a ratio to {MULTI_STEPS} in turn: {text}")
    if any(result and "is_confirmed" not in result for result, _ in results.values()):
        print(f"* {FEW} micro-steps beside other processes; no time was left for {EMISSIONS} emissions")
    print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, nargs="+", default=[24.0], help="of memory, in gigabytes of 1e9 bytes")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["scan"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS[:-1]))
    parser.add_argument("--seconds", type=float, default=540.0, help="in all; then it prints what it has found")
    parser.add_argument("--width", type=int, help="of a layer; without it 1536 by scan and 2048 in leaves")
    parser.add_argument("--head", type=int, default=128, help="width of a head of attention")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--every-k", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1, help="in which methods take turns at the same depth")
    parser.add_argument("--at-once", type=int, default=5, help="processes at most while depths are searched")
    parser.add_argument("--tune", action="store_true", help="let XLA measure the algorithms of matrix products")
    options = parser.parse_args()
    total, name = gpu()
    if total and max(options.budget) * GIGABYTE > total:
        parser.error(f"--budget: the GPU has {total / GIGABYTE:.1f} GB")
    print_header(options, name)
    asked = [(b, la, p) for b in options.budget for la in options.layout for p in options.precision]
    with tempfile.TemporaryDirectory() as cache:
        for i, one in enumerate(asked):
            left = options.seconds - (time.monotonic() - BEGAN)
            table(*one, options, left / (len(asked) - i), cache)


if __name__ == "__main__":
    main()
