"""The speed of coding, adding and decoding trits on a GPU, compared with a copy of the array, XLA and other codecs.

Run `python benchmarks/trit_kernels.py | tee benchmarks/trit_kernels_gpu.log`. With `--tune`, it times each variant of
each kernel: `| tee benchmarks/trit_kernels_tuning.log`. Calls are in flight, as in training: `CALLS` are issued without
waiting. Rates count the bytes of the vector and of its code that must be moved, as shares of the rate of `x + 1`.
"""

import argparse
import functools
import importlib.metadata
import itertools
import math
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from vsa_optax.accumulation import packed_rows
from vsa_optax.kernels import rotation, signs, trit_blocks
from vsa_optax.kernels.gpu import levels, trit_kernels
from vsa_optax.kernels.gpu.trit_kernels import Tuning

BLOCK = 1024
CALLS, ROUNDS = 10, 7
SIZE = 1 << 27
OPERATIONS = "encode", "decode", "add", "finish"


def bytes_moved(operation, size, bits):
    """Of f32 in or out, and of codes of so many bits a coordinate in or out."""
    code = size * bits / 8
    return {
        "copy": 8 * size,
        "words": size / 8,
        "encode": 4 * size + code,
        "decode": 4 * size + code,
        "add": 4 * size + 2 * code,
        "finish": 8 * size + code,
    }[operation]


def bits_of(trits):
    return 1.6 * trits + 16 / BLOCK


def seconds_of(call, state, calls=CALLS):
    """Seconds of one call among many in flight; ``call`` receives its last result."""
    start = time.perf_counter()
    for _ in range(calls):
        state = call(state)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / calls, state


def medians(calls, rounds=ROUNDS, number=CALLS):
    """For each name the quartiles of seconds a call; ``calls`` are pairs of a function and what it is first given."""
    states, taken = {}, {name: [] for name in calls}
    for name, (call, first) in calls.items():
        states[name] = jax.block_until_ready(call(first))
        _, states[name] = seconds_of(call, states[name], number)
    for _ in range(rounds):
        for name, (call, _) in calls.items():
            seconds, states[name] = seconds_of(call, states[name], number)
            taken[name].append(seconds)
    return {name: np.percentile(values, [25, 50, 75]) for name, values in taken.items()}


@functools.cache
def vector(size):
    return jax.random.normal(jax.random.key(0), (size,))


def key():
    return signs.stream(0, 1)


