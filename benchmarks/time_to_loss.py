"""Wall time of a whole run without noise: plain Adam, and the same Adam that skips backward passes, at the same rate.

Run `python benchmarks/time_to_loss.py | tee benchmarks/time_to_loss.log`; on a GPU add `--case "PINN, 4 x 256"` (its
log is `time_to_loss_gpu.log`). `tolerance.log` was made with `--case "3 x 64" --variants "one program" --seeds 3
--tolerances 0.14 0.1 0.07 0.05 0.03`, at two rates.

All runs of a seed start from the same parameters and take the same number of steps with the same cosine schedule and
betas. Steps are in flight with a donated state. Runs take turns, so that other load on the machine affects all of them.
The loss is that of the final parameters. The time excludes compilation: each program has run before.

Where skipping ends below plain Adam's loss, `--share 0.9` asks how much earlier it gets there: all but plain Adam then
take this share of the steps, with a schedule as long.
"""

import argparse
import importlib.metadata
import os
import platform
import time

import jax
import jax.numpy as jnp
import noiseless_poisson
import numpy as np
import optax
import prediction_tasks

import vsa_optax

CASES = {
    "Poisson PINN, 4 x 256, 8192 points": lambda: noiseless_poisson.poisson(256, 8192),
    "Poisson PINN, 3 x 64, 1024 points": lambda: noiseless_poisson.poisson(64, 1024, depth=3),
    "PINN, sin(2 pi x)": lambda: prediction_tasks.pinn(2),
    "digits, full batch": prediction_tasks.digits_full_batch,
}


def variants(schedule, schedule_of_others, betas, tolerances):
    """Name to (optimizer, how the step is compiled); plain Adam is the first."""
    found = {"plain Adam": (optax.with_extra_args_support(optax.adam(schedule, *betas)), jax.jit)}
    adam = optax.adam(schedule_of_others, *betas)
    for tolerance in tolerances:
        switched = vsa_optax.phase_switched(adam, phases=vsa_optax.Guarded(tolerance=tolerance))
        found |= {
            f"tolerance {tolerance:g}, one program": (switched, jax.jit),
            f"tolerance {tolerance:g}, by phase": (switched, vsa_optax.jit_by_phase),
            f"tolerance {tolerance:g}, flattened, one program": (optax.flatten(switched), jax.jit),
            f"tolerance {tolerance:g}, flattened, by phase": (optax.flatten(switched), vsa_optax.jit_by_phase),
        }
    return found


def run_of(loss, opt, jit, is_plain):
    """``run(params, steps)``: seconds, parameters and state at the end."""

    def step(params, state):
        if is_plain:
            value, grads = jax.value_and_grad(loss)(params)
        else:
            value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    compiled = jit(step, donate_argnums=(0, 1))

    def run(params, steps):
        carry = jax.tree.map(jnp.array, (params, opt.init(params)))
        jax.block_until_ready(carry)
        start = time.perf_counter()
        for _ in range(steps):
            carry = compiled(*carry)
        jax.block_until_ready(carry)
        return time.perf_counter() - start, *carry

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="sin(2;digits", help="only what contains one of these")
    parser.add_argument("--variants", default="", help="only what contains one of these, and plain Adam")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--share", type=float, default=1.0, help="of plain Adam's steps, for the others")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999))
    parser.add_argument("--tolerances", type=float, nargs="+", default=(0.14,), help="of the guard")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--precision", default="highest", help="of matrix products; a GPU's default is TF32")
    options = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", options.precision)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "optax"))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}")
    print(f"versions: python {platform.python_version()}, {versions}")
    print(
        f"n = {options.seeds} seeds; {options.steps} steps of Adam, betas {tuple(options.betas)}, a cosine from "
        f"{options.rate:g}, products: {options.precision}; medians [smallest, largest] of ratios to plain Adam's with "
        "the same seed"
    )
    fewer = round(options.share * options.steps)
    if fewer != options.steps:
        print(f"all but plain Adam take {fewer} steps")
    schedules = [optax.cosine_decay_schedule(options.rate, steps) for steps in (options.steps, fewer)]
    for name, make in CASES.items():
        if not any(part in name for part in options.case.split(";")):
            continue
        task = make()
        batch = task.batches(0, 1)[0] if hasattr(task, "batches") else ()

        def loss(params, task=task, batch=batch):
            return task.loss(params, batch)

        chosen = {
            label: case
            for label, case in variants(*schedules, options.betas, options.tolerances).items()
            if label == "plain Adam" or any(part in label for part in options.variants.split(";"))
        }
        runs = {label: run_of(loss, *case, label == "plain Adam") for label, case in chosen.items()}
        for run in runs.values():
            run(task.init(0), 200)  # Long enough to meet each kind of step.
        final = jax.jit(loss)
        found = {label: [] for label in runs}
        for seed in range(options.seeds):
            for label, run in runs.items():
                passes = options.steps if label == "plain Adam" else fewer
                seconds, params, state = run(task.init(seed), passes)
                if label != "plain Adam":
                    passes -= int(vsa_optax.phase_stats(state).predict_steps)
                found[label].append((seconds, float(final(params)), passes))
        plain = np.array(found["plain Adam"])
        print(f"\n{name}: {optax.tree.size(task.init(0)):,} parameters")
        print(f"{'':42s} {'wall time':26s} {'loss':30s} {'passes':>8s} {'ms a step':>10s}")
        for label, rows in found.items():
            ratios = np.array(rows) / plain
            cells = [f"{np.median(r):.3f} [{r.min():.3f}, {r.max():.3f}]" for r in ratios.T[:2]]
            seconds, _, passes = np.array(rows).T
            milliseconds = 1e3 * np.median(seconds) / (options.steps if label == "plain Adam" else fewer)
            print(f"{label:42s} {cells[0]:26s} {cells[1]:30s} {passes.mean():8.0f} {milliseconds:10.3f}", flush=True)


if __name__ == "__main__":
    main()
