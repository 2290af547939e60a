"""A training run that can be killed at any moment and started again; prints a line for each step's milestones.

Arguments: folder, number of steps, steps between two checkpoints (0 for none). The last line is the final state's hash.
"""

import functools
import hashlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from samples import CHEAP

import vsa_optax
from vsa_optax import checkpoint

SETTINGS = dict(window=5, warmup_steps=2, longest=4)
X = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)


def loss(params):
    return jnp.mean((jnp.tanh(X @ params["w"]) - jnp.sin(X)) ** 2) + jnp.sum(params["b"] ** 2)


def train(folder, steps, save_every):
    predictor, phases = vsa_optax.Secants(5), vsa_optax.Guarded(warmup_steps=2, longest=4)
    opt = vsa_optax.phase_switched(optax.adamw(0.02), predictor=predictor, phases=phases)

    @functools.partial(jax.jit, **CHEAP)
    def step(params, opt_state):
        value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=opt_state)
        updates, opt_state = opt.update(grads, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state

    params = {"w": jnp.eye(4), "b": jnp.ones(3), "empty": jnp.zeros((0, 2))}
    state = params, jax.jit(opt.init, **CHEAP)(params)
    done = 0
    if save_every and checkpoint.latest_step(folder) is not None:
        done, state = checkpoint.restore(folder, state, config=SETTINGS)
    print("from", done, flush=True)
    for count in range(done + 1, steps + 1):
        state = step(*state)
        if save_every and count % save_every == 0:
            print("saving", count, flush=True)
            checkpoint.save(folder, count, state, config=SETTINGS, keep=2)
            print("saved", count, flush=True)
    digest = hashlib.sha256(b"".join(jax.device_get(leaf).tobytes() for leaf in jax.tree.leaves(state)))
    print("end", digest.hexdigest(), flush=True)
    return digest.hexdigest()


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
