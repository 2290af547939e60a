"""A neural field: a network from coordinates to colours, fitted to all pixels of a sample image of scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from noiseless_task import FullBatch, dense, num_params, stored

SHRINK = 8  # Of the image's side, by the means of squares.


def sample_image():
    """``[53, 80, 3] float32`` in [0, 1]: `china.jpg`, 427 x 640 pixels."""
    image = stored("china")
    if image is None:
        from sklearn.datasets import load_sample_image

        image = load_sample_image("china.jpg")[: 427 // SHRINK * SHRINK] / 255
        image = image.reshape(427 // SHRINK, SHRINK, 640 // SHRINK, SHRINK, 3).mean(axis=(1, 3))
    return np.asarray(image, np.float32)


@functools.cache
def field(num_features=96, width=192, scale=4.0):
    """Random Fourier features, three hidden layers of rectifiers."""
    image = sample_image()
    rows, columns, _ = image.shape
    grid = np.stack(np.meshgrid(np.arange(rows) / columns, np.arange(columns) / columns, indexing="ij"), axis=-1)
    waves = scale * np.random.default_rng(0).standard_normal((2, num_features))
    phases = 2 * np.pi * grid.reshape(-1, 2) @ waves
    features = jnp.asarray(np.concatenate([np.cos(phases), np.sin(phases)], axis=1), jnp.float32)
    colours = jnp.asarray(image.reshape(-1, 3))
    sizes = [2 * num_features, width, width, width, 3]

    def init(seed):
        keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
        return [
            dense(key, m, n, np.sqrt(2) if n > 3 else 0.3) for key, m, n in zip(keys, sizes, sizes[1:], strict=False)
        ]

    def loss(params, data):
        del data
        hidden = features
        for layer in params[:-1]:
            hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"])
        return jnp.mean((hidden @ params[-1]["kernel"] + params[-1]["bias"] - colours) ** 2)

    return FullBatch(
        f"neural field: {num_params(init):,} parameters, china.jpg at {rows} x {columns} pixels, {2 * num_features} "
        "Fourier features; mean squared error of colours in [0, 1]",
        init=init,
        loss=loss,
        budgets=(100, 300, 1000),
        rates=(-2, 0, 2, 4),
        floor=1e-9,
    )


CASES = {"neural field": field}
