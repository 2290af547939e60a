"""Phases, `multisecant`, a killed process and a restart on two devices of one host: are both devices equal?

Run `python benchmarks/two_devices.py | tee benchmarks/two_devices_gpu.log` on a machine with two GPUs; on a CPU, prefix
`XLA_FLAGS=--xla_force_host_platform_device_count=2`. First, one process with both devices trains in `jax.shard_map`,
with `phase_switched` around `compressed_pmean` and with `multisecant` after `jax.lax.pmean`. Then two processes with
one device each run `tests/multiprocess_worker.py`: one is killed, and both are started again.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
WORKER = HERE.parent / "tests" / "multiprocess_worker.py"
STEPS, SAVE_AT, PATIENCE = 60, 30, 120


def one_process():
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import vsa_optax

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "optax"))
    print(f"machine: {platform.machine()}, {len(jax.devices())} x {jax.devices()[0].device_kind}")
    print(f"versions: python {platform.python_version()}, {versions}\n", flush=True)
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh = jax.make_mesh((2,), ("data",))
    x = jax.random.normal(jax.random.key(1), (4096, 64))
    batch = jax.device_put(x, NamedSharding(mesh, P("data")))

    def make_params():
        keys = jax.random.split(jax.random.key(0))
        return {"in": jax.random.normal(keys[0], (64, 512)) / 8, "out": jax.random.normal(keys[1], (512, 1)) / 23}

    def loss(params, x):
        found = jnp.tanh(x @ params["in"]) @ params["out"]
        return jnp.mean((found - jnp.sin(x[:, :1]) * x[:, 1:2]) ** 2)

    pmean = vsa_optax.compressed_pmean("data", vsa_optax.TritCodec(3))
    lines = vsa_optax.Window()
    cases = {
        "phase_switched, cycle, three trits": vsa_optax.phase_switched(
            optax.chain(pmean, optax.adamw(1.0)), learning_rate=1e-3, predictor=lines, phases=vsa_optax.Cycle()
        ),
        "phase_switched, guarded, three trits": vsa_optax.phase_switched(
            optax.chain(pmean, optax.adamw(1.0)), learning_rate=1e-3, predictor=lines
        ),
        "phase_switched, secants, pmean": vsa_optax.phase_switched(optax.adamw(1e-3)),
        "multisecant, pmean": vsa_optax.multisecant(optax.adamw(1e-3)),
    }
    names = f"{'one process, 300 steps':38s} {'loss':>19s} {'predicted':>10s} {'collectives':>12s} {'in branches':>12s}"
    print(f"{names}  same bits")
    for name, opt in cases.items():
        sends_itself = "trits" in name
        specs = vsa_optax.state_specs(jax.eval_shape(lambda opt=opt: opt.init(make_params())), "data")

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs, P()))
        def step(params, state, x, opt=opt, sends_itself=sends_itself, name=name):
            def averaged(own, x):
                return jax.lax.pmean(loss(own, x), "data")

            own = jax.lax.pcast(params, "data", to="varying") if sends_itself else params
            of_loss = loss if sends_itself else averaged
            if name.startswith("multisecant"):
                value, grads = jax.value_and_grad(of_loss)(own, x)
            else:
                value, grads = vsa_optax.value_and_grad_by_phase(of_loss)(own, x, state=state)
            value = jax.lax.pmean(value, "data") if sends_itself else value
            updates, state = opt.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state, value

        params = jax.jit(make_params, out_shardings=NamedSharding(mesh, P()))()
        state = jax.jit(jax.shard_map(opt.init, mesh=mesh, in_specs=P(), out_specs=specs))(params)
        text = step.lower(params, state, batch).compile().as_text()
        entry = text[text.index("\nENTRY") :]
        sent = r"= [^=]* (?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\("
        values = []
        for _ in range(300):
            params, state, value = jax.block_until_ready(step(params, state, batch))
            values.append(value)
        bits = [
            hashlib.sha256(
                b"".join(
                    np.asarray(leaf.addressable_data(device)).tobytes()
                    for leaf in jax.tree.leaves((params, state))
                    if leaf.is_fully_replicated
                )
            ).hexdigest()
            for device in range(2)
        ]
        predicted = "" if name.startswith("multisecant") else str(int(vsa_optax.phase_stats(state).predict_steps))
        num_all, num_entry = len(re.findall(sent, text)), len(re.findall(sent, entry))
        losses = f"{float(values[0]):.3g} to {float(values[-1]):.3g}"
        print(
            f"{name:38s} {losses:>19s} {predicted:>10s} {num_all:12d} {num_all - num_entry:12d}  {bits[0] == bits[1]}",
            flush=True,
        )


class Process:
    """A worker, and what it has said."""

    def __init__(self, folder, number, port):
        self.path = folder / f"said_{time.monotonic_ns()}"
        mine = {"CUDA_VISIBLE_DEVICES": str(number), "XLA_FLAGS": "", "PYTHONPATH": str(HERE.parent)}
        command = [sys.executable, WORKER, *map(str, (number, port, folder / "run", STEPS, SAVE_AT))]
        with self.path.open("w") as file:
            self.popen = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | mine)

    def line(self, beginning):
        """Waits for a line that begins like this."""
        for _ in range(10 * PATIENCE):
            for line in self.path.read_text().splitlines():
                if line.startswith(beginning):
                    return line
            if self.popen.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"no line {beginning!r} in:\n{self.path.read_text()[-3000:]}")


def two_processes():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)

        def start():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            return [Process(folder, number, port) for number in range(2)]

        first = start()
        ends = [process.line("end") for process in first]
        predicted = [process.line("predicted") for process in first]
        shared = [line.split()[1].split(":")[0] for line in ends]
        first[0].line(f"step {STEPS + 20}")
        began = time.monotonic()
        first[1].popen.send_signal(signal.SIGKILL)
        first[0].popen.wait(PATIENCE)
        seconds = time.monotonic() - began
        second = start()
        resumed, again = [process.line("from") for process in second], [process.line("end") for process in second]
        for process in second:
            process.popen.wait(PATIENCE)
        print(f"\ntwo processes, {STEPS} steps, checkpoint at {SAVE_AT}, phase_switched around one trit with feedback")
        print(f"predicted steps of either: {predicted[0].split()[1]}, {predicted[1].split()[1]}")
        print(f"the same bits on both: {shared[0] == shared[1]}")
        print(f"process 1 killed: process 0 ended after {seconds:.1f} s with exit code {first[0].popen.returncode}")
        print(f"started again: {resumed[0]}, {resumed[1]}; at step {STEPS} the bits of before: {again == ends}")


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    two_processes()
    one_process()


if __name__ == "__main__":
    main()
