"""The suite: training with skipped backward passes compared with other methods of as many passes, each at its best.

Run `python benchmarks/prediction.py | tee benchmarks/prediction.log` for the tasks without noise and the small ones in
mini-batches. It starts one process per core; on a machine with a GPU, prefix `JAX_PLATFORMS=cpu`. On a GPU, run
`--task bytes`, or `--task sentences` (`sentence_transformer.py` describes its weights): one run after the other. With
`--results FILE` it resumes where it was stopped, and uses the results that runs with other `--methods` have written.
`prediction_picture.py` draws the picture from the log.

Some seeds choose each method's rate, betas and own settings, and others compare the methods. They are compared at these
settings, and with plain Adam's betas at a quarter of plain Adam's best rate, which is typical of recipes. Plain Adam
also takes fewer and more steps, with rate and betas chosen and compared by the same seeds. This shows how many backward
passes it needs for the final loss of a method.

`coast` is Adam in disguise: a gradient of zero in every second step is plain Adam on the gradients in between, with
betas `(b1**2, b2**2)` and, to a percent, the rate times `sqrt(1 + b2)`. Without these betas in plain Adam's grid,
`coast` would look like a saving. So the grid has (0.8, 0.95), and rates in steps of the square root of 2. The grid of
`guard.py` has three pairs of betas, and rates a factor of 2 or more apart.
"""

import argparse
import functools
import itertools
import json
import pathlib
import sys
import time
from typing import NamedTuple

import byte_transformer
import codec_tasks
import digits_cnn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import prediction_tasks
import sentence_transformer
from guard import BETAS as GUARD_BETAS
from guard import MOST_WORSE, MOST_WORSE_SEED, geometric_mean
from prediction_methods import METHODS, RECIPE, WARMUP
from prediction_report import print_case

CASES = prediction_tasks.CASES | digits_cnn.CASES | sentence_transformer.CASES | byte_transformer.CASES
BETAS = (*GUARD_BETAS, (0.8, 0.95))
LARGE = [*sentence_transformer.CASES, *byte_transformer.CASES]
# The methods that are compared if runs are long. There, each method takes the best betas of plain Adam, and on a GPU
# the first of its settings.
FEW_METHODS = [
    method for method in METHODS if method not in ("conservative", "aggressive", "line, guarded", "line, 1 of 2")
]
FIRST_TUNING_SEED = 100


class Job(NamedTuple):
    """Arguments of `runs`; rates are with the betas they are used with."""

    name: str
    method: str
    variant: int
    rates: tuple[tuple[float, tuple[float, float]], ...]
    steps: int
    seeds: tuple[int, ...]


@functools.cache
def trainer(name, method, variant_number, steps):
    """``rate, betas, params, batches -> final loss, backward passes``, compiled, once a process."""
    task, method = CASES[name].task(), METHODS[method]
    variant = method.variants[variant_number]

    @jax.jit
    def train(rate, betas, params, batches):
        opt = optax.with_extra_args_support(method.make(rate, betas, steps, variant))
        if method.is_lookahead:
            params = optax.LookaheadParams.init_synced(params)

        def step(carry, batch):
            params, state, average, passes = carry
            needs = method.needs(state, variant)
            at = params.fast if method.is_lookahead else params
            value, gradient = jax.lax.cond(
                needs,
                lambda: jax.value_and_grad(task.loss)(at, batch),
                lambda: (task.loss(at, batch) if method.reads_value else jnp.zeros([]), optax.tree.zeros_like(at)),
            )
            updates, state = opt.update(gradient, state, params, value=value)
            params = optax.apply_updates(params, updates)
            if method.average:
                average = optax.tree.add(optax.tree.scale(variant, average), optax.tree.scale(1 - variant, params))
            return (params, state, average, passes + needs), None

        average = optax.tree.zeros_like(params) if method.average else None
        carry = (params, opt.init(params), average, jnp.zeros([], jnp.int32))
        params, _, average, passes = jax.lax.scan(step, carry, batches)[0]
        if method.average:
            params = optax.tree.scale(1 / (1 - variant**steps), average)
        return task.final(params.slow if method.is_lookahead else params), passes

    return train.lower(0.1, (0.9, 0.9), task.init(0), task.batches(0, steps)).compile()


def runs(name, method, variant, rates, steps, seeds):
    """``[rates, seeds, 3]``: final loss, infinite where it is not a number, backward passes, and seconds."""
    task, train = CASES[name].task(), trainer(name, method, variant, steps)
    found = np.zeros((len(rates), len(seeds), 3))
    for (row, (rate, betas)), (column, seed) in itertools.product(enumerate(rates), enumerate(seeds)):
        arguments = jax.block_until_ready((task.init(seed), task.batches(seed, steps)))
        began = time.perf_counter()
        loss, passes = jax.block_until_ready(train(rate, betas, *arguments))
        found[row, column] = float(loss), float(passes), time.perf_counter() - began
    return np.nan_to_num(found, nan=np.inf, posinf=np.inf)


