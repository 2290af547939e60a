"""Which of two ways to compute the same: the one of a GPU, or the one that XLA has anywhere."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp

Operands = TypeVarTuple("Operands")
Result = TypeVar("Result")

_AMPERE = 8
MOST = 1 << 31  # Elements of an array that a kernel is given are fewer.


@functools.cache
def has_kernels() -> bool:
    """Whether they can run: JAX has announced the end of what they are written for, and old GPUs have no bfloat16."""
    has_pallas = importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    return has_pallas and all(map(_has_bfloat16, jax.local_devices()))


def _has_bfloat16(device: jax.Device) -> bool:
    """Of a GPU of NVIDIA's, which says by a version what it can, from Ampere on; of any other device true."""
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return not major.isdigit() or int(major) >= _AMPERE


def is_on_one_device() -> bool:
    """Whether arrays cannot be laid out over several devices: there is but one, and no ``shard_map`` around us.

    XLA does not divide a kernel of ours over devices: it would gather the arrays first.
    """
    return jax.device_count() == 1 and not jax.sharding.get_abstract_mesh().manual_axes


def is_of_one_device() -> bool:
    """Whether an array is one device's whole: there is but one, or a ``shard_map`` over all axes of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.are_all_axes_manual if mesh.manual_axes else jax.device_count() == 1


def on_gpu_or_anywhere(
    on_gpu: Callable[[*Operands], Result], anywhere: Callable[[*Operands], Result], *operands: *Operands
) -> Result:
    """``on_gpu(*operands)`` in what is compiled for one GPU of NVIDIA's, ``anywhere(*operands)`` in all else."""
    if not is_on_one_device():
        return anywhere(*operands)
    return jax.lax.platform_dependent(*operands, cuda=on_gpu, default=anywhere)


def on_each_gpu_or_anywhere(
    on_gpu: Callable[[*Operands], Result], anywhere: Callable[[*Operands], Result], *operands: *Operands
) -> Result:
    """As `on_gpu_or_anywhere`, and ``on_gpu`` on each GPU of a ``shard_map``, for what it has."""
    if not (is_of_one_device() and has_kernels()):
        return anywhere(*operands)
    return jax.lax.platform_dependent(*operands, cuda=on_gpu, default=anywhere)


def shape_like(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, operands: Sequence[jax.Array]
) -> jax.ShapeDtypeStruct:
    """What a kernel makes of operands: inside ``shard_map`` it varies over the devices if one of these does."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return jax.ShapeDtypeStruct(shape, dtype)

    def made(*operands: jax.Array) -> jax.Array:
        nothing = functools.reduce(jnp.logical_or, [x.reshape(-1)[0] != x.reshape(-1)[0] for x in operands])
        return jnp.broadcast_to(nothing.astype(dtype), shape)

    return jax.eval_shape(made, *operands)
