"""Accumulating gradients in trits, beside `optax.MultiSteps` and others: what is lost, and what it saves.

Run `python benchmarks/accumulation.py fidelity training > benchmarks/accumulation.log`, and
`python benchmarks/accumulation.py memory speed > benchmarks/accumulation_cpu.log` on a machine that does nothing else;
without a name all four are run. `memory` draws `accumulation.png` beside the script. `fidelity` and `training` start a
process a core: where there is a GPU, put `JAX_PLATFORMS=cpu` in front. All of `training` takes an hour on two cores:
`--case` and `--methods` choose from it. In the committed log of the GPU, the model of 151 million parameters has
a width of 1024, 12 layers and 16 heads as `char_transformer.LARGE`.
"""

import argparse
import functools
import itertools
import pathlib
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import accumulation_rivals as rivals
import char_transformer
import codec_tasks as tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
from char_transformer import LARGE
from codec_tasks import print_row, spread, verdict

import vsa_optax

HERE = pathlib.Path(__file__).parent
TRITS = (1, 2, 3)
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

MOST_BITS = {1: 1.70, 2: 3.3}
NEVER = 10**6


def in_trits(number):
    return f"{number} trit{'s' * (number > 1)}"


class Method(NamedTuple):
    """A way to take the mean of K gradients one after the other.

    Attributes:
        state: K, tree like the gradients -> what is kept.
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


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def num_parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def bits(state, like):
    """Bits a parameter."""
    return 8 * nbytes(state) / num_parameters(like)


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
    # What takes longest first.
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


def large_transformer():
    """Shapes of its parameters."""
    return jax.eval_shape(lambda: char_transformer.init(0, LARGE))


def adamw_behind(every_k):
    """AdamW behind `optax.MultiSteps` and behind trits, by name."""
    adamw = optax.adamw(1e-3)
    ternary = {in_trits(t): vsa_optax.ternary_multi_steps(adamw, every_k, trits=t) for t in TRITS}
    return {"optax.MultiSteps": optax.MultiSteps(adamw, every_k)} | ternary


def step_bytes(opt, params, micro_batch):
    """Bytes of arguments, outputs and temporaries of a compiled, donated micro-step, and seconds to compile it."""

    def step(params, state, batch):
        emitted, state = opt.update(jax.grad(char_transformer.loss)(params, batch, LARGE), state, params)
        return optax.apply_updates(params, emitted), state

    batch = jax.ShapeDtypeStruct((micro_batch, LARGE.context + 1), jnp.int32)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(opt.init, params), batch)
    began = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    in_all = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return in_all - memory.alias_size_in_bytes, time.perf_counter() - began


def memory(options):
    params = large_transformer()
    tasks.print_header("MEMORY: AdamW, K = 8", char_transformer.describe(LARGE))
    print("Bits a parameter of the accumulated gradients alone, with scales and padding")
    adamw = optax.adamw(1e-3)
    others = {
        "optax.MultiSteps, bfloat16": optax.MultiSteps(adamw, 8, accumulator_dtype=jnp.bfloat16),
        "int8, blocks of 256": rivals.multi_steps(adamw, 8, rivals.int8_blocks()),
    }
    sizes = {}
    for name, opt in (adamw_behind(8) | others).items():
        sizes[name] = bits(jax.eval_shape(opt.init, params).acc_grads, params)
        most = {in_trits(trits): limit for trits, limit in MOST_BITS.items()}.get(name)
        target = f"target: at most {most:g}, {verdict(sizes[name] <= most)}" if most else ""
        print_row([30, 10, 34], [name, f"{sizes[name]:.3f}", target])
    draw({name: value / 8 for name, value in sizes.items()}, num_parameters(params))

    print("\nThe whole compiled, donated micro-step: arguments + outputs + temporaries - aliases")
    for micro_batch in options.micro_batches:
        print_step_bytes(adamw, params, micro_batch)


def print_step_bytes(adamw, params, micro_batch):
    """A table of what each way to accumulate adds to a micro-step."""
    widths = [30, 10, 28, 24, 12, 44]
    heads = [
        f"micro-batches of {micro_batch}",
        "bytes",
        "beyond plain, a parameter",
        "share of MultiSteps's",
        "compiled",
        "",
    ]
    print_row(widths, heads)
    plain, seconds = step_bytes(adamw, params, micro_batch)
    print_row(widths, ["none: plain AdamW", f"{plain / 1e6:.1f} MB", "", "", f"{seconds:.1f} s", ""])
    extra = {}
    for name, opt in adamw_behind(8).items():
        in_all, seconds = step_bytes(opt, params, micro_batch)
        extra[name] = (in_all - plain) / num_parameters(params)
        share = extra[name] / extra["optax.MultiSteps"]
        row = [name, f"{in_all / 1e6:.1f} MB", f"{extra[name]:.3f}", f"{share:.1%}", f"{seconds:.1f} s", ""]
        if name != "optax.MultiSteps":
            row[-1] = f"<= 100 %: {verdict(share <= 1)}; stretch <= 25 %: {verdict(share <= 0.25)}"
        print_row(widths, row)


def draw(sizes, num):
    """Bytes a parameter, a bar each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor="white")
    axis = figure.subplots()
    labels = {"optax.MultiSteps": "optax.MultiSteps, f32"}
    names = sorted(sizes, key=sizes.get)
    blue, black = "#0072B2", "#444444"
    colors = [blue if "trit" in name else black for name in names]
    bars = axis.barh([labels.get(name, name) for name in names], [sizes[name] for name in names], color=colors)
    axis.bar_label(bars, fmt="%.2f", padding=4, fontsize=10.5)
    axis.set(xlim=(0, 4.4), xlabel="accumulated gradients, bytes a parameter")
    axis.grid(alpha=0.25, axis="x")
    axis.set_axisbelow(True)
    axis.set_title(f"What is kept between micro-batches (a transformer of {num / 1e6:.1f} M parameters)", fontsize=11)
    figure.savefig(HERE / "accumulation.png", dpi=110)


