"""The cost of a step of each kind compared with plain AdamW, with steps in flight as in training, and its causes.

Run `python benchmarks/phase_in_flight.py | tee benchmarks/phase_in_flight.log`; on a GPU the log is
`phase_in_flight_gpu.log`. Each variant takes blocks of steps with a donated state, without waiting between them. Blocks
of all variants alternate in rounds, and ratios are taken within a round.

A variant is a way to compile (one program with `jax.jit`, or one for each kind with `vsa_optax.jit_by_phase`) and a
kind of step: true steps while the guard is asleep; true steps that it watches; predicted steps. Real steps first fill
the history; then the machine is held in its phase by setting its scalars. In the variant "alone", the program of one
kind runs without the host's choice before it. The difference to it is the time of the host, or its waits.

Beside the time, the table has these counts per step:

- kernels and copies launched on a GPU, and the share of time it was busy (both from JAX's profiler);
- waits of the host for the next kind;
- conditionals and loops in the compiled program, without those of the model;
- copies in it of arrays as large as the largest leaf.
"""

import argparse
import concurrent.futures
import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import tempfile
import time

import byte_transformer
import jax
import jax.numpy as jnp
import noiseless_poisson
import numpy as np
import optax
import prediction_tasks

import vsa_optax
from vsa_optax import Guarded, Phase, Recursive, Secants
from vsa_optax.core.kinds import StepKind

RATE, NEVER = 1e-3, 10**6
RECORDS = 18  # Real steps before a machine is held: as many as fill the default history.


def mlp():
    """A small classifier on mini-batches, where the guard sleeps."""
    widths = (64, 256, 256, 10)
    x = jax.random.normal(jax.random.key(1), (128, widths[0]))
    y = jax.random.randint(jax.random.key(2), (128,), 0, widths[-1])

    def init():
        keys = jax.random.split(jax.random.key(0), len(widths) - 1)
        return [
            {"w": jax.random.normal(k, (m, n)) * m**-0.5, "b": jnp.zeros(n)}
            for k, m, n in zip(keys, widths, widths[1:], strict=False)
        ]

    def loss(params):
        hidden = x
        for layer in params[:-1]:
            hidden = jax.nn.relu(hidden @ layer["w"] + layer["b"])
        logits = hidden @ params[-1]["w"] + params[-1]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return init(), loss


def of_task(task, batches=None):
    """Parameters and the loss on one batch."""
    batch = () if batches is None else jnp.asarray(task.batches(0, 1)[0])
    return task.init(0), lambda params: task.loss(params, batch)


CASES = {
    "byte transformer, batch 64 x 256": lambda: of_task(byte_transformer.byte_transformer(64, 256), True),
    "Poisson PINN, 4 x 256, 8192 points": lambda: of_task(noiseless_poisson.poisson(256, 8192)),
    "Poisson PINN, 3 x 64, 1024 points": lambda: of_task(noiseless_poisson.poisson(64, 1024, depth=3)),
    "char transformer, batch 8": lambda: of_task(prediction_tasks.CASES["chars, batch 8"].task(), True),
    "MLP, 64 to 256 to 256 to 10, batch 128": mlp,
}


def asleep(machine):
    return machine._replace(phase=jnp.int32(Phase.FULL), guard=machine.guard._replace(asleep=jnp.int32(NEVER)))


def watched(machine):
    guard = machine.guard._replace(hopeless=jnp.int32(-NEVER), asleep=jnp.int32(0))
    return machine._replace(phase=jnp.int32(Phase.FULL), guard=guard)


def predicted(machine):
    guard = machine.guard._replace(length=jnp.float32(NEVER), pace=jnp.float32(0), drift=jnp.float32(0))
    return machine._replace(phase=jnp.int32(Phase.PREDICT), steps_in_phase=jnp.int32(0), guard=guard)


HELD = {
    "asleep": (asleep, StepKind.PLAIN),
    "watched": (watched, StepKind.WATCHED),
    "predicted": (predicted, StepKind.PREDICTED),
}


def optimizers():
    # With so small a tolerance no true step starts a leap, whatever the history says.
    phases = Guarded(tolerance=1e-12, longest=2 * NEVER)

    def switched(predictor):
        return vsa_optax.phase_switched(optax.adamw(RATE), predictor=predictor, phases=phases)

    return {
        "default": switched(Secants()),
        "flattened": optax.flatten(switched(Secants())),
        "float16": switched(Secants(dtype="float16")),
        "float16, flattened": optax.flatten(switched(Secants(dtype="float16"))),
        "8 secants, bfloat16": switched(Secants(8, dtype="bfloat16")),
        "recursion": vsa_optax.phase_switched(
            optax.adamw(1.0), predictor=Recursive(), learning_rate=RATE, phases=phases
        ),
    }


