"""The optimizer inside `ternary_multi_steps`: its update if a window is complete, and zeros otherwise.

It runs inside a conditional, whose branches must have the same types. So the dtypes, and on a mesh the varying axes,
are those of an update, which is traced first.
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
from vsa_optax.core.trees import zeros_unless
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics

# The updates, the sum, and the optimizer's state.
_Emission: TypeAlias = tuple[optax.Updates, Tree, optax.OptState]
_Finish: TypeAlias = Callable[..., tuple[optax.Updates, Tree]]


class Outcome(NamedTuple):
    """The shapes of an update of the inner optimizer.

    Attributes:
        updates: tree of ``jax.ShapeDtypeStruct``, the updates.
        inner_state: tree of ``jax.ShapeDtypeStruct``, the new state.
        axes: the mesh axes over which the optimizer communicates.
    """

    updates: Tree
    inner_state: Tree
    axes: frozenset[str]


class RunInner:
    """Runs the inner optimizer if the window is complete, and returns zeros otherwise.

    ``finish((last, total), *window)`` returns the mean of a window's last micro-batch and the sum of the others, and an
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
        """The shapes of the optimizer's result for such updates."""
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
        """Processes a micro-batch.

        Returns:
            The updates in the dtypes that the optimizer emits; the micro-batch, if it is not the last of a window; the
            sum; the optimizer's state in its own dtypes.
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
            # The means of each device become replicated updates: one array cannot have both types.
            operand, held = last, jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), emitted)
        else:
            # One tree serves for both, so that updates can reuse the gradient's memory.
            held = jax.tree.map(lambda g, u: g.astype(numerics.promoted(g.dtype, u.dtype)), last, emitted)
        held = mesh.varying_like(held, emitted)
        held, total, inner_state = step_if(emits, (held, total, inner_state), operand, window, params, traced_args)
        updates = jax.tree.map(lambda x, u: x.astype(u.dtype), zeros_unless(emits, held), emitted)
        if operand is None:
            last = jax.tree.map(lambda x, g: x.astype(g.dtype), held, last)
        return updates, last, total, inner_state

    def _functions(self, dtypes: tuple[jnp.dtype, ...]) -> tuple[Callable[..., _Emission], Callable[..., _Emission]]:
        """The update for means of gradients with these dtypes, and its conditional version."""

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
            # As in optax.MultiSteps, the state keeps its dtypes, whatever those of the gradients are.
            updates = jax.tree.map(lambda u, w: u.astype(w.dtype), updates, held)
            return mesh.varying_like((updates, total, _in_dtypes_of(inner_state, new_state)), carry)

        return step, in_place_if(step)  # type: ignore[arg-type] # It runs without keyword arguments.


def _in_dtypes_of(old: Tree, new: Tree) -> Tree:
    """``new`` in the dtypes of ``old``."""

    def cast(o: jax.Array, n: ArrayLike) -> jax.Array:
        array = jnp.asarray(n)
        # An imaginary part is not dropped: JAX raises an error, since the types differ.
        return array if jnp.iscomplexobj(array) and not jnp.iscomplexobj(o) else array.astype(o.dtype)

    return jax.tree.map(lambda o, n: n if jnp.result_type(o) == jnp.result_type(n) else cast(o, n), old, new)
