"""The speed of the codecs on an accelerator, compared with a copy of the same array.

Run `python benchmarks/codec_speed.py | tee benchmarks/codec_speed_gpu.log`. Times on one CPU core are in
`codec_times.py`.
"""

import argparse
import platform
import time

import jax
import numpy as np

import vsa_optax

ROUNDS = 30
SIZES = (1 << 20, 1 << 24, 1 << 27)


def seconds(calls):
    """Medians and quartiles of ``ROUNDS`` calls of each function, which take turns."""
    for call in calls.values():
        jax.block_until_ready(call())
    taken = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            taken[name].append(time.perf_counter() - begin)
    return {name: np.percentile(values, [25, 50, 75]) for name, values in taken.items()}


def calls_for(size):
    x = jax.random.normal(jax.random.key(0), (size,))
    add = jax.jit(lambda x: x + 1)
    calls = {"copy (x + 1)": lambda: add(x)}
    codecs = {"HypervectorCodec(0.1)": vsa_optax.HypervectorCodec(0.1)}
    for trits in (1, 2, 3):
        codecs[f"TritCodec({trits})"] = vsa_optax.TritCodec(trits)
        codecs[f"TritCodec({trits}, unbiased)"] = vsa_optax.TritCodec(trits, unbiased=True)
    for name, codec in codecs.items():
        encode, decode = jax.jit(codec.encode), jax.jit(codec.decode)
        payload = encode(x)
        calls[f"{name} encode"] = lambda encode=encode: encode(x)
        calls[f"{name} decode"] = lambda decode=decode, payload=payload: decode(payload)
    return calls


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    device = jax.devices()[0].device_kind
    print(f"machine: {platform.machine()}, {device}; jax {jax.__version__}, vsa_optax {vsa_optax.__version__}")
    print(f"n = {ROUNDS} interleaved calls; median [quartiles]; rate: bytes of f32 in or out per second\n")
    for size in SIZES:
        print(f"{size} coordinates")
        for name, (low, middle, high) in seconds(calls_for(size)).items():
            rate = 4 * size / middle / 1e9
            times = f"{1e3 * middle:8.3f} ms [{1e3 * low:.3f}, {1e3 * high:.3f}]"
            print(f"  {name:30s} {times:30s} {rate:7.1f} GB/s", flush=True)
        print()


if __name__ == "__main__":
    main()
