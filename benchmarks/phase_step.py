"""The cost of a step of each phase compared with plain AdamW, and with the bytes that it has to move.

Run `python benchmarks/phase_step.py | tee benchmarks/phase_step.log`; it takes about two minutes on two cores. On a GPU
add `--hidden 8192 --batch 8192`: a step on a million parameters ends before the next can be launched.

A multilayer perceptron of a million parameters is trained on batches of 1024 with a donated state. In every round each
variant takes one step, so that other load on the machine affects all of them; ratios are taken within a round. The
optimizer alone is then compared with its lower bound; it receives the same gradient at every step. The bound is the
bytes that it must read and write over the rate at which this machine copies a tree of that size, measured in the same
rounds.
"""

import argparse
import importlib.metadata
import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vsa_optax
from vsa_optax import Cycle, Guarded, Phase, Recursive, Secants, Window

INPUTS, OUTPUTS = 64, 10
RATE = 1e-3
# Trees moved by the optimizer's part of a step, parameters' own read and write included. Plain AdamW: gradient, two
# moments and parameters read, moments and parameters written.
PLAIN_TREES = 7


def variants(window):
    blind = dict(calibrate=False, residual_decay=0.95)
    update, gradient = Window(window, **blind), Window(window, predicts="gradient", **blind)

    def make(predictor, phases=Cycle()):
        return vsa_optax.phase_switched(optax.adamw(1.0), learning_rate=RATE, predictor=predictor, phases=phases)

    # name: transformation, phase, trees to be moved.
    # PREDICT reads the history and the residual and writes the prediction, which the parameters' update reads.
    # FULL does what AdamW does; the update is written and read, and recorded: the window writes one row, the recursion
    # reads and writes two trees. Calibrated, the true step reads the records too, and the update twice more.
    # Secants: every step reads the moves, and the displacement from two trees. FULL reads the changes and the newest
    # gradient to compare, and writes a move, a change, the point and the gradient. PREDICT reads the changes and the
    # newest gradient, and writes the prediction, which AdamW reads.
    return {
        "window, PREDICT": (make(update), Phase.PREDICT, window + 1 + 1 + 3),
        "window, FULL": (make(update), Phase.FULL, PLAIN_TREES + 2 + 2),
        "window, CORRECT": (make(update), Phase.CORRECT, PLAIN_TREES + 2 + 2 + window + 1 + 1 + 4),
        "recursive, PREDICT": (make(Recursive(**blind)), Phase.PREDICT, 2 + 1 + 1 + 3),
        "recursive, FULL": (make(Recursive(**blind)), Phase.FULL, PLAIN_TREES + 2 + 6),
        "window, gradient domain, PREDICT": (make(gradient), Phase.PREDICT, window + 1 + 1 + PLAIN_TREES),
        "window, gradient domain, FULL": (make(gradient), Phase.FULL, PLAIN_TREES + 2),
        "calibrated, FULL": (make(Window(window)), Phase.FULL, PLAIN_TREES + 2 + 2 + window + 2),
        "calibrated, guarded, FULL": (
            make(Window(window), Guarded()),
            Phase.FULL,
            PLAIN_TREES + 2 + 2 + window + 2,
        ),
        **{
            f"secants of {num}, {phase.name}": (make(Secants(num), Guarded()), phase, PLAIN_TREES + 2 * num + trees)
            for num in (window, 2 * window)
            for phase, trees in ((Phase.FULL, 2 + 1 + 4), (Phase.PREDICT, 2 + 1 + 1))
        },
        "phases=None": (make(update, None), None, PLAIN_TREES),
    }


def init(key, hidden):
    widths = (INPUTS, hidden, hidden - hidden // 8, OUTPUTS)
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) * m**-0.5, "b": jnp.zeros(n)}
        for k, m, n in zip(keys, widths, widths[1:], strict=False)
    ]


