"""Runs a function on a state, or leaves the state in place in memory."""

import os
import re
import warnings
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
from jax import lax

Carry = TypeVar("Carry")
Operands = TypeVarTuple("Operands")
_COMMAND_BUFFERS = re.compile(r"--?xla_gpu_enable_command_buffer=(\S+)")


def in_place_if(fun: Callable[[Carry, *Operands], Carry]) -> Callable[[jax.Array, Carry, *Operands], Carry]:
    """Returns ``run(pred, carry, *operands)``, which is ``fun(carry, *operands)`` if ``pred``, else ``carry``.

    It is a loop of at most one iteration. ``lax.cond`` computes the same, but XLA gives the result of a conditional its
    own buffer: the skipping branch copies its operand, and the result is copied back into the donated argument. With
    AdamW inside, two moments and a residual cost 12 transfers of the parameters' size in a PREDICT step, as many as the
    rest of the step. The carry of a loop keeps its buffer. In return, an update has no reverse-mode derivative.

    ``run`` is one function object for ``fun``. Outside jit, JAX compiles a loop or a conditional again for each new
    function object, so callers create theirs once. An eager update of `vsa_optax.phase_switched` on a small model then
    takes 19 ms instead of 1.6 s, and one of `vsa_optax.ternary_multi_steps` 10 ms instead of 2.1 s (on a CPU,
    benchmarks/eager_step.log).
    """

    def more(loop: tuple[jax.Array, Carry, tuple[*Operands]]) -> jax.Array:
        return loop[0]

    def body(loop: tuple[jax.Array, Carry, tuple[*Operands]]) -> tuple[jax.Array, Carry, tuple[*Operands]]:
        pred, carry, operands = loop
        # This is False, and under shard_map it varies over the same axes as the condition.
        return jnp.logical_and(pred, False), fun(carry, *operands), operands

    def run(pred: jax.Array, carry: Carry, *operands: *Operands) -> Carry:
        return lax.while_loop(more, body, (pred, carry, operands))[1]

    return run


def run_if(fun: Callable[[Carry, *Operands], Carry]) -> Callable[[jax.Array, Carry, *Operands], Carry]:
    """Like `in_place_if`, but a conditional where that is faster; for carries that may be in memory twice.

    At each loop a GPU waits until the host has fetched the condition. JAX 0.11 puts conditionals into command buffers,
    where the device decides alone: with the default predictor, a true step of a transformer of 11 million parameters
    takes 1.08 times as long as AdamW's while the guard sleeps, and 1.17 times with loops (H200, JAX 0.11.2,
    benchmarks/phase_in_flight_gpu.log). Where conditionals are not in command buffers, they wait like loops. The price
    is the memory of the result beside that of the carry. A conditional has a reverse-mode derivative, a loop has none.
    """
    loop = in_place_if(fun)

    def run(pred: jax.Array, carry: Carry, *operands: *Operands) -> Carry:
        if prefers_branches():
            return lax.cond(pred, fun, _unchanged, carry, *operands)
        return loop(pred, carry, *operands)

    return run


def prefers_branches() -> bool:
    """Whether conditionals are faster than loops of at most one iteration, as on GPUs; both compute the same.

    It is known while a program is traced, since to trace both takes twice as long. A program for another device than
    JAX's default one is correct, too.
    """
    return jax.default_backend() == "gpu"


def _unchanged(carry: Carry, *operands: object) -> Carry:
    del operands
    return carry


def warn_of_command_buffers() -> None:
    """Warns if XLA flags put loops into command buffers on a GPU, which gives wrong numbers.

    A loop after a conditional then runs when it should not, also without this library. On an H100 with JAX 0.11.2 a sum
    was 16.1 or 18.6 instead of 14.8. CONDITIONAL in command buffers is correct.
    """
    commands = _COMMAND_BUFFERS.findall(os.environ.get("XLA_FLAGS", ""))
    if commands and "WHILE" in re.split(r"[+,]", commands[-1].upper()) and jax.default_backend() == "gpu":
        warnings.warn(
            "XLA_FLAGS puts loops into command buffers (--xla_gpu_enable_command_buffer with WHILE), which gives wrong "
            "numbers: leave WHILE out of it; CONDITIONAL may stay",
            UserWarning,
            stacklevel=2,
        )


def split_extra_args(extra_args: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Splits extra arguments into trees of arrays, which become operands, and others, which are static."""
    traced = {name: value for name, value in extra_args.items() if _is_array_tree(value)}
    return traced, {name: value for name, value in extra_args.items() if name not in traced}


def _is_array_tree(value: object) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array) or hasattr(leaf, "__array__") for leaf in leaves)
