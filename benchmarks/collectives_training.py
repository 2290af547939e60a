"""Trains with gradients averaged over eight devices, and compares the final losses of all ways to average.

Run `python benchmarks/collectives_training.py | tee -a benchmarks/collectives.log` for the second half of that log; it
uses as many cores as there are. `averaging_methods.py` creates the devices.
"""

import argparse
import functools

import codec_tasks as tasks
import jax
import numpy as np
import optax
from averaging_methods import BATCH, METHODS, NUM, OURS, RIVALS, ROWS, averaging, is_checked, on_devices
from codec_tasks import print_row, spread, verdict
from jax.sharding import PartitionSpec


@functools.cache
def trainer(name, steps):
    """``rate, params, batches -> final loss``, compiled once a process."""
    task, method = tasks.characters(), averaging(name)
    shapes = jax.eval_shape(lambda: task.init(0))

    def adam(rate):
        return optax.adam(optax.cosine_decay_schedule(rate, steps))

    specs = (method.specs(shapes), PartitionSpec())

    def train(rate, params, state, batches):
        opt = optax.chain(method.opt, adam(rate))

        def step(carry, batch):
            params, state = carry
            # The device's own gradient: of parameters that all devices share it would be the sum over them.
            own = jax.lax.pcast(params, "data", to="varying") if is_checked(name) else params
            updates, state = opt.update(jax.grad(task.loss)(own, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), batches[0])[0][0]

    everywhere = PartitionSpec()
    init = on_devices(optax.chain(method.opt, adam(1.0)).init, everywhere, specs, is_checked(name))
    train = on_devices(train, (everywhere, everywhere, specs, ROWS), everywhere, is_checked(name))
    final = jax.jit(task.final)

    def run(rate, seed):
        params = task.init(seed)
        windows = task.batches(seed, steps * BATCH // 8).reshape(steps, NUM, BATCH // NUM, -1)
        return float(final(train(rate, params, init(params), np.swapaxes(windows, 0, 1))))

    return run


def final_loss(name, seed, rate, steps):
    return trainer(name, steps)(rate, seed)


def training(options):
    seeds, steps, rates = options.seeds, options.steps, options.rates
    names = [name for name in METHODS if options.methods is None or name in options.methods or name == "f32 pmean"]
    shapes = jax.eval_shape(lambda: tasks.characters().init(0))
    tasks.print_header(
        f"TRAINING: the final loss with Adam behind the averaged gradient, {NUM} devices",
        tasks.characters(BATCH).description.replace("batch", f"{BATCH // NUM} windows a device, batch"),
        f"{steps} steps, cosine schedule; processes of {NUM} host devices, one a core; n = {seeds} seeds",
        "difference: to f32 with the same seed, mean [min, max]; sd: of f32 over the seeds; bytes: sent by each device",
    )
    # The longest jobs come first.
    jobs = [(name, seed, rate, steps) for name in reversed(names) for rate in rates for seed in range(seeds)]
    found = dict(zip(jobs, tasks.in_processes(final_loss, jobs), strict=True))
    losses = {
        name: np.array([[found[name, seed, rate, steps] for rate in rates] for seed in range(seeds)]) for name in names
    }  # [seeds, rates]
    sent = {name: averaging(name).sent(shapes, NUM) for name in names}
    best = {name: int(np.argmin(values.mean(axis=0))) for name, values in losses.items()}
    reference = best["f32 pmean"]

    print_losses(
        f"At the rate that is best for f32, {rates[reference]:g}", rates, losses, sent, dict.fromkeys(names, reference)
    )
    print_losses("Each at its own best rate", rates, losses, sent, best)
    print("Mean final loss at each rate")
    widths = [34, *[10] * len(rates)]
    print_row(widths, ["", *(f"{rate:g}" for rate in rates)])
    for name in names:
        print_row(widths, [name, *(f"{value:.5f}" for value in losses[name].mean(axis=0))])
    print()
    print_against_peers(losses, sent, reference, best)


def print_losses(title, rates, losses, sent, at):
    """A row for each method, at the rate whose number ``at`` holds."""
    plain = losses["f32 pmean"][:, at["f32 pmean"]]
    print(title)
    widths = [34, 12, 8, 20, 36, 8, 44]
    print_row(widths, ["", "bytes", "rate", "final loss ± sd", "difference", "in sd", ""])
    for name in losses:
        values = losses[name][:, at[name]]
        deviations = (values - plain).mean() / plain.std(ddof=1)
        row = [name, f"{sent[name]:,.0f}", f"{rates[at[name]]:g}"]
        row += [f"{values.mean():.5f} ± {values.std(ddof=1):.5f}"]
        row += ["", ""] if name == "f32 pmean" else [spread(values - plain, "{:+.5f}"), f"{deviations:+.2f}"]
        target = {"two trits": "target", "one trit, error feedback": "stretch"}.get(name)
        row += [f"{target}: at most +1, {verdict(deviations <= 1)}" if target else ""]
        print_row(widths, row)
    print(flush=True)


def print_against_peers(losses, sent, reference, best):
    """Targets that compare with others than f32."""
    if {"bf16 pmean", "two trits"} <= losses.keys():
        plain, values = (losses[name][:, reference] for name in ("bf16 pmean", "two trits"))
        deviations = (values - plain).mean() / plain.std(ddof=1)
        print(
            f"target, two trits against bf16, in bf16's sd: at most +1: {deviations:+.2f}, {verdict(deviations <= 1)}"
        )
    mean = {name: values[:, best[name]].mean() for name, values in losses.items()}
    for peer in [name for name in losses if name in RIVALS and name != "f32 pmean"]:
        better = [n for n in losses if n in OURS and mean[n] < mean[peer] and sent[n] < sent[peer]]
        print(f"stretch, lower loss at fewer bytes than {peer}: {', '.join(better) or 'none'}: {verdict(bool(better))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", nargs="+", type=float, default=(1e-3, 3e-3, 1e-2))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these, and f32")
    options = parser.parse_args()
    tasks.run_parts({"training": training}, "all", options)


if __name__ == "__main__":
    main()
