"""Accumulates gradients in trits and with `optax.MultiSteps`, and measures memory and time.

Run `python benchmarks/accumulation_costs.py memory speed > benchmarks/accumulation_cpu.log` on an otherwise idle
machine; on a GPU the same command makes `accumulation_gpu.log`. Without a name both are run. `memory` draws
`accumulation.png` beside the script. In the committed log of the GPU, the model of 151 million parameters has a width
of 1024, 12 layers and 16 heads as `char_transformer.LARGE`. `accumulation.py` measures the loss of accuracy.
"""

import argparse
import pathlib
import time
import warnings

import accumulation_rivals as rivals
import char_transformer
import codec_tasks as tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
from char_transformer import LARGE
from codec_tasks import TRITS, bits, in_trits, print_row, quartiles, verdict

import vsa_optax

HERE = pathlib.Path(__file__).parent
MOST_BITS = {1: 1.70, 2: 3.3}
NEVER = 10**6


def large_transformer():
    """Shapes of its parameters."""
    return jax.eval_shape(lambda: char_transformer.init(0, LARGE))


def adamw_behind(every_k):
    """AdamW behind `optax.MultiSteps` and behind trits, by name."""
    adamw = optax.adamw(1e-3)
    ternary = {in_trits(t): vsa_optax.ternary_multi_steps(adamw, every_k, trits=t) for t in TRITS}
    return {"optax.MultiSteps": optax.MultiSteps(adamw, every_k)} | ternary


def step_bytes(opt, params, micro_batch):
    """Bytes of arguments, outputs and temporaries of a compiled, donated micro-step, and seconds to compile it."""

    def step(params, state, batch):
        emitted, state = opt.update(jax.grad(char_transformer.loss)(params, batch, LARGE), state, params)
        return optax.apply_updates(params, emitted), state

    batch = jax.ShapeDtypeStruct((micro_batch, LARGE.context + 1), jnp.int32)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(opt.init, params), batch)
    began = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    in_all = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return in_all - memory.alias_size_in_bytes, time.perf_counter() - began


def memory(options):
    params = large_transformer()
    tasks.print_header("MEMORY: AdamW, K = 8", char_transformer.describe(LARGE))
    print("Bits a parameter of the accumulated gradients alone, with scales and padding")
    adamw = optax.adamw(1e-3)
    others = {
        "optax.MultiSteps, bfloat16": optax.MultiSteps(adamw, 8, accumulator_dtype=jnp.bfloat16),
        "int8, blocks of 256": rivals.multi_steps(adamw, 8, rivals.int8_blocks()),
    }
    sizes = {}
    for name, opt in (adamw_behind(8) | others).items():
        sizes[name] = bits(jax.eval_shape(opt.init, params).acc_grads, params)
        most = {in_trits(trits): limit for trits, limit in MOST_BITS.items()}.get(name)
        target = f"target: at most {most:g}, {verdict(sizes[name] <= most)}" if most else ""
        print_row([30, 10, 34], [name, f"{sizes[name]:.3f}", target])
    draw({name: value / 8 for name, value in sizes.items()}, optax.tree.size(params))

    print("\nThe whole compiled, donated micro-step: arguments + outputs + temporaries - aliases")
    for micro_batch in options.micro_batches:
        print_step_bytes(adamw, params, micro_batch)


def print_step_bytes(adamw, params, micro_batch):
    """A table of what each way to accumulate adds to a micro-step."""
    widths = [30, 10, 28, 24, 12, 44]
    heads = [
        f"micro-batches of {micro_batch}",
        "bytes",
        "beyond plain, a parameter",
        "share of MultiSteps's",
        "compiled",
        "",
    ]
    print_row(widths, heads)
    plain, seconds = step_bytes(adamw, params, micro_batch)
    print_row(widths, ["none: plain AdamW", f"{plain / 1e6:.1f} MB", "", "", f"{seconds:.1f} s", ""])
    extra = {}
    for name, opt in adamw_behind(8).items():
        in_all, seconds = step_bytes(opt, params, micro_batch)
        extra[name] = (in_all - plain) / optax.tree.size(params)
        share = extra[name] / extra["optax.MultiSteps"]
        row = [name, f"{in_all / 1e6:.1f} MB", f"{extra[name]:.3f}", f"{share:.1%}", f"{seconds:.1f} s", ""]
        if name != "optax.MultiSteps":
            row[-1] = f"<= 100 %: {verdict(share <= 1)}; stretch <= 25 %: {verdict(share <= 0.25)}"
        print_row(widths, row)


