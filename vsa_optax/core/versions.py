"""What older releases lack of what is used here, and from which release on each function can go."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.core.types import Tree

# Of these releases `all_gather` cannot promise that its result is the same on all devices, and an array's type has the
# axes over which it varies under another name. All in this module can go when the oldest JAX is 0.10.0.
_IS_BEFORE_0_10 = jax.__version_info__ < (0, 10)


@runtime_checkable
class Program(Protocol):
    """A jaxpr, closed or not. ``jax.extend``, where JAX has these classes, takes long to import."""

    eqns: list[Any]


def varying_axes(x: jax.typing.ArrayLike) -> frozenset[str]:
    """The axes of a ``jax.shard_map`` over which the array varies."""
    kind: Tree = jax.typeof(x)
    return frozenset(kind.vma if _IS_BEFORE_0_10 else kind.manual_axis_type.varying)


def all_gather_invarying(own: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """``[n, m]``: the arrays ``[m]`` of the n devices along ``axes``, known as the same on all of them.

    Before JAX 0.10.0 arrays that are zero but for one are added up, which takes twice the bytes.
    """
    if not _IS_BEFORE_0_10:
        return lax.all_gather(own, axes, to="invarying")
    every = jnp.zeros((lax.axis_size(axes), own.size), own.dtype)
    return lax.psum(lax.dynamic_update_index_in_dim(every, own, lax.axis_index(axes), 0), axes)


def traced(fun: Callable[..., Tree], *args: Tree) -> tuple[Program, Tree]:
    """A function's program, and what it returns: a tree of shapes and dtypes, and of the axes over which they vary.

    Before JAX 0.10.0 the shapes that come with a program do not tell these axes.
    """
    program, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    return program, jax.eval_shape(fun, *args) if _IS_BEFORE_0_10 else shapes


def present_trace() -> object:
    """Equal for all that is being traced into one and the same program; JAX 0.8.2 has it in another module."""
    import jax.extend.core as extended  # It takes long: only who accumulates needs it.

    has_it = extended if hasattr(extended, "get_opaque_trace_state") else jax.core
    return has_it.get_opaque_trace_state(convention="vsa_optax")
