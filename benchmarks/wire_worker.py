"""One process of `wire.py`: runs the given measurements, and prints tables if it is the first.

The arguments are the process's number, the number of processes, the coordinator's port, a folder shared by all links,
tasks and methods separated by commas (no method for all), and `small` for a miniature. Times are medians of rounds. In
a round each method has a block of steps in flight, one block after the other.
"""

import concurrent.futures
import functools
import glob
import importlib.metadata
import json
import pathlib
import platform
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

import collective_rivals as rivals
import gpt2
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from wire_model import exchange_seconds, sent_by_codec

import vsa_optax
from vsa_optax import TritCodec

ROWS, SAME = PartitionSpec("data"), PartitionSpec()
ROUNDS = 5
COMPARED = ("range", "of bfloat16", "of float32", "calculator")


class Scale(NamedTuple):
    """How large things are.

    Attributes:
        leaf: coordinates of the one leaf: where one process has all devices, and where not.
        model: GPT-2's size.
        batch: windows a device.
        bucket_bytes: where there are several buckets.
    """

    leaf: tuple[int, int]
    model: gpt2.Size
    batch: int
    bucket_bytes: int


LARGE = Scale((2**27, 2**26), gpt2.SMALL, 8, 64 << 20)
MINIATURE = Scale((2**17, 2**16), gpt2.TINY, 2, 256 << 10)
CHOSEN = set()  # The chosen methods; empty for all.
CODECS = {"two trits": TritCodec(2), "one trit": TritCodec(1)}


def methods(scale):
    """Name -> transformation, what it sends by formula, and its codec; None where nothing is coded."""

    def plain(dtype):
        rival = rivals.pmean("data", dtype) if dtype else rivals.pmean("data")
        return rival.opt, rival.sent, None

    def ours(name, **settings):
        codec = CODECS[name]
        opt = vsa_optax.compressed_pmean("data", codec, **settings)
        return opt, functools.partial(sent_by_codec, codec), name

    known = {
        "float32 pmean": plain(None),
        "bfloat16 pmean": plain(jnp.bfloat16),
        "two trits": ours("two trits"),
        "one trit": ours("one trit"),
        "two trits, buckets": ours("two trits", bucket_bytes=scale.bucket_bytes),
    }
    return {name: method for name, method in known.items() if not CHOSEN or name in CHOSEN}


def show(*cells):
    if jax.process_index() == 0:
        print(f"{cells[0]:<34}", *(f"{cell:>16}" for cell in cells[1:]), flush=True)


def mesh():
    return Mesh(np.array(jax.devices()), ("data",))


def on_devices(function, in_specs, out_specs, is_checked=True, donate=()):
    mapped = jax.shard_map(function, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=is_checked)
    return jax.jit(mapped, donate_argnums=donate)


def made(function, spec):
    """The result of a function, with the sharding ``spec``."""
    return jax.jit(function, out_shardings=NamedSharding(mesh(), spec))()


def laid_out(shapes, spec):
    layout = NamedSharding(mesh(), spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), shapes)


def normals(size):
    return made(lambda: jax.random.normal(jax.random.key(0), (jax.device_count(), size)), ROWS)


def median_seconds(calls, steps, rounds=ROUNDS):
    """Name -> ``[rounds]`` seconds a step of functions, each of which starts a step and gives what to wait for."""
    for call in calls.values():
        jax.block_until_ready(call())
    found = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(steps):
                result = call()
            jax.block_until_ready(result)
            found[name].append((time.perf_counter() - start) / steps)
    return found


def milliseconds(times):
    return f"{1e3 * np.median(times):.2f}", f"{1e3 * min(times):.2f}-{1e3 * max(times):.2f}"


def shares_of(found, name):
    """Of the plain methods' times, round by round."""
    plain = ("bfloat16 pmean", "float32 pmean")
    return [f"{np.median(np.divide(found[name], found[other])):.3f}" if other in found else "" for other in plain]


# ---- what the link carries, and what coding takes


