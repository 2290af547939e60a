"""Checks of a function and its arguments for `value_and_grad_by_phase`, which calls it inside a conditional."""

import functools
import inspect
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from vsa_optax.core.types import Tree

Array: TypeAlias = jax.Array | np.ndarray | np.generic


def refuse_hidden_arguments(fun: Callable[..., object], args: tuple[Tree, ...]) -> None:
    """``TypeError`` for an argument of ``fun`` that cannot be passed, since its name is already used."""
    try:
        signature = inspect.signature(fun)
        filled = signature.bind_partial(*args).arguments
    except (TypeError, ValueError):  # There is no signature, or calling ``fun`` will raise an error.
        return
    bound = fun.keywords if isinstance(fun, functools.partial) else {}
    for name in ("state", "aux_in_predict"):
        if name in signature.parameters and name not in filled and name not in bound:
            raise TypeError(
                f"fun has an argument {name!r} of its own, but {name}= is taken for value_and_grad_by_phase's: pass it "
                "by position, bind it (functools.partial), or rename it"
            )


def refuse_modules(fun: Callable[..., object], args: tuple[Tree, ...], kwargs: dict[str, Tree]) -> None:
    """``TypeError`` for a Flax nnx Module in the function or its arguments."""
    nnx = sys.modules.get("flax.nnx")  # If Flax was never imported, nothing here is a Module.
    if nnx is None:
        return

    def is_module(x: object) -> bool:
        return isinstance(x, nnx.Module)

    everything = (args, kwargs, getattr(fun, "__self__", None), fun)
    if any(is_module(x) for x in jax.tree.leaves(everything, is_leaf=is_module)):
        raise TypeError(
            "a Flax nnx Module was given, but what it changes inside a conditional (batch statistics, dropout counts) "
            "would be lost: split it, graphdef, params, rest = nnx.split(model, nnx.Param, ...), pass the states, put "
            "them together in the function, model = nnx.merge(graphdef, params, rest, copy=True), and return what "
            "changes as aux, nnx.state(model, nnx.Not(nnx.Param))"
        )


def refuse_what_is_no_array(args: tuple[Tree, ...], argnums: int | Sequence[int]) -> None:
    """``TypeError`` for an argument to differentiate that does not consist of arrays."""
    for place in [argnums] if isinstance(argnums, int) else argnums:
        if not -len(args) <= place < len(args):
            return  # JAX raises an error.
        for path, leaf in jax.tree_util.tree_leaves_with_path(args[place]):
            if not (isinstance(leaf, Array | int | float | complex) or hasattr(leaf, "__jax_array__")):
                raise TypeError(
                    f"argument {place}, which is differentiated, must be made of arrays, but "
                    f"{jax.tree_util.keystr(path) or 'itself'} is a {type(leaf).__name__}. Pass only the arrays "
                    "of an Equinox model: params, static = eqx.partition(model, eqx.is_inexact_array), and in the "
                    "function model = eqx.combine(params, static)"
                )


def aux_without_arrays(call: Callable[[], object]) -> Tree:
    """Returns an aux without arrays, which can stand for itself in PREDICT; ``ValueError`` if it holds arrays."""
    found: list[Tree] = []

    def traced() -> int:
        out = call()
        if isinstance(out, tuple) and len(out) == 2:
            found.append(out[1])
        return 0

    jax.eval_shape(traced)
    if found and not jax.tree.leaves(found):
        return found[0]
    raise ValueError(
        "has_aux=True needs value_in_predict=True, or aux_in_predict=, what to return as aux in PREDICT (a tree of "
        "aux's structure), got neither"
    )


def check_aux(call: Callable[[Sequence[Array]], object], arrays: Sequence[Array]) -> None:
    """``TypeError`` if aux holds anything but arrays and numbers."""
    found: list[tuple[tuple[Hashable, ...], object]] = []

    def traced(arrays: Sequence[Array]) -> int:
        out = call(arrays)
        if isinstance(out, tuple) and len(out) == 2:
            found.extend(jax.tree_util.tree_leaves_with_path(out[1]))
        return 0

    jax.eval_shape(traced, arrays)
    for path, leaf in found:
        try:
            jnp.result_type(leaf)
        except TypeError:
            name = jax.tree_util.keystr(path) or "itself"
            raise TypeError(
                f"aux must be made of arrays to pass through a conditional, but {name} is a {type(leaf).__name__}"
            ) from None


def check_aux_in_predict(expected: Tree, given: Tree) -> None:
    """``ValueError`` unless ``aux_in_predict`` has the structure, the shapes and the dtypes of aux."""
    wanted: object = jax.tree.structure(expected)
    had: object = jax.tree.structure(given)
    if wanted != had:
        raise ValueError(f"aux_in_predict must have the structure of aux, {wanted}, got {had}")
    for (path, want), have in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(given), strict=True):
        if (jnp.shape(have), jnp.result_type(have)) != (want.shape, want.dtype):
            raise ValueError(
                f"aux_in_predict{jax.tree_util.keystr(path)} must have shape {want.shape} and dtype {want.dtype} like "
                f"aux, got shape {jnp.shape(have)} and dtype {jnp.result_type(have)}"
            )
