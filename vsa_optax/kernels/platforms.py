"""Which of two ways to compute the same: the one of a GPU, or the one that XLA has anywhere."""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import jax

Operands = TypeVarTuple("Operands")
Result = TypeVar("Result")


def is_on_one_device() -> bool:
    """Whether arrays cannot be laid out over several devices: there is but one, and no ``shard_map`` around us.

    XLA does not divide a kernel of ours over devices: it would gather the arrays first.
    """
    return jax.device_count() == 1 and not jax.sharding.get_abstract_mesh().manual_axes


def on_gpu_or_anywhere(
    on_gpu: Callable[[*Operands], Result], anywhere: Callable[[*Operands], Result], *operands: *Operands
) -> Result:
    """``on_gpu(*operands)`` in what is compiled for one GPU of NVIDIA's, ``anywhere(*operands)`` in all else."""
    if not is_on_one_device():
        return anywhere(*operands)
    return jax.lax.platform_dependent(*operands, cuda=on_gpu, default=anywhere)
