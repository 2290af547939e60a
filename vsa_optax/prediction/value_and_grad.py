"""The backward pass inside a conditional, so that PREDICT steps really do not run it."""

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vsa_optax.core.mesh import as_varying, varying_axes
from vsa_optax.core.types import Tree
from vsa_optax.prediction.machine import Phase, last_value
from vsa_optax.prediction.stats import find_machine

Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)
Result = TypeVar("Result")
Array: TypeAlias = jax.Array | np.ndarray | np.generic


class ValueAndGradByPhase(Protocol[Value_co]):
    """What `value_and_grad_by_phase` returns: the function's arguments go in, and by keyword the optimizer's state."""

    def __call__(self, *args: Any, state: Tree, aux_in_predict: Tree = None, **kwargs: Any) -> tuple[Value_co, Tree]:
        """What the function returns, or in PREDICT what stands in its place; and the gradients, or zeros."""


def value_and_grad_by_phase(
    fun: Callable[..., Value],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    value_in_predict: bool = False,
) -> ValueAndGradByPhase[Value]:
    """Like ``jax.value_and_grad``, but PREDICT steps run neither the backward nor, by default, the forward pass.

    In WARMUP, FULL and CORRECT the returned function does what ``jax.value_and_grad(fun, argnums, has_aux)`` does. In
    PREDICT it returns zero gradients, which `vsa_optax.phase_switched` and `vsa_optax.predict_gradients` ignore, and as
    the value the last finite ``value=`` that an ``update`` received (NaN until one did, or infinity with
    ``jax_debug_nans``), or, with ``value_in_predict=True``, the value that a forward pass gives.

    The choice is one ``lax.cond`` on the phase in ``state``; a single compiled step serves all phases. Under
    ``jax.vmap`` both sides run.

    Inside ``jax.shard_map`` devices that share the state take the same side, so ``fun`` may communicate. There JAX sums
    up gradients of parameters that are the same on all devices, as those of ``jax.value_and_grad``: for each device's
    own, as `vsa_optax.compressed_pmean` wants them, make the parameters vary first.

    Args:
        fun: a function with a scalar floating-point value, or ``(value, aux)``.
        argnums: positions of the arguments to differentiate.
        has_aux: whether ``fun`` returns ``(value, aux)``.
        value_in_predict: whether PREDICT runs the forward pass.

    Returns:
        ``f(*args, state, aux_in_predict=None, **kwargs)``, which returns ``(value, grads)`` or
        ``((value, aux), grads)``. ``state`` is the optimizer's state, with one phase machine anywhere inside.
        ``aux_in_predict`` is what stands for aux in PREDICT when no forward pass runs: a tree of aux's structure,
        shapes and dtypes, e.g. the current batch statistics.

    Raises:
        ValueError: ``has_aux=True`` with neither ``value_in_predict=True`` nor ``aux_in_predict``; an
            ``aux_in_predict`` that does not match aux; a ``state`` without exactly one phase machine.
        TypeError: aux that is not made of arrays; a Flax nnx Module among the arguments, whose mutations inside a
            conditional would be lost: split it (``nnx.split``) and return what changes as aux.

    Example:
        >>> import jax.numpy as jnp, optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.sgd(0.1))
        >>> params = jnp.arange(3.0)
        >>> value, grads = vsa_optax.value_and_grad_by_phase(lambda w: jnp.sum(w**2))(params, state=opt.init(params))
        >>> float(value), grads.tolist()
        (5.0, [0.0, 2.0, 4.0])
    """
    differentiated = jax.value_and_grad(fun, argnums, has_aux)

    def value_and_grads(*args: Any, state: Tree, aux_in_predict: Tree = None, **kwargs: Any) -> tuple[Value, Tree]:
        if has_aux and not value_in_predict and aux_in_predict is None:
            raise ValueError(
                "has_aux=True needs value_in_predict=True, or aux_in_predict=, what to return as aux in PREDICT "
                "(a tree of aux's structure), got aux_in_predict=None"
            )
        _refuse_modules(fun, args, kwargs)
        machine = find_machine(state)
        if machine.errors is None:  # No step is ever predicted.
            return differentiated(*args, **kwargs)

        # Arrays enter the conditional as operands, so that containers which know where they were made (Flax's
        # Variables) are made anew inside; what is not an array is static.
        leaves, treedef = jax.tree.flatten((args, kwargs))
        is_array = [isinstance(leaf, Array) for leaf in leaves]
        arrays = [leaf for leaf, dynamic in zip(leaves, is_array, strict=True) if dynamic]

        def call(function: Callable[..., Result], arrays: Sequence[Array]) -> Result:
            remaining = iter(arrays)
            merged = [next(remaining) if dynamic else leaf for leaf, dynamic in zip(leaves, is_array, strict=True)]
            inner_args, inner_kwargs = jax.tree.unflatten(treedef, merged)
            return function(*inner_args, **inner_kwargs)

        if has_aux:
            _check_aux(lambda arrays: call(fun, arrays), arrays)
        axes = None

        def traced(arrays: Sequence[Array]) -> tuple[Value, Tree]:
            nonlocal axes
            out = call(differentiated, arrays)
            axes = jax.tree.map(varying_axes, out)
            return out

        out_shapes, grad_shapes = jax.eval_shape(traced, arrays)
        if has_aux and not value_in_predict:
            _check_aux_in_predict(out_shapes[1], aux_in_predict)

        def with_backward(arrays: Sequence[Array], aux: Tree) -> tuple[Value, Tree]:
            del aux
            return call(differentiated, arrays)

        def without_backward(arrays: Sequence[Array], aux: Tree) -> tuple[Value, Tree]:
            # Inside shard_map both branches must vary over the same axes.
            return jax.tree.map(as_varying, in_predict(arrays, aux), axes)

        def in_predict(arrays: Sequence[Array], aux: Tree) -> tuple[Value, Tree]:
            grads = jax.tree.map(lambda s: jnp.zeros_like(s, dtype=s.dtype), grad_shapes)
            if value_in_predict:
                return call(fun, arrays), grads
            dtype = (out_shapes[0] if has_aux else out_shapes).dtype
            value = last_value(machine).astype(dtype)
            instead: Tree = (value, aux) if has_aux else value
            return instead, grads

        is_predict = machine.phase == Phase.PREDICT
        return lax.cond(is_predict, without_backward, with_backward, arrays, aux_in_predict)

    return value_and_grads


def _check_aux(call: Callable[[Sequence[Array]], object], arrays: Sequence[Array]) -> None:
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


def _check_aux_in_predict(expected: Tree, given: Tree) -> None:
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


def _refuse_modules(fun: Callable[..., object], args: tuple[Tree, ...], kwargs: dict[str, Tree]) -> None:
    nnx = sys.modules.get("flax.nnx")  # If Flax was never imported, nothing here is a Module.
    if nnx is None:
        return

    def is_module(x: object) -> bool:
        return isinstance(x, nnx.Module)

    everything = (args, kwargs, getattr(fun, "__self__", None), fun)
    if any(is_module(x) for x in jax.tree.leaves(everything, is_leaf=is_module)):
        raise TypeError(
            "a Flax nnx Module was given, but what it changes inside a conditional (batch statistics, dropout counts) "
            "would be lost: split it with nnx.split, pass the states, and return what changes as aux"
        )