@functools.cache
def words(size):
    return signs.random_bits(key(), (trit_kernels.num_rows(size) * levels.BLOCKS * BLOCK // 32,))


def repeated(call):
    """A call that does not depend on the last one."""
    return lambda _: call()


@functools.cache
def coded(trits, size):
    run = jax.jit(lambda x, c: trit_kernels.encode(x, c, trits=trits, unbiased=False))
    return jax.block_until_ready(run(vector(size), words(size)[None]))


def kernels_of(trits, size, tunings):
    """The calls of our kernels alone, without random words or scalars that are made for them."""
    x, one = vector(size), words(size)[None]
    codes, scales = coded(trits, size)
    factors = scales.astype(jnp.float32)
    shares = jnp.ones_like(factors)[None]
    out = {}
    for operation, tuning in tunings:
        loop = "unrolled" if tuning.is_unrolled else f"loop, {tuning.num_stages} stages"
        name = f"{operation}, {trits} trits, {tuning.num_warps} warps, {loop}, {tuning.rows} rows"
        if operation == "encode":
            run = jax.jit(lambda x, c, t=tuning: trit_kernels.encode(x, c, trits=trits, unbiased=False, tuning=t))
            out[name] = repeated(lambda run=run: run(x, one)), None
        elif operation == "decode":
            run = jax.jit(lambda c, *a, t=tuning: trit_kernels.decode_sum(c[None], *a, size=size, tuning=t))
            out[name] = repeated(lambda run=run: run(codes, shares, factors, one)), None
        elif operation == "add":
            run = jax.jit(
                lambda total, x, c, t=tuning: trit_kernels.add(x, c, None, *total, tuning=t), donate_argnums=0
            )
            out[name] = (lambda total, run=run: run(total, x, one)), (jnp.array(codes), jnp.array(scales))
        else:
            run = jax.jit(lambda *a, t=tuning: trit_kernels.finish(*a, jnp.float32(8), nearest=True, tuning=t))
            out[name] = repeated(lambda run=run: run(codes, scales, x, one)), None
    return out


def tune(size, operations, trits, warps, thorough):
    print(f"tuning, {size} coordinates, {CALLS} calls in flight, best of 3 rounds; share of the rate of x + 1")
    add_one, x = jax.jit(lambda x: x + 1), vector(size)
    _, copy, _ = medians({"copy": (repeated(lambda: add_one(x)), None)})["copy"]
    copied = bytes_moved("copy", size, 0) / copy
    print(f"x + 1: {1e3 * copy:.3f} ms, {copied / 1e9:.0f} GB/s moved", flush=True)
    choices = [Tuning(num) for num in warps]
    if thorough:
        choices += [Tuning(1, num_stages=2), Tuning(1, rows=4), Tuning(2, is_unrolled=True)]
    for num, operation, tuning in itertools.product(trits, operations, choices):
        try:
            ((name, (call, first)),) = kernels_of(num, size, [(operation, tuning)]).items()
            start = time.perf_counter()
            state = jax.block_until_ready(call(first))
            compiling = time.perf_counter() - start
            best = math.inf
            for _ in range(3):
                seconds, state = seconds_of(call, state)
                best = min(best, seconds)
            share = bytes_moved(operation, size, bits_of(num)) / best / copied
            print(f"  {name:55s} {1e3 * best:7.3f} ms  {share:5.1%}  compiled in {compiling:.2f} s", flush=True)
        except jax.errors.JaxRuntimeError as error:
            print(f"  {operation} {num} {tuning}: {str(error)[:200]}", flush=True)


def nmse(decoded, x):
    return float(jax.jit(lambda a, b: jnp.sum((a - b) ** 2) / jnp.sum(b**2))(decoded, x))


def trits_of(num, size, by_xla):
    """Calls of the codec's and the accumulator's own functions, random words and all, and the codec's error."""
    suits, trit_blocks.suits_gpu = trit_blocks.suits_gpu, (lambda *_: False) if by_xla else trit_blocks.suits_gpu
    x, settings = vector(size), {"block_size": BLOCK, "unbiased": False}
    encode = jax.jit(lambda x: trit_blocks.encode.__wrapped__(x, key(), trits=num, **settings))
    one = jnp.ones(1)
    decode = jax.jit(
        lambda c, s: trit_blocks.decode_sum.__wrapped__(c[None], s[None], one, key(), size=size, **settings)
    )
    add = jax.jit(
        lambda total, x, w: packed_rows.add.__wrapped__(total, x, w, None, block_size=BLOCK), donate_argnums=0
    )
    finish = jax.jit(
        lambda total, x, w: packed_rows.finish.__wrapped__(total, x, w, jnp.float32(8), block_size=BLOCK, nearest=True)
    )
    codes, scales = encode(x)
    error = nmse(decode(codes, scales), x)
    total, signs_of = packed_rows.Coded(codes, scales), words(size)
    calls = {
        "encode": (repeated(lambda: encode(x)), None),
        "decode": (repeated(lambda: decode(codes, scales)), None),
        "add": (lambda sum_so_far: add(sum_so_far, x, signs_of), jax.tree.map(jnp.array, total)),
        "finish": (repeated(lambda: finish(total, x, signs_of)), None),
    }
    for call, first in calls.values():
        jax.block_until_ready(call(jax.tree.map(jnp.array, first)))  # Compiled while the choice stands.
    trit_blocks.suits_gpu = suits
    return calls, error


def eden(bits):
    """EDEN in plain JAX: a rotation, the 2 or 4 Lloyd-Max levels of a Gaussian, 8 or 4 of them a byte, a scale."""
    table = jnp.array([[-0.7978846, 0.7978846], [-1.5104176, -0.4527800, 0.4527800, 1.5104176]][bits - 1])
    cuts = (table[1:] + table[:-1]) / 2
    per_byte = 8 // bits

    def encode(x):
        rows = x.reshape(-1, BLOCK)
        y = rotation.rotate(rows, [signs.random_words(key(), rows.shape)])
        unit = y * jax.lax.rsqrt(jnp.mean(y**2, axis=1, keepdims=True))
        numbers = sum((unit > cut).astype(jnp.uint8) for cut in cuts)
        level = sum(jnp.where(numbers == i, value, 0.0) for i, value in enumerate(table))
        scales = jnp.sum(y * level, axis=1) / jnp.sum(level**2, axis=1)
        shifts = (bits * jnp.arange(per_byte, dtype=jnp.uint8)).reshape(1, per_byte, 1)
        packed = jnp.sum(numbers.reshape(len(rows), per_byte, -1) << shifts, axis=1, dtype=jnp.uint8)
        return packed, scales.astype(jnp.bfloat16)

    def decode(packed, scales):
        shifts = (bits * jnp.arange(per_byte, dtype=jnp.uint8)).reshape(1, per_byte, 1)
        numbers = ((packed[:, None] >> shifts) & (2**bits - 1)).reshape(len(packed), BLOCK)
        level = sum(jnp.where(numbers == i, value, 0.0) for i, value in enumerate(table))
        y = scales.astype(jnp.float32)[:, None] * level
        return rotation.rotate_back(y, [signs.random_words(key(), y.shape)]).reshape(-1)

    return encode, decode, bits + 16 / BLOCK


def peers():
    def to_int8(x):
        rows = x.reshape(-1, BLOCK)
        scales = (jnp.max(jnp.abs(rows), axis=1) / 127).astype(jnp.bfloat16)
        return jnp.round(rows / scales.astype(jnp.float32)[:, None]).astype(jnp.int8), scales

    def from_int8(numbers, scales):
        return (numbers * scales.astype(jnp.float32)[:, None]).reshape(-1)

    return {
        "EDEN, 1 bit": eden(1),
        "EDEN, 2 bits": eden(2),
        "int8, scale a block": (to_int8, from_int8, 8 + 16 / BLOCK),
        "bfloat16": (lambda x: (x.astype(jnp.bfloat16),), lambda x: x.astype(jnp.float32), 16),
    }


def peers_of(name, size):
    encode, decode, bits = peers()[name]
    encode, decode, x = jax.jit(encode), jax.jit(decode), vector(size)
    code = jax.block_until_ready(encode(x))
    calls = {"encode": (repeated(lambda: encode(x)), None), "decode": (repeated(lambda: decode(*code)), None)}
    return calls, nmse(decode(*code), x), bits


def compare(size, trits):
    add_one, x = jax.jit(lambda x: x + 1), vector(size)
    draw = jax.jit(lambda seed: signs.random_bits(signs.stream(seed), (size // 32,)))
    calls = {"copy (x + 1)": (repeated(lambda: add_one(x)), None), "random words": (repeated(lambda: draw(0)), None)}
    of = {"copy (x + 1)": ("copy", 0, None), "random words": ("words", 0, None)}
    for num in trits:
        for way, by_xla in (("", False), (", XLA", True)):
            made, error = trits_of(num, size, by_xla)
            for operation, call in made.items():
                name = f"{num} trit{'s' * (num > 1)} {operation}{way}"
                calls[name], of[name] = call, (operation, bits_of(num), error if operation == "encode" else None)
    for peer in peers():
        made, error, bits = peers_of(peer, size)
        for operation, call in made.items():
            name = f"{peer} {operation}"
            calls[name], of[name] = call, (operation, bits, error if operation == "encode" else None)
    taken = medians(calls)
    copied = bytes_moved("copy", size, 0) / taken["copy (x + 1)"][1]
    print(f"{size} coordinates; {ROUNDS} rounds of {CALLS} calls in flight, interleaved; median [quartiles]")
    print("name                              ms                        GB/s moved  of x + 1's  bits    NMSE")
    for name, (low, middle, high) in taken.items():
        operation, bits, error = of[name]
        rate = bytes_moved(operation, size, bits) / middle
        times = f"{1e3 * middle:7.3f} [{1e3 * low:.3f}, {1e3 * high:.3f}]"
        print(
            f"{name:32s}  {times:26s} {rate / 1e9:7.0f}     {rate / copied:6.1%}   {bits:6.3f}"
            f"  {'' if error is None else f'{error:.6f}'}",
            flush=True,
        )


def versions():
    packages = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "numpy"))
    print(f"machine: {platform.machine()}, {jax.devices()[0].device_kind}; {packages}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="all ways to compile each kernel, instead of the table")
    parser.add_argument("--size", type=int, default=SIZE, help="coordinates")
    parser.add_argument("--operations", nargs="*", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--trits", nargs="*", type=int, default=(1, 2, 3))
    parser.add_argument("--warps", nargs="*", type=int, default=(1, 2, 4), help="to tune")
    parser.add_argument("--thorough", action="store_true", help="to tune stages, rows and unrolling, too")
    options = parser.parse_args()
    versions()
    if options.tune:
        tune(options.size, options.operations, options.trits, options.warps, options.thorough)
    else:
        compare(options.size, options.trits)


if __name__ == "__main__":
    main()
