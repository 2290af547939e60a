"""Accumulates gradients in trits, `optax.MultiSteps` and other ways, and measures the loss of accuracy.

Run `python benchmarks/accumulation.py fidelity training > benchmarks/accumulation.log`; without a name both are run.
They start one process per core; on a machine with a GPU, prefix `JAX_PLATFORMS=cpu`. All of `training` takes an hour on
two cores; `--case` and `--methods` select a part. `accumulation_costs.py` measures memory and time.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import accumulation_rivals as rivals
import codec_tasks as tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
from codec_tasks import TRITS, bits, in_trits, print_row, spread, verdict

import vsa_optax

SIZE = 1 << 20
CAPTURED_AFTER = 100
CAPTURED_FROM = {"digits": lambda: tasks.digits(64), "characters": tasks.characters}
ALL_K = {"Gaussian": (2, 8, 32), "digits": (8,), "characters": (8, 32)}
# Relative squared errors of the mean of eight by `accumulate_ternary`, by `ternary_accumulator`.
MOST_ERROR, MOST_REAL_ERROR = {1: 0.405, 2: 0.09, 3: 0.0125}, {1: 0.32, 2: 0.08}
MOST_ACCUMULATOR_ERROR = {1: 0.49, 2: 0.11}

SEEDS_FOR_RATE = 2
UPDATES = {("characters", 32): 50, ("characters", 8): 200, ("digits", 32): 150, ("digits", 8): 150}
TASKS = {"digits": lambda: tasks.digits(16), "characters": lambda: tasks.characters(4)}


class Method(NamedTuple):
    """A way to take the mean of K gradients one after the other.

    Attributes:
        state: K, tree like the gradients -> state.
        mean: tree with an axis ``[K]`` in front, number of the window -> tree.
    """

    state: Callable[[int, Any], Any]
    mean: Callable[[Any, jax.Array], Any]


def by_transformation(make):
    """For ``make(K)``, which emits the mean at the K-th step."""

    def mean(gradients, number):
        like = jax.tree.map(lambda g: g[0], gradients)
        opt = make(len(jax.tree.leaves(gradients)[0]))

        def step(carry, gradient):
            return opt.update(gradient, carry[1]), None

        start = like, opt.init(like)._replace(gradient_step=number)
        return jax.lax.scan(step, start, gradients)[0][0]

    return Method(lambda every_k, like: make(every_k).init(like), mean)


def by_accumulator(make):
    """For ``make(K)``, an `optax.microbatching.Accumulator`."""

    def mean(gradients, number):
        del number
        every_k = len(jax.tree.leaves(gradients)[0])
        accumulator = make(every_k)

        def step(carry, indexed):
            return accumulator.update(carry, *indexed), None

        start = accumulator.init(jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), gradients))
        return accumulator.finalize(jax.lax.scan(step, start, (gradients, jnp.arange(every_k)))[0])

    return Method(lambda every_k, like: make(every_k).init(like), mean)


def methods():
    found = {}
    for rounding in ("nearest", "stochastic"):
        for trits in TRITS:
            make = functools.partial(vsa_optax.accumulate_ternary, trits=trits, rounding=rounding)
            found[in_trits(trits) + ", stochastic" * (rounding != "nearest")] = by_transformation(make)
    for trits in TRITS:
        make = functools.partial(vsa_optax.ternary_accumulator, trits=trits)
        found[f"ternary_accumulator, {in_trits(trits)}"] = by_accumulator(make)
    return found | {
        "optax.MultiSteps": by_transformation(lambda k: optax.MultiSteps(optax.identity(), k)),
        "optax.MultiSteps, bfloat16": by_transformation(
            lambda k: optax.MultiSteps(optax.identity(), k, accumulator_dtype=jnp.bfloat16)
        ),
        "int8, blocks of 256": by_transformation(
            lambda k: rivals.multi_steps(optax.identity(), k, rivals.int8_blocks())
        ),
        "counts of stochastic trits": by_transformation(
            lambda k: rivals.multi_steps(optax.identity(), k, rivals.ternary_counts())
        ),
    }


@functools.lru_cache(maxsize=1)
def captured(name, num_seeds):
    """For each seed the gradients of K batches at one place, behind steps of Adam at the middle one of the rates."""
    task, every_k = CAPTURED_FROM[name](), max(ALL_K[name])

    @jax.jit
    def capture(params, batches):
        params = tasks.trained(task, params, batches[:CAPTURED_AFTER])
        return jax.lax.map(lambda batch: jax.grad(task.loss)(params, batch), batches[CAPTURED_AFTER:])

    return [capture(task.init(seed), task.batches(seed, CAPTURED_AFTER + every_k)) for seed in range(num_seeds)]


def gaussian(num_seeds, every_k):
    return (jax.random.normal(jax.random.key(seed), [every_k, SIZE]) for seed in range(num_seeds))


def mean_errors(data, name, every_k, num_seeds):
    """Squared errors of the mean of K, ``[seeds, leaves]``, and squared norms of the exact one."""
    method = methods()[name]

    @jax.jit
    def one(gradients, number):
        gradients = jax.tree.map(lambda g: g[:every_k], gradients)
        exact = [jnp.mean(g, axis=0) for g in jax.tree.leaves(gradients)]
        found = jax.tree.leaves(method.mean(gradients, number))
        errors = [jnp.sum((x - y) ** 2) for x, y in zip(exact, found, strict=True)]
        return jnp.array(errors), jnp.array([jnp.sum(x**2) for x in exact])

    trees = gaussian(num_seeds, every_k) if data == "Gaussian" else captured(data, num_seeds)
    results = [one(gradients, jnp.int32(seed)) for seed, gradients in enumerate(trees)]
    return tuple(np.array(column, np.float64) for column in zip(*results, strict=True))


def print_errors(title, data, found):
    """A row for each method, from ``{(data, name, K): (errors, norms)}``."""
    print(title)
    is_real = data in CAPTURED_FROM
    like = CAPTURED_FROM[data]().init(0) if is_real else jax.ShapeDtypeStruct([SIZE], jnp.float32)
    widths, heads = [30, 7], ["method", "bits"]
    for every_k in ALL_K[data]:
        widths += [34, 36][: 1 + is_real]
        heads += [f"K = {every_k}: error, mean [min, max]", "worst leaf: mean error"][: 1 + is_real]
    print_row(widths, heads)
    for name, method in methods().items():
        cells = [name, f"{bits(jax.eval_shape(functools.partial(method.state, 8), like), like):.3f}"]
        for every_k in ALL_K[data]:
            errors, norms = found[data, name, every_k]
            cells.append(spread(errors.sum(axis=1) / norms.sum(axis=1)))
            if is_real:
                by_leaf = np.mean(errors / np.maximum(norms, 1e-30), axis=0)
                worst = int(np.argmax(by_leaf))
                cells.append(f"{tasks.leaf_names(like)[worst]}: {by_leaf[worst]:.4g}")
        print_row(widths, cells)
    print(flush=True)


def fidelity(options):
    seeds = {data: options.seeds or number for data, number in {"Gaussian": 5, "digits": 20, "characters": 5}.items()}
    tasks.print_header(
        "FIDELITY: ||mean' - mean||^2 / ||mean||^2 of the mean of K gradients taken one after the other",
        "bits: a parameter, of all that is kept between two micro-batches",
        f"digits, characters: gradients of K batches at the same weights, after {CAPTURED_AFTER} steps of Adam",
        *(make().description.split("; final")[0] for make in CAPTURED_FROM.values()),
    )
    # The longest jobs come first.
    jobs = [
        (data, name, k, seeds[data]) for data in reversed(ALL_K) for k in reversed(ALL_K[data]) for name in methods()
    ]
    results = tasks.in_processes(mean_errors, jobs)
    found = {job[:3]: result for job, result in zip(jobs, results, strict=True)}
    print_errors(f"Gaussian, independent, d = {SIZE:,}; n = {seeds['Gaussian']}", "Gaussian", found)
    for data, make in CAPTURED_FROM.items():
        print_errors(f"{data}, captured at rate {make().rates[1]:g}; n = {seeds[data]}", data, found)
    print("Targets, K = 8, means over the seeds")
    targets = [("Gaussian", in_trits(t), most) for t, most in MOST_ERROR.items()]
    targets += [("Gaussian", f"ternary_accumulator, {in_trits(t)}", m) for t, m in MOST_ACCUMULATOR_ERROR.items()]
    targets += [(data, in_trits(t), m) for data in CAPTURED_FROM for t, m in MOST_REAL_ERROR.items()]
    for data, name, most in targets:
        errors, norms = found[data, name, 8]
        error = np.mean(errors.sum(axis=1) / norms.sum(axis=1))
        print_row([30, 12, 10, 10, 10], [name, data, f"{error:.5f}", f"<= {most:g}", verdict(error <= most)])


def optimizers(learning_rate, every_k):
    """Adam behind each way to accumulate, by name."""
    adam = optax.adam(learning_rate)
    found = {"optax.MultiSteps": optax.MultiSteps(adam, every_k)}
    for trits in TRITS:
        found[in_trits(trits)] = vsa_optax.ternary_multi_steps(adam, every_k, trits=trits)
    return found | {
        "2 trits, stochastic": vsa_optax.ternary_multi_steps(adam, every_k, trits=2, rounding="stochastic"),
        "optax.MultiSteps, bfloat16": optax.MultiSteps(adam, every_k, accumulator_dtype=jnp.bfloat16),
        "int8, blocks of 256": rivals.multi_steps(adam, every_k, rivals.int8_blocks()),
        "counts of stochastic trits": rivals.multi_steps(adam, every_k, rivals.ternary_counts()),
        "AdamA, no accumulator": rivals.adam_a(learning_rate, every_k),
    }


@functools.cache
def trainer(task_name, every_k, name, updates):
    """``rate, params, batches -> final loss``, compiled once a process."""
    task = TASKS[task_name]()

    @jax.jit
    def train(rate, params, batches):
        opt = optimizers(optax.cosine_decay_schedule(rate, updates), every_k)[name]

        def step(carry, batch):
            params, state = carry
            emitted, state = opt.update(jax.grad(task.loss)(params, batch), state, params)
            return (optax.apply_updates(params, emitted), state), None

        return task.final(jax.lax.scan(step, (params, opt.init(params)), batches)[0][0])

    return train


def final_losses(task_name, every_k, name, rate, updates, seeds):
    """``[seeds]``."""
    task = TASKS[task_name]()
    train = trainer(task_name, every_k, name, updates)
    return [float(train(rate, task.init(seed), task.batches(seed, every_k * updates))) for seed in seeds]


def jobs_of(case, name, rate, updates, num_seeds):
    """Arguments of `final_losses`: the characters' seeds apart, as they take long."""
    seeds = range(num_seeds)
    return [(*case, name, rate, updates, some) for some in ([seeds] if case[0] == "digits" else [[s] for s in seeds])]


