"""Compares guarded training with plain Adam, and counts the backward passes that plain Adam needs for the same loss.

Run `python benchmarks/guard.py | tee benchmarks/guard.log`; it starts one process per core. On a machine with a GPU,
prefix `JAX_PLATFORMS=cpu`. `--task` and `--seeds` select a part.

Runs of equal length are compared seed by seed, at four rates around plain Adam's best, with the best betas of plain
Adam and with the usual ones. Then plain Adam takes fewer and more steps, with rate and betas chosen for each number.
"""

import argparse
import functools
import time
from typing import NamedTuple

import codec_tasks
import jax
import numpy as np
import optax
import scipy.stats
from codec_tasks import print_row, verdict
from prediction_tasks import CASES, chosen

import vsa_optax

DEFAULT_BETAS = (0.9, 0.999)
BETAS = (DEFAULT_BETAS, (0.9, 0.98), (0.95, 0.98))
RATE_FACTORS = (0.25, 0.5, 1.0, 2.0)
BUDGET_RATE_FACTORS = (0.5, 1.0, 2.0)
SEEDS_FOR_RATE, SEEDS_FOR_BUDGET = 2, 3
MOST_WORSE, MOST_WORSE_SEED = 1.01, 1.05


class Job(NamedTuple):
    """Arguments of `runs`."""

    name: str
    method: str
    rates: tuple[float, ...]
    betas: tuple[float, float]
    steps: int
    seeds: tuple[int, ...]


def optimizer(method, rate, betas, steps):
    """Adam, plain or guarded, its rate a cosine over all steps."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    adam = functools.partial(optax.adam, b1=betas[0], b2=betas[1])
    if method == "plain":
        return optax.with_extra_args_support(adam(schedule))
    return vsa_optax.phase_switched(adam(1.0), learning_rate=schedule)  # Its defaults, for all tasks.


@functools.cache
def trainer(name, method, steps):
    """``rate, betas, params, batches -> final loss, backward passes``, compiled once a process."""
    task = CASES[name].task()

    @jax.jit
    def train(rate, betas, params, batches):
        opt = optimizer(method, rate, betas, steps)

        def step(carry, batch):
            params, state = carry
            if method == "plain":
                value, gradient = jax.value_and_grad(task.loss)(params, batch)
            else:
                value, gradient = vsa_optax.value_and_grad_by_phase(task.loss)(params, batch, state=state)
            updates, state = opt.update(gradient, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        params, state = jax.lax.scan(step, (params, opt.init(params)), batches)[0]
        if method == "plain":
            return task.final(params), steps
        return task.final(params), steps - vsa_optax.phase_stats(state).predict_steps

    return train


def runs(name, method, rates, betas, steps, seeds):
    """``[rates, seeds, 2]``: final loss, infinite where it is not a number, and backward passes."""
    task, train = CASES[name].task(), trainer(name, method, steps)
    found = [[train(rate, betas, task.init(seed), task.batches(seed, steps)) for seed in seeds] for rate in rates]
    return np.nan_to_num(np.array(found, np.float64), nan=np.inf, posinf=np.inf)


def jobs_of(name, method, rates, betas, steps, num_seeds):
    """One for each rate; one for each run where a run takes long."""
    seeds = range(num_seeds)
    groups = [(seed,) for seed in seeds] if CASES[name].runs_apart else [tuple(seeds)]
    return [Job(name, method, (rate,), betas, steps, group) for rate in rates for group in groups]


def gathered(results, jobs):
    """``{(method, rate, betas, steps): [seeds, 2]}`` from as many results as there are jobs."""
    found = {}
    for job in jobs:
        for rate, values in zip(job.rates, next(results), strict=True):
            found.setdefault((job.method, rate, job.betas, job.steps), []).append(values)
    return {key: np.concatenate(parts) for key, parts in found.items()}


def geometric_mean(losses):
    return float(np.exp(np.mean(np.log(losses))))


def scan_jobs(name, steps):
    """The search for plain Adam's rate and betas."""
    return [job for betas in BETAS for job in jobs_of(name, "plain", CASES[name].rates, betas, steps, SEEDS_FOR_RATE)]


