"""A micro-step where activations are small: peak memory and times, to compile and to run, beside `optax.MultiSteps`.

Run `python benchmarks/accumulation_peak.py memory > benchmarks/accumulation_peak_cpu.log`, and the same with `speed`
for `accumulation_speed_cpu.log`. Without a name all parts are run, `compile` among them. `memory` needs no quiet
machine: it reads the analysis by XLA of the compiled and donated step, with `value_and_grad` and AdamW. It says nothing
about the allocator of a GPU. Parameters are eight matrices, as leaves of their own or stacked in one leaf over which
the model scans.
"""

import argparse
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from accumulation_costs import stepper
from codec_tasks import TRITS, in_trits, print_header, print_row, quartiles, run_parts, verdict

import vsa_optax

LAYERS, EVERY_K = 8, 8
MOST_BEYOND = {1: 1.0, 2: 1.0}
MOST_TIME = {1: 0.9, 2: 1.0, 3: 1.1}
MOST_COMPILE = 3.0


def accumulators(inner, every_k):
    """By name: `optax.MultiSteps`, in float32 and bfloat16, and trits."""
    found = {
        "optax.MultiSteps": optax.MultiSteps(inner, every_k),
        "optax.MultiSteps, bfloat16": optax.MultiSteps(inner, every_k, accumulator_dtype=jnp.bfloat16),
    }
    return found | {in_trits(t): vsa_optax.ternary_multi_steps(inner, every_k, trits=t) for t in TRITS}


def of_leaves(params, x):
    """The loss of a network whose matrices are leaves."""
    for matrix in params:
        x = jnp.tanh(x @ matrix)
    return jnp.mean(x**2)


def of_stack(params, x):
    """The loss of the same network, its matrices in one leaf."""
    return jnp.mean(jax.lax.scan(lambda x, matrix: (jnp.tanh(x @ matrix), None), x, params)[0] ** 2)


def shapes(width, *, is_stacked, num=LAYERS):
    """The network's parameters, and its loss."""
    if is_stacked:
        return jax.ShapeDtypeStruct((num, width, width), jnp.float32), of_stack
    return [jax.ShapeDtypeStruct((width, width), jnp.float32)] * num, of_leaves


def lowered(opt, params, loss, batch):
    """The donated step; without an optimizer one of gradient descent."""

    def step(params, state, x):
        value, gradients = jax.value_and_grad(loss)(params, x)
        if opt is None:
            return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients), state, value
        updates, state = opt.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = () if opt is None else jax.eval_shape(opt.init, params)
    width = jax.tree.leaves(params)[0].shape[-1]
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, jax.ShapeDtypeStruct((batch, width), jnp.float32))


def bytes_a_parameter(step, params):
    """Arguments, outputs and temporaries, less what takes an argument's place."""
    memory = step.compile().memory_analysis()
    in_all = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (in_all - memory.alias_size_in_bytes) / sum(p.size for p in jax.tree.leaves(params))


def memory(options):
    print_header(
        "MEMORY: bytes a parameter of the whole donated step, by XLA's analysis",
        f"{LAYERS} matrices of {options.width} x {options.width}; AdamW; K = {EVERY_K}",
    )
    inner = optax.adamw(1e-3)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), inner)
    for is_stacked in (False, True):
        params, loss = shapes(options.width, is_stacked=is_stacked)
        for batch in options.batches:
            place = "stacked in one leaf" if is_stacked else f"{LAYERS} leaves"
            widths = [40, 10, 14, 26, 40]
            print_row(widths, [f"{place}, batch {batch}", "bytes", "beyond AdamW", "beyond no optimizer + 8", ""])
            bare = bytes_a_parameter(lowered(None, params, loss, batch), params)
            plain = bytes_a_parameter(lowered(inner, params, loss, batch), params)
            print_row(widths, ["gradient descent", f"{bare:.2f}", "", "", ""])
            print_row(widths, ["AdamW", f"{plain:.2f}", "", f"{plain - bare - 8:.2f}", ""])
            for name, opt in accumulators(inner, EVERY_K).items():
                value = bytes_a_parameter(lowered(opt, params, loss, batch), params)
                limit = {in_trits(t): most for t, most in MOST_BEYOND.items()}.get(name)
                target = f"<= {limit:g} beyond AdamW: {verdict(value - plain <= limit)}" if limit else ""
                print_row(widths, [name, f"{value:.2f}", f"{value - plain:.2f}", f"{value - bare - 8:.2f}", target])
            opt = vsa_optax.ternary_multi_steps(clipped, EVERY_K, trits=2)
            value = bytes_a_parameter(lowered(opt, params, loss, batch), params)
            row = [f"{in_trits(2)}, gradients clipped by their norm", f"{value:.2f}", f"{value - plain:.2f}"]
            print_row(widths, [*row, f"{value - bare - 8:.2f}", ""])
            print(flush=True)