def in_turn(jobs):
    """The results of the jobs, one after the other, for a GPU. Progress goes to the standard error."""
    for job in jobs:
        began = time.perf_counter()
        results = runs(*job)
        print(f"{time.perf_counter() - began:.0f} s: {job}, {results[..., 0].tolist()}", file=sys.stderr, flush=True)
        yield results


def remembering(run_all, path):
    """``run_all`` for the jobs whose results are not in the file, a JSON list a line, to which theirs are added."""

    def run(jobs):
        jobs = list(jobs)
        lines = path.read_text().splitlines() if path.exists() else []
        known = {json.dumps(job): results for job, results in map(json.loads, lines)}
        new = iter(run_all([job for job in jobs if json.dumps(job) not in known]))
        with path.open("a") as file:
            for job in jobs:
                if json.dumps(job) in known:
                    yield np.array(known[json.dumps(job)])
                    continue
                results = next(new)
                print(json.dumps([job, results.tolist()]), file=file, flush=True)
                yield results

    return run


def gathered(run_all, jobs):
    """``{(name, method, variant, rate, betas, steps): [seeds, 3]}``."""
    found = {}
    for job, results in zip(jobs, run_all(jobs), strict=True):
        for (rate, betas), values in zip(job.rates, results, strict=True):
            found.setdefault((job.name, job.method, job.variant, rate, betas, job.steps), []).append(values)
    return {key: np.concatenate(parts) for key, parts in found.items()}


def split(name, method, variant, rates, steps, seeds):
    """A job, or one for each run where that takes long."""
    if not CASES[name].runs_apart:
        return [Job(name, method, variant, tuple(rates), steps, tuple(seeds))]
    return [Job(name, method, variant, (rate,), steps, (seed,)) for rate, seed in itertools.product(rates, seeds)]


class Plan(NamedTuple):
    """How much is run of a task.

    Attributes:
        methods: that take part.
        rates: to choose from.
        betas: plain Adam chooses from; the others too, unless runs are long.
        tuning_seeds: to choose by.
        seeds: to compare by.
    """

    methods: tuple[str, ...]
    rates: tuple[float, ...]
    betas: tuple[tuple[float, float], ...]
    tuning_seeds: range
    seeds: range


def plan_of(name, options):
    case, is_large = CASES[name], name in LARGE
    takes_long = is_large or case.runs_apart
    methods = [method for method in METHODS if not takes_long or method in FEW_METHODS]
    if options.methods:
        methods = ["plain", *(m for m in methods if m != "plain" and any(o in m for o in options.methods.split(",")))]
    first = FIRST_TUNING_SEED
    return Plan(
        tuple(methods),
        case.rates if options.coarse else half_octaves(case.rates),
        BETAS[:1] + BETAS[2:3] if options.coarse else BETAS[:2] + BETAS[-1:] if is_large else BETAS,
        range(first, first + (options.tuning_seeds or (1 if is_large else 2 if case.runs_apart else 6))),
        range(options.seeds or (5 if takes_long else 10)),
    )


def half_octaves(rates):
    """From the smallest to the largest or beyond, each the one before times the square root of 2."""
    num = int(np.ceil(2 * np.log2(max(rates) / min(rates))))
    return tuple(min(rates) * 2 ** (power / 2) for power in range(num + 1))


def tuning_jobs(name, plan, steps, methods, betas):
    rates = [*itertools.product(plan.rates, betas)]
    return [
        job
        for method in methods
        for variant in range(1 if name in LARGE else len(METHODS[method].variants))
        for job in split(name, method, variant, rates, steps, plan.tuning_seeds)
    ]


def best_of(found, name, method, steps):
    """The variant, rate and betas with the least mean loss, of what was found for a method in so many steps."""
    means = {
        key[2:5]: geometric_mean(values[:, 0])
        for key, values in found.items()
        if key[:2] == (name, method) and key[5] == steps
    }
    return min(means, key=means.get)


def comparison_jobs(name, plan, steps, best):
    """Each method at its best, and with the same setting of its own at the recipe's rate and plain Adam's betas."""
    _, rate, betas = best["plain"]
    jobs = []
    for method in plan.methods:
        variant, *own = best[method]
        rates = dict.fromkeys([tuple(own), (RECIPE * rate, betas)])
        jobs += split(name, method, variant, rates, steps, plan.seeds)
    return jobs


def budgets_of(name, steps, fewest=None):
    fractions = CASES[name].fractions if fewest is None else (fewest, *CASES[name].fractions)
    return [max(1, round(fraction * steps)) for fraction in fractions]


