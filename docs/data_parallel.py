"""Data-parallel training that sends two trits a coordinate, keeps what it did not send, and survives being killed.

On one machine, with all its devices (on a CPU, eight for trying it out):

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python data_parallel.py --folder run

With a process on each of two machines, the first of which is called host0:

    python data_parallel.py --folder /shared/run --coordinator host0:8476 --processes 2 --process 0   # on host0
    python data_parallel.py --folder /shared/run --coordinator host0:8476 --processes 2 --process 1   # on the other

Start it again with the same folder, and it goes on where the last checkpoint was written.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import vsa_optax
from vsa_optax import checkpoint

FEATURES, HIDDEN, BATCH = 64, 128, 512  # The batch is that of all devices together.


def make_params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "hidden": {"kernel": jax.random.normal(keys[0], (FEATURES, HIDDEN)) / FEATURES**0.5, "bias": jnp.zeros(HIDDEN)},
        "out": {"kernel": jax.random.normal(keys[1], (HIDDEN, 1)) / HIDDEN**0.5, "bias": jnp.zeros(1)},
    }


def loss_fn(params, batch):
    x, y = batch
    x = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean((x @ params["out"]["kernel"] + params["out"]["bias"] - y) ** 2)


def read_part(step, part, parts):
    """The rows of the batch that this process reads: a file's in practice, here numbers drawn from the step."""
    rng = np.random.default_rng([step, part])
    x = rng.normal(size=(BATCH // parts, FEATURES)).astype(np.float32)
    return x, np.sin(3 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]


def train(folder, steps, save_every):
    # Every process runs all of this with the same arguments, and has its own devices in the mesh.
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    same, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    # Gradients are averaged first; from there on all is the same on all devices.
    average = vsa_optax.compressed_pmean("data", vsa_optax.TritCodec(2), error_feedback=True)
    optimizer = optax.chain(average, optax.clip_by_global_norm(1.0), optax.adamw(3e-3))

    # Each device has a residual of its own. `specs` says so, and the state is made where each device can have one.
    specs = vsa_optax.state_specs(jax.eval_shape(lambda: optimizer.init(make_params())), "data")
    params = jax.jit(make_params, out_shardings=same)()
    opt_state = jax.jit(jax.shard_map(optimizer.init, mesh=mesh, in_specs=P(), out_specs=specs))(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs, P()))
    def train_step(params, opt_state, batch):
        # Gradients of parameters that vary are each device's own; otherwise JAX would sum them up, uncompressed.
        own = jax.lax.pcast(params, "data", to="varying")
        loss, grads = jax.value_and_grad(loss_fn)(own, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, jax.lax.pmean(loss, "data")

    first = 0
    if checkpoint.latest_step(folder) is not None:
        # The state just made says what to expect, and where it lies: every device reads its own residual.
        first, (params, opt_state) = checkpoint.restore(folder, (params, opt_state))
    losses = []
    for step in range(first + 1, steps + 1):
        part = read_part(step, jax.process_index(), jax.process_count())
        batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), part)
        params, opt_state, loss = train_step(params, opt_state, batch)
        losses.append(loss)  # Still an array on the devices: reading it here would wait for the step.
        if step % save_every == 0 or step == steps:
            checkpoint.save(folder, step, (params, opt_state))
            if jax.process_index() == 0:
                print(f"step {step}: loss {np.mean(losses):.4f}", flush=True)
            losses.clear()
    return params, opt_state


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="of checkpoints, the same for all processes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--coordinator", help="host:port of process 0; not needed by one process, nor on a cluster")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.processes > 1:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    return train(options.folder, options.steps, options.save_every)


if __name__ == "__main__":
    main()
