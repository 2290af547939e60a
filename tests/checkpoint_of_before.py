"""Training states of every kind in the middle of a run, and the script that stored them as a checkpoint.

The checkpoint in ``tests/data/checkpoint_of_before`` was written by the code of commit f11c712, with JAX 0.10.2 and
Orbax 0.12.8, by running this file. It stands for the checkpoints that users have, so it is not to be written again:
what a later release stores gets a folder of its own. Beside it, ``expected.npz`` holds for each case the bytes of all
leaves, and the parameters and the loss after one more step.

Arguments: folder to write to.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from samples import CHEAP

import vsa_optax
from vsa_optax import AdaptiveCycle, Cycle, Recursive, Secants, TritCodec, Window, checkpoint

STEPS = 23  # The next step is the last of a window of eight micro-batches, and in a PREDICT phase of the fixed cycle.
CONFIG = dict(steps=STEPS, shapes=[[1280], [5, 3]])
FOLDER = Path(__file__).parent / "data" / "checkpoint_of_before"
DEVICES = 4


def make_params(width):
    """A leaf of ``width`` coordinates, one of a few in bfloat16, a scalar, an empty one."""
    rng = np.random.default_rng(width)
    return {
        "w": jnp.asarray(rng.normal(size=width), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(5, 3)), jnp.bfloat16),
        "scale": jnp.ones([]),
        "empty": jnp.zeros((0, 2)),
    }


def loss(params, shift=0.0):
    """Its minimum lies at another place for each shift."""
    w, b = params["w"], params["b"].astype(jnp.float32)
    fit = jnp.sum(jnp.linspace(0.5, 1.5, w.size) * (jnp.tanh(w) - 0.5 - shift) ** 2)
    return fit + jnp.sum((b - shift) ** 2) + jnp.sum(params["scale"] ** 2) + jnp.sum(params["empty"])


class Case(NamedTuple):
    """A state to begin with, and a step: ``(state, count)`` to the next state and the loss."""

    fresh: Callable[[], Any]
    step: Callable[[Any, Any], tuple[Any, Any]]


def by_phase(opt, width=40):
    """The same data at each step, where most steps can be predicted."""

    def fresh():
        params = make_params(width)
        return {"params": params, "opt_state": opt.init(params)}

    def step(state, count):
        params, opt_state = state["params"], state["opt_state"]
        value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=opt_state)
        updates, opt_state = opt.update(grads, opt_state, params, value=value)
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}, value

    return Case(fresh, step)


def by_batch(opt, width):
    """Other data at each step."""

    def fresh():
        params = make_params(width)
        return {"params": params, "opt_state": opt.init(params)}

    def step(state, count):
        params = state["params"]
        value, grads = jax.value_and_grad(loss)(params, 0.3 * jnp.sin(count))
        updates, opt_state = opt.update(grads, state["opt_state"], params)
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}, value

    return Case(fresh, step)


def by_device(compressed, opt, width):
    """Other data on each of a few devices, in the place of which there is `jax.vmap`; ``init`` runs outside of it."""

    def fresh():
        params = make_params(width)
        copies = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), params)
        return {"params": params, "compressed": jax.vmap(compressed.init)(copies), "opt_state": opt.init(params)}

    def step(state, count):
        params = state["params"]
        shifts = 0.3 * jnp.sin(count + jnp.arange(DEVICES))
        values, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, shifts)
        sent, own = jax.vmap(compressed.update, axis_name="data")(grads, state["compressed"])
        mean = jax.tree.map(lambda x: x[0], sent)
        updates, opt_state = opt.update(mean, state["opt_state"], params)
        state = {"params": optax.apply_updates(params, updates), "compressed": own, "opt_state": opt_state}
        return state, values.mean()

    return Case(fresh, step)


def cyclic(opt, learning_rate, predictor):
    return vsa_optax.phase_switched(opt, learning_rate=learning_rate, predictor=predictor, phases=Cycle())


SMALL_BLOCKS = TritCodec(2, block_size=32)
BLIND = dict(calibrate=False, residual_decay=0.95)
LARGE = 1280  # More than the 1024 coordinates of a block.

CASES = {
    # As its changes were kept before they were in float16.
    "secants": by_phase(vsa_optax.phase_switched(optax.adamw(1.0), learning_rate=0.01, predictor=Secants(dtype=None))),
    "calibrated window": by_phase(cyclic(optax.adamw(1.0), 0.01, Window())),
    "blind recursion": by_phase(cyclic(optax.adamw(1.0), 0.01, Recursive(**BLIND))),
    "coded window": by_phase(
        cyclic(optax.sgd(1.0), 0.02, Window(3, codec=TritCodec())),
        LARGE,
    ),
    "chain": by_phase(
        optax.chain(
            vsa_optax.predict_gradients(
                predictor=Window(predicts="gradient", dtype="bfloat16", **BLIND), phases=AdaptiveCycle()
            ),
            optax.adam(0.01),
        )
    ),
    "multi-steps": by_batch(vsa_optax.ternary_multi_steps(optax.sgd(0.1, momentum=0.9), 8), LARGE),
    "accumulation": by_batch(optax.chain(vsa_optax.accumulate_ternary(8, trits=1), optax.sgd(0.1)), LARGE),
    "compression": by_batch(
        optax.chain(vsa_optax.compress_gradients(SMALL_BLOCKS, error_feedback=True), optax.sgd(0.1)), 128
    ),
    "compressed mean": by_device(
        vsa_optax.compressed_pmean("data", SMALL_BLOCKS, error_feedback=True), optax.sgd(0.1), 128
    ),
}


@functools.cache
def fresh_states():
    """The initial state of a run of each case: the template."""
    return jax.jit(lambda: {name: case.fresh() for name, case in CASES.items()}, **CHEAP)()


@functools.cache
def compiled(name):
    """The step of a case."""
    return jax.jit(CASES[name].step, **CHEAP)


def one_step(name, state, count):
    """The loss and the parameters after the step, as one vector."""
    state, value = compiled(name)(state, jnp.asarray(count, jnp.float32))
    leaves = [value, *jax.tree.leaves(state["params"])]
    return np.concatenate([np.ravel(np.asarray(leaf, np.float32)) for leaf in leaves])


def leaf_bytes(tree):
    """Those of all leaves, one after the other."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


def main(folder):
    states, expected = {}, {}
    for name, case in CASES.items():
        state = case.fresh()
        for count in range(STEPS):
            state, value = compiled(name)(state, jnp.asarray(count, jnp.float32))
        states[name] = state
        expected[name] = np.frombuffer(leaf_bytes(state), np.uint8)
        expected[f"{name}, one step later"] = one_step(name, state, STEPS)
        print(name, "loss", value)
    checkpoint.save(folder, STEPS, states, config=CONFIG)
    np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
