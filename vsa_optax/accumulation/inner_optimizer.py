"""The optimizer inside `ternary_multi_steps`: its update where a window is complete, and zeros elsewhere.

It runs inside a conditional, both sides of which must have the same types. So the dtypes, and on a mesh the axes over
which things vary, are those of what an update would come to, which is looked up before.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from vsa_optax.core import mesh, versions
from vsa_optax.core.conditional import in_place_if, split_extra_args
from vsa_optax.core.mesh import varying_axes
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics

# Updates, what is summed, and the optimizer's state.
_Emission: TypeAlias = tuple[optax.Updates, Tree, optax.OptState]
_Finish: TypeAlias = Callable[..., tuple[optax.Updates, Tree]]


class Outcome(NamedTuple):
    """What an update of the inner optimizer would come to.

    Attributes:
        updates: tree of ``jax.ShapeDtypeStruct``.
        inner_state: likewise.
        axes: of the mesh, over which it communicates.
    """

    updates: Tree
    inner_state: Tree
    axes: frozenset[str]


class RunInner:
    """The inner optimizer's update where the window is complete, else zeros.

    ``finish((last, total), *window)`` gives the mean of a window's last micro-batch and the sum of the others, and an
    empty sum.
    """

    def __init__(self, inner: optax.GradientTransformationExtraArgs, finish: _Finish) -> None:
        self._inner = inner
        self._finish = finish
        self._functions_for = functools.lru_cache(maxsize=16)(self._functions)

    def look(
        self,
        updates: optax.Updates,
        inner_state: optax.OptState,
        params: optax.Params | None,
        extra_args: dict[str, object],
    ) -> Outcome:
        """What would come of such updates."""
        traced_args, static_args = split_extra_args(extra_args)
        update = functools.partial(self._inner.update, **static_args)
        program, (emitted, new_state) = versions.traced(
            lambda g, s, p, e: update(g, s, p, **e), updates, inner_state, params, traced_args
        )
        return Outcome(emitted, new_state, mesh.axes_in(inner_state) | mesh.axes_communicated_over(program))

    def __call__(
        self,
        emits: jax.Array,
        last: optax.Updates,
        total: Tree,
        window: tuple[jax.Array, ...],
        inner_state: optax.OptState,
        params: optax.Params | None,
        extra_args: dict[str, object],
        outcome: Outcome,
    ) -> tuple[optax.Updates, optax.Updates, Tree, optax.OptState]:
        """What comes of a micro-batch.

        Returns:
            Updates in the dtypes that the optimizer emits; the micro-batch where it is not the last of a window; the
            sum; the optimizer's state in the dtypes that it has.
        """
        traced_args, static_args = split_extra_args(extra_args)
        emitted = outcome.updates
        inner_state = mesh.varying_like(inner_state, outcome.inner_state)
        dtypes = tuple(g.dtype for g in jax.tree.leaves(last))
        step, step_if = self._functions_for(dtypes)
        if static_args:
            step_if = in_place_if(functools.partial(step, **static_args))
        operand = None
        if varying_axes(last) - varying_axes(emitted):
            # Means of each device become updates that are the same on all: one array cannot be of both types.
            operand, held = last, jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), emitted)
        else:
            # One tree for both, so that updates can take the gradient's place in memory.
            held = jax.tree.map(lambda g, u: g.astype(numerics.promoted(g.dtype, u.dtype)), last, emitted)
        held = mesh.varying_like(held, emitted)
        held, total, inner_state = step_if(emits, (held, total, inner_state), operand, window, params, traced_args)
        updates = jax.tree.map(lambda x, u: jnp.where(emits, x, jnp.zeros_like(x)).astype(u.dtype), held, emitted)
        if operand is None:
            last = jax.tree.map(lambda x, g: x.astype(g.dtype), held, last)
        return updates, last, total, inner_state

    def _functions(self, dtypes: tuple[jnp.dtype, ...]) -> tuple[Callable[..., _Emission], Callable[..., _Emission]]:
        """The update of means of gradients of these dtypes, and the conditional one."""

        def step(
            carry: _Emission,
            last: optax.Updates | None,
            window: tuple[jax.Array, ...],
            params: optax.Params | None,
            traced_args: dict[str, object],
            **static_args: object,
        ) -> _Emission:
            held, total, inner_state = carry
            if last is None:
                leaves, treedef = jax.tree.flatten(held)
                last = jax.tree.unflatten(treedef, [x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=True)])
            mean, total = self._finish((last, total), *window)
            updates, new_state = self._inner.update(mean, inner_state, params, **traced_args, **static_args)
            # As in optax.MultiSteps, the state keeps its dtypes whatever those of the gradients.
            updates = jax.tree.map(lambda u, w: u.astype(w.dtype), updates, held)
            return mesh.varying_like((updates, total, _in_dtypes_of(inner_state, new_state)), carry)

        return step, in_place_if(step)  # type: ignore[arg-type] # It is run without keywords.


def _in_dtypes_of(old: Tree, new: Tree) -> Tree:
    """``new``, but in the dtypes of ``old``."""

    def cast(o: jax.Array, n: ArrayLike) -> jax.Array:
        array = jnp.asarray(n)
        # An imaginary part is not dropped: let JAX say that the types differ.
        return array if jnp.iscomplexobj(array) and not jnp.iscomplexobj(o) else array.astype(o.dtype)

    return jax.tree.map(lambda o, n: n if jnp.result_type(o) == jnp.result_type(n) else cast(o, n), old, new)
