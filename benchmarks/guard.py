"""Calibrated predictions out of sample, and guarded training beside plain Adam: what it costs, and what it saves.

Run `python benchmarks/guard.py > benchmarks/guard.log`; without a name both modes are run. Both start a process a core:
where there is a GPU, put `JAX_PLATFORMS=cpu` in front. `--task` and `--seeds` choose from it.

`prediction` records gradients, and the updates of Adam at rate 1, along runs of plain Adam, and predicts each from
records that end some steps before. `training` compares runs of equal length, seed by seed, and asks how many backward
passes plain Adam, its rate and betas chosen for that, would have needed for the same loss.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import codec_tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from codec_tasks import Task, print_row, verdict

import vsa_optax
from vsa_optax.kernels import calibration
from vsa_optax.transforms.history import WindowHistoryState
from vsa_optax.transforms.window_history import WindowHistory

OPTIONS = {"calibrate": True, "guard": True}  # The same for all tasks.

WINDOW, DECAY, FORGET = 8, 0.95, 0.95  # The library's defaults.
HORIZONS = (1, 2, 4, 9)
SETTLING = 20
MOST_ERROR, MOST_ERROR_STRETCH = 1.05, 0.95
PREDICTIONS = ("zero", "last", "mean", "line", "calibrated")

DEFAULT_BETAS = (0.9, 0.999)
BETAS = (DEFAULT_BETAS, (0.9, 0.98), (0.95, 0.98))
RATE_FACTORS = (0.25, 1.0, 2.0)
BUDGET_RATE_FACTORS = (0.5, 1.0, 2.0)
SEEDS_FOR_RATE, SEEDS_FOR_BUDGET = 2, 3
FRACTIONS = (0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.25, 1.5)
MOST_WORSE, MOST_WORSE_SEED = 1.01, 1.05

BOUNDARY_WEIGHT = 10.0


class Case(NamedTuple):
    """A task and how it is used.

    Attributes:
        task: makes it.
        rates: the grid to choose plain Adam's from.
        steps: of training.
        recorded: steps of a trajectory, at the middle one of the task's own rates.
        least: targets for the ratio of backward passes.
        fractions: of the steps, plain Adam's budgets.
        runs_apart: whether each run is a job of its own, as it takes long.
    """

    task: Callable[[], Task]
    rates: tuple[float, ...]
    steps: int
    recorded: int
    least: tuple[float, ...]
    fractions: tuple[float, ...] = FRACTIONS
    runs_apart: bool = False


@functools.cache
def digits_full_batch():
    """The loss that is differentiated is the final one."""
    task = codec_tasks.digits(64)
    return task._replace(
        description=task.description.replace("batch 64", "full batch"),
        batches=no_batches,
        loss=lambda params, _: task.final(params),
    )


def no_batches(seed, steps):
    del seed
    return np.zeros((steps, 1), np.int32)


@functools.cache
def pinn(frequency, width=32, num_points=128):
    """A network of two hidden layers for ``u'' = -sin(frequency pi x)`` on [0, 1], zero at both ends."""
    points = jnp.linspace(0, 1, num_points)
    sizes = [1, width, width, 1]

    def init(seed):
        layers = []
        for key, fan_in, fan_out in zip(jax.random.split(jax.random.key(seed), 3), sizes, sizes[1:], strict=False):
            is_first = fan_in == 1
            scale = (3 if is_first else 1) * np.sqrt(2 / (fan_in + fan_out))
            bias = (0.5 if is_first else 0.0) * jax.random.normal(jax.random.fold_in(key, 1), (fan_out,))
            layers.append({"kernel": scale * jax.random.normal(key, (fan_in, fan_out)), "bias": bias})
        return layers

    def solution(params, x):
        hidden = x[None]
        for layer in params[:-1]:
            hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"])
        return (hidden @ params[-1]["kernel"] + params[-1]["bias"])[0]

    def final(params):
        second = jax.vmap(jax.grad(jax.grad(functools.partial(solution, params))))(points)
        residual = second + jnp.sin(frequency * np.pi * points)
        ends = solution(params, jnp.array(0.0)) ** 2 + solution(params, jnp.array(1.0)) ** 2
        return jnp.mean(residual**2) + BOUNDARY_WEIGHT * ends

    num = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init(0))))
    return Task(
        f"PINN: {num:,} parameters, u'' = -sin({frequency} pi x) at {num_points} points; final loss is the same",
        rates=(0.003, 0.01, 0.02),
        init=init,
        batches=no_batches,
        loss=lambda params, _: final(params),
        final=final,
    )


CASES = {
    "digits, full batch": Case(digits_full_batch, (0.003, 0.01, 0.03, 0.06), 300, 300, (1.5, 2.5)),
    "PINN, sin(2 pi x)": Case(lambda: pinn(2), (0.003, 0.01, 0.02, 0.04), 2000, 600, (1.5,)),
    "PINN, sin(6 pi x)": Case(lambda: pinn(6), (0.003, 0.01, 0.02, 0.04), 2000, 600, (1.5,)),
    "digits, batch 64": Case(lambda: codec_tasks.digits(64), (0.001, 0.003, 0.01, 0.03), 300, 300, (1.0,)),
    "chars, batch 8": Case(
        lambda: codec_tasks.characters(8, 128),
        (0.001, 0.003, 0.006, 0.012),
        200,
        120,
        (1.0,),
        fractions=(0.65, 1.0, 1.25),
        runs_apart=True,
    ),
}


def trajectory(task, rate, steps):
    """Gradients, and updates of Adam at rate 1, along seed 0's run of plain Adam: trees with an axis ``[T]``."""
    directions = optax.adam(1.0)
    schedule = optax.cosine_decay_schedule(rate, steps)

    def step(carry, indexed):
        params, state = carry
        batch, number = indexed
        gradient = jax.grad(task.loss)(params, batch)
        update, state = directions.update(gradient, state)
        params = jax.tree.map(lambda p, u: p + schedule(number) * u, params, update)
        return (params, state), (gradient, update)

    @jax.jit
    def run(params, batches):
        return jax.lax.scan(step, (params, directions.init(params)), (batches, jnp.arange(steps)))[1]

    return run(task.init(0), jnp.asarray(task.batches(0, steps)))


