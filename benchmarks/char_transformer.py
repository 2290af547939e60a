"""A small transformer that predicts the next character of Python's standard library: a task for the other scripts.

The text is the source of the running interpreter's own ``*.py`` files, so nothing is downloaded; another Python has
another text, which is why `describe` gives its length and a hash.
"""

import functools
import hashlib
import pathlib
import sysconfig
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

_CHARACTERS = 2_000_000


class Size(NamedTuple):
    """The size of a transformer.

    Attributes:
        context: the largest number of characters that it sees.
        width: the width of a character's vector.
        layers: the number of layers.
        heads: the number of heads in each layer.
        dtype: the dtype of matrix products and attention; all else is float32.
        recomputes: whether the backward pass recomputes the cheap parts of a layer: all except products with weights.
    """

    context: int
    width: int
    layers: int
    heads: int
    dtype: jnp.dtype = jnp.float32
    recomputes: bool = False

    def describe(self):
        """A few words."""
        return f"{self.layers} layers of width {self.width}, {self.heads} heads, context {self.context}"


SMALL = Size(context=64, width=144, layers=2, heads=4)
LARGE = Size(context=64, width=384, layers=6, heads=6)


@functools.cache
def text():
    """``[2,000,000] int32``, and how many characters there are: files by name, what is not ASCII as one character."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = np.frombuffer(b"\f".join(path.read_bytes() for path in files)[:_CHARACTERS], np.uint8)
    alphabet, numbers = np.unique(np.minimum(data, 128), return_inverse=True)
    return numbers.astype(np.int32), len(alphabet)


def describe(size=SMALL):
    """One line on text and model."""
    numbers, alphabet = text()
    num = optax.tree.size(jax.eval_shape(lambda: init(0, size)))
    digest = hashlib.sha256(numbers.tobytes()).hexdigest()[:12]
    return (
        f"char transformer: {num:,} parameters, {size.describe()}; "
        f"{len(numbers):,} characters of the standard library's source (sha256 {digest}), alphabet of {alphabet}"
    )


def init(seed, size=SMALL, alphabet=None):
    """Weights; each layer's leaves are stacked on a leading axis. Without an alphabet that of the text is taken."""
    alphabet = alphabet or text()[1]
    context, width, layers = size.context, size.width, size.layers
    keys = iter(jax.random.split(jax.random.key(seed), 6))

    def normal(*shape, scale):
        return scale * jax.random.normal(next(keys), shape)

    deep = (2 * layers * width) ** -0.5
    return {
        "embedding": normal(alphabet, width, scale=1.0),
        "position": normal(context, width, scale=0.3),
        "layers": {
            "attention_in": normal(layers, width, 3 * width, scale=width**-0.5),
            "attention_out": normal(layers, width, width, scale=deep),
            "mlp_in": normal(layers, width, 4 * width, scale=width**-0.5),
            "mlp_in_bias": jnp.zeros([layers, 4 * width]),
            "mlp_out": normal(layers, 4 * width, width, scale=deep / 2),
            "mlp_out_bias": jnp.zeros([layers, width]),
            "norm_1": jnp.ones([layers, width]),
            "norm_2": jnp.ones([layers, width]),
        },
        "norm": jnp.ones([width]),
        "head": jnp.zeros([width, alphabet]),
    }


def loss(params, windows, size=SMALL):
    """Mean cross-entropy in nats of the next characters in ``windows``, ``[batch, context + 1] int32``."""
    hidden = _embedded(params["embedding"], windows[:, :-1], size.dtype) + params["position"]
    layer = functools.partial(_layer, size)
    if size.recomputes:
        are_kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        layer = jax.checkpoint(layer, policy=are_kept, prevent_cse=False)
    hidden, _ = jax.lax.scan(layer, hidden, params["layers"])
    logits = _product(_normalized(hidden, params["norm"]), params["head"], size.dtype)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def batches(seed, steps, size):
    """``[steps, size, 65] int32``: windows anywhere in the first nine tenths of the text."""
    numbers = text()[0]
    last = len(numbers) * 9 // 10 - SMALL.context - 1
    return _windows(np.random.default_rng(seed).integers(0, last, (steps, size)))


def held_out(size):
    """``[size, 65] int32``: windows evenly spaced in the last tenth."""
    numbers = text()[0]
    return _windows(np.linspace(len(numbers) * 9 // 10, len(numbers) - SMALL.context - 1, size).astype(np.int64))


def _windows(starts):
    return text()[0][starts[..., None] + np.arange(SMALL.context + 1)]


def _layer(size, hidden, layer):
    normed = _normalized(hidden, layer["norm_1"])
    queries = _product(normed, layer["attention_in"], size.dtype).astype(size.dtype)
    query, key, value = jnp.split(queries.reshape(*hidden.shape[:2], size.heads, -1), 3, axis=-1)
    attended = jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(hidden.shape)
    hidden = hidden + _product(attended, layer["attention_out"], size.dtype)
    inner = _product(_normalized(hidden, layer["norm_2"]), layer["mlp_in"], size.dtype) + layer["mlp_in_bias"]
    return hidden + _product(jax.nn.gelu(inner), layer["mlp_out"], size.dtype) + layer["mlp_out_bias"], None


def _embedded(table, numbers, dtype):
    """The rows; of less than float32 as a product, whose gradient a GPU adds up in the same order every time."""
    if dtype == jnp.float32:
        return table[numbers]
    return _product(jax.nn.one_hot(numbers, len(table), dtype=dtype), table, dtype)


def _product(x, kernel, dtype):
    """``x @ kernel`` in float32, of factors in ``dtype``; so are the factors of its gradients' products."""
    return (x.astype(dtype) @ kernel.astype(dtype)).astype(jnp.float32)


def _normalized(x, gain):
    return gain * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
