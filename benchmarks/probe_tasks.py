"""The recommendations of `vsa_optax.probe` on tasks whose answer whole trainings have shown, by its number of steps.

Run `JAX_PLATFORMS=cpu python benchmarks/probe_tasks.py | tee benchmarks/probe_tasks.log`. Whole trainings of the same
tasks are in `prediction.log`, `multisecant_noise.log` and `noiseless.log`. Each probe is one run with seed 0.
"""

import optax
import prediction_tasks
from codec_tasks import print_header

import vsa_optax

PROBES = (
    ("digits, full batch", 0.006, 100),
    ("digits, full batch", 0.006, 300),
    ("digits, full batch", 0.024, 100),
    ("PINN, sin(2 pi x)", 0.01, 100),
    ("digits, batch 64", 0.004, 100),
)


def main():
    print_header("vsa_optax.probe of Adam with betas (0.95, 0.98); n = 1, seed 0")
    for name, rate, steps in PROBES:
        task = prediction_tasks.CASES[name].task()
        print(f"\n---- {name}, rate {rate:g}, {steps} steps", flush=True)
        vsa_optax.probe(task.loss, task.init(0), list(task.batches(0, steps)), optax.adam(rate, 0.95, 0.98), steps)


if __name__ == "__main__":
    main()