def gram_matrices(tree):
    """``[L, T, T]`` float64: the products of all records of a leaf with each other."""
    leaves = [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)]
    return np.stack([leaf @ leaf.T for leaf in leaves])


@jax.jit
def calibrated(gram, products, energy):
    """``[n, L, K]``: the library's coefficients after each of n measurements."""

    def step(sums, measured):
        sums, _ = calibration.measure(sums, calibration.coefficients(sums), *measured, FORGET)
        return sums, calibration.coefficients(sums)

    start = calibration.zeros(*products.shape[1:])
    return jax.lax.scan(step, start, (gram, products, energy))[1]


def prediction_weights(horizon):
    """``[W]`` for each prediction without calibration, and ``[K, W]`` for the library's features of the one with it."""
    filled = WindowHistoryState(None, jnp.arange(WINDOW, dtype=jnp.int32), jnp.int32(WINDOW))
    scalars = WindowHistory(WINDOW, DECAY, None).scalars(filled, jnp.int32(WINDOW - 1 + horizon))
    line, features, reach = (np.asarray(x, np.float64) for x in (scalars.coefficients, scalars.features, scalars.reach))
    last = np.eye(WINDOW)[-1]
    fixed = {"zero": 0 * last, "last": last, "mean": np.full(WINDOW, 1 / WINDOW), "line": line}
    return fixed, features * reach[:, None]