def stepper(opt, params, gradients):
    """``emitting -> seconds`` of the optimizer's part of a micro-step, everything donated."""

    def step(gradients, state, params):
        emitted, state = opt.update(gradients, state, params)
        return optax.apply_updates(params, emitted), state

    compiled = jax.jit(step, donate_argnums=(0, 1, 2))
    carry = [jax.tree.map(jnp.copy, params), opt.init(params)]

    def timed(emitting):
        if emitting:
            carry[1] = carry[1]._replace(mini_step=jnp.int32(NEVER - 1))
        given = jax.block_until_ready((jax.tree.map(jnp.copy, gradients), carry[1], carry[0]))
        began = time.perf_counter()
        carry[:] = jax.block_until_ready(compiled(*given))
        return time.perf_counter() - began

    return timed


def speed(options):
    rounds = options.rounds
    shapes = large_transformer()
    tasks.print_header(
        "SPEED: the optimizer's part of a micro-step, AdamW behind, gradients, parameters and state donated",
        f"{jax.devices()[0].device_kind}; {num_parameters(shapes):,} parameters of the large char transformer",
        f"n = {rounds} rounds in which all take turns; median [quartiles]; ratios within a round",
    )
    params = jax.jit(char_transformer.init, static_argnums=1)(0, LARGE)
    gradients = jax.tree.map(lambda p: 1e-3 * jax.random.normal(jax.random.key(1), p.shape), params)
    # The gradient's memory is no result's, but may be worked in.
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    # A window that ends only where its state says so.
    steppers = {n: stepper(opt, params, gradients) for n, opt in adamw_behind(lambda step: NEVER).items()}
    taken = {(kind, name): [] for kind in ("between", "emitting") for name in steppers}
    for turn in range(rounds + 3):
        for (kind, name), seconds in taken.items():
            value = steppers[name](kind == "emitting")
            if turn >= 3:
                seconds.append(value)
    for kind, title in (("between", "A micro-step that emits nothing"), ("emitting", "The micro-step that emits")):
        widths = [30, 26, 26, 44]
        print_row(widths, [title, "ms", "ratio to MultiSteps", ""])
        for name in steppers:
            values = np.array(taken[kind, name])
            ratios = values / np.array(taken[kind, "optax.MultiSteps"])
            row = [name, quartiles(1e3 * values), quartiles(ratios), ""]
            if kind == "between" and name != "optax.MultiSteps":
                middle = np.median(ratios)
                row[3] = f"<= 100 %: {verdict(middle <= 1)}; stretch <= 40 %: {verdict(middle <= 0.4)}"
            print_row(widths, row)


def quartiles(values):
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


MODES = {"fidelity": fidelity, "training": training, "memory": memory, "speed": speed}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", choices=MODES, help="default: all")
    parser.add_argument("--seeds", type=int, help="in fidelity and training, instead of their own")
    parser.add_argument("--updates", type=int, help="in training, instead of its own")
    parser.add_argument("--case", default="", help='in training, only what contains this: "characters, K = 32"')
    parser.add_argument("--methods", type=int, help="in training, only the first so many")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4], help="in memory")
    parser.add_argument("--rounds", type=int, default=40, help="in speed")
    options = parser.parse_args()
    for name, mode in MODES.items():
        if not options.modes or name in options.modes:
            began = time.perf_counter()
            mode(options)
            print(f"\n{name}: {time.perf_counter() - began:.0f} s in all\n", flush=True)


if __name__ == "__main__":
    main()
