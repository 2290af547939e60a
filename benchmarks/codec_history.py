"""The predictor's history in trits: its bytes, and its effect on predictions and on training.

Run `python benchmarks/codec_history.py | tee benchmarks/codec_history.log`; it takes about six minutes on two cores.

The optimizer is `vsa_optax.phase_switched` with a `Cycle` of default lengths around Adam with a cosine schedule. The
error of a prediction is ||x - predicted|| / ||x||, averaged over a run's CORRECT steps. Ratios are taken between runs
of one seed.
"""

import argparse
import time

import codec_tasks as tasks
import jax
import numpy as np
import optax
from codec_tasks import print_row, spread, verdict

import vsa_optax
from vsa_optax import Cycle, TritCodec, Window

TASKS = {
    "characters": tasks.characters,
    "digits, batch 64": lambda: tasks.digits(64),
    "digits, full batch": lambda: tasks.digits(1437),
}
CASES = [
    ("characters", "update"),
    ("characters", "gradient"),
    ("digits, batch 64", "update"),
    ("digits, batch 64", "gradient"),
    ("digits, full batch", "update"),
]
HISTORIES = {
    "f32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "TritCodec(3)": {"codec": TritCodec(3)},
    "TritCodec(2)": {"codec": TritCodec(2)},
    "TritCodec(2, block_size=128)": {"codec": TritCodec(2, block_size=128)},
}
RATE = 1e-3
MOST_BYTES, MOST_ERROR = 0.105, 1.05


def run(task_name, predicts, history, steps, num_seeds):
    """``(errors [seeds], final losses [seeds], bytes of the window, of the residual, parameters)``."""
    task = TASKS[task_name]()
    schedule = optax.cosine_decay_schedule(RATE, steps)
    opt = vsa_optax.phase_switched(
        optax.adam(1.0),
        learning_rate=schedule,
        predictor=Window(predicts=predicts, calibrate=False, residual_decay=0.95, **HISTORIES[history]),
        phases=Cycle(),
    )

    @jax.jit
    def train(params, batches):
        def step(carry, batch):
            params, state = carry
            value, grads = vsa_optax.value_and_grad_by_phase(task.loss)(params, batch, state=state)
            updates, state = opt.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, opt.init(params)), batches)
        return vsa_optax.phase_stats(state).mean_prediction_error, task.final(params)

    results = [train(task.init(seed), task.batches(seed, steps)) for seed in range(num_seeds)]
    params = task.init(0)
    state = jax.eval_shape(opt.init, params)
    window, residual = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
        for part in (state.history.records, state.residual)
    )
    errors, losses = np.array(results, np.float64).T
    return errors, losses, window, residual, sum(leaf.size for leaf in jax.tree.leaves(params))


def print_case(task_name, predicts, results):
    """A row for each history, against f32."""
    print(f"{task_name}, predicted: the {predicts}")
    widths = [30, 8, 10, 30, 24, 28, 12]
    heads = ["history", "window", "and resid.", "prediction error", "ratio to f32", "final loss", ""]
    print_row(widths, heads)
    plain_errors, _, plain_window, plain_residual, _ = results["f32"]
    for history, (errors, losses, window, residual, _) in results.items():
        shares = window / plain_window, (window + residual) / (plain_window + plain_residual)
        ratios = errors / plain_errors
        row = [history, *(f"{share:.2%}" for share in shares), spread(errors), spread(ratios, "{:.3f}"), spread(losses)]
        if history.startswith("TritCodec"):
            row.append(verdict(shares[0] <= MOST_BYTES and ratios.mean() <= MOST_ERROR))
        print_row(widths, row + [""] * (len(widths) - len(row)))
    print(flush=True)


def print_floor(results):
    """The bound of any code of single numbers, for good predictions."""
    plain = results["f32"][0].mean()
    *_, window, _, size = results["TritCodec(2)"]
    bits = 8 * window / (8 * size)
    least = np.sqrt(plain**2 + 2.0 ** (-2 * bits)) / plain
    print(f"Where f32's error is {plain:.3f}, and records err alike, any code of Gaussian numbers in {bits:.2f} bits")
    print(f"has an error of at least sqrt({plain:.3f}^2 + 2^(-2 * {bits:.2f})): a ratio of {least:.3f}.\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    began = time.perf_counter()
    tasks.print_header(
        *(make().description for make in TASKS.values()),
        f"n = {options.seeds} seeds; {options.steps} steps at rate {RATE:g}; processes of one thread, one a core",
        "window, and resid.: bytes of the window's records, and of them and the residual, relative to f32's",
        "all numbers over seeds: mean [min, max]",
        f"target: at most {MOST_BYTES:.1%} of the window's bytes, and at most {MOST_ERROR} times f32's error",
    )
    jobs = [(*case, history, options.steps, options.seeds) for case in CASES for history in HISTORIES]
    found = tasks.in_processes(run, jobs)
    for case in CASES:
        results = {history: next(found) for history in HISTORIES}
        print_case(*case, results)
    print_floor(results)
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
