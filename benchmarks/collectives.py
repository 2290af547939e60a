"""Averages gradients over eight devices: bytes sent, error of the mean, and the link speeds at which it saves time.

Run `python benchmarks/collectives.py | tee benchmarks/collectives.log`, and for the rest of that log
`collectives_training.py`. `--task` runs one part. `averaging_methods.py` creates the devices.

The bytes that a device sends are counted twice: by formula from shapes alone, and from the HLO of a step, by the
results of its collectives. An all-reduce of S bytes sends 2 (n - 1) / n S. An all-to-all or all-gather whose result has
S bytes sends (n - 1) / n S.
"""

import argparse
import collections
import math
import pathlib
import re

import codec_tasks as tasks
import collective_rivals as rivals
import jax
import jax.numpy as jnp
import numpy as np
import optax
from averaging_methods import BATCH, METHODS, NUM, ROWS, averaging, is_checked, on_devices
from codec_tasks import print_row, spread, verdict
from jax.sharding import PartitionSpec
from wire_model import exchange_seconds

import vsa_optax
from vsa_optax import TritCodec

HERE = pathlib.Path(__file__).parent
# Whose mean's error is compared with what theory says.
CODECS = {
    "two trits": TritCodec(2),
    "two trits, unbiased": TritCodec(2, unbiased=True),
    "one trit": TritCodec(1),
    "one trit, unbiased": TritCodec(1, unbiased=True),
}
MOST_BYTES = {"two trits": 0.102, "one trit": 0.052}
# Result bytes -> sent bytes, times (n - 1) / n.
COLLECTIVES = {"all-reduce": 2, "all-to-all": 1, "all-gather": 1}
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
# Gigabytes that a device sends a second, nominal, in one direction.
LINKS = {
    "NVLink 4, 450 GB/s": 450,
    "InfiniBand, 400 Gbit/s": 50,
    "Ethernet, 100 Gbit/s": 12.5,
    "Ethernet, 25 Gbit/s": 3.125,
    "Ethernet, 10 Gbit/s": 1.25,
    "Ethernet, 1 Gbit/s": 0.125,
}


# ---- bytes


def sent_by_hlo(text):
    """Bytes that a device sends, by kind of collective, in the HLO of one step."""
    found = collections.Counter()
    for shape, kind in re.findall(r" = (.*?) ((?:all|reduce-scatter|collective|ragged)[-\w]*)\(", text):
        if kind not in COLLECTIVES:
            raise ValueError(f"no rule for what {kind} sends")
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
        size = sum(WIDTHS[dtype] * math.prod(int(d) for d in dims.split(",") if d) for dtype, dims in arrays)
        found[kind] += COLLECTIVES[kind] * (NUM - 1) / NUM * size
    return found


def lowered_step(name, shapes):
    """One averaging step on the gradients of eight devices, as lowered."""
    method = averaging(name)
    specs = method.specs(shapes)
    init = on_devices(method.opt.init, PartitionSpec(), specs, is_checked(name))

    def step(gradients, state):
        own = jax.tree.map(lambda g: g[0], gradients)
        return method.opt.update(own, state)

    gradients = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((NUM, *leaf.shape), leaf.dtype), shapes)
    return on_devices(step, (ROWS, specs), (PartitionSpec(), specs), is_checked(name)).lower(
        gradients, jax.eval_shape(init, shapes)
    )


def large_model():
    """Shapes of GPT-2 small, 124 million parameters, each layer's leaves stacked on a leading axis."""
    width, layers = 768, 12

    def stacked(*shape):
        return jax.ShapeDtypeStruct((layers, *shape), jnp.float32)

    norms = {"scale": stacked(width), "bias": stacked(width)}
    return {
        "tokens": jax.ShapeDtypeStruct((50257, width), jnp.float32),
        "positions": jax.ShapeDtypeStruct((1024, width), jnp.float32),
        "norm": {name: jax.ShapeDtypeStruct((width,), jnp.float32) for name in norms},
        "layers": {
            "norm_1": norms,
            "attention_in": {"kernel": stacked(width, 3 * width), "bias": stacked(3 * width)},
            "attention_out": {"kernel": stacked(width, width), "bias": stacked(width)},
            "norm_2": norms,
            "mlp_in": {"kernel": stacked(width, 4 * width), "bias": stacked(4 * width)},
            "mlp_out": {"kernel": stacked(4 * width, width), "bias": stacked(width)},
        },
    }


MODELS = {
    "char transformer": lambda: jax.eval_shape(lambda: tasks.characters().init(0)),
    "GPT-2 small": large_model,
}


def bytes_of(model, name):
    """Bytes that a device sends: by formula, in the HLO before compilation, and in the HLO compiled for the CPU.

    The last is counted for the small model alone: a large one takes minutes to compile.
    """
    shapes = MODELS[model]()
    lowered = lowered_step(name, shapes)
    compiled = sent_by_hlo(lowered.compile().as_text()) if model == "char transformer" else None
    return averaging(name).sent(shapes, NUM), sent_by_hlo(lowered.as_text("hlo")), compiled


