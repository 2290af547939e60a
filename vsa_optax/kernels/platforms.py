"""Chooses between a GPU kernel and an XLA implementation of the same function."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp

Operands = TypeVarTuple("Operands")
Result = TypeVar("Result")

_AMPERE = 8
MOST = 1 << 31  # An array passed to a kernel must have fewer elements.


@functools.cache
def has_kernels() -> bool:
    """Whether the GPU kernels can run: this JAX must still have Pallas Triton, and the GPU must support bfloat16."""
    has_pallas = importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    return has_pallas and all(map(_has_bfloat16, jax.local_devices()))


def _has_bfloat16(device: jax.Device) -> bool:
    """Whether an NVIDIA GPU is Ampere or newer, by its compute capability; true for any other device."""
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return not major.isdigit() or int(major) >= _AMPERE


def is_on_one_device() -> bool:
    """Whether arrays cannot be sharded: there is only one device, and no enclosing ``shard_map``.

    XLA cannot partition a custom kernel over devices; it would gather the arrays first.
    """
    return jax.device_count() == 1 and not jax.sharding.get_abstract_mesh().manual_axes


def is_of_one_device() -> bool:
    """Whether each array is on one device: there is only one, or a ``shard_map`` over all axes of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.are_all_axes_manual if mesh.manual_axes else jax.device_count() == 1


def on_gpu_or_anywhere(
    on_gpu: Callable[[*Operands], Result], anywhere: Callable[[*Operands], Result], *operands: *Operands
) -> Result:
    """``on_gpu(*operands)`` if compiled for a single NVIDIA GPU, else ``anywhere(*operands)``."""
    if not is_on_one_device():
        return anywhere(*operands)
    return jax.lax.platform_dependent(*operands, cuda=on_gpu, default=anywhere)


def on_each_gpu_or_anywhere(
    on_gpu: Callable[[*Operands], Result], anywhere: Callable[[*Operands], Result], *operands: *Operands
) -> Result:
    """Like `on_gpu_or_anywhere`, but also runs ``on_gpu`` on each GPU of a ``shard_map``, for its own shard."""
    if not (is_of_one_device() and has_kernels()):
        return anywhere(*operands)
    return jax.lax.platform_dependent(*operands, cuda=on_gpu, default=anywhere)


def shape_like(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, operands: Sequence[jax.Array]
) -> jax.ShapeDtypeStruct:
    """The shape of a kernel's result: inside ``shard_map`` it varies over the axes over which an operand varies."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return jax.ShapeDtypeStruct(shape, dtype)

    def made(*operands: jax.Array) -> jax.Array:
        nothing = functools.reduce(jnp.logical_or, [x.reshape(-1)[0] != x.reshape(-1)[0] for x in operands])
        return jnp.broadcast_to(nothing.astype(dtype), shape)

    return jax.eval_shape(made, *operands)
