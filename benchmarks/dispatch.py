"""The host's time for a program that does almost nothing, by the number of its arrays, and for reading a result.

Run `python benchmarks/dispatch.py | tee benchmarks/dispatch_gpu.log` on a GPU. In the first part, calls are in flight
with all arrays donated and changed. In the second, the host reads the result of each call.
"""

import importlib.metadata
import time

import jax
import jax.numpy as jnp
import numpy as np

ROUNDS, CALLS, READS = 5, 100, 200


def in_flight(num):
    """Milliseconds a call of a program with ``num`` scalars; the median of the rounds."""
    step = jax.jit(lambda *scalars: tuple(x + 1 for x in scalars), donate_argnums=tuple(range(num)))
    scalars, found = tuple(jnp.zeros([]) + i for i in range(num)), []
    for _ in range(ROUNDS + 1):  # The first is not counted.
        start = time.perf_counter()
        for _ in range(CALLS):
            scalars = step(*scalars)
        jax.block_until_ready(scalars)
        found.append((time.perf_counter() - start) / CALLS * 1e3)
    return np.median(found[1:])


def reading(fun):
    """Microseconds of a call and of reading its result; the median."""
    fun = jax.jit(fun)
    x, found = jnp.zeros(4, jnp.int32), []
    for _ in range(READS):
        start = time.perf_counter()
        np.asarray(fun(x))
        found.append((time.perf_counter() - start) * 1e6)
    return np.median(found)


def main():
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "numpy"))
    print(f"machine: {jax.devices()[0].device_kind}; {versions}")
    for num in (2, 10, 30, 60, 100):
        print(f"{num:3d} scalars: {in_flight(num):.3f} ms a call", flush=True)
    print(f"a call, and reading its result from the device: {reading(lambda x: x + 1):.0f} us")
    host = jax.memory.Space.Host
    print(f"a call, and reading its result from host memory: {reading(lambda x: jax.device_put(x + 1, host)):.0f} us")


if __name__ == "__main__":
    main()