def count_bytes(options):
    del options
    tasks.print_header(
        f"BYTES: what each of {NUM} devices sends a step",
        "formula: from shapes alone; HLO: results of the collectives, as given to XLA; compiled: as compiled for the",
        "CPU, where bfloat16 crosses as float32",
    )
    names = [name for name in METHODS if name not in ("two trits, unbiased", "one trit, error feedback")]
    kinds = list(COLLECTIVES)
    widths = [34, 12, 12, 12, 12, 12, 12, 8, 34]
    jobs = [(model, name) for model in MODELS for name in names]
    for (model, name), found in zip(jobs, tasks.in_processes(bytes_of, jobs), strict=True):
        if name == "f32 pmean":
            print(f"{model}: {rivals.size_of(MODELS[model]()):,} parameters")
            print_row(widths, ["", "formula", "HLO", *kinds, "compiled", "of f32", ""])
            plain = found[1].total()
        by_formula, given, compiled = found
        share = given.total() / plain
        most = MOST_BYTES.get(name)
        target = f"target: at most {most:.1%}, {verdict(share <= most)}" if most else ""
        sizes = [by_formula, given.total(), *(given[kind] for kind in kinds)]
        row = [*(f"{size:,.0f}" for size in sizes), "" if compiled is None else f"{compiled.total():,.0f}"]
        print_row(widths, [name, *row, f"{share:.2%}", target])
        if name == names[-1]:
            print(flush=True)


# ---- error of the mean


def independent(seed):
    """Gaussian gradients, no two devices' alike: ``[8, 2^20]``."""
    return {"kernel": jax.random.normal(jax.random.key(seed), [NUM, 1024, 1024])}


def captured(seed, after=100):
    """Each device's gradient on its share of a batch of the char transformer, behind ``after`` steps of Adam."""
    task = tasks.characters()
    batches = task.batches(seed, (after + 1) * BATCH // 8).reshape(after + 1, BATCH, -1)

    @jax.jit
    def capture(params, batches):
        params = tasks.trained(task, params, batches[:-1])
        shares = batches[-1].reshape(NUM, BATCH // NUM, -1)
        return jax.lax.map(lambda share: jax.grad(task.loss)(params, share), shares)

    return capture(task.init(seed), batches)


def squared(tree):
    return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(tree))


def mean_errors(name, data, num_seeds, repeats):
    """``[seeds, 3]``: the mean's NMSE, the exact mean's square over the gradients', and the codec's own error."""
    codec, make = CODECS[name], GRADIENTS[data]
    opt = vsa_optax.compressed_pmean("data", codec)
    like = jax.eval_shape(lambda: jax.tree.map(lambda g: g[0], make(0)))
    specs = vsa_optax.state_specs(jax.eval_shape(opt.init, like), "data")

    def step(gradients, state):
        return opt.update(jax.tree.map(lambda g: g[0], gradients), state)

    def measure(gradients, mean, number):
        exact = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
        power = squared(gradients) / NUM

        def lost(own):
            return squared(optax.tree.sub(codec.decode(codec.encode(own, number)), own))

        one = jnp.sum(jax.lax.map(lost, gradients)) / squared(gradients)
        return squared(optax.tree.sub(mean, exact)) / power, squared(exact) / power, one

    init = on_devices(opt.init, PartitionSpec(), specs)
    average = on_devices(step, (ROWS, specs), (PartitionSpec(), specs))
    measure = jax.jit(measure)
    found = np.zeros([num_seeds, repeats, 3])
    for seed in range(num_seeds):
        gradients = make(seed)
        state = init(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like))
        for number in range(repeats):
            mean, state = average(gradients, state)
            found[seed, number] = jax.device_get(measure(gradients, mean, jnp.int32(number)))
    return found.mean(axis=1)


GRADIENTS = {
    f"independent Gaussian gradients, {2**20:,} coordinates": independent,
    f"char transformer, {BATCH // NUM} windows a device, after 100 steps": captured,
}