def best_rates(name, found):
    """Plain Adam's best rate for each of the betas, the best betas first."""
    means = {key[1:3]: geometric_mean(values[:, 0]) for key, values in found.items()}
    print(f"{name}: plain, geometric mean of {SEEDS_FOR_RATE} seeds")
    widths = [14, *[12] * len(CASES[name].rates)]
    print_row(widths, ["betas", *(f"{rate:g}" for rate in CASES[name].rates)])
    for betas in BETAS:
        print_row(widths, [betas, *(f"{means[rate, betas]:.4g}" for rate in CASES[name].rates)])
    best = {}
    for rate, betas in sorted(means, key=means.get):
        best.setdefault(betas, rate)
    betas, rate = next(iter(best.items()))
    print(f"used: {rate:g} with betas {betas}, {best[DEFAULT_BETAS]:g} with {DEFAULT_BETAS}\n", flush=True)
    return best


def compared(best):
    """Rates to compare at for the best betas, and for the default ones if they are others."""
    return {betas: [factor * best[betas] for factor in RATE_FACTORS] for betas in (next(iter(best)), DEFAULT_BETAS)}


def comparison_jobs(name, best, steps, num_seeds):
    return [
        job
        for betas, rates in compared(best).items()
        for method in ("guarded", "plain")
        for job in jobs_of(name, method, rates, betas, steps, num_seeds)
    ]


def budgets(name, steps):
    return [max(1, round(fraction * steps)) for fraction in CASES[name].fractions]


def budget_jobs(name, best, steps):
    rates = [factor * next(iter(best.values())) for factor in BUDGET_RATE_FACTORS]
    return [
        job
        for budget in reversed(budgets(name, steps))
        for betas in BETAS
        for job in jobs_of(name, "plain", rates, betas, budget, SEEDS_FOR_BUDGET)
    ]


def mean_and_half(differences):
    """The mean, and half of its 95 % interval by Student's t; not a number for a single one."""
    num = len(differences)
    with np.errstate(invalid="ignore"):
        mean = np.mean(differences)
        half = np.std(differences, ddof=1) / np.sqrt(num) * scipy.stats.t.ppf(0.975, num - 1) if num > 1 else np.nan
    return mean, half


def spread(losses):
    """Geometric mean [smallest, largest]."""
    return f"{geometric_mean(losses):.4g} [{np.min(losses):.4g}, {np.max(losses):.4g}]"


def print_comparison(name, betas, rates, found, steps):
    """A row for each rate, for one choice of betas."""
    widths = [10, 34, 34, 8, 26, 12]
    print(f"{name}: {steps} steps, betas {betas}")
    print_row(widths, ["rate", "plain", "guarded", "passes", "log difference", "no worse"])
    for rate in rates:
        plain = found["plain", rate, betas, steps][:, 0]
        guarded, passes = found["guarded", rate, betas, steps].T
        with np.errstate(invalid="ignore"):
            differences = np.log(guarded) - np.log(plain)
        mean, half = mean_and_half(differences)
        on_average = mean <= np.log(MOST_WORSE) or abs(mean) <= half
        is_no_worse = on_average and guarded.max() <= MOST_WORSE_SEED * plain.max()
        difference = f"{mean:+.3f} ± {half:.3f}"
        cells = [
            f"{rate:g}",
            spread(plain),
            spread(guarded),
            f"{np.mean(passes):.1f}",
            difference,
            verdict(is_no_worse),
        ]
        print_row(widths, cells)


def passes_needed(lengths, losses, target):
    """Between which budgets plain Adam reaches the target, log-interpolated: ``("<", "" or ">", passes)``."""
    lowest = np.log(np.minimum.accumulate(losses))
    reached = np.flatnonzero(lowest <= np.log(target))
    if not len(reached):
        return ">", lengths[-1]
    after = reached[0]
    if after == 0:
        return "<" if lowest[0] < np.log(target) else "", lengths[0]
    low, high = np.log(lengths[after - 1 : after + 1])
    share = (np.log(target) - lowest[after - 1]) / (lowest[after] - lowest[after - 1])
    return "", float(np.exp(low + share * (high - low)))