def link(scale, known):
    """Bytes a second that a device sends, both ways at once, by kind of collective."""
    size = scale.leaf[jax.process_count() > 1] // 4
    x = normals(size)
    octets = made(lambda: jnp.ones((jax.device_count(), size), jnp.uint8), ROWS)
    num = jax.device_count()
    swap = on_devices(lambda x: jax.lax.all_to_all(x.reshape(num, -1), "data", 0, 0, tiled=True), ROWS, ROWS)
    add = on_devices(lambda x: jax.lax.psum(x, "data"), ROWS, SAME)
    gather = on_devices(lambda x: jax.lax.all_gather(x[0], "data"), ROWS, ROWS)
    calls = {"all-to-all": lambda: swap(octets), "all-gather": lambda: gather(octets), "psum": lambda: add(x)}
    found = median_seconds(calls, 4)
    # The all-to-all and the sum have results of one such array, the gathering of one from each device.
    sent = rivals.gathered(size, num), rivals.gathered(num * size, num), rivals.all_reduced(4 * size, num)
    known["link"] = {kind: amount / np.median(found[kind]) for kind, amount in zip(calls, sent, strict=True)}
    show(f"{size:,} bytes a device, psum x 4", *(f"{kind}, GB/s" for kind in calls))
    show("what a device sends", *(f"{rate / 1e9:.2f}" for rate in known["link"].values()))


def codec(scale, known):
    """Bytes of float32 a second, of a row on each device; once for all links, whose devices are the same."""
    noted = pathlib.Path(known["folder"]) / "codec.json"
    if noted.exists():
        known["codec"] = json.loads(noted.read_text())
        return
    known["codec"] = {}
    size = scale.leaf[jax.process_count() > 1] // jax.device_count()
    x, calls = normals(size), {}
    for name, coder in CODECS.items():
        encode = on_devices(lambda x, coder=coder: jax.tree.map(lambda a: a[None], coder.encode(x[0])), ROWS, ROWS)
        payload = encode(x)
        decode = on_devices(lambda p, coder=coder: coder.decode(jax.tree.map(lambda a: a[0], p))[None], ROWS, ROWS)
        calls[name, "encode"] = functools.partial(encode, x)
        calls[name, "decode"] = functools.partial(decode, payload)
    found = median_seconds(calls, 8)
    show(f"{size:,} coordinates", "encode, GB/s", "decode, GB/s")
    for name in CODECS:
        speeds = [4 * size / np.median(found[name, way]) for way in ("encode", "decode")]
        known["codec"][name] = speeds
        show(name, *(f"{speed / 1e9:.3g}" for speed in speeds))
    if jax.process_index() == 0:
        noted.write_text(json.dumps(known["codec"]))


def predicted(known, sent, size, coder):
    """The calculator's seconds for one exchange."""
    rates = known["link"]
    if not coder:
        return exchange_seconds(sent, rates["psum"])
    first = "all-gather" if jax.device_count() == 2 else "all-to-all"
    mean_rate = 2 / (1 / rates[first] + 1 / rates["all-gather"])
    return exchange_seconds(sent, mean_rate, 4 * size, *known["codec"][coder])


# ---- exchange of one leaf


