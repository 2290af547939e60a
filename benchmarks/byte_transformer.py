"""A transformer of ten million parameters that predicts the next byte of Python's standard library: a task for a GPU.

Run `python benchmarks/byte_transformer.py` for a trial; `--case` and `--steps` make it shorter. The model is that of
`char_transformer` with bfloat16 in its matrix products. The text is all source of the running interpreter's standard
library except its tests; one file in twenty is held out. A batch holds the positions of windows in the text, which is
on the device, so a run of any length is one `jax.lax.scan`.
"""

import argparse
import functools
import hashlib
import pathlib
import sysconfig

import char_transformer
import jax
import jax.numpy as jnp
import numpy as np
import optax
from codec_tasks import Task
from prediction_tasks import Case, trial

LEFT_OUT = {"site-packages", "test", "tests"}
ALPHABET = 256
HELD_OUT = 1 << 17  # Bytes predicted for the final loss.


@functools.cache
def texts():
    """Two arrays of bytes, to train on and held out: files by name, every twentieth of them held out."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]
    data = [path.read_bytes() for path in paths]
    held_out = data[::20]
    del data[::20]
    return tuple(np.frombuffer(b"\f".join(files), np.uint8) for files in (data, held_out))


@functools.cache
def byte_transformer(batch_size, context):
    """Loss on held-out windows at the end, evenly spaced, as many as predict `HELD_OUT` bytes."""
    size = char_transformer.LARGE._replace(context=context, dtype=jnp.bfloat16, recomputes=True)
    train, held_out = (jnp.asarray(text) for text in texts())
    held_out_starts = np.linspace(0, len(held_out) - context - 1, HELD_OUT // context).astype(np.int32)

    def batches(seed, steps):
        return np.random.default_rng(seed).integers(0, len(train) - context, (steps, batch_size), np.int32)

    def loss_at(params, text, starts):
        windows = text[starts[:, None] + jnp.arange(context + 1)].astype(jnp.int32)
        return char_transformer.loss(params, windows, size)

    def final(params):
        return jax.lax.map(lambda starts: loss_at(params, held_out, starts), held_out_starts.reshape(16, -1)).mean()

    def init(seed):
        return char_transformer.init(seed, size, ALPHABET)

    num = optax.tree.size(jax.eval_shape(lambda: init(0)))
    digest = hashlib.sha256(np.concatenate(texts())).hexdigest()[:12]
    return Task(
        f"byte transformer: {num:,} parameters, {size.describe()}, {size.dtype.__name__}; {len(train):,} bytes of the "
        f"standard library's source (sha256 {digest}), batch {batch_size}; final loss on {HELD_OUT:,} of "
        f"{len(held_out):,} held out",
        rates=(5e-4, 1e-3, 2e-3),
        init=init,
        batches=batches,
        loss=lambda params, starts: loss_at(params, train, starts),
        final=final,
    )


RATES, FRACTIONS = (5e-4, 1e-3, 2e-3, 4e-3), (0.5, 0.65, 0.8, 1.0)
CASES = {
    "bytes, batch 64": Case(functools.partial(byte_transformer, 64, 256), RATES, 400, 200, (1.0, 1.3), FRACTIONS),
    "bytes, batch 1024": Case(functools.partial(byte_transformer, 1024, 128), RATES, 200, 200, (1.0, 1.3), FRACTIONS),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help='only what contains this: "batch 64"')
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    trial({name: case for name, case in CASES.items() if options.case in name}, options.steps)


if __name__ == "__main__":
    main()
