"""The demo's task with every method at its own learning rate, at the same steps and at the same backward passes.

Run `python benchmarks/digits_budget.py | tee benchmarks/digits_budget.log`; it takes about a minute on two cores.

The demo compares runs at one rate. If backward passes are the cost, another question matters: what would plain AdamW
reach with as many passes, with a learning rate chosen for them and a schedule that decays over them?
"""

import argparse
import importlib.metadata
import os
import platform

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vsa_optax
from vsa_optax import Cycle, Recursive, Window, demo

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
STEPS = 300
SEEDS = 5


def trainer(loss, make, steps, *, by_phase):
    """``rate, params, images, labels -> loss over the whole set after so many full-batch steps, backward passes``."""

    @jax.jit
    def train(rate, params, images, labels):
        opt = make(rate)

        def step(carry, _):
            params, state = carry
            if by_phase:
                value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, images, labels, state=state)
            else:
                value, grads = jax.value_and_grad(loss)(params, images, labels)
            updates, state = opt.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        params, state = jax.lax.scan(step, (params, opt.init(params)), None, length=steps)[0]
        skipped = vsa_optax.phase_stats(state).predict_steps if by_phase else 0
        return loss(params, images, labels), steps - skipped

    return train


def plain(steps):
    return lambda rate: optax.with_extra_args_support(optax.adamw(optax.cosine_decay_schedule(rate, steps)))


def switched(**kwargs):
    return lambda rate: vsa_optax.phase_switched(
        optax.adamw(1.0), learning_rate=optax.cosine_decay_schedule(rate, STEPS), **kwargs
    )


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "flax"))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}; {versions}")
    print(f"digits, full batch, cosine schedule over each run's steps; n = {SEEDS} seeds; rates {RATES}")
    print("final training loss: geometric mean over seeds [smallest, largest]; best: smallest mean over the rates\n")
    task = demo.Task(*demo.load_digits(), *demo.make_network(0))
    images, labels = map(jnp.asarray, task.train)
    weights = [demo.make_network(seed)[0] for seed in range(SEEDS)]
    blind = dict(calibrate=False, residual_decay=0.95)
    methods = {
        "plain AdamW": (plain(STEPS), STEPS, False),
        "phase_switched, default": (switched(), STEPS, True),
        "no guard, window": (switched(predictor=Window(**blind), phases=Cycle()), STEPS, True),
        "no guard, window, calibrated": (switched(predictor=Window(), phases=Cycle()), STEPS, True),
        "no guard, recursive": (switched(predictor=Recursive(**blind), phases=Cycle()), STEPS, True),
        "no guard, gradient domain": (
            switched(predictor=Window(predicts="gradient", **blind), phases=Cycle()),
            STEPS,
            True,
        ),
        "plain AdamW, 113 steps": (plain(113), 113, False),
        "plain AdamW, 80 steps": (plain(80), 80, False),
    }
    print(f"{'':30s} backward  at 1e-3                         backward  at its best rate")
    for name, (make, steps, by_phase) in methods.items():
        losses, passes, train = {}, {}, trainer(task.loss, make, steps, by_phase=by_phase)
        for rate in RATES:
            runs = np.array([train(rate, params, images, labels) for params in weights], np.float64)
            losses[rate], passes[rate] = runs[:, 0], runs[:, 1].mean()
        means = {rate: np.exp(np.log(values).mean()) for rate, values in losses.items()}
        best = min(means, key=means.get)
        cells = [
            f"{passes[r]:8.0f}  {means[r]:.6f} [{losses[r].min():.6f}, {losses[r].max():.6f}]" for r in (1e-3, best)
        ]
        print(f"{name:30s} {cells[0]:40s} {cells[1]} at {best:g}", flush=True)


if __name__ == "__main__":
    main()
