"""Checks that a machine covers all gradients: in PREDICT, others would reach their optimizer as zeros."""

import collections
import math
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax

from vsa_optax.core.types import Tree
from vsa_optax.prediction.predictors.base import Calibration
from vsa_optax.prediction.predictors.momentum import MomentumHistoryState
from vsa_optax.prediction.predictors.recursive import RecursiveHistoryState
from vsa_optax.prediction.predictors.secant import SecantHistoryState
from vsa_optax.prediction.predictors.window import WindowHistoryState
from vsa_optax.prediction.stats import contains_machine, find_machine
from vsa_optax.prediction.update import PhaseSwitchedState

_NAMED = 3  # The number of leaves that an error names.


def check_covers(switched: PhaseSwitchedState, state: Tree, grads: Tree) -> None:
    """``ValueError`` if ``grads`` hold leaves that the history does not, and that are not frozen.

    Coordinates are counted, not compared leaf by leaf: between the caller and the machine, other containers
    (Flax nnx) and other shapes (``optax.flatten``) are allowed.

    Args:
        switched: the state with the machine.
        state: the whole state around it, which shows how the other leaves are updated.
        grads: a tree of shapes and dtypes; leaves of dtype float0 need not be covered.
    """
    wanted = [
        (path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if leaf.dtype != jax.dtypes.float0
    ]
    recorded = _recorded(switched)
    if recorded is None:
        # A codec's payload does not show the shapes. The calibration shows the number of leaves.
        if (num := _num_leaves(find_machine(state).calibration)) is None or len(wanted) <= num or num == 1:
            return
    elif sum(math.prod(leaf.shape) for _, leaf in wanted) <= sum(map(math.prod, recorded.values())):
        return
    if _others_are_frozen(state):
        return
    unknown = _uncovered(wanted, recorded) if recorded else []
    names = ", ".join(unknown[:_NAMED]) + (", ..." if len(unknown) > _NAMED else "") or "some leaves"
    raise ValueError(
        f"gradients were asked for that the phase machine does not cover ({names}): in PREDICT they would reach their "
        "optimizer as zeros, which it would use as gradients. Wrap the whole optimizer, "
        "phase_switched(optax.multi_transform({...}, labels)), not a part of it; differentiate only covered leaves; or "
        "freeze the others with optax.set_to_zero()"
    )


def _recorded(switched: PhaseSwitchedState) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the recorded leaves, by path; None if a codec keeps them."""
    history = switched.history
    if isinstance(history, SecantHistoryState):
        tree, leading = history.gradient, 0
    elif isinstance(history, WindowHistoryState | MomentumHistoryState):
        tree, leading = history.records, 1
    elif isinstance(history, RecursiveHistoryState):
        tree, leading = history.mean, 0
    else:
        return None
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(leaf)[leading:] for path, leaf in leaves}


def _num_leaves(calibration: Calibration | None) -> int | None:
    """The number of recorded leaves; None if it is unknown."""
    if calibration is None:
        return None
    return int(jax.eval_shape(lambda known: known.quality().r_squared, calibration).shape[0])


def _uncovered(
    wanted: list[tuple[tuple[Hashable, ...], jax.ShapeDtypeStruct]], recorded: dict[str, tuple[int, ...]]
) -> list[str]:
    """The paths of leaves that are not recorded, by path and shape; in other containers by shape alone."""
    named = [(jax.tree_util.keystr(path) or "(the tree is one leaf)", leaf.shape) for path, leaf in wanted]
    left = dict(recorded)
    rest = [(name, shape) for name, shape in named if left.get(name.replace("(the tree is one leaf)", "")) != shape]
    for name, _ in set(named) - set(rest):
        left.pop(name, None)
    shapes = collections.Counter(left.values())
    unknown = []
    for name, shape in rest:
        if shapes[shape] > 0:
            shapes[shape] -= 1
        else:
            unknown.append(name)
    return unknown


def _others_are_frozen(state: Tree) -> bool:
    """Whether stateless transformations, such as ``optax.set_to_zero``, update all other groups of parameters."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.MaskedState))
    others = [node for node in nodes if isinstance(node, optax.MaskedState) and not contains_machine(node)]
    return bool(others) and all(isinstance(node.inner_state, optax.EmptyState) for node in others)