def print_budgets(name, found, lengths):
    """Plain Adam's best at each budget, which is returned."""
    widths = [10, 14, 12, 14]
    print(f"{name}: plain at its best, geometric mean of {SEEDS_FOR_BUDGET} seeds")
    print_row(widths, ["steps", "loss", "rate", "betas"])
    losses = []
    for length in lengths:
        means = {key: geometric_mean(values[:, 0]) for key, values in found.items() if key[-1] == length}
        _, rate, betas, _ = best = min(means, key=means.get)
        losses.append(means[best])
        print_row(widths, [length, f"{means[best]:.4g}", f"{rate:g}", betas])
    return losses


def print_ratio(name, betas, rates, found, steps, lengths, losses):
    """Backward passes that plain Adam needs for what the guarded run reaches, for one choice of betas."""
    ratios = []
    for rate in rates:
        losses_here, passes = found["guarded", rate, betas, steps][:SEEDS_FOR_BUDGET].T
        reached = geometric_mean(losses_here)
        sign, needed = passes_needed(lengths, losses, reached)
        ratios.append((sign != "<", needed / np.mean(passes)))
        print(
            f"betas {betas}, rate {rate:g}: guarded {reached:.4g} with {np.mean(passes):.1f} passes, plain needs "
            f"{sign}{needed:.0f}; ratio {sign}{ratios[-1][1]:.2f}"
        )
    is_bounded, ratio = max(ratios)
    verdicts = [f">= {least:g}: {verdict(is_bounded and ratio >= least)}" for least in CASES[name].least]
    print(f"betas {betas}: the best of these {'' if is_bounded else '<'}{ratio:.2f}; {'; '.join(verdicts)}")


def print_case(name, best, found, of_budgets, steps):
    rates = compared(best)
    for betas in rates:
        print_comparison(name, betas, rates[betas], found, steps)
    lengths = budgets(name, steps)
    losses = print_budgets(name, of_budgets, lengths)
    for betas in rates:
        print_ratio(name, betas, rates[betas], found, steps, lengths, losses)
    print(flush=True)


def training(options):
    names = chosen(options.task)
    steps = {name: options.steps or CASES[name].steps for name in names}
    codec_tasks.print_header(
        "Plain Adam and phase_switched with its defaults, for all tasks",
        *(CASES[name].task().description for name in names),
        f"n = {options.seeds} seeds; cosine schedule over all steps; processes of one thread, one a core",
        "losses: geometric mean [smallest, largest]; passes: mean",
        "log difference: of the final losses with the same seed, mean ± half of its 95 % interval by Student's t",
        f"no worse: mean at most log {MOST_WORSE} or 0 inside the interval, and no seed above {MOST_WORSE_SEED} times "
        "plain's worst",
        f"plain needs: for guarded's mean loss, the first {SEEDS_FOR_BUDGET} seeds of either, log-interpolated between "
        "plain's best at each number of steps",
    )
    jobs = {name: scan_jobs(name, steps[name]) for name in names}
    results = codec_tasks.in_processes(runs, [job for some in jobs.values() for job in some])
    best = {name: best_rates(name, gathered(results, jobs[name])) for name in names}

    jobs = {
        name: (
            comparison_jobs(name, best[name], steps[name], options.seeds),
            budget_jobs(name, best[name], steps[name]),
        )
        for name in names
    }
    results = codec_tasks.in_processes(runs, [job for pair in jobs.values() for some in pair for job in some])
    for name in names:
        found, of_budgets = (gathered(results, some) for some in jobs[name])
        print_case(name, best[name], found, of_budgets, steps[name])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="", help='only what contains this: "PINN"')
    parser.add_argument("--seeds", type=int, default=5, help="in the comparison")
    parser.add_argument("--steps", type=int, help="instead of each task's own, for a trial")
    began = time.perf_counter()
    training(parser.parse_args())
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
