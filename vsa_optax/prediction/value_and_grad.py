"""Puts the backward pass inside a conditional, so that PREDICT steps do not run it."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.core.kinds import StepKind, kind_of
from vsa_optax.core.mesh import as_varying, varying_axes
from vsa_optax.core.types import Tree
from vsa_optax.prediction import unmeasured
from vsa_optax.prediction.coverage import check_covers
from vsa_optax.prediction.function_checks import (
    Array,
    aux_without_arrays,
    check_aux,
    check_aux_in_predict,
    refuse_hidden_arguments,
    refuse_modules,
    refuse_what_is_no_array,
)
from vsa_optax.prediction.machine import Phase, last_value, note_repeated_loss
from vsa_optax.prediction.predictors.secant import SecantHistoryState
from vsa_optax.prediction.stats import contains_machine, find_machine_state
from vsa_optax.prediction.update import PhaseSwitchedState

Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)
Result = TypeVar("Result")
_NOT_GIVEN: Any = object()  # None is a valid optimizer state and a valid aux.


class ValueAndGradByPhase(Protocol[Value_co]):
    """The type of function that `value_and_grad_by_phase` returns: the optimizer's state is a keyword argument."""

    def __call__(self, *args: Any, state: Tree, aux_in_predict: Tree = ..., **kwargs: Any) -> tuple[Value_co, Tree]:
        """The function's value, or its replacement in PREDICT, and the gradients, or zeros."""


