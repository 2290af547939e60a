"""Checks whose errors name the argument, its value and the valid range, or the leaf that does not fit."""

import math
import numbers
import operator
from collections.abc import Hashable, Iterator
from typing import Literal, SupportsIndex

import jax
import jax.numpy as jnp

from vsa_optax.core.axis_names import without_names
from vsa_optax.core.types import Tree

NumTrits = Literal[1, 2, 3]

_LARGEST_INTEGER = 2**31 - 1  # Steps are counted in int32.
_SUPPORTED = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


def check_integer(name: str, value: object, minimum: int) -> int:
    """Returns ``value`` as an int; ``ValueError`` unless it is an integer from ``minimum`` to 2**31 - 1."""
    number = _as_integer(value)
    if number is None or not minimum <= number <= _LARGEST_INTEGER:
        raise ValueError(f"{name} must be an integer >= {minimum} and < 2**31, got {value!r}")
    return number


def check_trits(name: str, value: object) -> int:
    """Returns ``value`` as an int; ``ValueError`` unless it is 1, 2 or 3."""
    number = _as_integer(value)
    if number not in (1, 2, 3):
        raise ValueError(f"{name} must be 1, 2 or 3, got {value!r}")
    return number


def check_block_size(name: str, value: object) -> int:
    """Returns ``value`` as an int; ``ValueError`` unless it is a power of two from 2 to 65536."""
    number = _as_integer(value)
    if number is None or not 2 <= number <= 65536 or number & (number - 1):
        raise ValueError(f"{name} must be a power of two from 2 to 65536, got {value!r}")
    return number


def check_real(name: str, value: object, *, low: float, high: float, low_open: bool = False) -> float:
    """Returns ``value`` as a float; ``ValueError`` unless it is a finite number in the interval."""
    try:
        number = float(value) if not isinstance(value, bool) and isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        number = math.inf
    above = number > low if low_open else number >= low
    if not (above and number <= high and math.isfinite(number)):
        bound = f"{'>' if low_open else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")
    return number


def check_bool(name: str, value: object) -> bool:
    """Returns ``value``; ``ValueError`` unless it is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Returns ``value``; ``ValueError`` unless it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_float_dtype(name: str, value: jax.typing.DTypeLike | None) -> jnp.dtype | None:
    """Returns ``value`` as a dtype or None; ``ValueError`` unless it is a supported floating-point dtype."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in _SUPPORTED[:4]:
        raise ValueError(f"{name} must be None or one of {', '.join(_SUPPORTED[:4])}, got {value!r}")
    if dtype.name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"{name} must be None, float16, bfloat16 or float32 unless jax_enable_x64 is set, got {value!r}"
        )
    return dtype


def check_scalar(name: str, value: object) -> jax.Array:
    """Returns ``value`` as an array; ``ValueError`` unless it is one real number."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be one real number, got {value!r}") from None
    is_real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if array.shape != () or not is_real:
        raise ValueError(f"{name} must be one real number, got shape {array.shape} and dtype {array.dtype}")
    return array


def check_inexact_leaves(tree: Tree) -> None:
    """``TypeError`` that names the first leaf of ``tree`` that is neither real nor complex floating point."""
    for name, kind in _unsupported(tree):
        raise TypeError(
            f"leaf {name} has dtype {kind}; only leaves of dtype {', '.join(_SUPPORTED)} have gradients: exclude the "
            "others with optax.masked or optax.partition"
        )


def check_encodable_leaves(tree: Tree) -> None:
    """``TypeError`` that names the first leaf of ``tree`` that no codec can encode."""
    for name, kind in _unsupported(tree):
        raise TypeError(
            f"only floating-point or complex leaves can be encoded: leaf {name} has dtype {kind}; leave such leaves "
            f"out, or cast them to one of {', '.join(_SUPPORTED)}"
        )


def check_same_tree(expected: Tree, actual: Tree, *, what: str, leading_axes: int = 0) -> None:
    """Raises an error that names the first leaf of ``actual`` whose place, shape or kind differs from ``expected``.

    It is a ``ValueError`` for place and shape, and a ``TypeError`` if real, complex and other numbers are mixed up.

    The comparison ignores the first ``leading_axes`` axes of the expected leaves, such as the axis of a window.
    """
    want = dict(_named_leaves(expected))
    have = dict(_named_leaves(actual))
    for name in have:
        if name not in want:
            raise ValueError(f"{what}: leaf {name} was not among the parameters given to init")
    for name, leaf in want.items():
        if name not in have:
            raise ValueError(f"{what}: leaf {name} is missing; init saw it among the parameters")
        _check_same_leaf(name, leaf, have[name], what=what, leading_axes=leading_axes)
    seen: object = jax.tree.structure(expected)
    given: object = jax.tree.structure(actual)
    if seen != given and _containers(expected) != _containers(actual):
        raise ValueError(f"{what}: the same leaves in other containers: {given}, but init saw {seen}")


def check_same_leaves(expected: Tree, actual: Tree, *, what: str) -> None:
    """Like `check_same_tree`, but compares leaves by their order, so that containers may differ.

    Trees with different numbers of leaves pass, since the order does not show which leaf is missing.
    """
    leaves, named = jax.tree.leaves(expected), _named_leaves(actual)
    if len(leaves) == len(named):
        for leaf, (name, given) in zip(leaves, named, strict=True):
            _check_same_leaf(name, leaf, given, what=what)


def _check_same_leaf(name: str, expected: Tree, actual: Tree, *, what: str, leading_axes: int = 0) -> None:
    kind, wanted = _dtype_name(actual), _dtype_name(expected)
    if kind not in _SUPPORTED or kind.startswith("complex") != wanted.startswith("complex"):
        raise TypeError(f"{what}: leaf {name} has dtype {kind}, but init saw a parameter of dtype {wanted}")
    shape, seen = jnp.shape(actual), jnp.shape(expected)[leading_axes:]
    if shape != seen:
        raise ValueError(f"{what}: leaf {name} has shape {shape}, but init saw a parameter of shape {seen}")


def _containers(tree: Tree) -> object:
    """The structure without axis names, which differ in a state."""
    return jax.tree.structure(without_names(tree))


def _as_integer(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _unsupported(tree: Tree) -> Iterator[tuple[str, str]]:
    """The name and dtype of each leaf that is neither real nor complex floating point."""
    for name, leaf in _named_leaves(tree):
        kind = _dtype_name(leaf)
        if kind not in _SUPPORTED:
            yield name, kind


def _named_leaves(tree: Tree) -> list[tuple[str, Tree]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path: tuple[Hashable, ...]) -> str:
    return jax.tree_util.keystr(path) or "(the tree is one leaf)"


def _dtype_name(leaf: object) -> str:
    """The name of a leaf's dtype, or of its type if it has no dtype."""
    if not (hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)):
        return type(leaf).__name__
    return str(jnp.result_type(leaf))
