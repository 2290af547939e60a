"""Errors that name the argument, the value and the valid range, and the leaf that does not fit."""

import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp


def check_integer(name: str, value: Any, minimum: int) -> int:
    """``value`` as an int; ``ValueError`` unless it is an integer and at least ``minimum``."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
    return number


def check_real(name: str, value: Any, *, low: float, high: float, low_open: bool = False) -> float:
    """``value`` as a float; ``ValueError`` unless it is a finite number in the interval."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number = float(value) if is_real else math.nan
    above = number > low if low_open else number >= low
    if not (above and number <= high and math.isfinite(number)):
        bound = f"{'>' if low_open else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """``value``; ``ValueError`` unless it is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """``value``; ``ValueError`` unless it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_float_dtype(name: str, value: Any) -> jnp.dtype | None:
    """``value`` as a dtype or None; ``ValueError`` unless it is a floating-point dtype."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be None or a floating-point dtype, got {value!r}")
    return dtype


def check_inexact_leaves(tree: Any) -> None:
    """``TypeError`` naming the first leaf of ``tree`` that is neither real nor complex floating point."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"leaf {_name(path)} has dtype {jnp.result_type(leaf)}; only floating-point and complex leaves have "
                "gradients to predict: keep the others out with optax.masked or optax.partition"
            )


def check_same_tree(expected: Any, actual: Any, *, what: str, leading_axes: int = 0) -> None:
    """``ValueError`` naming the first leaf of ``actual`` whose place or shape is not as in ``expected``.

    The first ``leading_axes`` axes of the expected leaves (a window, say) are left out of the comparison.
    """
    want = dict(_named_leaves(expected))
    have = dict(_named_leaves(actual))
    for name in have:
        if name not in want:
            raise ValueError(f"{what}: leaf {name} was not among the parameters given to init")
    for name, leaf in want.items():
        if name not in have:
            raise ValueError(f"{what}: leaf {name} is missing; init saw it among the parameters")
        shape = jnp.shape(leaf)[leading_axes:]
        if jnp.shape(have[name]) != shape:
            raise ValueError(
                f"{what}: leaf {name} has shape {jnp.shape(have[name])}, but init saw a parameter of shape {shape}"
            )
    seen: Any = jax.tree.structure(expected)
    given: Any = jax.tree.structure(actual)
    if seen != given:
        raise ValueError(f"{what}: the same leaves in other containers: {given}, but init saw {seen}")


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "(the tree is one leaf)"