def in_order(jobs):
    """The losses of all jobs, one after the other, each as soon as it and those before are there."""
    return itertools.chain.from_iterable(tasks.in_processes(final_losses, jobs))


def training(options):
    updates = {
        (task, k): options.updates or number
        for (task, k), number in UPDATES.items()
        if options.case in f"{task}, K = {k}"
    }
    seeds = {"digits": options.seeds or 10, "characters": options.seeds or 5}
    tasks.print_header(
        "TRAINING: the final loss with Adam behind the accumulated mean",
        *(f"{TASKS[name]().description}; n = {seeds[name]} seeds" for name in TASKS),
        "batches are micro-batches; cosine schedule over the updates; processes of one thread, one a core",
        "difference: to f32 with the same seed, mean [min, max]; sd: of f32 over the seeds",
    )
    reference = "optax.MultiSteps"
    scan = [
        job
        for case, number in updates.items()
        for rate in TASKS[case[0]]().rates
        for job in jobs_of(case, reference, rate, number, SEEDS_FOR_RATE)
    ]
    scanned = np.reshape(list(in_order(scan)), (len(updates), -1, SEEDS_FOR_RATE)).mean(axis=2)
    best = {}
    for case, means in zip(updates, scanned, strict=True):
        rates = TASKS[case[0]]().rates
        best[case] = rates[int(np.nanargmin(means))]
        text = ", ".join(f"{mean:.5f} at {rate:g}" for mean, rate in zip(means, rates, strict=True))
        print(
            f"{case[0]}, K = {case[1]}: f32, mean of {SEEDS_FOR_RATE} seeds: {text}; used: {best[case]:g}", flush=True
        )
    print()
    names = list(optimizers(1e-3, 8))[: options.methods]
    jobs = [
        job
        for case, number in updates.items()
        for name in names
        for job in jobs_of(case, name, best[case], number, seeds[case[0]])
    ]
    found = in_order(jobs)
    widths = [30, 20, 36, 10, 42]
    for case, number in updates.items():
        heads = [f"{case[0]}, K = {case[1]}, {number} updates", "final loss ± sd", "difference", "in sd", ""]
        print_row(widths, heads)
        for name in names:
            losses = np.array([next(found) for _ in range(seeds[case[0]])])
            if name == reference:
                plain = losses
            deviations = (losses - plain).mean() / plain.std(ddof=1)
            row = [name, f"{losses.mean():.5f} ± {losses.std(ddof=1):.5f}", "", "", ""]
            if name != reference:
                row[2:4] = [spread(losses - plain, "{:+.5f}"), f"{deviations:+.2f}"]
            default = in_trits(2 if case[1] <= 8 else 3)
            if name in (in_trits(1), default):
                row[4] = f"{'target' if name == default else 'stretch'}: at most +1, {verdict(deviations <= 1)}"
            print_row(widths, row)
        print(flush=True)


MODES = {"fidelity": fidelity, "training": training}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", choices=[*MODES, "all"], default="all")
    parser.add_argument("--seeds", type=int, help="instead of their own")
    parser.add_argument("--updates", type=int, help="in training, instead of its own")
    parser.add_argument("--case", default="", help='in training, only what contains this: "characters, K = 32"')
    parser.add_argument("--methods", type=int, help="in training, only the first so many")
    options = parser.parse_args()
    tasks.run_parts(MODES, options.modes, options)


if __name__ == "__main__":
    main()
