"""How much do the constants matter that were chosen by hand? Those of the guard, the calibration and the secants.

Run `JAX_PLATFORMS=cpu python benchmarks/constants.py | tee benchmarks/constants.log`; it starts one process per core.

Each constant is halved, doubled or otherwise changed while all others stay, and a guarded Adam is trained on two losses
without noise and one with mini-batches. On the mini-batches nothing is predicted with any constant. If the table shows
the same losses and nearly the same passes for a constant, its value needs no better reason.
"""

import argparse
import time

import codec_tasks
import jax
import numpy as np
import optax
from prediction_tasks import CASES

import vsa_optax
from vsa_optax.prediction import guard
from vsa_optax.prediction.fits import calibration, secant_fit

# Plain Adam's best rate and betas in benchmarks/guard.log; for mini-batches a third of the best rate.
USED = {
    "digits, full batch": (0.06, (0.95, 0.98), 300),
    "PINN, sin(2 pi x)": (0.04, (0.95, 0.98), 2000),
    "digits, batch 64": (0.01, (0.9, 0.98), 300),
}
SECANTS, LINE = vsa_optax.Secants(), vsa_optax.Window()
# Module, name, other values, predictor.
VARIED = [
    (guard, "_GROWTH", (1.2, 2.0, 3.0), SECANTS),
    (guard, "_SAFETY", (0.7, 0.8, 1.0), SECANTS),
    (guard, "_FORGET", (0.0, 0.5, 0.9), SECANTS),
    (guard, "_MOST_ERROR", (10.0, 1000.0), SECANTS),
    (guard, "_SHORTEST_LEAP", (0.5, 1.0), SECANTS),
    (guard, "_START", (0.1, 0.5, 1.0), SECANTS),
    (guard, "_HOPELESS_ERROR", (0.25, 0.9), SECANTS),
    (guard, "_MOST_WATCHED", (32, 128), SECANTS),
    (guard, "_WORTH", (2, 8), SECANTS),
    (guard, "_SHORTEST_SLEEP", (8, 64), SECANTS),
    (guard, "_LONGEST_SLEEP", (256, 4096), SECANTS),
    (secant_fit, "FORGET", (0.5, 0.8, 0.95), SECANTS),
    (secant_fit, "_MOST_ERROR", (1.0, 16.0), SECANTS),
    (secant_fit, "RIDGES", ((1e-6, *secant_fit.RIDGES), secant_fit.RIDGES[1:], secant_fit.RIDGES[::2]), SECANTS),
    (calibration, "FORGET", (0.8, 0.9, 0.99), LINE),
    (calibration, "RIDGE", (1e-5, 1e-3), LINE),
    (calibration, "FLOOR", (1e-7, 1e-5), LINE),
]


def trained(task_name, predictor, seed):
    """Final loss, and true gradients."""
    rate, betas, steps = USED[task_name]
    task = CASES[task_name].task()
    schedule = optax.cosine_decay_schedule(rate, steps)
    opt = vsa_optax.phase_switched(optax.adam(1.0, *betas), learning_rate=schedule, predictor=predictor)

    @jax.jit
    def train(params, batches):
        def step(carry, batch):
            params, state = carry
            value, gradient = vsa_optax.value_and_grad_by_phase(task.loss)(params, batch, state=state)
            updates, state = opt.update(gradient, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        params, state = jax.lax.scan(step, (params, opt.init(params)), batches)[0]
        return task.final(params), steps - vsa_optax.phase_stats(state).predict_steps

    return [float(x) for x in train(task.init(seed), task.batches(seed, steps))]


def run(index, value, task_name, seed):
    """One training run with one constant moved, in a process of its own."""
    module, name, _, predictor = VARIED[index]
    before = getattr(module, name)
    if value is not None:
        setattr(module, name, value)
    try:
        jax.clear_caches()
        return trained(task_name, predictor, seed)
    finally:
        setattr(module, name, before)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", default="", help="only tasks whose names contain this")
    parser.add_argument("--only", default="", help='only constants that contain one of these: "_WORTH;_SHORTEST_SLEEP"')
    options = parser.parse_args()
    began = time.perf_counter()
    tasks = [name for name in USED if options.task in name]
    codec_tasks.print_header("Constants chosen by hand: what moving one of them does")
    print(f"n = {options.seeds} seeds; loss: geometric mean; passes: mean of the true gradients")
    rows = [
        (i, value)
        for i, entry in enumerate(VARIED)
        if any(part in entry[1] for part in options.only.split(";"))
        for value in (None, *entry[2])
    ]
    jobs = [(*row, name, seed) for row in rows for name in tasks for seed in range(options.seeds)]
    results = codec_tasks.in_processes(run, jobs)
    widths = [22, 34, *[24] * len(tasks)]
    codec_tasks.print_row(widths, ["constant", "value", *tasks])
    for index, value in rows:
        module, name, _, predictor = VARIED[index]
        shown = getattr(module, name) if value is None else value
        cells = []
        for _ in tasks:
            found = np.array([next(results) for _ in range(options.seeds)])
            cells.append(f"{np.exp(np.mean(np.log(found[:, 0]))):.3g} @{np.mean(found[:, 1]):.0f}")
        label = f"{module.__name__.rpartition('.')[2]}.{name}" + (" (line)" if predictor is LINE else "")
        codec_tasks.print_row(widths, [label, f"{shown} (used)" if value is None else f"{shown}", *cells])
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
