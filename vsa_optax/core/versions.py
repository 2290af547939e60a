"""Replacements for functions that older releases of JAX lack, and the release that makes them obsolete."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.core.types import Tree

# In these releases `all_gather` cannot mark its result as replicated, and an array's type has another name for the axes
# over which it varies. This module can be removed when the oldest supported JAX is 0.10.0.
_IS_BEFORE_0_10 = jax.__version_info__ < (0, 10)


@runtime_checkable
class Program(Protocol):
    """A jaxpr, closed or not. The module of JAX's own classes, ``jax.extend``, takes long to import."""

    eqns: list[Any]


def varying_axes(x: jax.typing.ArrayLike) -> frozenset[str]:
    """The axes of a ``jax.shard_map`` over which an array varies."""
    kind: Tree = jax.typeof(x)
    return frozenset(kind.vma if _IS_BEFORE_0_10 else kind.manual_axis_type.varying)


def all_gather_invarying(own: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """``[n, m]``: the arrays ``[m]`` of the n devices along ``axes``, marked as replicated.

    Before JAX 0.10.0, each device contributes its own row of a zero array to a sum, which sends twice the bytes.
    """
    if not _IS_BEFORE_0_10:
        return lax.all_gather(own, axes, to="invarying")
    every = jnp.zeros((lax.axis_size(axes), own.size), own.dtype)
    return lax.psum(lax.dynamic_update_index_in_dim(every, own, lax.axis_index(axes), 0), axes)


def traced(fun: Callable[..., Tree], *args: Tree) -> tuple[Program, Tree]:
    """A function's program, and the shapes, dtypes and varying axes of its result as a tree.

    Before JAX 0.10.0, the shapes that JAX returns with a program lack these axes.
    """
    program, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    return program, jax.eval_shape(fun, *args) if _IS_BEFORE_0_10 else shapes


def present_trace() -> object:
    """The identity of the program that is being traced; JAX 0.8.2 has this function in another module."""
    import jax.extend.core as extended  # The import takes long, and only accumulation needs it.

    has_it = extended if hasattr(extended, "get_opaque_trace_state") else jax.core
    return has_it.get_opaque_trace_state(convention="vsa_optax")