def value_and_grad_by_phase(
    fun: Callable[..., Value],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    value_in_predict: bool = False,
    allow_int: bool = False,
) -> ValueAndGradByPhase[Value]:
    """Like ``jax.value_and_grad``, but PREDICT steps run neither the backward nor, by default, the forward pass.

    In WARMUP, FULL and CORRECT the returned function equals ``jax.value_and_grad(fun, argnums, has_aux)``. In PREDICT
    it returns zero gradients, which `vsa_optax.phase_switched` and `vsa_optax.predict_gradients` ignore. Its value is
    then the last finite ``value=`` that an ``update`` received in a true step. Before the first, the value is NaN, or
    infinity with ``jax_debug_nans``. With ``value_in_predict=True`` a forward pass computes the value instead. A pure
    function cannot keep its own last value, so ``update`` must receive ``value=``; a warning says if it did not.

    **A repeated value carries no information.** Code that reads it as a new loss goes wrong without an error: early
    stopping, a loss scale that is divided out again, a schedule that follows the loss. For example,
    ``reduce_on_plateau`` counts repeated losses as no progress, until the rate is 0; NaN would count likewise. If
    something reads the value at every step, pay for the forward pass with ``value_in_predict=True``. Or read the value
    only at steps for which ``vsa_optax.needs_backward(state)`` was true before the update. A state that holds
    ``reduce_on_plateau`` or ``momo`` is an error without ``value_in_predict=True``.

    One ``lax.cond`` on the phase in ``state`` makes the choice, so a single compiled step serves all phases. Under
    ``jax.vmap`` both branches run.

    Inside ``jax.shard_map``, devices that share the state take the same branch, so ``fun`` may communicate. As with
    ``jax.value_and_grad``, JAX then sums the gradients of parameters that are the same on all devices.
    `vsa_optax.compressed_pmean` needs each device's own gradients: make the parameters vary over the devices first.

    Args:
        fun: a function that returns a scalar floating-point value, or ``(value, aux)``.
        argnums: the positions of the arguments to differentiate.
        has_aux: whether ``fun`` returns ``(value, aux)``.
        value_in_predict: whether PREDICT steps run the forward pass.
        allow_int: whether arguments of integer dtype may be differentiated, which gives gradients of dtype float0.

    Returns:
        ``f(*args, state, aux_in_predict, **kwargs)``, which returns ``(value, grads)`` or ``((value, aux), grads)``.
        ``state`` is the optimizer's state, which contains one phase machine at any depth. ``aux_in_predict`` replaces
        aux in PREDICT when no forward pass runs. It is a tree with the structure, shapes and dtypes of aux, e.g. the
        current batch statistics. It is not needed if aux has no arrays, e.g. if it is None.

    Raises:
        ValueError: if ``has_aux=True`` comes with neither ``value_in_predict=True`` nor ``aux_in_predict``; if
            ``aux_in_predict`` does not match aux; if ``state`` does not contain exactly one phase machine; if ``fun``
            is differentiated in leaves that the machine does not cover and that are not frozen, since their optimizer
            would treat the zeros of a skipped step as gradients; if something in the state follows the loss without
            ``value_in_predict=True``.
        TypeError: if ``state=`` is missing; if ``fun`` has its own argument ``state`` or ``aux_in_predict`` that was
            not given by position; if aux is not made of arrays; if a differentiated argument has leaves that are not
            arrays, such as an Equinox model; if an argument is a Flax nnx Module, whose mutations inside a conditional
            would be lost. Split the Module with ``nnx.split`` and return its changes as aux.

    Warns:
        UserWarning: at ``update``, if it receives no ``value=`` and ``value_in_predict`` is False.

    Example:
        >>> import jax.numpy as jnp, optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.sgd(0.1))
        >>> params = jnp.arange(3.0)
        >>> value, grads = vsa_optax.value_and_grad_by_phase(lambda w: jnp.sum(w**2))(params, state=opt.init(params))
        >>> float(value), grads.tolist()
        (5.0, [0.0, 2.0, 4.0])
    """
    differentiated = jax.value_and_grad(fun, argnums, has_aux, allow_int=allow_int)

    def value_and_grads(
        *args: Any, state: Tree = _NOT_GIVEN, aux_in_predict: Tree = _NOT_GIVEN, **kwargs: Any
    ) -> tuple[Value, Tree]:
        _check_state_is_given(state, args)
        refuse_hidden_arguments(fun, args)
        refuse_modules(fun, args, kwargs)
        refuse_what_is_no_array(args, argnums)
        if has_aux and not value_in_predict and aux_in_predict is _NOT_GIVEN:
            aux_in_predict = aux_without_arrays(lambda: fun(*args, **kwargs))
        elif not has_aux or value_in_predict:
            aux_in_predict = None
        kept = find_machine_state(state)
        machine = kept.unpacked()
        if machine.errors is None:  # No step is ever predicted.
            return differentiated(*args, **kwargs)
        if not value_in_predict:
            note_repeated_loss(machine)
            unmeasured.check_no_reader(_run_in_predict(state))

        # Arrays enter the conditional as operands, and the containers are rebuilt inside it: Flax's Variables remember
        # the trace that they were made in. All leaves that are not arrays are static.
        leaves, treedef = jax.tree.flatten((args, kwargs))
        is_array = [isinstance(leaf, Array) for leaf in leaves]
        arrays = [leaf for leaf, dynamic in zip(leaves, is_array, strict=True) if dynamic]

        def call(function: Callable[..., Result], arrays: Sequence[Array]) -> Result:
            remaining = iter(arrays)
            merged = [next(remaining) if dynamic else leaf for leaf, dynamic in zip(leaves, is_array, strict=True)]
            inner_args, inner_kwargs = jax.tree.unflatten(treedef, merged)
            return function(*inner_args, **inner_kwargs)

        if has_aux:
            check_aux(lambda arrays: call(fun, arrays), arrays)
        axes = None

        def traced(arrays: Sequence[Array]) -> tuple[Value, Tree]:
            nonlocal axes
            out = call(differentiated, arrays)
            axes = jax.tree.map(varying_axes, out)
            return out

        out_shapes, grad_shapes = jax.eval_shape(traced, arrays)
        for switched in _switched(state):
            check_covers(switched, state, grad_shapes)
        if has_aux and not value_in_predict:
            check_aux_in_predict(out_shapes[1], aux_in_predict)

        def with_backward(arrays: Sequence[Array], aux: Tree) -> tuple[Value, Tree]:
            del aux
            return call(differentiated, arrays)

        def without_backward(arrays: Sequence[Array], aux: Tree) -> tuple[Value, Tree]:
            # Inside shard_map, both branches must vary over the same axes.
            return jax.tree.map(as_varying, in_predict(arrays, aux), axes)

        def in_predict(arrays: Sequence[Array], aux: Tree) -> tuple[Value, Tree]:
            grads = jax.tree.map(lambda s: jnp.zeros_like(s, dtype=s.dtype), grad_shapes)
            if value_in_predict:
                return call(fun, arrays), grads
            dtype = (out_shapes[0] if has_aux else out_shapes).dtype
            value = last_value(machine).astype(dtype)
            instead: Tree = (value, aux) if has_aux else value
            return instead, grads

        kind = kind_of(kept.marks())
        if kind is not None:
            return (in_predict if kind is StepKind.PREDICTED else with_backward)(arrays, aux_in_predict)
        is_predict = machine.phase == Phase.PREDICT
        return lax.cond(is_predict, without_backward, with_backward, arrays, aux_in_predict)

    return value_and_grads


def _switched(state: Tree) -> list[PhaseSwitchedState]:
    """The states of transformations that hold a machine; none if the machine was given alone."""
    return [node for node in _nodes(state) if isinstance(node, PhaseSwitchedState)]


def _nodes(state: Tree) -> list[Tree]:
    """The leaves of a state; a transformation that holds the machine or follows the loss counts as one leaf."""
    return jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PhaseSwitchedState) or unmeasured.is_reader(x))


def _run_in_predict(state: Tree) -> list[Tree]:
    """The parts of a state that PREDICT updates: all outside the machine, and an optimizer fed by secants."""
    found = [node for node in _nodes(state) if not isinstance(node, PhaseSwitchedState)]
    return found + [node.inner_state for node in _switched(state) if isinstance(node.history, SecantHistoryState)]


def _check_state_is_given(state: Tree, args: tuple[Tree, ...]) -> None:
    if state is not _NOT_GIVEN:
        return
    places = [place for place, arg in enumerate(args) if contains_machine(arg)]
    got = f"argument {places[0]} holds it" if places else "there is none"
    raise TypeError(f"value_and_grad_by_phase(...) needs state=opt_state (keyword only), the optimizer's state: {got}")