def relative_errors(grams, horizon):
    """For each of the `PREDICTIONS` the mean over the steps of ``||y - y'||^2 / ||y||^2`` of the whole tree."""
    targets = np.arange(WINDOW - 1 + horizon, grams.shape[1])
    records = targets[:, None] - horizon - np.arange(WINDOW)[::-1]
    windows = np.moveaxis(grams[:, records[:, :, None], records[:, None, :]], 0, 1)  # [n, L, W, W]
    with_target = np.moveaxis(grams[:, targets[:, None], records], 0, 1)  # [n, L, W]
    energy = grams[:, targets, targets].T  # [n, L]
    fixed, features = prediction_weights(horizon)
    gram, products = features @ windows @ features.T, with_target @ features.T

    def seen(measured):
        """What is known when a target is predicted: measurements of targets as old as the newest record."""
        delayed = np.concatenate([np.zeros_like(measured[:horizon]), measured[:-horizon]])
        return jnp.asarray(delayed, jnp.float32)

    theta = np.asarray(calibrated(seen(gram), seen(products), seen(energy)), np.float64)
    weights = {name: np.broadcast_to(w, with_target.shape) for name, w in fixed.items()}
    weights["calibrated"] = theta @ features
    is_counted = targets >= WINDOW + 2 * horizon + SETTLING
    means = []
    for name in PREDICTIONS:
        w = weights[name]
        squared = energy - 2 * np.sum(w * with_target, -1) + np.einsum("nli,nlij,nlj->nl", w, windows, w)
        means.append(np.mean((squared.sum(axis=1) / energy.sum(axis=1))[is_counted]))
    return means


def prediction_errors(name, steps):
    """``[2, horizons, predictions]``: of gradients and of updates."""
    task = CASES[name].task()
    trees = trajectory(task, task.rates[1], steps)
    return [[relative_errors(grams, h) for h in HORIZONS] for grams in map(gram_matrices, trees)]


def prediction(options):
    names = chosen(options)
    codec_tasks.print_header(
        "PREDICTION: mean over the steps of ||y - y'||^2 / ||y||^2 over the whole tree",
        f"y' from the {WINDOW} records that end h steps before y, decay {DECAY}",
        f"along plain Adam with a cosine schedule, betas {DEFAULT_BETAS}, seed 0",
        "line: weighted least squares as it is; calibrated: with coefficients from targets up to h steps before y",
        *(CASES[name].task().description for name in names),
    )
    lengths = [options.steps or CASES[name].recorded for name in names]
    widths = [10, 4, *[11] * len(PREDICTIONS), 12, 14, 18]
    for name, steps, of_domains in zip(
        names, lengths, codec_tasks.in_processes(prediction_errors, zip(names, lengths, strict=True)), strict=True
    ):
        print(f"{name}: {steps} steps at rate {CASES[name].task().rates[1]:g}")
        print_row(
            widths, ["of", "h", *PREDICTIONS, "/ best other", f"<= {MOST_ERROR}", f"stretch <= {MOST_ERROR_STRETCH}"]
        )
        for domain, of_horizons in zip(("gradients", "updates"), of_domains, strict=True):
            for horizon, errors in zip(HORIZONS, of_horizons, strict=True):
                ratio = errors[-1] / min(errors[:-1])
                verdicts = [verdict(ratio <= most) for most in (MOST_ERROR, MOST_ERROR_STRETCH)]
                print_row(widths, [domain, horizon, *(f"{e:.4g}" for e in errors), f"{ratio:.3f}", *verdicts])
        print(flush=True)


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
    return vsa_optax.phase_switched(adam(1.0), learning_rate=schedule, **OPTIONS)


@functools.cache
def trainer(name, method, steps):
    """``rate, betas, params, batches -> final loss, backward passes, rollbacks``, compiled once a process."""
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
            return task.final(params), steps, 0
        return task.final(params), steps - vsa_optax.phase_stats(state).predict_steps, state.machine.guard.rollbacks

    return train


def runs(name, method, rates, betas, steps, seeds):
    """``[rates, seeds, 3]``: final loss, infinite where it is not a number, backward passes, rollbacks."""
    task, train = CASES[name].task(), trainer(name, method, steps)
    found = [[train(rate, betas, task.init(seed), task.batches(seed, steps)) for seed in seeds] for rate in rates]
    return np.nan_to_num(np.array(found, np.float64), nan=np.inf, posinf=np.inf)


