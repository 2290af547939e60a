"""Compares histories of larger leaves in float16 and float32, on a Poisson PINN of 4 x 256.

Run `python benchmarks/history_large.py | tee benchmarks/history_large_gpu.log` on a GPU. All kernels between hidden
layers have 65,536 coordinates. By default changes are in float16 only from 262,144 on, because of this log, so the
script lowers the bound. Products are in full precision and in TF32, a GPU's default, whose rounding is noise to the
guard. A run is one `lax.scan`. Each setting is trained from the same parameters with both histories and by plain Adam.
The table also has the steps that the guard watches.
"""

import argparse
import importlib.metadata
import os
import platform

import jax
import jax.numpy as jnp
import noiseless_poisson
import numpy as np
import optax

import vsa_optax
from vsa_optax import Phase, Secants
from vsa_optax.prediction.predictors import secant

secant._LARGE = 2**16  # Below that of the library, so that the kernels are in float16.
SETTINGS = ((1e-3, (0.9, 0.999)), (1e-3, (0.95, 0.98)), (3e-4, (0.9, 0.999)))
HISTORIES = {"plain": None, "float16": Secants(), "float32": Secants(dtype="float32")}
WIDTHS = [10, 8, 14, 22, 8, 12, 26, 9, 9]


def trainer(task, history, steps):
    """``params, rate, b1, b2 -> loss, predicted steps, watched steps``."""

    @jax.jit
    def train(params, rate, b1, b2):
        adam = optax.adam(optax.cosine_decay_schedule(rate, steps), b1, b2)
        opt = adam if history is None else vsa_optax.phase_switched(adam, predictor=history)

        def loss(params):
            return task.loss(params, ())

        def plain_step(carry, _):
            params, state, watched = carry
            grads = jax.grad(loss)(params)
            updates, state = opt.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, watched), None

        def step(carry, _):
            params, state, watched = carry
            is_watched = (state.machine.phase != Phase.PREDICT) & (state.machine.unpacked().guard.asleep == 0)
            value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
            updates, state = opt.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state, watched + is_watched), None

        one = plain_step if history is None else step
        (params, state, watched), _ = jax.lax.scan(one, (params, opt.init(params), jnp.int32(0)), length=steps)
        predicted = 0 if history is None else vsa_optax.phase_stats(state).predict_steps
        return loss(params), predicted, watched

    return train


def copies(task, history):
    """Of the parameters, in the history."""
    if history is None:
        return 0.0
    params = jax.eval_shape(lambda: task.init(0))
    state = jax.eval_shape(vsa_optax.phase_switched(optax.adam(1e-3), predictor=history).init, params)
    nbytes = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (state.history, params)]
    return nbytes[0] / nbytes[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "optax"))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}")
    print(f"versions: python {platform.python_version()}, {versions}")
    print(f"n = {options.seeds} seeds; {options.steps} steps of Adam, a cosine; geometric means of losses")
    task = noiseless_poisson.poisson(256, 8192)
    names = ["products", "rate", "betas", "history", "copies", "loss", "[smallest, largest]", "skipped", "watched"]
    print("".join(f"{name:>{width}s}" for name, width in zip(names, WIDTHS, strict=True)), flush=True)
    for precision in ("highest", "default"):
        with jax.default_matmul_precision(precision):
            trainers = {name: trainer(task, history, options.steps) for name, history in HISTORIES.items()}
            for rate, betas in SETTINGS:
                for name, train in trainers.items():
                    runs = np.array([train(task.init(seed), rate, *betas) for seed in range(options.seeds)], float)
                    losses, (skipped, watched) = runs[:, 0], runs[:, 1:].mean(0) / options.steps
                    num_copies = f"{copies(task, HISTORIES[name]):.1f}"
                    cells = [
                        *(precision, f"{rate:g}", f"{betas[0]}, {betas[1]}", name, num_copies),
                        *(f"{np.exp(np.log(losses).mean()):.3g}", f"[{losses.min():.3g}, {losses.max():.3g}]"),
                        *(f"{skipped:.1%}", f"{watched:.0%}"),
                    ]
                    print("".join(f"{cell:>{width}s}" for cell, width in zip(cells, WIDTHS, strict=True)), flush=True)


if __name__ == "__main__":
    main()
