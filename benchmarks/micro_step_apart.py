"""What `micro_step.py` measures, each program in a process of its own: two versions of the library side by side.

Run `python benchmarks/micro_step_apart.py --before PATH | tee benchmarks/micro_step_apart_gpu.log` on a GPU, where PATH
is a checkout of an older version; without it this one is measured alone. First the optimizer's parts are compiled one
after the other, then all else at the same time. Then each process, in turn and alone on the device, runs `STEPS` steps
in flight in `ROUNDS` rounds, everything donated, says the peak of its own allocator, and ends. A table has:

    ms            a step; median of the rounds [quartiles]
    compiled, s   to trace, lower and compile
    peak, B/p     the allocator's, in bytes a parameter
    launches      kernels and copies of the compiled program, without what is inside its loops
    waits         loops and conditionals of which a GPU's host reads the condition
    traced        kernels and copies that a profiler saw in a step, and for how many milliseconds the device was busy
"""

import argparse
import gc
import glob
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, ROUNDS, TRACED = 10, 5, 3
WIDTH, LAYERS, EVERY_K = 2048, 8, 8  # Of the model with eight matrices.
BATCHES = (8, 1024)
HERE = Path(__file__).parent
NO_KERNELS = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all"}


# What runs in a process of its own; JAX is imported there only.


def programs(part, name):
    """A step, and functions that make its carry and what else it is given."""
    import functools

    import jax
    import jax.numpy as jnp
    import micro_step
    import optax

    if not part.startswith("matrices"):
        found = micro_step.programs(micro_step.LAYERS, [part], [name], 8)
        return found[f"{part}, {name}"]
    adamw, batch = optax.adamw(1e-3), int(part.split()[-1])
    opt = adamw if name == "AdamW" else micro_step.accumulators()[name]

    def loss(params, x):
        for matrix in params:
            x = jnp.tanh(x @ matrix)
        return jnp.mean(x**2)

    def step(carry, x):
        params, state = carry
        updates, state = opt.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    def carry():
        params = [jax.random.normal(jax.random.key(i), (WIDTH, WIDTH)) / WIDTH**0.5 for i in range(LAYERS)]
        return params, opt.init(params)

    return step, carry, functools.partial(jax.random.normal, jax.random.key(9), (batch, WIDTH))


def computations(text):
    """The opcodes of each computation of a compiled program, by its name; of the entry by ENTRY."""
    found, name = {}, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
            name = "ENTRY" if head.group(1) else head.group(2)
            found[name] = []
        elif name and (equation := re.match(r"\s+(?:ROOT )?%[\w.\-]+ = (?:\([^=]*?\)|\S+) ([\w\-]+)\(", line)):
            found[name].append(equation.group(1))
    return found