class Program:
    """A training step, compiled for one kind of step or for all."""

    def __init__(self, jitted, carry):
        self._lowered = jitted.lower(*carry)
        self.call = jitted

    def compile(self):
        """With the compilation cache switched on, the next call of the jitted function finds it there."""
        start = time.perf_counter()
        compiled = self._lowered.compile()
        self.seconds = time.perf_counter() - start
        self.text, self.analysis = compiled.as_text(), compiled.memory_analysis()

    def control_flow(self):
        """Conditionals and loops."""
        return self.text.count(" conditional("), self.text.count(" while(")

    def large_copies(self, size):
        """Copies of at least so many numbers in the entry computation."""
        entry = self.text[self.text.index("\nENTRY") :]
        shapes = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", entry)
        return sum(np.prod([int(n) for n in shape.split(",") if n]) >= size for shape in shapes)


class Optimizer:
    """Its programs for one loss."""

    def __init__(self, loss, params, opt, is_phased, options):
        def step(params, state):
            by_phase = functools.partial(vsa_optax.value_and_grad_by_phase(loss), state=state)
            value, grads = (by_phase if is_phased else jax.value_and_grad(loss))(params)
            updates, state = opt.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state

        def scanned(params, state):
            return jax.lax.scan(lambda carry, _: (step(*carry), None), (params, state), length=options.steps)[0]

        settings = {"donate_argnums": (0, 1)}
        if options.command_buffers:
            settings["compiler_options"] = {"xla_gpu_enable_command_buffer": options.command_buffers}
        self.start = lambda: jax.tree.map(jnp.array, (params, opt.init(params)))
        carry = self.start()
        single = jax.jit(scanned if options.scan else step, **settings)
        self.programs = {None: Program(single, carry)}
        if is_phased:
            self.by_phase = vsa_optax.jit_by_phase(step, **settings)
            self.programs |= {kind: Program(self.by_phase.programs[kind], carry) for _, kind in HELD.values()}


class Variant:
    """A way to run an optimizer, and a carry that is held where it is to be measured."""

    def __init__(self, optimizer, way, held, is_scan):
        self.way, (self.hold, kind) = way, HELD.get(held, (None, None))
        self.program = optimizer.programs[None if way == "one program" else kind]
        self.num_waits = 0
        carry = optimizer.start()
        if held:
            for _ in range(RECORDS):  # Real steps, real records.
                carry = optimizer.by_phase(*carry)
        self.carry, self.optimizer = carry, optimizer
        self.is_scan = is_scan

    def block(self, steps):
        """Seconds a step."""
        if self.way == "by phase":
            before, step = self.optimizer.by_phase.num_waits, self.optimizer.by_phase
        elif self.way == "alone":
            step = lambda *carry: self.program.call(*carry)[0]  # noqa: E731 # The result without its forecast.
        else:
            step = self.program.call
        if self.hold:  # Repeated for each block, since on a fixed batch the guard may fall asleep.
            state = self.carry[1]
            machine = jax.tree.map(jnp.array, self.hold(state.machine.unpacked()).packed())
            self.carry = jax.block_until_ready((self.carry[0], state._replace(machine=machine)))
        start = time.perf_counter()
        for _ in range(1 if self.is_scan else steps):
            self.carry = step(*self.carry)
        jax.block_until_ready(self.carry)
        seconds = (time.perf_counter() - start) / steps
        if self.way == "by phase":
            self.num_waits = (step.num_waits - before) / steps
        return seconds


WAYS = ("one program", "by phase", "alone")


def cases():
    """The variants: a name, the optimizer, the way to compile, and the phase in which the machine is held."""
    rows = [("plain", "plain", "one program", None), ("phases=None", "phases=None", "one program", None)]
    rows += [(f"{held}, {way}", "default", way, held) for held in HELD for way in WAYS]
    rows += [
        (f"{held}, {way}; {name}", name, way, held)
        for name in optimizers()
        if name != "default"
        for held in HELD
        for way in WAYS
    ]
    return rows


