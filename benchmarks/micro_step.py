"""The cost of a micro-step that only accumulates: GPT-2 of 124 million parameters in 148 leaves, on a GPU.

Run `python benchmarks/micro_step.py | tee benchmarks/micro_step_gpu.log`. A program is compiled; then `STEPS` of its
steps are in flight, in `ROUNDS` rounds, with a donated state. There are two parts:

    optimizer    update and apply_updates, of existing gradients
    whole        forward and backward in bfloat16, with layers recomputed, on 8 x 1024 tokens, and the optimizer

Windows are so long that no step emits. With trits, a step is compiled in two ways, by `jax.jit` and by
`vsa_optax.jit_by_phase`. The second compiles a program for these steps and one for those that may emit; the first step
of all runs the latter. Each whole program is alone on the device. The allocator's peak only grows, so programs that
need little memory come first, and `forward and backward` again at the end. With `--together` all programs are compiled
at the same time, which takes less time in all, but longer for each.

The last lines have each whole step relative to forward and backward, which is the mean of both measurements, and what
it takes beyond that relative to `MultiSteps`.
"""

import argparse
import concurrent.futures
import functools
import gc
import importlib.metadata
import pathlib
import platform
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vsa_optax
from vsa_optax.core.kinds import StepKind

STEPS, ROUNDS = 10, 5
NEVER = 10**6
HEAD = 64  # The width of an attention head.
WAYS = "jit", "by phase"
KINDS = StepKind.ACCUMULATED, StepKind.UNDECIDED


class Size(NamedTuple):
    """The size of the model; the context is in tokens."""

    layers: int = 12
    width: int = 768
    alphabet: int = 50257
    context: int = 1024


TINY = Size(layers=1, width=128, alphabet=997, context=64)


def shapes(size):
    """Of the parameters, a leaf each: 12 a layer, two embeddings and the last norm."""

    def linear(inner, outer):
        return {"kernel": (inner, outer), "bias": (outer,)}

    width = size.width
    norm = {"scale": (width,), "bias": (width,)}
    layer = {
        "norm_1": norm,
        "qkv": linear(width, 3 * width),
        "out": linear(width, width),
        "norm_2": norm,
        "up": linear(width, 4 * width),
        "down": linear(4 * width, width),
    }
    tables = {"tokens": (size.alphabet, width), "places": (size.context, width)}
    model = tables | {"layers": [layer] * size.layers, "norm": norm}
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), model, is_leaf=_is_shape)


def _is_shape(node):
    return isinstance(node, tuple)


def init(size):
    """Parts of one random vector, which is faster to compile than a random array for each leaf."""
    leaves, treedef = jax.tree.flatten(shapes(size))
    numbers = 0.02 * jax.random.normal(jax.random.key(0), (max(leaf.size for leaf in leaves),))
    return jax.tree.unflatten(treedef, [numbers[: leaf.size].reshape(leaf.shape) for leaf in leaves])


def normed(x, norm):
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
    return (unit * (1 + norm["scale"]) + norm["bias"]).astype(jnp.bfloat16)


def applied(x, linear):
    return x @ linear["kernel"].astype(jnp.bfloat16) + linear["bias"].astype(jnp.bfloat16)


@jax.checkpoint
def layered(x, layer):
    q, k, v = jnp.split(applied(normed(x, layer["norm_1"]), layer["qkv"]), 3, axis=-1)
    heads = [y.reshape(*y.shape[:-1], -1, HEAD) for y in (q, k, v)]
    mixed = jax.nn.dot_product_attention(*heads, is_causal=True).reshape(x.shape)
    x = x + applied(mixed, layer["out"])
    return x + applied(jax.nn.gelu(applied(normed(x, layer["norm_2"]), layer["up"])), layer["down"])


def loss(params, tokens):
    """Mean cross-entropy of the next token, in natural units."""
    x = params["tokens"].astype(jnp.bfloat16)[tokens[:, :-1]] + params["places"].astype(jnp.bfloat16)
    for layer in params["layers"]:
        x = layered(x, layer)
    logits = jnp.einsum("btw,vw->btv", normed(x, params["norm"]), params["tokens"].astype(jnp.bfloat16))
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()


def accumulators():
    adamw = optax.adamw(1e-3)
    ternary = {
        f"{trits} trit{'s' * (trits > 1)}": vsa_optax.ternary_multi_steps(adamw, lambda step: NEVER, trits=trits)
        for trits in (1, 2, 3)
    }
    return ternary | {"MultiSteps": optax.MultiSteps(adamw, lambda step: NEVER)}


def optimizer_part(opt):
    def step(carry, gradients):
        params, state = carry
        updates, state = opt.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def whole(opt):
    def step(carry, tokens):
        params, state = carry
        updates, state = opt.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    return step


def forward_and_backward(carry, tokens):
    """The gradients take the place of the last ones."""
    params, _ = carry
    return params, jax.grad(loss)(params, tokens)


class Variant(NamedTuple):
    """A step, functions that make its carry and what else it is given, and the way to compile it."""

    step: object
    carry: object
    given: object
    way: str = "jit"


