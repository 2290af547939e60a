"""The cost of an update outside `jax.jit`: with one transformation, and with one that is made again at each update.

Run `python benchmarks/eager_step.py | tee benchmarks/eager_step.log`.

Outside jit, JAX compiles a loop or a conditional again for each new function object, so the library creates these
objects once, with the transformation. A transformation that is made again has new ones. All variants take turns, so
that other load on the machine affects all of them. JAX reports the compilations.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from codec_tasks import print_header, print_row, quartiles, verdict

import vsa_optax

WIDTHS = (64, 128, 10)
BLIND = dict(predictor=vsa_optax.Window(calibrate=False, residual_decay=0.95), phases=vsa_optax.Cycle())
COMPILED = "/jax/core/compile/backend_compile_duration"
AS_IT_IS, IN_JIT, AGAIN = "one transformation", "inside jax.jit", "made again at each update"
LEAST_FACTOR = 1.2
CASES = {
    "phase_switched(adamw)": lambda: vsa_optax.phase_switched(optax.adamw(1.0), learning_rate=1e-3),
    "phase_switched(adamw), blind window": lambda: vsa_optax.phase_switched(
        optax.adamw(1.0), learning_rate=1e-3, **BLIND
    ),
    "chain(predict_gradients, adamw)": lambda: optax.chain(vsa_optax.predict_gradients(), optax.adamw(1e-3)),
    "ternary_multi_steps(adam, 4)": lambda: vsa_optax.ternary_multi_steps(optax.adam(1e-3), 4),
}


def init():
    keys = jax.random.split(jax.random.key(0), len(WIDTHS) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) * m**-0.5, "b": jnp.zeros(n)}
        for k, m, n in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    ]


class Stepper:
    """Updates one after the other, and what they took: ``seconds, compilations``."""

    def __init__(self, make, compilations, *, is_jitted=False, is_made_again=False):
        self._make, self._compilations, self._is_made_again = make, compilations, is_made_again
        opt = optax.with_extra_args_support(make())
        self._update = jax.jit(opt.update) if is_jitted else opt.update
        self._params = init()
        self._state = opt.init(self._params)

    def __call__(self):
        gradients = jax.block_until_ready(jax.tree.map(lambda p: 0.01 * p + 1e-3, self._params))
        before = len(self._compilations)
        began = time.perf_counter()
        update = optax.with_extra_args_support(self._make()).update if self._is_made_again else self._update
        updates, self._state = jax.block_until_ready(update(gradients, self._state, self._params))
        seconds = time.perf_counter() - began
        num = len(self._compilations) - before
        self._params = optax.apply_updates(self._params, updates)
        return seconds, num


def measured(make, options, compilations):
    """``{variant: [n, 2]}``: seconds and compilations of each update."""
    steppers = {
        IN_JIT: Stepper(make, compilations, is_jitted=True),
        AS_IT_IS: Stepper(make, compilations),
        AGAIN: Stepper(make, compilations, is_made_again=True),
    }
    found = {name: [] for name in steppers}
    for turn in range(options.warmup + options.rounds):
        for name, stepper in steppers.items():
            if name != AGAIN or turn < options.warmup + options.slow_rounds:
                found[name].append(stepper())
    return {name: np.array(rows[options.warmup :]) for name, rows in found.items()}


def print_case(title, found):
    widths = [36, 26, 14, 12, 34]
    print_row(widths, [title, "ms", "compilations", "factor", ""])
    as_it_is = np.median(found[AS_IT_IS][:, 0])
    for name, rows in found.items():
        seconds, compilations = rows.T
        factor = np.median(seconds) / as_it_is
        cells = [f"  {name}", quartiles(1e3 * seconds), f"{np.median(compilations):g}", f"{factor:.3g}"]
        target = f"worth it, >= {LEAST_FACTOR}: {verdict(factor >= LEAST_FACTOR)}" if name == AGAIN else ""
        print_row(widths, [*cells, target])
    print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="timed updates as it is and inside jit")
    parser.add_argument(
        "--slow-rounds", type=int, default=5, help="timed updates of transformations that are made again"
    )
    parser.add_argument("--warmup", type=int, default=2, help="updates before")
    parser.add_argument("--case", default="", help='only what contains this: "ternary"')
    options = parser.parse_args()
    size = sum(leaf.size for leaf in jax.tree.leaves(init()))
    print_header(
        "EAGER: an update outside jax.jit, and what it costs if the transformation is made again each time",
        f"{size:,} parameters f32 in 4 leaves; seed 0",
        f"n = {options.rounds} updates as it is and inside jax.jit, {options.slow_rounds} of the others, interleaved, "
        f"after {options.warmup} of warm-up",
        "ms: median [quartiles]; compilations: of an update, median; factor: of medians, to as it is",
    )
    compilations = []

    def listen(event, *args, **kwargs):
        del args, kwargs
        if event == COMPILED:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    began = time.perf_counter()
    for title, make in CASES.items():
        if options.case in title:
            print_case(title, measured(make, options, compilations))
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