def jobs_of(name, method, rates, betas, steps, num_seeds):
    """One that compiles once for all rates and seeds; one for each where a run takes long."""
    seeds = tuple(range(num_seeds))
    if not CASES[name].runs_apart:
        return [Job(name, method, tuple(rates), betas, steps, seeds)]
    return [Job(name, method, (rate,), betas, steps, (seed,)) for rate in rates for seed in seeds]


def gathered(results, jobs):
    """``{(method, rate, betas, steps): [seeds, 3]}`` from as many results as there are jobs."""
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
    widths = [10, 34, 34, 8, 10, 26, 12]
    print(f"{name}: {steps} steps, betas {betas}")
    print_row(widths, ["rate", "plain", "guarded", "passes", "rollbacks", "log difference", "no worse"])
    for rate in rates:
        plain = found["plain", rate, betas, steps][:, 0]
        guarded, passes, rollbacks = found["guarded", rate, betas, steps].T
        with np.errstate(invalid="ignore"):
            differences = np.log(guarded) - np.log(plain)
        mean, half = mean_and_half(differences)
        on_average = mean <= np.log(MOST_WORSE) or abs(mean) <= half
        is_no_worse = on_average and guarded.max() <= MOST_WORSE_SEED * plain.max()
        difference = f"{mean:+.3f} ± {half:.3f}"
        numbers = [f"{np.mean(passes):.1f}", f"{np.mean(rollbacks):.1f}"]
        print_row(widths, [f"{rate:g}", spread(plain), spread(guarded), *numbers, difference, verdict(is_no_worse)])


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
    guarded = {rate: found["guarded", rate, betas, steps][:SEEDS_FOR_BUDGET] for rate in rates}
    means = {rate: geometric_mean(values[:, 0]) for rate, values in guarded.items()}
    rate = min(means, key=means.get)
    passes = np.mean(guarded[rate][:, 1])
    sign, needed = passes_needed(lengths, losses, means[rate])
    ratio = needed / passes
    verdicts = [f">= {least:g}: {verdict(ratio >= least and sign != '<')}" for least in CASES[name].least]
    print(
        f"betas {betas}, rate {rate:g}: guarded {means[rate]:.4g} with {passes:.1f} passes, "
        f"plain needs {sign}{needed:.0f}; ratio {sign}{ratio:.2f}; {'; '.join(verdicts)}"
    )


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
    names = chosen(options)
    steps = {name: options.steps or CASES[name].steps for name in names}
    codec_tasks.print_header(
        f"TRAINING: plain Adam and phase_switched with {OPTIONS}, otherwise with its defaults, for all tasks",
        *(CASES[name].task().description for name in names),
        f"n = {options.seeds} seeds; cosine schedule over all steps; processes of one thread, one a core",
        "losses: geometric mean [smallest, largest]; passes, rollbacks: means",
        "log difference: of the final losses with the same seed, mean ± half of its 95 % interval by Student's t",
        f"no worse: mean at most log {MOST_WORSE} or 0 inside the interval, and no seed above {MOST_WORSE_SEED} times "
        "plain's worst",
        f"plain needs: for guarded's mean loss at its best rate, the first {SEEDS_FOR_BUDGET} seeds of either, "
        "log-interpolated",
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


def chosen(options):
    return [name for name in CASES if options.task in name]


MODES = {"prediction": prediction, "training": training}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", choices=MODES, help="default: both")
    parser.add_argument("--task", default="", help='only what contains this: "PINN"')
    parser.add_argument("--seeds", type=int, default=5, help="in the comparison of training")
    parser.add_argument("--steps", type=int, help="instead of each task's own, for a trial")
    options = parser.parse_args()
    for name, mode in MODES.items():
        if not options.modes or name in options.modes:
            began = time.perf_counter()
            mode(options)
            print(f"\n{name}: {time.perf_counter() - began:.0f} s in all\n", flush=True)


if __name__ == "__main__":
    main()
