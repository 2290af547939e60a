"""The optimizer's part of a micro-step that only accumulates, on the 148 leaves of GPT-2, without the model.

Run `python benchmarks/micro_step_leaves.py | tee benchmarks/micro_step_leaves_gpu.log` on a GPU. First all variants
take turns in one process; then each is profiled in a process of its own. Steps are in flight, with everything donated.
"""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
import warnings

import gpt2
import jax
import jax.numpy as jnp
import numpy as np
import optax

import vsa_optax

EVERY_K, STEPS, ROUNDS = 64, 8, 5
VARIANTS = {
    "optax.MultiSteps": lambda adamw: optax.MultiSteps(adamw, EVERY_K),
    "one trit": lambda adamw: vsa_optax.ternary_multi_steps(adamw, EVERY_K, trits=1),
    "two trits": lambda adamw: vsa_optax.ternary_multi_steps(adamw, EVERY_K, trits=2),
}


class Variant:
    """A compiled micro-step and its carry."""

    def __init__(self, name, params):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 64 micro-batches are many for one trit.
            opt = VARIANTS[name](optax.adamw(1e-3))

        def step(params, state, gradients):
            updates, state = opt.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.carry = jax.tree.map(jnp.array, (params, jax.jit(opt.init)(params)))
        self.gradients = jax.tree.map(lambda x: 0.01 * jax.random.normal(jax.random.key(x.size), x.shape), params)
        began = time.perf_counter()
        self.call = jax.jit(step, donate_argnums=(0, 1)).lower(*self.carry, self.gradients).compile()
        self.compiling = time.perf_counter() - began

    def block(self, steps):
        """Milliseconds a step."""
        began = time.perf_counter()
        for _ in range(steps):
            self.carry = self.call(*self.carry, self.gradients)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - began) / steps * 1e3


def profiled(variant, steps=4):
    """Launches a step, and milliseconds of them."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            variant.block(steps)
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        lines = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
        events = [event for line in lines if line.name.startswith("Stream") for event in line.events]
    return len(events) / steps, sum(event.duration_ns for event in events) / steps / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", choices=VARIANTS, help="profile this one")
    parser.add_argument("--small", action="store_true", help="one narrow layer, to try the script")
    options = parser.parse_args()
    params = gpt2.init(jax.random.key(0), gpt2.TINY if options.small else gpt2.SMALL)
    if options.alone:
        variant = Variant(options.alone, params)
        times = sorted(variant.block(STEPS) for _ in range(ROUNDS))[:-1]
        launches, busy = profiled(variant)
        print(f"{options.alone:18s} alone: {np.median(times):.2f} ms, busy {busy:.2f} ms, {launches:.0f} launches")
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "optax"))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}")
    print(f"versions: python {platform.python_version()}, {versions}")
    num_leaves = len(jax.tree.leaves(params))
    print(f"{optax.tree.size(params):,} parameters in {num_leaves} leaves; n = {ROUNDS} rounds of {STEPS}")
    variants = {name: Variant(name, params) for name in VARIANTS}
    times = {name: [] for name in VARIANTS}
    for _ in range(ROUNDS):
        for name, variant in variants.items():
            times[name].append(variant.block(STEPS))
    for name, variant in variants.items():
        low, *_, high = sorted(times[name])[:-1]
        temporary, seconds = variant.call.memory_analysis().temp_size_in_bytes >> 20, variant.compiling
        print(
            f"{name:18s} {low:.2f} to {high:.2f} ms, compiles in {seconds:.1f} s, {temporary} MiB of temporaries",
            flush=True,
        )
    del variants, variant
    if jax.default_backend() == "gpu":
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        for name in VARIANTS:
            small = ["--small"] if options.small else []
            subprocess.run([sys.executable, __file__, "--alone", name, *small], check=True, env=environment)


if __name__ == "__main__":
    main()
