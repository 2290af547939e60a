"""The cost of a micro-step that only accumulates: GPT-2 of 124 million parameters in 148 leaves, on a GPU.

Run `python benchmarks/micro_step.py | tee benchmarks/micro_step_gpu.log`. A program is compiled; then `STEPS` of its
steps are in flight, in `ROUNDS` rounds, with a donated state. There are two parts:

    optimizer    update and apply_updates, of existing gradients
    whole        forward and backward in bfloat16, with layers recomputed, on 8 x 1024 tokens, and the optimizer

Windows are so long that no step emits. Each whole program is alone on the device. The allocator's peak only grows, so
programs that need little memory come first, and `forward and backward` again at the end. With `--together` all programs
are compiled at the same time, which takes less time in all, but longer for each.
"""

import argparse
import concurrent.futures
import functools
import gc
import importlib.metadata
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vsa_optax

LAYERS, WIDTH, HEADS, ALPHABET, CONTEXT = 12, 768, 12, 50257, 1024
STEPS, ROUNDS = 10, 5
NEVER = 10**6


def shapes(layers=LAYERS):
    """Of the parameters, a leaf each: 12 a layer, two embeddings and the last norm."""

    def linear(inner, outer):
        return {"kernel": (inner, outer), "bias": (outer,)}

    norm = {"scale": (WIDTH,), "bias": (WIDTH,)}
    layer = {
        "norm_1": norm,
        "qkv": linear(WIDTH, 3 * WIDTH),
        "out": linear(WIDTH, WIDTH),
        "norm_2": norm,
        "up": linear(WIDTH, 4 * WIDTH),
        "down": linear(4 * WIDTH, WIDTH),
    }
    model = {"tokens": (ALPHABET, WIDTH), "places": (CONTEXT, WIDTH), "layers": [layer] * layers, "norm": norm}
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), model, is_leaf=_is_shape)


def _is_shape(node):
    return isinstance(node, tuple)


@functools.partial(jax.jit, static_argnums=0)
def init(layers):
    leaves, treedef = jax.tree.flatten(shapes(layers))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(
        treedef, [0.02 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )


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
    heads = [y.reshape(*y.shape[:-1], HEADS, WIDTH // HEADS) for y in (q, k, v)]
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


def programs(layers, parts, names, batch):
    """For each name a step, and functions that make its carry and what else it is given."""
    params = functools.partial(init, layers)
    tokens = functools.partial(jax.random.randint, jax.random.key(1), (batch, CONTEXT + 1), 0, ALPHABET)

    def gradients():
        return jax.tree.map(lambda x: 1e-3 * x, params())

    out = {}
    if "whole" in parts:

        def pair():
            return params(), gradients()

        out["whole, forward and backward"] = forward_and_backward, pair, tokens
    chosen = {name: opt for name, opt in accumulators().items() if name in names}
    for part, made, given in (("optimizer", optimizer_part, gradients), ("whole", whole, tokens)):
        for name, opt in chosen.items() if part in parts else ():
            out[f"{part}, {name}"] = (
                made(opt),
                functools.partial(lambda opt: (params(), opt.init(params())), opt),
                given,
            )
    if "whole" in parts and "AdamW" in names:
        adamw = optax.adamw(1e-3)
        out["whole, AdamW"] = whole(adamw), lambda: (params(), adamw.init(params())), tokens
    order = ["optimizer", "forward", "AdamW", "trit", "MultiSteps"]
    place = {name: next(i for i, word in enumerate(order) if word in name) for name in out}
    return {name: out[name] for name in sorted(out, key=place.get)}


def compiled(step, carry, given):
    began = time.perf_counter()
    program = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(carry), jax.eval_shape(given)).compile()
    return program, time.perf_counter() - began


def measured(program, carry, given):
    """Seconds a step in each round, and the allocator's peak in bytes."""
    carry, given = jax.block_until_ready((jax.tree.map(jnp.array, carry()), given()))
    gc.collect()
    seconds = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        for _ in range(STEPS):
            carry = program(carry, given)
        jax.block_until_ready(carry)
        seconds.append((time.perf_counter() - began) / STEPS)
    return seconds[1:], (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--parts", nargs="+", default=["optimizer", "whole"], choices=["optimizer", "whole"])
    parser.add_argument("--names", nargs="+", default=["AdamW", "1 trit", "2 trits", "3 trits", "MultiSteps"])
    parser.add_argument("--together", action="store_true", help="compile all programs at the same time")
    options = parser.parse_args()
    packages = ("jax", "jaxlib", "optax", "numpy")
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"machine: {platform.machine()}, {jax.devices()[0].device_kind}; {versions}")
    model = shapes(options.layers)
    print(f"{optax.tree.size(model):,} parameters in {len(jax.tree.leaves(model))} leaves; {options.batch} x {CONTEXT}")
    how = "together" if options.together else "one by one"
    print(f"{ROUNDS} rounds of {STEPS} steps in flight; median [quartiles]; compiled {how}")
    steps = programs(options.layers, options.parts, options.names, options.batch)
    with concurrent.futures.ThreadPoolExecutor(len(steps) if options.together else 1) as pool:
        ready = {name: pool.submit(compiled, *step) for name, step in steps.items()}
        if options.together:
            concurrent.futures.wait(ready.values())
        again = ["whole, forward and backward"] if "whole" in options.parts else []
        for name in [*steps, *again]:
            program, compiling = ready[name].result()
            if not options.together:
                concurrent.futures.wait(ready.values())  # Nothing is measured while another compiles.
            seconds, peak = measured(program, *steps[name][1:])
            low, middle, high = 1e3 * np.percentile(seconds, [25, 50, 75])
            print(
                f"{name:32s} {middle:8.3f} ms [{low:.3f}, {high:.3f}]  compiled in {compiling:5.1f} s"
                f"  peak {peak / 2**20:8.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
