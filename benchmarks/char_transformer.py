"""A small transformer that predicts the next character of Python's standard library: a task for the other scripts.

The text is the source of the running interpreter's own ``*.py`` files, so nothing is downloaded; another Python has
another text, which is why `describe` gives its length and a hash.
"""

import functools
import hashlib
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax

CONTEXT, WIDTH, LAYERS, HEADS = 64, 144, 2, 4
_CHARACTERS = 2_000_000


@functools.cache
def text():
    """``[2,000,000] int32``, and how many characters there are: files by name, what is not ASCII as one character."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = np.frombuffer(b"\f".join(path.read_bytes() for path in files)[:_CHARACTERS], np.uint8)
    alphabet, numbers = np.unique(np.minimum(data, 128), return_inverse=True)
    return numbers.astype(np.int32), len(alphabet)


def describe():
    """One line on text and model."""
    numbers, alphabet = text()
    size = sum(leaf.size for leaf in jax.tree.leaves(init(0)))
    digest = hashlib.sha256(numbers.tobytes()).hexdigest()[:12]
    return (
        f"char transformer: {size:,} parameters, {LAYERS} layers of width {WIDTH}, {HEADS} heads, context {CONTEXT}; "
        f"{len(numbers):,} characters of the standard library's source (sha256 {digest}), alphabet of {alphabet}"
    )


def init(seed):
    """Weights; each layer's leaves are stacked on a leading axis."""
    alphabet = text()[1]
    keys = iter(jax.random.split(jax.random.key(seed), 6))

    def normal(*shape, scale):
        return scale * jax.random.normal(next(keys), shape)

    deep = (2 * LAYERS * WIDTH) ** -0.5
    return {
        "embedding": normal(alphabet, WIDTH, scale=1.0),
        "position": normal(CONTEXT, WIDTH, scale=0.3),
        "layers": {
            "attention_in": normal(LAYERS, WIDTH, 3 * WIDTH, scale=WIDTH**-0.5),
            "attention_out": normal(LAYERS, WIDTH, WIDTH, scale=deep),
            "mlp_in": normal(LAYERS, WIDTH, 4 * WIDTH, scale=WIDTH**-0.5),
            "mlp_in_bias": jnp.zeros([LAYERS, 4 * WIDTH]),
            "mlp_out": normal(LAYERS, 4 * WIDTH, WIDTH, scale=deep / 2),
            "mlp_out_bias": jnp.zeros([LAYERS, WIDTH]),
            "norm_1": jnp.ones([LAYERS, WIDTH]),
            "norm_2": jnp.ones([LAYERS, WIDTH]),
        },
        "norm": jnp.ones([WIDTH]),
        "head": jnp.zeros([WIDTH, alphabet]),
    }


def loss(params, windows):
    """Mean cross-entropy in nats of the next characters in ``windows``, ``[batch, CONTEXT + 1] int32``."""
    hidden = params["embedding"][windows[:, :-1]] + params["position"]
    hidden, _ = jax.lax.scan(_layer, hidden, params["layers"])
    logits = _normalized(hidden, params["norm"]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def batches(seed, steps, size):
    """``[steps, size, CONTEXT + 1] int32``: windows anywhere in the first nine tenths of the text."""
    numbers = text()[0]
    last = len(numbers) * 9 // 10 - CONTEXT - 1
    return _windows(np.random.default_rng(seed).integers(0, last, (steps, size)))


def held_out(size):
    """``[size, CONTEXT + 1] int32``: windows evenly spaced in the last tenth."""
    numbers = text()[0]
    return _windows(np.linspace(len(numbers) * 9 // 10, len(numbers) - CONTEXT - 1, size).astype(np.int64))


def _windows(starts):
    return text()[0][starts[..., None] + np.arange(CONTEXT + 1)]


def _layer(hidden, layer):
    normed = _normalized(hidden, layer["norm_1"])
    query, key, value = jnp.split((normed @ layer["attention_in"]).reshape(*hidden.shape[:2], HEADS, -1), 3, axis=-1)
    attended = jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(hidden.shape)
    hidden = hidden + attended @ layer["attention_out"]
    inner = jax.nn.gelu(_normalized(hidden, layer["norm_2"]) @ layer["mlp_in"] + layer["mlp_in_bias"])
    return hidden + inner @ layer["mlp_out"] + layer["mlp_out_bias"], None


def _normalized(x, gain):
    return gain * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
