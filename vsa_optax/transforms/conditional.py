"""Run a function on a state, or leave the state where it lies in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def when(fun: Callable[..., Any]) -> Callable[..., Any]:
    """``run(pred, carry, *operands)``, which is ``fun(carry, *operands)`` if ``pred``, else ``carry``.

    A loop of one turn or none. ``lax.cond`` says the same, but XLA gives a conditional's result a buffer of its own:
    what the skipping branch hands through is copied, and copied back into the donated argument. With AdamW inside,
    two moments and a residual cost 12 transfers of the parameters' size a PREDICT step, as many as the step needs
    altogether. A loop's carry keeps its buffer. The price: no reverse-mode differentiation through an update.

    ``run`` is one function object for ``fun``, so that outside jit it is compiled once.
    """

    def more(loop: tuple[jax.Array, Any, Any]) -> jax.Array:
        return loop[0]

    def body(loop: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, Any]:
        _, carry, operands = loop
        return jnp.array(False), fun(carry, *operands), operands

    def run(pred: jax.Array, carry: Any, *operands: Any) -> Any:
        return lax.while_loop(more, body, (pred, carry, operands))[1]

    return run