def loss(params, x, y):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    logits = x @ params[-1]["w"] + params[-1]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def whole_step(opt, phased):
    def step(params, state, x, y):
        if phased:
            value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, x, y, state=state)
        else:
            value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def optimizer_step(opt):
    def step(params, state, grads):
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def put_in(state, phase):
    """The state with its machine at the start of ``phase``, whatever came before."""
    if phase is None:
        return state
    done = {Phase.CORRECT: 5}.get(phase, 0)
    machine = state.machine.unpacked()._replace(phase=jnp.int32(phase), steps_in_phase=jnp.int32(done))
    return jax.block_until_ready(state._replace(machine=machine.packed()))


def interleave(steps, rounds, warmup=5):
    """Seconds of each named step in each round, ``{name: [rounds]}``; ``steps`` maps a name to a callable."""
    seconds = {name: [] for name in steps}
    for _ in range(warmup + rounds):
        for name, step in steps.items():
            seconds[name].append(step())
    return {name: np.array(values[warmup:]) for name, values in seconds.items()}


def stepper(compiled, params, opt, phase, args):
    carry = [jax.tree.map(jnp.array, params), opt.init(params)]

    def step():
        carry[1] = put_in(carry[1], phase)
        start = time.perf_counter()
        carry[0], carry[1] = jax.block_until_ready(compiled(*carry, *args))
        return time.perf_counter() - start

    return step


def quartiles(values):
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:6.3f}  [{low:.3f}, {high:.3f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="timed steps of each variant")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument(
        "--hidden", type=int, default=1024, help="width of the first hidden layer; the second is 7/8 of it"
    )
    options = parser.parse_args()

    params = init(jax.random.key(0), options.hidden)
    size = sum(x.size for x in jax.tree.leaves(params))
    x = jax.random.normal(jax.random.key(1), (options.batch, INPUTS))
    y = jax.random.randint(jax.random.key(2), (options.batch,), 0, OUTPUTS)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "optax"))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}")
    print(f"versions: python {platform.python_version()}, {versions}")
    print(f"parameters: {size:,} f32; batch {options.batch}; window {options.window}; seeds 0, 1, 2 (weights, x, y)")
    print(f"n = {options.rounds} interleaved rounds; median [quartiles]\n")

    plain = optax.with_extra_args_support(optax.adamw(RATE))
    cases = variants(options.window)
    steps = {"plain": stepper(whole_step(plain, phased=False), params, plain, None, (x, y))}
    steps |= {
        name: stepper(whole_step(opt, phased=True), params, opt, phase, (x, y))
        for name, (opt, phase, _) in cases.items()
    }
    seconds = interleave(steps, options.rounds)
    print("whole step, ratio to plain AdamW's in the same round")
    for name, values in seconds.items():
        print(f"  {name:34s} {quartiles(values / seconds['plain'])}")
    print(f"  (plain: {np.median(seconds['plain']) * 1e3:.1f} ms)\n")

    steps.clear()  # Their states take as much memory as those to come.
    grads = jax.tree.map(lambda p: 0.01 * p + 1e-3, params)
    # In place: a copy to fresh memory would be slower, and the floor too kind.
    copy = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1.0, tree), donate_argnums=0)
    copied = [jax.tree.map(jnp.array, params)]

    def copy_step():
        start = time.perf_counter()
        copied[0] = jax.block_until_ready(copy(copied[0]))
        return time.perf_counter() - start

    steps = {"copy": copy_step, "plain": stepper(optimizer_step(plain), params, plain, None, (grads,))}
    steps |= {
        name: stepper(optimizer_step(opt), params, opt, phase, (grads,)) for name, (opt, phase, _) in cases.items()
    }
    seconds = interleave(steps, 2 * options.rounds)
    print("optimizer's part alone, ratio to its floor: trees it must move, at the copy rate of the same round")
    for name, values in seconds.items():
        if name != "copy":
            trees = PLAIN_TREES if name == "plain" else cases[name][2]
            print(f"  {name:34s} {quartiles(values / (seconds['copy'] * trees / 2))}   {trees} trees")
    rate = 2 * 4 * size / np.median(seconds["copy"]) / 1e9
    print(f"  (copy: {rate:.1f} GB/s read and written; one tree is {4 * size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
