"""One trial of `largest_model.py`, in a process of its own: micro-steps of a transformer of some depth.

The argument is a JSON object of settings. Each line of output is ``RESULT`` and a JSON object: one as soon as the depth
is known, whose `out_of_memory` says that nothing has run yet, and one at the end.
"""

import concurrent.futures
import json
import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import vsa_optax

GIGABYTE = 1e9
# The share of the limit in the first guess; the allocator's fragments take some.
FORETOLD_SHARE = 0.985


def init(key, depth, setup):
    """Parameters: the layers stacked on a leading axis, or each in a dictionary of its own."""
    width = setup["width"]
    of_embedding, of_layers = jax.random.split(key)

    def layer(key):
        keys = jax.random.split(key, 4)
        sizes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
        matrices = {
            name: (shape[0] ** -0.5 * jax.random.normal(k, shape)).astype(setup["precision"])
            for k, (name, shape) in zip(keys, sizes.items(), strict=True)
        }
        return matrices | {name: jnp.ones(width, setup["precision"]) for name in ("norm_1", "norm_2")}

    # One after the other: drawn all at once, random numbers would take more memory than training.
    layers = jax.lax.map(layer, jax.random.split(of_layers, depth))
    if setup["layout"] == "leaves":
        layers = [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(depth)]
    embedding = 0.02 * jax.random.normal(of_embedding, (setup["vocabulary"], width))
    return {"embedding": embedding.astype(setup["precision"]), "layers": layers, "norm": jnp.ones(width)}


def loss(params, tokens, setup):
    """Mean cross-entropy of ``[batch, context + 1] int32``; activations in bfloat16, layers recomputed."""

    def normalized(x, gain):
        x = x.astype(jnp.float32)
        return (gain * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)).astype(jnp.bfloat16)

    @jax.checkpoint
    def layer(hidden, weights):
        w = {name: x.astype(jnp.bfloat16) for name, x in weights.items()}
        qkv = normalized(hidden, weights["norm_1"]) @ w["qkv"]
        heads = [x.reshape(*x.shape[:2], -1, setup["head"]) for x in jnp.split(qkv, 3, axis=-1)]
        attended = jax.nn.dot_product_attention(*heads, is_causal=True).reshape(hidden.shape)
        hidden = hidden + attended @ w["out"]
        return hidden + jax.nn.gelu(normalized(hidden, weights["norm_2"]) @ w["up"]) @ w["down"], None

    hidden = params["embedding"][tokens[:, :-1]].astype(jnp.bfloat16)
    if setup["layout"] == "scan":
        hidden, _ = jax.lax.scan(layer, hidden, params["layers"])
    else:
        for weights in params["layers"]:
            hidden, _ = layer(hidden, weights)
    logits = normalized(hidden, params["norm"]) @ params["embedding"].astype(jnp.bfloat16).T
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()


def optimizer(setup):
    """AdamW, its first moment in the precision of the parameters, behind an accumulator."""
    inner = optax.adamw(1e-4, mu_dtype=jnp.dtype(setup["precision"]))
    method, k = setup["method"], setup["every_k"]
    if method == "none":
        return inner
    if method.startswith("MultiSteps"):
        dtype = method.partition(", ")[2]
        return optax.MultiSteps(inner, k, accumulator_dtype=jnp.dtype(dtype)).gradient_transformation()
    return vsa_optax.ternary_multi_steps(inner, k, trits=int(method[0]))


class Step(NamedTuple):
    """The donated micro-step of a model of some depth, compiled."""

    run: Callable
    opt: optax.GradientTransformation
    depth: int
    num: int  # The number of parameters.
    foretold: int  # The bytes by XLA's analysis: arguments, outputs in places of their own, temporaries.
    compile_seconds: float


def shapes(opt, depth, setup):
    """The shapes of the parameters and the state."""
    params = jax.eval_shape(lambda: init(jax.random.key(0), depth, setup))
    return params, jax.eval_shape(opt.init, params)


def compiled_step(depth, setup):
    began = time.perf_counter()
    opt = optimizer(setup)

    def step(params, state, tokens):
        value, gradients = jax.value_and_grad(loss)(params, tokens, setup)
        updates, state = opt.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state = shapes(opt, depth, setup)
    tokens = jax.ShapeDtypeStruct((setup["batch"], setup["context"] + 1), jnp.int32)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens).compile()
    memory = compiled.memory_analysis()
    foretold = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    num = sum(p.size for p in jax.tree.leaves(params))
    seconds = time.perf_counter() - began
    return Step(compiled, opt, depth, num, foretold - memory.alias_size_in_bytes, seconds)


def bytes_limit(setup):
    """The bytes that JAX may take."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", setup["budget"] * GIGABYTE)


def deepest_step(setup):
    """The step of the largest depth whose bytes should be within the limit.

    The first guess is by the bytes of parameters, state and gradients. Two depths, that one and half of it, give the
    bytes of a layer. At small depths they would not: there the peak is that of the logits.
    """
    opt, room = optimizer(setup), FORETOLD_SHARE * bytes_limit(setup)
    few, more = (
        sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves((*shapes(opt, depth, setup), shapes(opt, depth, setup)[0]))
        )
        for depth in (2, 4)
    )
    guess = max(2, int(room / ((more - few) / 2)))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        half, step = pool.map(lambda depth: compiled_step(depth, setup), (guess // 2, guess))
    a_layer = (step.foretold - half.foretold) / (guess - guess // 2)
    for _ in range(3):
        depth = max(1, step.depth + math.floor((room - step.foretold) / a_layer))
        if depth == step.depth:
            break
        step = compiled_step(depth, setup)
    return step


def trial(setup):
    """Micro-steps at a depth, or at the one foretold. Prints a line when that is known, and one at the end."""
    step = compiled_step(setup["depth"], setup) if setup["depth"] else deepest_step(setup)
    result = {name: getattr(step, name) for name in ("depth", "num", "foretold", "compile_seconds")}
    result["limit"] = bytes_limit(setup)
    report(result | {"out_of_memory": "not known"})
    device = jax.devices()[0]
    if device.platform == "cpu" and step.foretold > result["limit"]:
        raise MemoryError(f"RESOURCE_EXHAUSTED: {step.foretold:.0f} bytes by XLA's analysis")
    params = jax.jit(lambda: init(jax.random.key(0), step.depth, setup))()
    state = jax.jit(step.opt.init)(params)
    shape = (setup["batch"], setup["context"] + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, setup["vocabulary"], jnp.int32)
    seconds, values = [], []
    for count in setup["steps"]:
        start = time.perf_counter()
        for _ in range(count):
            params, state, value = step.run(params, state, tokens)
        values.append(float(value))
        seconds.append((time.perf_counter() - start) / count)
    if not all(map(math.isfinite, values)):
        raise RuntimeError(f"losses {values}")
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    rate = setup["batch"] * setup["context"] / min(seconds[1:] or seconds)
    report(result | {"tokens_a_second": rate, "peak": peak, "losses": values})


def report(result):
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    trial(json.loads(sys.argv[1]))
