"""A convolutional network on scikit-learn's 8x8 digits: a task for `prediction.py`.

Run `python benchmarks/digits_cnn.py` for a trial. A convolution is a matrix product with patches: it trains like
`flax.linen.Conv`, and on one core XLA runs it twenty times as fast.
"""

import functools

import codec_tasks
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from prediction_tasks import Case, trial

from vsa_optax import demo


class Convolution(nn.Module):
    """3x3, padded with zeros: ``[batch, n, n, channels] -> [batch, n / stride, n / stride, features]``."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        size = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows, columns = ([slice(i, i + size, self.stride) for i in range(3)] for _ in range(2))
        patches = [padded[:, row, column] for row in rows for column in columns]
        return nn.Dense(self.features)(jnp.concatenate(patches, axis=-1))


class Network(nn.Module):
    """``[batch, 64] -> [batch, 10]``: images to logits."""

    @nn.compact
    def __call__(self, images):
        hidden = images.reshape(-1, 8, 8, 1)
        hidden = nn.relu(Convolution(16)(hidden))
        hidden = nn.relu(Convolution(32, stride=2)(hidden))
        hidden = nn.relu(nn.Dense(32)(hidden.reshape(len(hidden), -1)))
        return nn.Dense(10)(hidden)


@functools.cache
def digits_cnn(batch_size=64):
    """Images and batches are those of `codec_tasks.digits`, and so is what its final loss is of."""
    network, mlp = Network(), codec_tasks.digits(batch_size)
    images, labels = (jnp.asarray(x) for x in demo.load_digits()[0])

    def init(seed):
        return network.init(jax.random.key(seed), images[:1])["params"]

    def mean_loss(params, images, labels):
        logits = network.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    num = optax.tree.size(jax.eval_shape(init, 0))
    size = len(labels)
    return mlp._replace(
        description=f"digits CNN: {num:,} parameters, {size} images, batch {batch_size}; final loss over all of them",
        init=init,
        loss=lambda params, chosen: mean_loss(params, images[chosen], labels[chosen]),
        final=lambda params: mean_loss(params, images, labels),
    )


CASES = {"digits CNN, batch 64": Case(digits_cnn, (0.001, 0.003, 0.01, 0.03, 0.06), 300, 300, (1.0, 1.3))}

if __name__ == "__main__":
    trial(CASES)