def profiled(variant, steps=10):
    """Launches a step, and the share of the time that the GPU is busy; None where there is none."""
    if jax.default_backend() != "gpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            variant.block(steps)
            wall = time.perf_counter() - start
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        events = [
            event
            for plane in data.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return len(events) / steps, sum(event.duration_ns for event in events) / 1e9 / wall, events


def report(name, options):
    """Prints one table."""
    params, loss = CASES[name]()
    size, largest = optax.tree.size(params), max(leaf.size for leaf in jax.tree.leaves(params))
    print(f"\n{name}: {size:,} parameters in {len(jax.tree.leaves(params))} leaves")
    print(
        f"{'':42s} {'ratio to plain [quartiles]':26s} {'ms':>8s} {'launches':>9s} {'busy':>5s} {'waits':>6s} "
        f"{'cond, loops':>12s} {'copies':>7s} {'B/param':>8s} {'compiles, s':>12s}",
        flush=True,
    )
    wanted = options.variants.split(";")
    used = ["plain", *(options.optimizers.split(";") if options.optimizers else ["phases=None", *optimizers()])]
    chosen = [case for case in cases() if case[1] in used and any(part in case[0] for part in ["plain", *wanted])]
    chosen = [case for case in chosen if case[2] == "one program" or not options.scan]
    plain = optax.with_extra_args_support(optax.adamw(RATE))
    never = vsa_optax.phase_switched(optax.adamw(RATE), phases=None)
    given = {"plain": plain, "phases=None": never} | optimizers()
    made = {
        used: Optimizer(loss, params, given[used], used in optimizers(), options)
        for used in dict.fromkeys(case[1] for case in chosen)
    }
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        list(pool.map(Program.compile, [program for used in made.values() for program in used.programs.values()]))
    base = made["plain"].programs[None].control_flow()
    variants = {variant: Variant(made[used], way, held, options.scan) for variant, used, way, held in chosen}
    for variant in variants.values():
        variant.block(options.steps if options.scan else 3)
    seconds = {name: [] for name in variants}
    for _ in range(options.rounds):
        for variant, values in zip(variants.values(), seconds.values(), strict=True):
            values.append(variant.block(options.steps))
    for label, values in seconds.items():
        low, middle, high = np.percentile(np.array(values) / np.array(seconds["plain"]), [25, 50, 75])
        variant, program = variants[label], variants[label].program
        seen = None if options.no_profile else profiled(variant)
        launches, busy = ("", "") if seen is None else (f"{seen[0]:.0f}", f"{seen[1]:.2f}")
        flow = "{}, {}".format(*(num - of_model for num, of_model in zip(program.control_flow(), base, strict=True)))
        needs = (program.analysis.argument_size_in_bytes + program.analysis.temp_size_in_bytes) / size
        print(
            f"{label:42s} {f'{middle:6.3f} [{low:.3f}, {high:.3f}]':26s} {1e3 * np.median(values):8.3f} {launches:>9s} "
            f"{busy:>5s} {variant.num_waits:6.2f} {flow:>12s} {program.large_copies(largest):7d} {needs:8.1f} "
            f"{program.seconds:12.1f}",
            flush=True,
        )
        if seen is not None and options.kernels:
            totals = {}
            for event in seen[2]:
                count, total = totals.get(event.name, (0, 0))
                totals[event.name] = count + 1, total + event.duration_ns
            for kernel, (count, total) in sorted(totals.items(), key=lambda item: -item[1][1])[: options.kernels]:
                print(f"      {total / 1e4:9.1f} us a step, {count / 10:6.1f} launches: {kernel[:90]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of a block")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", default="", help='only what contains one of these: "byte;PINN, 4"')
    parser.add_argument("--variants", default="", help='only what contains one of these, and plain: "asleep;alone"')
    parser.add_argument("--optimizers", default="", help='only these, and plain: "default;flattened"')
    parser.add_argument("--precision", default="default", help="of matrix products; a GPU's default is TF32")
    parser.add_argument("--command-buffers", default="", help='for all: "FUSION,CUBLAS,CUDNN,CONDITIONAL"')
    parser.add_argument("--scan", action="store_true", help="a block is one lax.scan; of the ways, only one program")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--kernels", type=int, default=0, help="how many of the longest kernels to list")
    options = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", options.precision)
    cache = tempfile.TemporaryDirectory()
    jax.config.update("jax_compilation_cache_dir", cache.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "optax"))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}")
    print(f"versions: python {platform.python_version()}, {versions}")
    buffers, how = options.command_buffers or "JAX's own choice", "in one scan" if options.scan else "in flight"
    print(
        f"n = {options.rounds} rounds of {options.steps} steps {how}; seed 0; command buffers: {buffers}; "
        f"products: {options.precision}"
    )
    for name in CASES:
        if not options.cases or any(part in name for part in options.cases.split(";")):
            report(name, options)


if __name__ == "__main__":
    main()