def errors(options):
    seeds, repeats = options.seeds or 5, 2
    tasks.print_header(
        f"NMSE of the mean over {NUM} devices, relative to the mean of ||g_i||^2",
        "vNMSE: of one encoding; sum: vNMSE / 8 + vNMSE ||mean||^2 / mean ||g_i||^2; ratio: measured over sum",
        "refined: measured over the sum without what is not encoded, a device's row for itself, and with the",
        "noisy mean in the place of the mean, since that is encoded again",
        f"n = {seeds} seeds, {repeats} rotations of each",
    )
    widths = [26, 9, 34, 9, 9, 9, 36]
    jobs = [(name, data, seeds, repeats) for data in GRADIENTS for name in CODECS]
    for (name, data, *_), found in zip(jobs, tasks.in_processes(mean_errors, jobs), strict=True):
        if name == next(iter(CODECS)):
            print(data)
            print_row(widths, ["", "vNMSE", "measured, mean [min, max]", "sum", "ratio", "refined", ""])
        measured, mean, one = found.T
        received = one * (NUM - 1) / NUM**2
        # A biased codec's output is shorter than its input by the error, an unbiased one's longer.
        noisy_mean = mean + (received if CODECS[name].unbiased else -received)
        stated, refined = one / NUM + one * mean, received + one * noisy_mean
        ratio = measured.mean() / stated.mean()
        target = f"target: at most 1.1, {verdict(ratio <= 1.1)}" if GRADIENTS[data] is independent else ""
        row = [f"{stated.mean():.5f}", f"{ratio:.3f}", f"{measured.mean() / refined.mean():.3f}", target]
        print_row(widths, [name, f"{one.mean():.5f}", spread(measured), *row])
        if name == list(CODECS)[-1]:
            print(flush=True)


# ---- when it pays


def measured_speeds():
    """``{machine: {codec: (encode, decode)}}`` in gigabytes of f32 a second, from the committed logs."""
    gpu = (HERE / "codec_speed_gpu.log").read_text()
    cpu = (HERE / "codec_times.log").read_text()
    found = {}
    for size in (2**27, 2**20):
        part = gpu.split(f"\n{size} coordinates\n")[1].split("\n\n")[0]
        rows = re.findall(r"^ +(.+?) (encode|decode) .* ([\d.]+) GB/s$", part, re.MULTILINE)
        speeds = {(codec, way): float(rate) for codec, way, rate in rows}
        found[f"H100, 2^{size.bit_length() - 1} coordinates"] = {
            codec: (speeds[codec, "encode"], speeds[codec, "decode"]) for codec, way in speeds if way == "encode"
        }
    table = cpu.split("Milliseconds for 1,048,576 coordinates\n")[1].split("\ntarget")[0]
    rows = re.findall(r"^(\S+codec\(.*?\)) +([\d.]+) \[.*?\] +([\d.]+) \[", table, re.MULTILINE | re.IGNORECASE)
    found["one CPU core, 2^20 coordinates"] = {
        codec: tuple(4 * 2**20 / 1e6 / float(ms) for ms in times) for codec, *times in rows
    }
    return found


def seconds_a_gigabyte(link, share, num=NUM, encode=math.inf, decode=math.inf):
    """To average a gigabyte of f32 gradients: sending a ``share`` of it, and the codec's time, one after the other.

    A device encodes as much as its gradient, and decodes twice as much.
    """
    return exchange_seconds(rivals.all_reduced(share, num), link, 1, encode, decode)


def break_even(share, against, num, encode, decode):
    """The link, in GB/s, at which compressing costs as much as it saves against a payload of ``against``."""
    codec = seconds_a_gigabyte(math.inf, share, num, encode, decode)
    return rivals.all_reduced(against - share, num) / codec


def links(options):
    del options
    shares = {f"TritCodec({t})": (1.6 * t + 16 / 1024) / 32 for t in (2, 1)}
    tasks.print_header(
        f"WHEN IT PAYS: milliseconds to average a gigabyte of f32 gradients over {NUM} devices",
        "link: what a device sends a second, nominal; nothing overlaps with the backward pass",
        "codec: one encoding and two decodings, at the speeds of codec_speed_gpu.log and codec_times.log",
    )
    for machine, speeds in measured_speeds().items():
        print(machine)
        widths = [26, 9, 9, *[14, 14] * len(shares)]
        print_row(widths, ["", "f32", "bf16", *(head for codec in shares for head in (codec, "times bf16's"))])
        for link, rate in LINKS.items():
            plain, half = (1e3 * seconds_a_gigabyte(rate, share) for share in (1.0, 0.5))
            row = [link, f"{plain:.1f}", f"{half:.1f}"]
            for codec, share in shares.items():
                taken = 1e3 * seconds_a_gigabyte(rate, share, NUM, *speeds[codec])
                row += [f"{taken:.1f}", f"{taken / half:.3g}"]
            print_row(widths, row)
        for codec, share in shares.items():
            f32, bf16 = (break_even(share, against, NUM, *speeds[codec]) for against in (1.0, 0.5))
            print(f"{codec} pays on links slower than {f32:.3g} GB/s against f32, {bf16:.3g} GB/s against bf16")
        print(flush=True)


TASKS = {"bytes": count_bytes, "nmse": errors, "links": links}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all")
    parser.add_argument("--seeds", type=int, help="in nmse, instead of 5")
    options = parser.parse_args()
    tasks.run_parts(TASKS, [options.task], options)


if __name__ == "__main__":
    main()
