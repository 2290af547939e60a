"""GPT-2 as published, 124 million parameters in 148 leaves: a training step of the usual size for a GPU.

Radford et al., "Language models are unsupervised multitask learners" (2019): learned positions, normalisation before
attention and before the MLP, the tanh approximation of GELU, and output weights tied to the embedding. Parameters are
float32, matrix products bfloat16.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Size(NamedTuple):
    """The size of the model: tokens, positions, width, layers and heads."""

    vocabulary: int = 50257
    context: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12


SMALL = Size()
TINY = Size(vocabulary=97, context=16, width=32, layers=1, heads=2)


def init(key, size):
    """Parameters: normal with deviation 0.02, biases zero, scales one."""
    keys = iter(jax.random.split(key, 2 + 4 * size.layers))

    def dense(rows, columns):
        return {"kernel": 0.02 * jax.random.normal(next(keys), (rows, columns)), "bias": jnp.zeros(columns)}

    def norm():
        return {"scale": jnp.ones(size.width), "bias": jnp.zeros(size.width)}

    return {
        "tokens": 0.02 * jax.random.normal(next(keys), (size.vocabulary, size.width)),
        "positions": 0.02 * jax.random.normal(next(keys), (size.context, size.width)),
        "layers": [
            {
                "norm_1": norm(),
                "attention_in": dense(size.width, 3 * size.width),
                "attention_out": dense(size.width, size.width),
                "norm_2": norm(),
                "mlp_in": dense(size.width, 4 * size.width),
                "mlp_out": dense(4 * size.width, size.width),
            }
            for _ in range(size.layers)
        ],
        "norm": norm(),
    }


def loss(params, windows, size):
    """Mean cross-entropy of the next token; ``windows`` are ``[batch, context + 1] int32``."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    x = (params["tokens"][inputs] + params["positions"][: inputs.shape[1]]).astype(jnp.bfloat16)
    for layer in params["layers"]:
        x = x + _dense(
            layer["attention_out"], _attention(_dense(layer["attention_in"], _norm(layer["norm_1"], x)), size)
        )
        x = x + _dense(layer["mlp_out"], jax.nn.gelu(_dense(layer["mlp_in"], _norm(layer["norm_2"], x))))
    logits = _norm(params["norm"], x) @ params["tokens"].T.astype(jnp.bfloat16)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets).mean()


def _attention(x, size):
    batch, length, _ = x.shape
    query, key, value = jnp.split(x.reshape(batch, length, 3 * size.heads, -1), 3, axis=2)
    return jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(batch, length, size.width)


def _dense(weights, x):
    return x @ weights["kernel"].astype(jnp.bfloat16) + weights["bias"].astype(jnp.bfloat16)


def _norm(weights, x):
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)
    return (x * weights["scale"] + weights["bias"]).astype(jnp.bfloat16)