def traced(program, carry, given):
    """Kernels and copies a step, and milliseconds that the device was busy; None where the profiler says nothing."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        try:
            with jax.profiler.trace(folder):
                for _ in range(TRACED):
                    carry = program(carry, given)
                jax.block_until_ready(carry)
            (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            lines = [
                line
                for plane in jax.profiler.ProfileData.from_file(path).planes
                if plane.name.startswith("/device:GPU")
                for line in plane.lines
                if line.name.startswith("Stream")
            ]
            events = [event for line in lines for event in line.events]
            if not events:
                return None
            busy = sum(event.duration_ns for event in events) / 1e6 / TRACED
            return [len(events) / TRACED, busy]
        except Exception as error:  # A measurement less, said so.
            print(f"no trace: {error}", file=sys.stderr)
            return None


def child(part, name):
    """Compiles when told to, and measures when told to."""
    import jax
    import numpy as np
    import optax

    step, carry, given = programs(part, name)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    program = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(carry), jax.eval_shape(given)).compile()
    found = {"compiled": time.perf_counter() - began, "card": jax.devices()[0].device_kind}
    opcodes = computations(program.as_text())["ENTRY"]
    found["launches"] = sum(code not in NO_KERNELS | {"while", "conditional"} for code in opcodes)
    found["waits"] = sum(code in ("while", "conditional") for code in opcodes)
    print("compiled", flush=True)
    sys.stdin.readline()
    carry, given = jax.block_until_ready((jax.jit(carry)(), given()))
    gc.collect()
    num = optax.tree.size(carry[0])
    before = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    seconds = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        for _ in range(STEPS):
            carry = program(carry, given)
        jax.block_until_ready(carry)
        seconds.append((time.perf_counter() - began) / STEPS)
    stats = jax.devices()[0].memory_stats() or {}
    found["ms"] = list(1e3 * np.percentile(seconds[1:], [25, 50, 75]))
    peak = stats.get("peak_bytes_in_use", 0)
    # What made the carry may have needed more than a step.
    found["peak"] = peak / num if peak > before else None
    found["traced"] = traced(program, carry, given)
    print(json.dumps(found), flush=True)


# What runs in the first process.


class Program:
    """A process that compiles and measures one program."""

    def __init__(self, root, part, name):
        paths = [str(root), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false", PYTHONPATH=os.pathsep.join(paths))
        arguments = [sys.executable, __file__, "--child", part, name]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 # It lasts as long as the process.
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        self.process = subprocess.Popen(arguments, env=environment, **pipes)
        self.said = None

    def tell(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def hear(self):
        """Its next line; ``None`` if it came to an end."""
        self.said = self.process.stdout.readline().strip()
        if not self.said:
            self.errors.seek(0)
            print(self.errors.read()[-1500:], file=sys.stderr, flush=True)
        return self.said or None


def row(cells):
    print(
        "".join(f"{cell!s:<{width}}" for cell, width in zip(cells, (44, 26, 13, 11, 10, 7, 16), strict=True)).rstrip()
    )


def measured(found, base):
    low, middle, high = found["ms"]
    ratio = f" {middle / base['ms'][1]:.2f}" if base else ""
    seen = f"{found['traced'][0]:.0f}, {found['traced'][1]:.2f} ms" if found["traced"] else "-"
    peak = f"{found['peak']:.2f}" if found["peak"] else "-"
    times = f"{middle:.3f} [{low:.3f}, {high:.3f}]{ratio}"
    return times, f"{found['compiled']:.1f}", peak, found["launches"], found["waits"], seen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--before", type=Path, help="a checkout of an older version; its first of --trits is measured")
    parser.add_argument("--trits", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parts", nargs="+", default=["optimizer", "whole", "matrices"])
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    began = time.perf_counter()
    ours = ["1 trit" if t == 1 else f"{t} trits" for t in options.trits]
    roots = {"": HERE.parent} | ({" before": options.before.resolve()} if options.before else {})
    wanted = []
    for part in options.parts:
        first = {"optimizer": [], "whole": ["forward and backward"], "matrices": ["AdamW"]}[part]
        for batch in BATCHES if part == "matrices" else [None]:
            place = part if batch is None else f"matrices, batch {batch}"
            wanted += [(place, name, "") for name in [*first, "MultiSteps"]]
            wanted += [(place, name, age) for name in ours for age in roots if name == ours[0] or not age]
    started = {key: Program(roots[key[2]], *key[:2]) for key in wanted}
    for program in started.values():
        program.hear()
    alone = [key for key in wanted if key[0] == "optimizer"]
    for key in alone:
        started[key].tell()
        started[key].hear()
    others = [key for key in wanted if key[0] != "optimizer"]
    for key in others:
        started[key].tell()
    for key in others:
        started[key].hear()
    results = {}
    for key in wanted:
        if started[key].said:
            started[key].tell()
            if started[key].hear():
                results[key] = json.loads(started[key].said)
        started[key].process.stdin.close()
        started[key].process.wait()
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "optax", "numpy"))
    print(f"{next(iter(results.values()))['card']}; {versions}; GPT-2 of 124 million parameters, 8 x 1024 tokens, and")
    print(f"{LAYERS} matrices of {WIDTH} x {WIDTH}; {ROUNDS} rounds of {STEPS} steps, none emits; {ROUNDS=} {STEPS=}")
    row(["", "ms [quartiles] ratio", "compiled, s", "peak, B/p", "launches", "waits", "traced"])
    for place in dict.fromkeys(key[0] for key in wanted):
        base = results.get((place, "forward and backward", "")) or results.get((place, "MultiSteps", ""))
        for key in (key for key in wanted if key[0] == place):
            cells = measured(results[key], base) if key in results else ["failed", *[""] * 5]
            row([f"{place}, {key[1]}{key[2]}", *cells])
    print(
        f"ratios of times are to the forward and backward pass, or to MultiSteps; {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