def exchange(scale, known):
    size = scale.leaf[jax.process_count() > 1]
    gradient, calls, memory = normals(size), {}, {}
    for name, (opt, _, _) in methods(scale).items():
        step = on_devices(lambda g, s, opt=opt: opt.update(g[0], s), (ROWS, SAME), SAME)
        state = jax.device_put(opt.init(jnp.zeros(1)), NamedSharding(mesh(), SAME))
        program = step.lower(gradient, state).compile()
        memory[name] = program.memory_analysis().temp_size_in_bytes / size
        calls[name] = functools.partial(program, gradient, state)
    means = {name: call()[0] for name, call in calls.items()}
    lost = jax.jit(lambda a, b, g: jnp.sum((a - b) ** 2) / jnp.mean(jnp.sum(g**2, axis=1)))
    exact = jax.jit(lambda g: g.mean(axis=0), out_shardings=NamedSharding(mesh(), SAME))(gradient)
    errors = {name: float(lost(mean, exact, gradient)) for name, mean in means.items()}
    del means, exact
    found = median_seconds(calls, 4)
    show(f"exchange, 2^{size.bit_length() - 1} coordinates", "ms", *COMPARED, "NMSE", "temporary, B")
    shape = jax.ShapeDtypeStruct((size,), jnp.float32)
    for name, (_, sent, coder) in methods(scale).items():
        shares = shares_of(found, name)
        guess = predicted(known, sent(shape, jax.device_count()), size, coder)
        show(
            name,
            *milliseconds(found[name]),
            *shares,
            f"{1e3 * guess:.2f}",
            f"{errors[name]:.2e}",
            f"{memory[name]:.1f}",
        )


# ---- compiling 148 leaves


def compiling(scale, known):
    """Of the exchange of GPT-2's gradient alone, of the full size on any machine: nothing runs."""
    del scale, known
    shapes = jax.eval_shape(lambda: gpt2.init(jax.random.key(0), LARGE.model))
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((jax.device_count(), *x.shape), x.dtype), shapes)
    num = rivals.size_of(shapes)
    show(
        f"exchange of {len(jax.tree.leaves(shapes))} leaves",
        "trace, s",
        "compile, s",
        "of all cores, s",
        "temporary, B",
    )
    for name, (opt, _, _) in methods(LARGE).items():
        step = on_devices(lambda g, s, opt=opt: opt.update(jax.tree.map(lambda x: x[0], g), s), (ROWS, SAME), SAME)
        start = time.perf_counter()
        lowered = step.lower(laid_out(stacked, ROWS), laid_out(jax.eval_shape(opt.init, shapes), SAME))
        middle, before = time.perf_counter(), time.process_time()
        program = lowered.compile()
        seconds, busy = time.perf_counter() - middle, time.process_time() - before
        temporary = program.memory_analysis().temp_size_in_bytes / num
        show(name, f"{middle - start:.1f}", f"{seconds:.1f}", f"{busy:.1f}", f"{temporary:.1f}")


# ---- training steps


def steps(scale):
    """Name -> compiled step of GPT-2, its carry and batch; ``none`` leaves out the exchange."""
    size, key = scale.model, jax.random.key(0)

    def prepared(name, average, is_checked):
        opt = optax.chain(average, optax.adamw(1e-4))

        def step(carry, windows):
            params, state = carry
            own = jax.lax.pcast(params, "data", to="varying") if is_checked else params
            value, grads = jax.value_and_grad(gpt2.loss)(own, windows, size)
            updates, state = opt.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value[None]

        carry = jax.eval_shape(lambda: (lambda p: (p, opt.init(p)))(gpt2.init(key, size)))
        shape = jax.ShapeDtypeStruct((jax.device_count() * scale.batch, size.context + 1), jnp.int32)
        program = on_devices(step, (SAME, ROWS), (SAME, ROWS), is_checked, donate=0).lower(
            laid_out(carry, SAME), laid_out(shape, ROWS)
        )
        return name, opt, program

    jobs = [prepared("none", optax.identity(), False)]
    jobs += [prepared(name, opt, True) for name, (opt, _, _) in methods(scale).items()]

    def compiled(job):
        start = time.perf_counter()
        return job[2].compile(), time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = list(pool.map(compiled, jobs))
    windows = made(
        lambda: jax.random.randint(key, (jax.device_count() * scale.batch, size.context + 1), 0, size.vocabulary), ROWS
    )
    for (name, opt, _), (program, seconds) in zip(jobs, programs, strict=True):
        carry = made(lambda opt=opt: (lambda p: (p, opt.init(p)))(gpt2.init(key, size)), SAME)
        yield name, Training(program, carry, windows), seconds


class Training:
    """A compiled step and what it carries from one call to the next."""

    def __init__(self, program, carry, windows):
        self.program, self.carry, self.windows = program, carry, windows

    def __call__(self):
        self.carry, value = self.program(self.carry, self.windows)
        return value


