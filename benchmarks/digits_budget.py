"""The demo's task with every method at its own learning rate, at the same steps and at the same backward passes.

Run `python benchmarks/digits_budget.py | tee benchmarks/digits_budget.log`; it takes about three minutes on two cores.

The demo compares runs of equal length. Whoever pays for backward passes asks another question: what would plain AdamW
have reached with as many of them, its learning rate chosen for that and its schedule decayed over them?
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
from vsa_optax import demo

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
STEPS = 300
SEEDS = 5


def final_loss(task, opt, steps, *, by_phase):
    """Training loss over the whole set after ``steps`` full-batch steps, and the backward passes taken."""
    images, labels = (jnp.asarray(x) for x in task.train)

    def step(carry, _):
        params, state = carry
        if by_phase:
            value, grads = vsa_optax.value_and_grad_by_phase(task.loss)(params, images, labels, state=state)
        else:
            value, grads = jax.value_and_grad(task.loss)(params, images, labels)
        updates, state = opt.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(step, (params, opt.init(params)), None, length=steps)[0])
    params, state = run(task.params)
    backward = steps
    if by_phase:
        stats = vsa_optax.phase_stats(state)
        backward = int(stats.total_steps - stats.predict_steps)
    return float(task.loss(params, images, labels)), backward


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
    tasks = [demo._make_task(seed) for seed in range(SEEDS)]
    gradient = dict(predict_in="gradient")
    methods = {
        "plain AdamW": (plain(STEPS), STEPS, False),
        "phase_switched, default": (switched(), STEPS, True),
        "phase_switched, recursive": (switched(history="recursive"), STEPS, True),
        "phase_switched, gradient domain": (switched(**gradient), STEPS, True),
        "plain AdamW, 113 steps": (plain(113), 113, False),
    }
    print(f"{'':33s} backward   at 1e-3                        at its best rate")
    for name, (make, steps, by_phase) in methods.items():
        losses = {}
        for rate in RATES:
            runs = [final_loss(task, make(rate), steps, by_phase=by_phase) for task in tasks]
            losses[rate] = np.array([loss for loss, _ in runs])
        means = {rate: np.exp(np.log(values).mean()) for rate, values in losses.items()}
        best = min(means, key=means.get)
        cells = [f"{means[r]:.6f} [{losses[r].min():.6f}, {losses[r].max():.6f}]" for r in (1e-3, best)]
        print(f"{name:33s} {runs[0][1]:8d}   {cells[0]:30s} {cells[1]} at {best:g}", flush=True)


if __name__ == "__main__":
    main()
