"""The cost of a `multisecant` step compared with plain AdamW, with steps in flight as in training; for a GPU.

Run `python benchmarks/multisecant_step.py | tee benchmarks/multisecant_step_gpu.log`. Each variant takes blocks of
steps with a donated state, without waiting between them. Blocks of all variants alternate in rounds, and ratios are
taken within a round. Beside the time, the table has the bytes per parameter that XLA reports for a program's arguments
and temporaries.
"""

import argparse
import importlib.metadata
import os
import platform
import time

import byte_transformer
import jax
import jax.numpy as jnp
import noiseless_poisson
import numpy as np
import optax

import vsa_optax

RATE = 1e-3


def variants():
    def made(**settings):
        return vsa_optax.multisecant(optax.adamw(RATE), **settings)

    return {
        "plain": optax.with_extra_args_support(optax.adamw(RATE)),
        "multisecant": made(),
        "window 16": made(history_window=16),
        "window 16, float32": made(history_window=16, history_dtype=None),
        "flattened": optax.flatten(made()),
        "flattened, window 16": optax.flatten(made(history_window=16)),
        "lbfgs, memory 16, its step alone": optax.chain(optax.scale_by_lbfgs(16), optax.scale(-RATE)),
    }


def compiled(loss, opt, params):
    """The donated step of an optimizer, compiled for these parameters, and its first carry."""

    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    carry = jax.tree.map(jnp.array, (params, opt.init(params)))  # Optax's L-BFGS starts with one array in two places.
    return jax.jit(step, donate_argnums=(0, 1)).lower(*carry).compile(), carry


def block(program, carry, steps):
    """Seconds a step, and the carry after them."""
    start = time.perf_counter()
    for _ in range(steps):
        carry = program(*carry)
    jax.block_until_ready(carry)
    return (time.perf_counter() - start) / steps, carry


def report(name, loss, params, options):
    """Prints one table."""
    size, steps, rounds = optax.tree.size(params), options.steps, options.rounds
    programs, carries, needs, compiling = {}, {}, {}, {}
    chosen = {name: opt for name, opt in variants().items() if name == "plain" or name in options.variants.split(";")}
    for variant, opt in (chosen if options.variants else variants()).items():
        start = time.perf_counter()
        programs[variant], carries[variant] = compiled(loss, optax.with_extra_args_support(opt), params)
        compiling[variant] = time.perf_counter() - start
        memory = programs[variant].memory_analysis()
        needs[variant] = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / size
        _, carries[variant] = block(programs[variant], carries[variant], 3)
    seconds = {variant: [] for variant in programs}
    for _ in range(rounds):
        for variant, program in programs.items():
            taken, carries[variant] = block(program, carries[variant], steps)
            seconds[variant].append(taken)
    print(f"\n{name}: {size:,} parameters in {len(jax.tree.leaves(params))} leaves")
    print(
        f"{'':34s} {'ratio to plain [quartiles]':28s} {'ms a step':>9s} {'bytes a parameter':>18s} {'compiles, s':>12s}"
    )
    plain = np.array(seconds["plain"])
    for variant, values in seconds.items():
        low, middle, high = np.percentile(np.array(values) / plain, [25, 50, 75])
        ratio = f"{middle:6.3f} [{low:.3f}, {high:.3f}]"
        milliseconds = 1e3 * np.median(values)
        print(
            f"{variant:34s} {ratio:28s} {milliseconds:9.3f} {needs[variant]:18.1f} {compiling[variant]:12.1f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of a block")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tasks", default="bytes,poisson", help="which of bytes, poisson")
    parser.add_argument("--variants", default="", help='only these, and plain: "multisecant;window 16"')
    options = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "optax"))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}")
    print(f"versions: python {platform.python_version()}, {versions}")
    print(f"n = {options.rounds} rounds of {options.steps} steps in flight; seed 0")
    if "bytes" in options.tasks:
        task = byte_transformer.byte_transformer(64, 256)
        batch = jnp.asarray(task.batches(0, 1)[0])
        report(
            "byte transformer, batch 64 x 256",
            lambda p: task.loss(p, batch),
            task.init(0),
            options,
        )
    if "poisson" in options.tasks:
        task = noiseless_poisson.poisson(256, 8192)
        report("Poisson PINN, 8192 points", lambda p: task.loss(p, ()), task.init(0), options)


if __name__ == "__main__":
    main()
