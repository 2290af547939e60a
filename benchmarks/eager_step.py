"""The cost of an update outside `jax.jit`, with the library as it is and with each kept function object created again.

Run `python benchmarks/eager_step.py | tee benchmarks/eager_step.log`; it takes a few minutes on two cores.

Outside jit, JAX compiles a loop or a conditional again for each new function object, so the library creates these
objects once. Here patches create them at every update instead, one at a time and all together. All variants take turns,
so that other load on the machine affects all of them. JAX reports the compilations. The benchmark patches private parts
of the library, and must change with them.
"""

import argparse
import contextlib
import functools
import time
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from codec_tasks import print_header, print_row, quartiles, verdict
from jax import lax

import vsa_optax
from vsa_optax.accumulation import multi_steps
from vsa_optax.core import conditional, mesh
from vsa_optax.prediction import step, update

WIDTHS = (64, 128, 10)
BLIND = dict(predictor=vsa_optax.Window(calibrate=False, residual_decay=0.95), phases=vsa_optax.Cycle())
COMPILED = "/jax/core/compile/backend_compile_duration"
AS_IT_IS, IN_JIT = "nothing: as it is", "inside jax.jit"
LEAST_FACTOR = 1.2


def uncached(module):
    """``module`` with a `functools.lru_cache` that remembers nothing."""
    forgetful = types.SimpleNamespace(lru_cache=lambda maxsize: lambda function: function, partial=functools.partial)
    return mock.patch.object(module, "functools", forgetful)


def renewed(function):
    """Another function object that does the same."""
    return lambda *args: function(*args)


def loops_anew(module, name):
    """``module`` with a loop made at every call, instead of once, round the function of this name."""
    others = module.in_place_if  # It is patched itself if all objects are created again.

    def in_place_if(function):
        if function.__name__ != name:
            return others(function)
        return lambda *args: conditional.in_place_if(renewed(function))(*args)

    return mock.patch.object(module, "in_place_if", in_place_if)


def conditionals_anew(module):
    """``module`` with a `lax.cond` that never sees the same branches twice."""

    def cond(pred, true_fun, false_fun, *operands):
        return lax.cond(pred, renewed(true_fun), renewed(false_fun), *operands)

    return mock.patch.object(module, "lax", types.SimpleNamespace(cond=cond))


def finite_anew():
    """`all_finite_over` without its cache, where its result is a branch."""
    return mock.patch.object(step, "all_finite_over", mesh.all_finite_over.__wrapped__)


OF_PHASES = {
    "functions of PhaseStep": lambda: uncached(step),
    "result of all_finite_over": finite_anew,
    "loop that records": lambda: loops_anew(update, "record"),
    "loop of a true step": lambda: loops_anew(step, "step"),
}
OF_GUARDED = OF_PHASES | {"branches of _Look": lambda: conditionals_anew(update)}
OF_WINDOWS = {
    "functions of _RunInner": lambda: uncached(multi_steps),
    "loop that adds": lambda: loops_anew(multi_steps, "_add"),
    "loop that takes the mean": lambda: loops_anew(multi_steps, "_finish"),
    "loop of the inner update": lambda: loops_anew(multi_steps, "step"),
}
# Name: transformation, and what it keeps.
CASES = {
    "phase_switched(adamw)": (
        lambda: vsa_optax.phase_switched(optax.adamw(1.0), learning_rate=1e-3),
        OF_GUARDED,
    ),
    "phase_switched(adamw), blind window": (
        lambda: vsa_optax.phase_switched(optax.adamw(1.0), learning_rate=1e-3, **BLIND),
        OF_PHASES,
    ),
    "chain(predict_gradients, adamw)": (
        lambda: optax.chain(vsa_optax.predict_gradients(), optax.adamw(1e-3)),
        OF_GUARDED,
    ),
    "ternary_multi_steps(adam, 4)": (
        lambda: vsa_optax.ternary_multi_steps(optax.adam(1e-3), 4),
        OF_WINDOWS,
    ),
}


@contextlib.contextmanager
def all_of(patches):
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch())
        yield


def init():
    keys = jax.random.split(jax.random.key(0), len(WIDTHS) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) * m**-0.5, "b": jnp.zeros(n)}
        for k, m, n in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    ]


class Stepper:
    """Updates one after the other, each under the patch, and what they took: ``seconds, compilations``."""

    def __init__(self, make, patch, compilations, *, is_jitted=False):
        self._patch, self._compilations = patch, compilations
        with patch():
            opt = optax.with_extra_args_support(make())
        self._update = jax.jit(opt.update) if is_jitted else opt.update
        self._params = init()
        self._state = opt.init(self._params)

    def __call__(self):
        gradients = jax.block_until_ready(jax.tree.map(lambda p: 0.01 * p + 1e-3, self._params))
        before = len(self._compilations)
        with self._patch():
            began = time.perf_counter()
            updates, self._state = jax.block_until_ready(self._update(gradients, self._state, self._params))
            seconds = time.perf_counter() - began
        num = len(self._compilations) - before
        self._params = optax.apply_updates(self._params, updates)
        return seconds, num


def measured(make, patches, options, compilations):
    """``{what is made anew: [n, 2]}``: seconds and compilations of each update."""
    steppers = {
        IN_JIT: Stepper(make, contextlib.nullcontext, compilations, is_jitted=True),
        AS_IT_IS: Stepper(make, contextlib.nullcontext, compilations),
        **{name: Stepper(make, patch, compilations) for name, patch in patches.items()},
        "all of these": Stepper(make, lambda: all_of(patches.values()), compilations),
    }
    found = {name: [] for name in steppers}
    for turn in range(options.warmup + options.rounds):
        for name, stepper in steppers.items():
            if name in (IN_JIT, AS_IT_IS) or turn < options.warmup + options.slow_rounds:
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
        is_kept = name not in (IN_JIT, AS_IT_IS)
        target = f"worth it, >= {LEAST_FACTOR}: {verdict(factor >= LEAST_FACTOR)}" if is_kept else ""
        print_row(widths, [*cells, target])
    print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="timed updates as it is and inside jit")
    parser.add_argument("--slow-rounds", type=int, default=5, help="timed updates with something made anew, each")
    parser.add_argument("--warmup", type=int, default=2, help="updates before")
    parser.add_argument("--case", default="", help='only what contains this: "ternary"')
    options = parser.parse_args()
    size = sum(leaf.size for leaf in jax.tree.leaves(init()))
    print_header(
        "EAGER: an update outside jax.jit, and what it costs if what the library keeps is made anew each time",
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
    for title, (make, patches) in CASES.items():
        if options.case in title:
            print_case(title, measured(make, patches, options, compilations))
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
