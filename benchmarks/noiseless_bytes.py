"""One fixed batch of the byte transformer, 250 evaluations: a large network without noise, for a GPU.

Run `python benchmarks/noiseless_bytes.py | tee benchmarks/noiseless_bytes_gpu.log`. The table has every setting that
was tried, each with its lowest loss so far after 125 and 250 evaluations of loss and gradient. L-BFGS counts the
evaluations of its line search. The rates of Adam and multisecant follow a cosine that ends with the budget.
"""

import argparse
import importlib.metadata
import os
import platform
import time

import byte_transformer
import jax
import jax.numpy as jnp
import noiseless_rivals
from noiseless_rivals import METHODS, Setting, lowest, rate_of
from noiseless_task import FullBatch

BUDGET = 250


def fixed_batch():
    task = byte_transformer.byte_transformer(64, 256)
    batch = jnp.asarray(task.batches(0, 1)[0])
    return FullBatch(
        task.description,
        init=task.init,
        loss=lambda params, _: task.loss(params, batch),
        budgets=(BUDGET,),
        rates=(),
        floor=0.0,
    )


def settings():
    for betas in ((0.9, 0.98), (0.8, 0.95)):
        for rate in (-2, -1, 0, 1, 2, 3):
            yield "Adam", Setting(rate, betas)
    for window in (8, 16):
        for rate in (-2, 0, 2, 4):
            yield "multisecant", Setting(rate, noiseless_rivals.BETAS[0], (("window", window),))
    for memory in (10, 16):
        yield "L-BFGS", Setting(own=(("memory", memory),))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    task = fixed_batch()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "optax"))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}")
    print(f"versions: python {platform.python_version()}, {versions}")
    print(f"{task.description}; {options.seeds} seeds of the weights\n")
    print(f"{'method':14s} {'rate':>8s} {'betas':>13s} {'own':12s} {'@125':30s} {'@250':30s} seconds", flush=True)
    programs = {}
    for name, setting in settings():
        key = name, setting.own
        if key not in programs:
            programs[key] = METHODS[name].compiled(task, setting.own, BUDGET)
        losses, seconds = [], []
        for seed in range(options.seeds):
            params = jax.block_until_ready(task.init(seed))
            began = time.perf_counter()
            found, _ = jax.block_until_ready(
                programs[key](
                    params, (), BUDGET, BUDGET, jnp.float32(rate_of(setting)), tuple(map(jnp.float32, setting.betas))
                )
            )
            seconds.append(time.perf_counter() - began)
            losses.append(lowest(found))
        columns = [" ".join(f"{loss[count - 1]:.3g}" for loss in losses) for count in (BUDGET // 2, BUDGET)]
        rate = f"{rate_of(setting):.2g}" if METHODS[name].has_rate else ""
        print(
            f"{name:14s} {rate:>8s} {setting.betas!s:>13s} {setting!s:12s} {columns[0]:30s} {columns[1]:30s} "
            f"{min(seconds):.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
