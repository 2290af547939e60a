"""How much memory do secants need? Windows and dtypes of the history on the tasks without noise, at two rates.

Run `JAX_PLATFORMS=cpu python benchmarks/history_memory.py | tee benchmarks/history_memory.log`; it starts one process
per core. Each run is `phase_switched` around Adam with the default guard, at plain Adam's best rate of `prediction.log`
and at a quarter of it, a typical recipe. Losses are compared with plain Adam's of the same seed. A loss is no worse if
the mean difference of the logarithms is at most 1 %, or its 95 % interval contains 0. Copies of the parameters are
counted from the state itself, without Adam's own.
"""

import argparse

import jax
import numpy as np
import optax
import prediction_tasks
from codec_tasks import in_processes, print_header, print_row, verdict
from multisecant_noise import T_975

import vsa_optax
from vsa_optax import Secants

BETAS = 0.95, 0.98
STEPS = {"digits, full batch": 300, "PINN, sin(2 pi x)": 2000, "PINN, sin(6 pi x)": 2000}
BEST = {"digits, full batch": 0.024, "PINN, sin(2 pi x)": 0.024, "PINN, sin(6 pi x)": 0.048}
HISTORIES = {
    "plain": None,
    "16, the default": Secants(16),
    "16, float16": Secants(16, dtype="float16"),
    "16, bfloat16": Secants(16, dtype="bfloat16"),
    "24, float16": Secants(24, dtype="float16"),
    "8, float32": Secants(8),
    "8, float16": Secants(8, dtype="float16"),
    "4, float16": Secants(4, dtype="float16"),
}
WIDTHS = [20, 7, 16, 7, 11, 26, 9, 9, 20, 9]


def trained(name, rate, history, seed):
    """Final loss, passes, and copies of the parameters in the state."""
    task, steps = prediction_tasks.CASES[name].task(), STEPS[name]
    schedule = optax.cosine_decay_schedule(rate, steps)
    if HISTORIES[history] is None:
        opt = optax.with_extra_args_support(optax.adam(schedule, *BETAS))
    else:
        opt = vsa_optax.phase_switched(optax.adam(schedule, *BETAS), predictor=HISTORIES[history])

    def step(carry, batch):
        params, state = carry
        if HISTORIES[history] is None:
            value, grads = jax.value_and_grad(task.loss)(params, batch)
        else:
            value, grads = vsa_optax.value_and_grad_by_phase(task.loss)(params, batch, state=state)
        updates, state = opt.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    params = task.init(seed)
    state = opt.init(params)
    (params_after, after), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps))((params, state))
    passes, copies = steps, 0.0
    if HISTORIES[history] is not None:
        passes -= int(vsa_optax.phase_stats(after).predict_steps)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.history))
        copies = nbytes / sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return float(task.final(params_after)), passes, copies


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    settings = [(name, rate) for name in STEPS for rate in (BEST[name], BEST[name] / 4)]
    rows = [(name, rate, history) for name, rate in settings for history in HISTORIES]
    jobs = [(*row, seed) for row in rows for seed in range(options.seeds)]
    print_header(f"n = {options.seeds} seeds; Adam, betas {BETAS}, a cosine over all steps; geometric means of losses")
    found = iter(in_processes(trained, jobs))
    names = ["task", "rate", "history", "copies", "loss", "[smallest, largest]", "passes", "skipped"]
    print_row(WIDTHS, [*names, "difference of log", "no worse"])
    for name, rate, history in rows:
        runs = np.array([next(found) for _ in range(options.seeds)])
        losses, passes = np.maximum(runs[:, 0], 1e-12), runs[:, 1].mean()
        if HISTORIES[history] is None:
            of_plain = losses
        difference = np.log(losses) - np.log(of_plain)
        half = T_975.get(options.seeds - 1, 2.0) * difference.std(ddof=1) / options.seeds**0.5
        is_no_worse = difference.mean() <= 0.01 or difference.mean() - half <= 0
        cells = [
            f"{runs[0, 2]:.1f}",
            f"{np.exp(np.log(losses).mean()):.3g}",
            f"[{losses.min():.3g}, {losses.max():.3g}]",
        ]
        share = 1 - passes / STEPS[name]
        more = [f"{passes:.0f}", f"{share:.0%}", f"{difference.mean():+.3f} ± {half:.3f}", verdict(is_no_worse)]
        print_row(WIDTHS, [name, f"{rate:g}", history, *cells, *more])


if __name__ == "__main__":
    main()
