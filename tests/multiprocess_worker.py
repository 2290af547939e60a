"""One of two processes that train together, and can be killed and started again at any moment.

Arguments: process, port, folder, number of steps, the step of which to save a checkpoint. Prints a line for each step,
and what the devices of this process hold when it saves and after that number of steps. A run that did not begin with a
checkpoint then goes on until it is killed.
"""

import functools
import hashlib
import itertools
import os
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import vsa_optax
from vsa_optax import checkpoint

PREDICTOR = vsa_optax.Window(calibrate=False, residual_decay=0.95)
PHASES = vsa_optax.Cycle(warmup_steps=2, full_steps=2, predict_steps=4, correct_every=2)
SETTINGS = dict(learning_rate=0.02, predictor=repr(PREDICTOR), phases=repr(PHASES))

SHAPES = {"w": (8, 128), "v": (128, 8)}  # Each process averages one block.


def connect(process, port):
    """Joins the run; nobody listens but on the loopback interface."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    limits = dict(initialization_timeout=60, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=20)
    jax.distributed.initialize(address, 2, process, coordinator_bind_address=address, **limits)


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - jnp.sin(x)) ** 2)


def make_params():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def make_optimizer():
    pmean = vsa_optax.compressed_pmean("data", vsa_optax.TritCodec(1), error_feedback=True)
    opt = optax.chain(pmean, optax.adamw(1.0))
    return vsa_optax.phase_switched(opt, learning_rate=0.02, predictor=PREDICTOR, phases=PHASES)


def specs_of_state():
    """Each device has residuals of its own; all else is the same on all."""
    return vsa_optax.state_specs(jax.eval_shape(lambda: make_optimizer().init(make_params())), "data")


def first_state(mesh):
    params = jax.jit(make_params, out_shardings=NamedSharding(mesh, P()))()
    init = jax.shard_map(make_optimizer().init, mesh=mesh, in_specs=P(), out_specs=specs_of_state())
    return params, jax.jit(init)(params)


def make_step(mesh):
    opt, specs = make_optimizer(), specs_of_state()

    def step(params, opt_state, x):
        own = jax.lax.pcast(params, "data", to="varying")  # Else JAX would sum up the gradients itself.
        value, grads = vsa_optax.value_and_grad_by_phase(loss)(own, x, state=opt_state)
        updates, opt_state = opt.update(grads, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs)))


def accumulate(mesh, x):
    """Windows of two micro-batches, summed by each process; process 1 leaves out the third, and is not waited for."""
    inner = optax.chain(vsa_optax.compressed_pmean("data", vsa_optax.TritCodec()), optax.adam(0.02))
    opt = vsa_optax.ternary_multi_steps(inner, 2, block_size=32)

    def micro_step(x, carry, count):
        params, state = carry
        is_spoiled = (count == 2) & (jax.lax.axis_index("data") == 1)
        target = jnp.where(is_spoiled, jnp.nan, x.reshape(-1)[count])
        updates, state = opt.update(jax.lax.pcast(params, "data", to="varying") - target, state, params)
        return (optax.apply_updates(params, updates), state), state.mini_step

    def steps(x):
        params = jnp.zeros(40)
        return jax.lax.scan(functools.partial(micro_step, x), (params, opt.init(params)), jnp.arange(6))

    specs = vsa_optax.state_specs(jax.eval_shape(opt.init, jnp.zeros(40)), "data")
    run = jax.shard_map(steps, mesh=mesh, in_specs=P("data"), out_specs=((P(), specs), P()))
    (params, state), walked = jax.jit(run)(x)
    print("accumulated", *digests((params, state), jax.local_devices()), *np.asarray(walked), flush=True)


def train(folder, steps, save_at):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    # Each process has read its own part of the batch.
    mine = np.random.default_rng(1 + jax.process_index()).normal(size=(16, 8)).astype(np.float32)
    x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), mine)
    state, step, done = first_state(mesh), make_step(mesh), 0
    if checkpoint.latest_step(folder) is not None:
        done, state = checkpoint.restore(folder, state, config=SETTINGS)
    print("from", done, flush=True)
    for count in range(done + 1, steps + 1):
        state = jax.block_until_ready(step(*state, x))
        if count == save_at:
            checkpoint.save(folder, count, state, config=SETTINGS)
            print("saved", *digests(state, jax.local_devices()), flush=True)
        print("step", count, flush=True)
    print("predicted", vsa_optax.phase_stats(state[1]).predict_steps, flush=True)
    print("end", *digests(state, jax.local_devices()), flush=True)
    if done:
        return
    accumulate(mesh, x)
    refuse(folder, "alone", jnp.ones(3))
    refuse(__file__, "unwritable", state)  # A file is no folder.
    for count in itertools.count(steps + 1):
        state = jax.block_until_ready(step(*state, x))
        print("step", count, flush=True)


def refuse(folder, word, tree):
    try:
        checkpoint.save(folder, 1, tree)
    except (OSError, ValueError) as error:
        print(word, type(error).__name__, error, flush=True)


def digests(state, devices):
    """The hashes of the arrays on each device: of those that every device has, and of those that only this one has."""
    for device in devices:
        shared, own = hashlib.sha256(), hashlib.sha256()
        for leaf in jax.tree.leaves(state):
            data = next(np.asarray(shard.data) for shard in leaf.addressable_shards if shard.device == device)
            (shared if leaf.is_fully_replicated else own).update(data.tobytes())
        yield f"{shared.hexdigest()}:{own.hexdigest()}"


if __name__ == "__main__":
    connect(int(sys.argv[1]), sys.argv[2])
    try:
        train(sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    except jax.errors.JaxRuntimeError:
        # On the way out JAX would wait for the lost process until its heartbeat is given up, and then abort.
        traceback.print_exc()
        os._exit(1)
    jax.distributed.shutdown()