def compile_times(options):
    print_header(
        "COMPILE: processor seconds, and those to trace and lower, of the step above with a batch of 8",
        f"medians of {options.repeats}, all in turn; ratios of all seconds together to optax.MultiSteps's",
    )
    for num in options.leaves:
        params, loss = shapes(options.width, is_stacked=False, num=num)
        ways = {"AdamW": optax.adamw(1e-3)} | accumulators(optax.adamw(1e-3), EVERY_K)
        del ways["optax.MultiSteps, bfloat16"]
        taken = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, opt in ways.items():
                began = time.process_time()
                step = lowered(opt, params, loss, 8)
                between = time.process_time()
                step.compile()
                taken[name].append((between - began, time.process_time() - between))
        widths = [40, 14, 14, 10, 40]
        print_row(widths, [f"{num} leaves", "lowering, s", "compiling, s", "ratio", ""])
        whole = {name: np.median(np.sum(values, axis=1)) for name, values in taken.items()}
        for name, values in taken.items():
            lower, compile_ = np.median(values, axis=0)
            ratio = whole[name] / whole["optax.MultiSteps"]
            target = f"<= {MOST_COMPILE:g}: {verdict(ratio <= MOST_COMPILE)}" if "trit" in name else ""
            print_row(widths, [name, f"{lower:.2f}", f"{compile_:.2f}", f"{ratio:.2f}", target])
        print(flush=True)


def speed(options):
    params, _ = shapes(1024, is_stacked=False)
    print_header(
        "SPEED: the optimizer's part of a micro-step, AdamW inside, everything donated",
        f"{jax.devices()[0].device_kind}; {LAYERS} leaves of 1024 x 1024",
        f"n = {options.rounds} rounds in which all take turns; median [quartiles]; ratios within a round",
    )
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), params)
    gradients = [1e-3 * jax.random.normal(jax.random.key(i), p.shape) for i, p in enumerate(params)]
    ways = accumulators(optax.adamw(1e-3), EVERY_K)
    steppers = {name: stepper(opt, zeros, gradients, EVERY_K) for name, opt in ways.items()}
    taken = {(emits, name): [] for emits in (False, True) for name in steppers}
    for turn in range(options.rounds + 3):
        for (emits, name), seconds in taken.items():
            value = steppers[name](emits)
            if turn >= 3:
                seconds.append(value)
    for emits, title in ((False, "No emission"), (True, "Emission")):
        widths = [30, 26, 26, 30]
        print_row(widths, [title, "ms", "ratio to MultiSteps", ""])
        for name in steppers:
            values = np.array(taken[emits, name])
            ratios = values / np.array(taken[emits, "optax.MultiSteps"])
            limit = {in_trits(t): most for t, most in MOST_TIME.items()}.get(name)
            target = f"<= {limit:g}: {verdict(np.median(ratios) <= limit)}" if limit and not emits else ""
            print_row(widths, [name, quartiles(1e3 * values), quartiles(ratios), target])
        print(flush=True)


MODES = {"memory": memory, "compile": compile_times, "speed": speed}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", choices=[*MODES, "all"], default="all")
    parser.add_argument("--width", type=int, default=256, help="in memory and compile")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1024], help="in memory")
    parser.add_argument("--leaves", type=int, nargs="+", default=[8], help="in compile, how many")
    parser.add_argument("--repeats", type=int, default=3, help="in compile")
    parser.add_argument("--rounds", type=int, default=30, help="in speed")
    options = parser.parse_args()
    run_parts(MODES, options.modes, options)


if __name__ == "__main__":
    main()
