"""The backward pass inside a conditional, so that PREDICT steps really do not run it."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

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
from vsa_optax.prediction.kinds import StepKind, kind_of
from vsa_optax.prediction.machine import Phase, last_value, note_repeated_loss
from vsa_optax.prediction.predictors.secant import SecantHistoryState
from vsa_optax.prediction.stats import contains_machine, find_machine
from vsa_optax.prediction.update import PhaseSwitchedState

Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)
Result = TypeVar("Result")
_NOT_GIVEN: Any = object()  # None may be the state of an optimizer, or aux.


class ValueAndGradByPhase(Protocol[Value_co]):
    """What `value_and_grad_by_phase` returns: the function's arguments go in, and by keyword the optimizer's state."""

    def __call__(self, *args: Any, state: Tree, aux_in_predict: Tree = ..., **kwargs: Any) -> tuple[Value_co, Tree]:
        """What the function returns, or in PREDICT what stands in its place; and the gradients, or zeros."""


def value_and_grad_by_phase(
    fun: Callable[..., Value],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    value_in_predict: bool = False,
    allow_int: bool = False,
) -> ValueAndGradByPhase[Value]:
    """Like ``jax.value_and_grad``, but PREDICT steps run neither the backward nor, by default, the forward pass.

    In WARMUP, FULL and CORRECT the returned function does what ``jax.value_and_grad(fun, argnums, has_aux)`` does. In
    PREDICT it returns zero gradients, which `vsa_optax.phase_switched` and `vsa_optax.predict_gradients` ignore, and as
    the value the last finite ``value=`` that an ``update`` received in a true step (NaN until one did, or infinity with
    ``jax_debug_nans``), or, with ``value_in_predict=True``, the value that a forward pass gives. It cannot be the last
    value that this function computed: a pure function keeps nothing, and of what it returns only what ``update`` is
    given reaches the state. Where ``update`` was not given it, a warning says so.

    **A repeated value is no news.** What takes it for news (early stopping, a loss scale that is divided out again, a
    schedule that follows the loss) goes wrong without an error: ``reduce_on_plateau`` counts repeated losses as no
    progress, until the rate is 0. A NaN in its place would count likewise. So, where something reads the value at every
    step, pay for the forward pass, ``value_in_predict=True``; or look only at steps for which
    ``vsa_optax.needs_backward(state)``, asked before the update, was true. A state that holds ``reduce_on_plateau`` or
    ``momo`` is refused without it.

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
        allow_int: as in ``jax.value_and_grad``.

    Returns:
        ``f(*args, state, aux_in_predict, **kwargs)``, which returns ``(value, grads)`` or
        ``((value, aux), grads)``. ``state`` is the optimizer's state, with one phase machine anywhere inside.
        ``aux_in_predict`` is what stands for aux in PREDICT when no forward pass runs: a tree of aux's structure,
        shapes and dtypes, e.g. the current batch statistics. It is not needed for an aux without arrays, such as None.

    Raises:
        ValueError: ``has_aux=True`` with neither ``value_in_predict=True`` nor ``aux_in_predict``; an
            ``aux_in_predict`` that does not match aux; a ``state`` without exactly one phase machine; gradients of
            leaves that the machine does not cover, whose optimizer would take the zeros of a skipped step for news
            (frozen ones are allowed); something in the state that follows the loss, without ``value_in_predict=True``.
        TypeError: no ``state=``; a ``fun`` with an argument ``state`` or ``aux_in_predict`` of its own that was not
            given by position; aux that is not made of arrays; an argument to differentiate with leaves that are no
            arrays, such as an Equinox model; a Flax nnx Module among the arguments, whose mutations inside a
            conditional would be lost: split it (``nnx.split``) and return what changes as aux.

    Warns:
        UserWarning: at the ``update``, if it is given no ``value=``, and ``value_in_predict`` is False.

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
        machine = find_machine(state)
        if machine.errors is None:  # No step is ever predicted.
            return differentiated(*args, **kwargs)
        if not value_in_predict:
            note_repeated_loss(machine)
            unmeasured.check_no_reader(_run_in_predict(state))

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

        kind = kind_of(machine)
        if kind is not None:
            return (in_predict if kind is StepKind.PREDICTED else with_backward)(arrays, aux_in_predict)
        is_predict = machine.phase == Phase.PREDICT
        return lax.cond(is_predict, without_backward, with_backward, arrays, aux_in_predict)

    return value_and_grads


def _switched(state: Tree) -> list[PhaseSwitchedState]:
    """The state of the transformation with the machine; none if the machine was given alone."""
    return [node for node in _nodes(state) if isinstance(node, PhaseSwitchedState)]


def _nodes(state: Tree) -> list[Tree]:
    """What a state holds, the transformation with the machine, and transformations that follow the loss, as one."""
    return jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PhaseSwitchedState) or unmeasured.is_reader(x))


def _run_in_predict(state: Tree) -> list[Tree]:
    """What of a state is updated in PREDICT, too: all around the machine, and what secants feed with gradients."""
    found = [node for node in _nodes(state) if not isinstance(node, PhaseSwitchedState)]
    return found + [node.inner_state for node in _switched(state) if isinstance(node.history, SecantHistoryState)]


def _check_state_is_given(state: Tree, args: tuple[Tree, ...]) -> None:
    if state is not _NOT_GIVEN:
        return
    places = [place for place, arg in enumerate(args) if contains_machine(arg)]
    got = f"argument {places[0]} holds it" if places else "there is none"
    raise TypeError(f"value_and_grad_by_phase(...) needs state=opt_state (keyword only), the optimizer's state: {got}")
