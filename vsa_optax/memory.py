"""Counts the bytes of an optimizer's state by part: `state_bytes` returns a `StateBytes`."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax.accumulation.microbatching import TernaryAccumulatorState
from vsa_optax.accumulation.multi_steps import AccumulateTernaryState, TernaryMultiStepsState
from vsa_optax.compression.gradients import CompressState
from vsa_optax.compression.pmean import CompressedPmeanState
from vsa_optax.core.types import Tree
from vsa_optax.loss_history import TrackLossState
from vsa_optax.prediction.leap import MultisecantState
from vsa_optax.prediction.machine_state import PhaseMachineState
from vsa_optax.prediction.update import PhaseSwitchedState

_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
# The part of each field, by the type of the state that has it; of all its other fields it is "bookkeeping". A wrapped
# optimizer's state counts as moments, apart from the states in it that are in this table.
_PARTS: Mapping[type, Mapping[str, str]] = {
    PhaseSwitchedState: {"history": "history", "residual": "residual", "inner_state": "moments"},
    PhaseMachineState: {},
    MultisecantState: {
        "inner_state": "moments",
        "params": "history",
        "gradient": "history",
        "gradient_rms": "moments",
        "diff_params": "history",
        "diff_gradients": "history",
    },
    CompressState: {"residual": "residual"},
    CompressedPmeanState: {"residual": "residual"},
    AccumulateTernaryState: {"acc_grads": "accumulator"},
    TernaryMultiStepsState: {"acc_grads": "accumulator", "inner_opt_state": "moments"},
    TernaryAccumulatorState: {"acc_grads": "accumulator"},
    optax.MultiStepsState: {"acc_grads": "accumulator", "inner_opt_state": "moments"},
    TrackLossState: {
        "values": "losses",
        "steps": "losses",
        "phases": "losses",
        "errors": "losses",
        "inner_state": "moments",
    },
}


class StateBytes(NamedTuple):
    """The bytes of a state by part; they add up to ``total``.

    Attributes:
        moments: the states of wrapped and chained optimizers, such as Adam's moments and its count, and every array
            that no other part claims.
        history: the records from which `vsa_optax.phase_switched`, `vsa_optax.predict_gradients` and
            `vsa_optax.multisecant` predict.
        accumulator: the running sum of micro-batches, of `vsa_optax.ternary_multi_steps`,
            `vsa_optax.accumulate_ternary`, `vsa_optax.ternary_accumulator` and ``optax.MultiSteps``.
        residual: the part of gradients that a codec has not sent yet, with ``error_feedback=True``, and the averaged
            error of predictions, with ``residual_decay=``.
        losses: the last losses, of `vsa_optax.track_loss`.
        bookkeeping: the phase machine with its guard and its calibration, and counts.
    """

    moments: int
    history: int
    accumulator: int
    residual: int
    losses: int
    bookkeeping: int

    @property
    def total(self) -> int:
        """The bytes of all parts together."""
        return sum(self)

    def __str__(self) -> str:
        """One line with the total and every part that is not empty."""
        parts = ", ".join(f"{name} {in_units(size)}" for name, size in self._asdict().items() if size)
        return f"{in_units(self.total)}: {parts}" if parts else in_units(0)


def state_bytes(tree: Tree, *, per_device: bool = False) -> StateBytes:
    """Counts the bytes of an optimizer's state by part.

    The types of the states determine the parts, however the states are nested: in ``optax.chain``, ``multi_transform``,
    ``masked``, wrapped in each other, or in an ``nnx.Optimizer``, a ``TrainState`` or any other pytree. Nothing is
    computed and no array is read, so the function also takes the shapes of a state that would not fit in memory:
    ``state_bytes(jax.eval_shape(opt.init, params))``.

    Args:
        tree: the state: any pytree of arrays, of ``jax.ShapeDtypeStruct`` or of Python numbers. If the types of the
            states are lost, as in ``nnx.state(optimizer)`` or ``flax.serialization.to_state_dict``, everything counts
            as moments.
        per_device: whether to count the bytes on each device. By default an array counts once with its global shape,
            however it is sharded or replicated. With True it counts with the shape of one device's shard: a replicated
            array in full, a sharded one by its share. An array without a sharding, such as a
            ``jax.ShapeDtypeStruct`` that has none, counts in full. Inside ``jax.shard_map`` arrays have the shapes
            of one device in either case.

    Returns:
        A `StateBytes`, a tuple of integers by part, with their sum ``total``. It prints as one line. Padding that a
        backend adds to an array is not counted.

    Raises:
        TypeError: if a leaf is neither an array nor a number.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> params = {"w": jnp.zeros((1000, 1000))}
        >>> opt = vsa_optax.ternary_multi_steps(optax.adamw(1e-3), 8)
        >>> size = vsa_optax.state_bytes(jax.eval_shape(opt.init, params))
        >>> size.moments, size.total == sum(size)
        (8000004, True)
        >>> print(size)
        8.4 MB: moments 8 MB, accumulator 403 kB, bookkeeping 12 B
    """
    found = dict.fromkeys(StateBytes._fields, 0)
    for part, path, leaf in _parts_of(tree, "moments", ()):
        found[part] += _bytes_of(leaf, path, per_device=per_device)
    return StateBytes(**found)


def in_units(size: int) -> str:
    """A number of bytes in TB, GB, MB, kB (powers of 1000) or B, with three digits."""
    return next((f"{size / unit:.3g} {name}" for unit, name in _UNITS if size >= unit), f"{size} B")


def _parts_of(tree: Tree, part: str, above: tuple[Any, ...]) -> Iterator[tuple[str, tuple[Any, ...], Tree]]:
    """The part, path and value of each leaf; leaves outside the states in the table belong to the given part."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: type(node) in _PARTS)
    for path, node in nodes:
        if type(node) not in _PARTS:
            yield part, (*above, *path), node
            continue
        for name, value in node._asdict().items():
            of_field = _PARTS[type(node)].get(name, "bookkeeping")
            yield from _parts_of(value, of_field, (*above, *path, jax.tree_util.GetAttrKey(name)))


def _bytes_of(leaf: Tree, path: tuple[Any, ...], *, per_device: bool) -> int:
    if isinstance(leaf, bool | int | float | complex):
        leaf = jax.eval_shape(jnp.asarray, leaf)
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(
            f"a state's leaves must be arrays or numbers, got {type(leaf).__name__} at "
            f"{jax.tree_util.keystr(path) or 'the top'}: pass the state itself, such as optimizer.init(params)"
        )
    shape: tuple[int, ...] = leaf.shape
    sharding = getattr(leaf, "sharding", None)
    if per_device and sharding is not None:
        shape = sharding.shard_shape(shape)
    return math.prod(shape) * int(leaf.dtype.itemsize)
