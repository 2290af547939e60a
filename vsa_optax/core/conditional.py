"""Run a function on a state, or leave the state where it lies in memory."""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
from jax import lax

Carry = TypeVar("Carry")
Operands = TypeVarTuple("Operands")


def in_place_if(fun: Callable[[Carry, *Operands], Carry]) -> Callable[[jax.Array, Carry, *Operands], Carry]:
    """``run(pred, carry, *operands)``, which is ``fun(carry, *operands)`` if ``pred``, else ``carry``.

    A loop of one turn or none. ``lax.cond`` says the same, but XLA gives a conditional's result a buffer of its own:
    what the skipping branch hands through is copied, and copied back into the donated argument. With AdamW inside,
    two moments and a residual cost 12 transfers of the parameters' size a PREDICT step, as many as the step needs
    altogether. A loop's carry keeps its buffer. The price: no reverse-mode differentiation through an update.

    ``run`` is one function object for ``fun``: outside jit JAX compiles a loop or a conditional anew for each new one,
    so callers make theirs once. An eager update of `vsa_optax.phase_switched` on a small model then takes 14 ms instead
    of 2 s, one of `vsa_optax.ternary_multi_steps` 9 ms instead of 2 s (on a CPU, benchmarks/eager_step.log).
    """

    def more(loop: tuple[jax.Array, Carry, tuple[*Operands]]) -> jax.Array:
        return loop[0]

    def body(loop: tuple[jax.Array, Carry, tuple[*Operands]]) -> tuple[jax.Array, Carry, tuple[*Operands]]:
        pred, carry, operands = loop
        # False, and under shard_map as variable over the devices as the condition was.
        return jnp.logical_and(pred, False), fun(carry, *operands), operands

    def run(pred: jax.Array, carry: Carry, *operands: *Operands) -> Carry:
        return lax.while_loop(more, body, (pred, carry, operands))[1]

    return run


def split_extra_args(extra_args: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Extra arguments that are trees of arrays, which can be operands, and the others, part of the program."""
    traced = {name: value for name, value in extra_args.items() if _is_array_tree(value)}
    return traced, {name: value for name, value in extra_args.items() if name not in traced}


def _is_array_tree(value: object) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array) or hasattr(leaf, "__array__") for leaf in leaves)