def step(scale, known):
    started = time.perf_counter()
    trainings, taken = {}, {}
    for name, training, seconds in steps(scale):
        trainings[name], taken[name] = training, seconds
    known["trainings"] = trainings
    tokens = scale.batch * scale.model.context
    show(f"{len(trainings)} programs compiled at once in {time.perf_counter() - started:.0f} s")
    first = {name: float(np.asarray(training().addressable_shards[0].data)[0]) for name, training in trainings.items()}
    found = median_seconds(trainings, 4, rounds=ROUNDS if jax.process_count() == 1 else 3)
    shapes = jax.eval_shape(lambda: gpt2.init(jax.random.key(0), scale.model))
    num = rivals.size_of(shapes)
    show(f"step, {num / 1e6:.3g}M, {tokens} tokens a device", "ms", *COMPARED, "compile, s", "first loss")
    for name, times in found.items():
        shares = shares_of(found, name)
        guess = np.median(found["none"])
        if name != "none":
            _, sent, coder = methods(scale)[name]
            guess += predicted(known, sent(shapes, jax.device_count()), num, coder)
        show(name, *milliseconds(times), *shares, f"{1e3 * guess:.2f}", f"{taken[name]:.1f}", f"{first[name]:.4f}")


# ---- what runs beside what


def overlap(scale, known):
    """From a profile of three steps: for how long of each step collectives run, and other kernels beside them."""
    del scale
    show("profile, ms a step", "collectives", "other kernels", "both at once", "span")
    for name, training in known["trainings"].items():
        if name == "none":
            continue
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(3):
                    value = training()
                jax.block_until_ready(value)
            [file] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            rows = list(_busy(jax.profiler.ProfileData.from_file(file)))
        for device, (wire, other, both, span) in rows:
            show(f"{name}, {device}", *(f"{1e-6 * ns / 3:.2f}" for ns in (wire, other, both, span)))
        if not rows:
            show(name, "no GPU in it")


def _busy(profile):
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        events = [event for line in plane.lines if line.name.startswith("Stream") for event in line.events]
        kinds = [[], []]
        for event in events:
            kinds["nccl" not in event.name.lower()].append((event.start_ns, event.start_ns + event.duration_ns))
        wire, other = map(_merged, kinds)
        both = sum(max(0, min(b, d) - max(a, c)) for a, b in wire for c, d in other if c < b and a < d)
        ends = [*wire, *other]
        if ends:
            span = max(b for _, b in ends) - min(a for a, _ in ends)
            yield plane.name.rpartition("/")[2], (_length(wire), _length(other), both, span)


def _merged(intervals):
    found = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def _length(intervals):
    return sum(stop - start for start, stop in intervals)


TASKS = {"link": link, "codec": codec, "exchange": exchange, "compile": compiling, "step": step, "overlap": overlap}


def main(process, count, port, folder, tasks, only, *size):
    CHOSEN.update(only.split(",") if only else [])
    scale = MINIATURE if size else LARGE
    if int(count) > 1:
        if size:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address = f"127.0.0.1:{port}"
        jax.distributed.initialize(
            address, int(count), int(process), local_device_ids=[0], coordinator_bind_address=address,
        )  # fmt: skip
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "optax", "numpy")]
    device = jax.devices()[0]
    if jax.process_index() == 0:
        print(f"machine: {platform.machine()}, {jax.device_count()} x {device.device_kind}", *versions, sep=", ")
    known, failed = {"folder": folder}, []
    started = time.perf_counter()
    for task in tasks.split(","):
        try:
            TASKS[task](scale, known)
        except Exception:  # The other tasks may still be measured.
            traceback.print_exc()
            failed.append(task)
        if jax.process_index() == 0:
            print(f"  ({task}: at {time.perf_counter() - started:.0f} s)", flush=True)
    if int(count) > 1:
        jax.distributed.shutdown()
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
