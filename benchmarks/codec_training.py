"""Trains with a codec between the gradient and Adam, and compares final losses.

Run `python benchmarks/codec_training.py | tee benchmarks/codec_training.log`; it takes eight minutes on two cores.

Every gradient goes through `vsa_optax.compress_gradients`, with and without error feedback, in front of Adam with a
cosine schedule. Methods share their seeds, that is, weights and batches. The rate is the best one for f32. The digits,
whose loss is then almost zero, are also trained at a lower rate.
"""

import argparse
import time

import codec_rivals as rivals
import codec_tasks as tasks
import jax
import numpy as np
import optax
from codec_tasks import print_row, spread, verdict

import vsa_optax
from vsa_optax import HypervectorCodec, TritCodec

TASKS = {"digits": lambda: tasks.digits(64), "characters": tasks.characters}
SEEDS = {"digits": 10, "characters": 5}
SEEDS_FOR_RATE = 2
CAUTIOUS_RATE = 1e-3
# Name: codec, and whether with error feedback.
METHODS = {
    "f32": (None, False),
    "TritCodec(1)": (TritCodec(1), False),
    "TritCodec(1), error feedback": (TritCodec(1), True),
    "TritCodec(1, unbiased)": (TritCodec(1, unbiased=True), False),
    "TritCodec(2)": (TritCodec(2), False),
    "TritCodec(2), error feedback": (TritCodec(2), True),
    "TritCodec(3)": (TritCodec(3), False),
    "TritCodec(3), error feedback": (TritCodec(3), True),
    "HypervectorCodec(0.1)": (HypervectorCodec(0.1), False),
    "HypervectorCodec(0.1), error feedback": (HypervectorCodec(0.1), True),
    "top-k, 3.22 bits": (rivals.top_k(3.22), False),
    "top-k, 3.22 bits, error feedback": (rivals.top_k(3.22), True),
    "trits, stochastic (TernGrad)": (rivals.terngrad(), False),
}
TARGET = ("TritCodec(2)", "TritCodec(2), error feedback")


def final_losses(task_name, method, rate, steps, num_seeds):
    """``[seeds]``."""
    task = TASKS[task_name]()
    codec, error_feedback = METHODS[method]
    opt = optax.adam(optax.cosine_decay_schedule(rate, steps))
    if codec is not None:
        opt = optax.chain(vsa_optax.compress_gradients(codec, error_feedback=error_feedback), opt)

    @jax.jit
    def train(params, batches):
        def step(carry, batch):
            params, state = carry
            updates, state = opt.update(jax.grad(task.loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return task.final(jax.lax.scan(step, (params, opt.init(params)), batches)[0][0])

    return np.array([float(train(task.init(seed), task.batches(seed, steps))) for seed in range(num_seeds)])


def bits(task_name, method):
    """Bits a coordinate of one payload."""
    params, codec = TASKS[task_name]().init(0), METHODS[method][0]
    return 32.0 if codec is None else 8 * codec.nbytes(params) / sum(leaf.size for leaf in jax.tree.leaves(params))


def best_rates(steps):
    """For each task the best of its rates for f32, all of which are printed."""
    jobs = [(name, "f32", rate, steps, SEEDS_FOR_RATE) for name in TASKS for rate in TASKS[name]().rates]
    means = {job[:3]: losses.mean() for job, losses in zip(jobs, tasks.in_processes(final_losses, jobs), strict=True)}
    best = {}
    for name in TASKS:
        by_rate = {rate: mean for (task, _, rate), mean in means.items() if task == name}
        best[name] = min(by_rate, key=by_rate.get)
        scanned = ", ".join(f"{mean:.5f} at {rate:g}" for rate, mean in by_rate.items())
        print(f"{name}: final loss of f32, mean of {SEEDS_FOR_RATE} seeds: {scanned}; used: {best[name]:g}", flush=True)
    print()
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    began = time.perf_counter()
    tasks.print_header(
        *(f"{TASKS[name]().description}; n = {SEEDS[name]} seeds" for name in TASKS),
        f"{steps} steps; processes of one thread, one a core",
        "difference: to f32 with the same seed, mean [min, max]; sd: of f32 over the seeds",
    )
    rates = best_rates(steps)
    runs = [("digits", CAUTIOUS_RATE), *rates.items()]
    jobs = [(name, method, rate, steps, SEEDS[name]) for name, rate in runs for method in METHODS]
    widths = [38, 7, 20, 36, 10, 30]
    reference = None
    for (name, method, rate, *_), losses in zip(jobs, tasks.in_processes(final_losses, jobs), strict=True):
        if method == "f32":
            reference, deviation = losses, losses.std(ddof=1)
            print_row(widths, [f"{name}, rate {rate:g}", "bits", "final loss ± sd", "difference", "in sd", ""])
        in_deviations = (losses - reference).mean() / deviation
        row = [method, f"{bits(name, method):.2f}", f"{losses.mean():.5f} ± {losses.std(ddof=1):.5f}"]
        if method != "f32":
            row += [spread(losses - reference, "{:+.5f}"), f"{in_deviations:+.2f}"]
        if method in TARGET:
            row.append(f"target: at most +1, {verdict(in_deviations <= 1)}")
        print_row(widths, row + [""] * (len(widths) - len(row)))
        if method == list(METHODS)[-1]:
            print(flush=True)
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