def budget_tuning_jobs(name, plan, steps, best, budgets):
    """Plain Adam with other numbers of steps: its best rate and its neighbours, with all betas unless runs are long."""
    _, rate, betas = best["plain"]
    at = plan.rates.index(rate)
    rates = [*itertools.product(plan.rates[max(0, at - 2) : at + 3], (betas,) if name in LARGE else plan.betas)]
    return [
        job
        for budget in reversed(budgets)
        if budget != steps
        for job in split(name, "plain", 0, rates, budget, plan.tuning_seeds)
    ]


def budget_jobs(name, plan, best_at):
    """At each number of steps with what is best there."""
    return [
        job
        for budget, (variant, *own) in best_at.items()
        for job in split(name, "plain", variant, [tuple(own)], budget, plan.seeds)
    ]


def suite(options):
    names = [name for name in CASES if (options.task in name if options.task else name not in LARGE)]
    steps = {name: options.steps or CASES[name].steps for name in names}
    plans = {name: plan_of(name, options) for name in names}
    budgets = {name: budgets_of(name, steps[name], options.fewest) for name in names}
    is_large = any(name in LARGE for name in names)
    run_all = in_turn if is_large else functools.partial(codec_tasks.in_processes, runs)
    if options.results:
        run_all = remembering(run_all, options.results)
    codec_tasks.print_header(
        "Final losses, backward passes, and how many of these plain Adam needs, each method at its own best settings",
        f"{jax.devices()[0].device_kind}; cosine schedule over all steps; betas of plain Adam: {plans[names[0]].betas}",
        "losses: geometric mean [smallest, largest]; passes: mean; a number behind a name: which of its settings",
        "settings are chosen by other seeds than those that are compared, plain Adam's at each number of steps too",
        "plain needs: for the method's mean loss, log-interpolated between its best at each number of steps",
        "ratio: that, divided by the passes used; time: the same of seconds, each run in its own process of one thread",
        f"skipped: behind {WARMUP} steps; log difference: to plain with the same seed, mean ± half its 95 % interval",
        f"no worse: mean at most log {MOST_WORSE} or 0 inside the interval, and no seed above {MOST_WORSE_SEED} times "
        "plain's worst",
    )
    # All tasks' jobs of a kind together, the long ones first, so that no core waits for a task's end.
    by_length = sorted(names, key=lambda name: -steps[name] * (1 + CASES[name].runs_apart * 100))
    # Where runs are long, plain Adam goes first, and the others take its betas.
    apart = {name: name in LARGE or CASES[name].runs_apart for name in names}

    def tuning(name, methods, betas):
        return tuning_jobs(name, plans[name], steps[name], methods, betas)

    jobs = [job for name in by_length for job in tuning(name, ("plain",), plans[name].betas)]
    for name in by_length:
        if not apart[name]:
            jobs += tuning(name, plans[name].methods[1:], plans[name].betas)
    found = gathered(run_all, jobs)
    best = {name: {"plain": best_of(found, name, "plain", steps[name])} for name in names}
    jobs = []
    for name in by_length:
        if apart[name]:
            jobs += tuning(name, plans[name].methods[1:], (best[name]["plain"][2],))
        jobs += budget_tuning_jobs(name, plans[name], steps[name], best[name], budgets[name])
    found |= gathered(run_all, jobs)
    best_at = {}
    for name in names:
        best[name] |= {method: best_of(found, name, method, steps[name]) for method in plans[name].methods[1:]}
        best_at[name] = {budget: best_of(found, name, "plain", budget) for budget in budgets[name]}

    jobs = []
    for name in by_length:
        jobs += comparison_jobs(name, plans[name], steps[name], best[name])
        jobs += budget_jobs(
            name, plans[name], {budget: at for budget, at in best_at[name].items() if budget != steps[name]}
        )
    found = gathered(run_all, jobs)
    for name in names:
        print_case(name, CASES[name], plans[name], steps[name], best[name], best_at[name], found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="", help='only what contains this: "PINN"; all small ones unless given')
    parser.add_argument("--methods", default="", help='only what contains one of these: "aggressive,coast"')
    parser.add_argument("--seeds", type=int, help="to compare by; 10 unless given, 5 where runs are long")
    parser.add_argument("--coarse", action="store_true", help="choose from few rates and two pairs of betas")
    parser.add_argument("--tuning-seeds", type=int, help="to choose by; 6 unless given, fewer where runs are long")
    parser.add_argument("--fewest", type=float, help="also give plain Adam this fraction of the steps, such as 0.2")
    parser.add_argument("--steps", type=int, help="instead of each task's own, for a trial")
    parser.add_argument("--results", type=pathlib.Path, help="a file to keep each run's results in, and to go on from")
    began = time.perf_counter()
    suite(parser.parse_args())
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
