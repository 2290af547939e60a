"""Is `multisecant` ever worse than the optimizer in it? Every task of the suite, three rates, mini-batches included.

Run `JAX_PLATFORMS=cpu python benchmarks/multisecant_noise.py | tee benchmarks/multisecant_noise.log`; it starts one
process per core. Both take the same number of evaluations on the same batches, paired by seed. A result is no worse if
two conditions hold. The mean difference of the logarithm of the final loss is at most 1 %, or its 95 % interval
contains 0; and no run is worse than plain's worst by more than 5 %. The time is that of the whole run without
compilation; both run in one process, one after the other.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import prediction_tasks
from codec_tasks import in_processes, print_header, print_row, verdict

import vsa_optax
from vsa_optax.prediction import leap

WIDTHS = [20, 7, 10, 12, 20, 12, 10, 10, 9]
STEPS = {"digits, full batch": 150, "PINN, sin(2 pi x)": 900, "PINN, sin(6 pi x)": 900}
T_975 = {4: 2.776, 9: 2.262}  # Student's t, by degrees of freedom.


def trained(name, rate, seed, repeats=2):
    """Final loss and least seconds of plain Adam and of multisecant around it, then its damping and its rejections.

    A run of multisecant ends with the last accepted parameters: a leap beyond them has not been evaluated.
    """
    case = prediction_tasks.CASES[name]
    task, steps = case.task(), STEPS.get(name, case.steps)
    schedule = optax.cosine_decay_schedule(rate, steps)
    batches = jnp.asarray(task.batches(seed, steps))
    results = []
    for opt in (optax.with_extra_args_support(optax.adam(schedule)), vsa_optax.multisecant(optax.adam(schedule))):

        def step(carry, batch, opt=opt):
            params, state = carry
            value, grads = jax.value_and_grad(task.loss)(params, batch)
            updates, state = opt.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        params = task.init(seed)
        carry = params, opt.init(params)
        run = (
            jax.jit(lambda carry, batches, step=step: jax.lax.scan(step, carry, batches)[0])
            .lower(carry, batches)
            .compile()
        )
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            params, state = jax.block_until_ready(run(carry, batches))
            taken.append(time.perf_counter() - start)
        if isinstance(state, leap.MultisecantState):
            params = state.params
        results.append((float(jax.jit(task.final)(params)), min(taken)))
    stats = vsa_optax.multisecant_stats(state)
    return results, float(stats.damping), int(stats.rejected)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", default="", help='only tasks whose names contain this: "batch 64"')
    options = parser.parse_args()
    names = [name for name in prediction_tasks.CASES if options.tasks in name]
    settings = [(name, rate) for name in names for rate in prediction_tasks.CASES[name].rates[:3]]
    jobs = [(name, rate, seed) for name, rate in settings for seed in range(options.seeds)]
    # Long ones first, so that no core waits at the end.
    order = sorted(range(len(jobs)), key=lambda i: "chars" not in jobs[i][0])
    print_header(f"n = {options.seeds} seeds; Adam with a cosine over all steps; loss: geometric mean")
    found = dict(zip(order, in_processes(trained, [jobs[i] for i in order]), strict=True))
    print_row(
        WIDTHS, ["task", "rate", "Adam", "multisecant", "difference of log", "worst", "time", "damping", "no worse"]
    )
    for number, (name, rate) in enumerate(settings):
        rows = [found[number * options.seeds + seed] for seed in range(options.seeds)]
        losses = np.array([[loss for loss, _ in results] for results, _, _ in rows])
        seconds = np.array([[taken for _, taken in results] for results, _, _ in rows])
        logs = np.log(np.maximum(losses, 1e-12))
        difference = logs[:, 1] - logs[:, 0]
        half = T_975.get(options.seeds - 1, 2.0) * difference.std(ddof=1) / options.seeds**0.5
        worst = losses[:, 1].max() / losses[:, 0].max()
        is_no_worse = (difference.mean() <= 0.01 or difference.mean() - half <= 0) and worst <= 1.05
        cells = [f"{x:.3g}" for x in np.exp(logs.mean(0))]
        interval = f"{difference.mean():+.3f} ± {half:.3f}"
        ratio = f"{np.median(seconds[:, 1] / seconds[:, 0]):.2f}"
        damping = f"{np.median([damping for _, damping, _ in rows]):.1e}"
        print_row(WIDTHS, [name, f"{rate:g}", *cells, interval, f"{worst:.2f}", ratio, damping, verdict(is_no_worse)])


if __name__ == "__main__":
    main()