def draw(sizes, num):
    """Bytes a parameter, a bar each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor="white")
    axis = figure.subplots()
    labels = {"optax.MultiSteps": "optax.MultiSteps, f32"}
    names = sorted(sizes, key=sizes.get)
    blue, black = "#0072B2", "#444444"
    colors = [blue if "trit" in name else black for name in names]
    bars = axis.barh([labels.get(name, name) for name in names], [sizes[name] for name in names], color=colors)
    axis.bar_label(bars, fmt="%.2f", padding=4, fontsize=10.5)
    axis.set(xlim=(0, 4.4), xlabel="accumulated gradients, bytes a parameter")
    axis.grid(alpha=0.25, axis="x")
    axis.set_axisbelow(True)
    axis.set_title(f"What is kept between micro-batches (a transformer of {num / 1e6:.1f} M parameters)", fontsize=11)
    figure.savefig(HERE / "accumulation.png", dpi=110)


def stepper(opt, params, gradients, every_k=NEVER):
    """``emitting -> seconds`` of the optimizer's part of a micro-step, everything donated."""

    def step(gradients, state, params):
        emitted, state = opt.update(gradients, state, params)
        return optax.apply_updates(params, emitted), state

    compiled = jax.jit(step, donate_argnums=(0, 1, 2))
    carry = [jax.tree.map(jnp.copy, params), opt.init(params)]

    def timed(emitting):
        carry[1] = carry[1]._replace(mini_step=jnp.int32(every_k - 1 if emitting else 1))
        given = jax.block_until_ready((jax.tree.map(jnp.copy, gradients), carry[1], carry[0]))
        began = time.perf_counter()
        carry[:] = jax.block_until_ready(compiled(*given))
        return time.perf_counter() - began

    return timed


def speed(options):
    rounds = options.rounds
    shapes = large_transformer()
    tasks.print_header(
        "SPEED: the optimizer's part of a micro-step, AdamW behind, gradients, parameters and state donated",
        f"{jax.devices()[0].device_kind}; {optax.tree.size(shapes):,} parameters of the large char transformer",
        f"n = {rounds} rounds in which all take turns; median [quartiles]; ratios within a round",
    )
    params = jax.jit(char_transformer.init, static_argnums=1)(0, LARGE)
    gradients = jax.tree.map(lambda p: 1e-3 * jax.random.normal(jax.random.key(1), p.shape), params)
    # The gradient's memory is no result's, but may be worked in.
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    # A window that ends only where its state says so.
    steppers = {n: stepper(opt, params, gradients) for n, opt in adamw_behind(lambda step: NEVER).items()}
    taken = {(kind, name): [] for kind in ("between", "emitting") for name in steppers}
    for turn in range(rounds + 3):
        for (kind, name), seconds in taken.items():
            value = steppers[name](kind == "emitting")
            if turn >= 3:
                seconds.append(value)
    for kind, title in (("between", "A micro-step that emits nothing"), ("emitting", "The micro-step that emits")):
        widths = [30, 26, 26, 44]
        print_row(widths, [title, "ms", "ratio to MultiSteps", ""])
        for name in steppers:
            values = np.array(taken[kind, name])
            ratios = values / np.array(taken[kind, "optax.MultiSteps"])
            row = [name, quartiles(1e3 * values), quartiles(ratios), ""]
            if kind == "between" and name != "optax.MultiSteps":
                middle = np.median(ratios)
                row[3] = f"<= 100 %: {verdict(middle <= 1)}; stretch <= 40 %: {verdict(middle <= 0.4)}"
            print_row(widths, row)


MODES = {"memory": memory, "speed": speed}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", choices=[*MODES, "all"], default="all")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4], help="in memory")
    parser.add_argument("--rounds", type=int, default=40, help="in speed")
    options = parser.parse_args()
    tasks.run_parts(MODES, options.modes, options)


if __name__ == "__main__":
    main()