def variants(size, batch, options):
    """By name, in the order in which they are measured."""
    params = functools.partial(init, size)
    tokens = functools.partial(jax.random.randint, jax.random.key(1), (batch, size.context + 1), 0, size.alphabet)

    def gradients():
        return jax.tree.map(lambda x: 1e-3 * x, params())

    def beginning(opt):
        return lambda: (params(), opt.init(params()))

    out = {}
    if "whole" in options.parts:
        out["whole, forward and backward"] = Variant(forward_and_backward, lambda: (params(), gradients()), tokens)
    for part, made, given in (("optimizer", optimizer_part, gradients), ("whole", whole, tokens)):
        for name, opt in accumulators().items() if part in options.parts else ():
            if name in options.names and "trit" not in name:
                out[f"{part}, {name}"] = Variant(made(opt), beginning(opt), given)
            elif name in options.names:
                for way in options.ways:
                    out[f"{part}, {name}, {way}"] = Variant(made(opt), beginning(opt), given, way)
    if "whole" in options.parts and "AdamW" in options.names:
        adamw = optax.adamw(1e-3)
        out["whole, AdamW"] = Variant(whole(adamw), beginning(adamw), tokens)
    order = ["optimizer", "forward", "AdamW", "trit", "MultiSteps"]
    place = {name: next(i for i, word in enumerate(order) if word in name) for name in out}
    return {name: out[name] for name in sorted(out, key=place.get)}


def compiled(variant):
    """A function that runs a step, and the seconds that each of its programs took to compile."""
    like = jax.eval_shape(variant.carry), jax.eval_shape(variant.given)

    def timed(jitted):
        began = time.perf_counter()
        return jitted.lower(*like).compile(), time.perf_counter() - began

    if variant.way == "jit":
        program, seconds = timed(jax.jit(variant.step, donate_argnums=0))
        return program, [seconds]
    by_phase = vsa_optax.jit_by_phase(variant.step, donate_argnums=0)
    ready = [timed(by_phase.programs[kind]) for kind in KINDS]
    by_phase.programs = dict(zip(KINDS, (program for program, _ in ready), strict=True))
    return by_phase, [seconds for _, seconds in ready]


def in_flight(program, carry, given):
    """The carry after `STEPS` steps, and the seconds of a step."""
    began = time.perf_counter()
    for _ in range(STEPS):
        carry = program(carry, given)
    jax.block_until_ready(carry)
    return carry, (time.perf_counter() - began) / STEPS


def measured(program, variant, is_profiled):
    """Seconds a step in each round, the allocator's peak in bytes, launches a step, and milliseconds of them."""
    carry, given = jax.block_until_ready((jax.jit(variant.carry)(), jax.jit(variant.given)()))
    gc.collect()
    seconds = []
    for _ in range(ROUNDS + 1):
        carry, of_round = in_flight(program, carry, given)
        seconds.append(of_round)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return seconds[1:], peak, profiled(program, carry, given) if is_profiled else None


def profiled(program, carry, given):
    """Launches a step, and milliseconds of them; no launches without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            in_flight(program, carry, given)
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        lines = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
        events = [event for line in lines if line.name.startswith("Stream") for event in line.events]
    return len(events) / STEPS, sum(event.duration_ns for event in events) / STEPS / 1e6


def print_ratios(found):
    """Of the median times, ``found`` in milliseconds by name; ``forward and backward`` has two."""
    medians = {name: np.mean(times) for name, times in found.items()}
    base, theirs = medians.get("whole, forward and backward"), medians.get("whole, MultiSteps", np.nan)
    for name, time_of in medians.items():
        if name.startswith("optimizer"):
            print(f"{name:28s} {time_of / medians.get('optimizer, MultiSteps', np.nan):.3f} of MultiSteps")
        elif time_of != base:
            beyond = f"{time_of - base:.3f} ms beyond it, {(time_of - base) / (theirs - base):.2f} of MultiSteps'"
            print(f"{name:28s} {time_of / base:.4f} of forward and backward; {beyond}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=Size().layers)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--parts", nargs="+", default=["optimizer", "whole"], choices=["optimizer", "whole"])
    parser.add_argument("--names", nargs="+", default=["AdamW", "1 trit", "2 trits", "3 trits", "MultiSteps"])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help="ways to compile steps with trits")
    parser.add_argument("--together", action="store_true", help="compile all programs at the same time")
    parser.add_argument("--profile", action="store_true", help="also count launches, and the time that they take")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    options = parser.parse_args()
    size = TINY if options.tiny else Size(layers=options.layers)
    packages = ("jax", "jaxlib", "optax", "numpy")
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"machine: {platform.machine()}, {jax.devices()[0].device_kind}; {versions}")
    model = shapes(size)
    num_leaves = len(jax.tree.leaves(model))
    print(f"{optax.tree.size(model):,} parameters in {num_leaves} leaves; {options.batch} x {size.context} tokens")
    how = "together" if options.together else "one by one"
    print(f"{ROUNDS} rounds of {STEPS} steps in flight; median [quartiles]; compiled {how}; by phase, two programs")
    steps, found = variants(size, options.batch, options), {}
    with concurrent.futures.ThreadPoolExecutor(len(steps) if options.together else 1) as pool:
        ready = {name: pool.submit(compiled, variant) for name, variant in steps.items()}
        again = ["whole, forward and backward"] if "whole" in options.parts else []
        for name in [*steps, *again]:
            concurrent.futures.wait(ready.values())  # Nothing is measured while another compiles.
            program, compiling = ready[name].result()
            seconds, peak, launched = measured(program, steps[name], options.profile)
            low, middle, high = 1e3 * np.percentile(seconds, [25, 50, 75])
            found.setdefault(name, []).append(middle)
            print(
                f"{name:28s} {middle:8.3f} ms [{low:.3f}, {high:.3f}]"
                f"  compiled in {' and '.join(f'{x:.1f}' for x in compiling)} s  peak {peak / 2**20:.0f} MiB"
                + ("" if launched is None else f"  {launched[0]:.0f} launches, busy {launched[1]:.3f} ms"),
                flush=True,
            )
    print_ratios(found)


if __name__ == "__main__":
    main()
