"""Finds transformations that cannot be wrapped, by their states: line searches, and those that emit only rarely."""

import jax
import optax

# Transformations that emit rarely, by the names of their states, since the folders do not import each other.
_RARE_EMITTERS = {
    "MultiStepsState": "optax.MultiSteps",
    "TernaryMultiStepsState": "ternary_multi_steps",
    "AccumulateTernaryState": "accumulate_ternary",
    "ApplyEvery": "optax.apply_every",
}
_LINE_SEARCHES = optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState


def check_no_line_search(inner_state: optax.OptState) -> None:
    """``ValueError`` if the state holds a line search."""
    nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, _LINE_SEARCHES))
    if any(isinstance(node, _LINE_SEARCHES) for node in nodes):
        raise ValueError("opt must not contain a line search: it evaluates the loss itself at every step")


def rare_emitters(inner_state: optax.OptState) -> list[str]:
    """The users' names of the transformations in an optimizer's state that emit rarely."""
    nodes = jax.tree.leaves(inner_state, is_leaf=_emits_rarely)
    kinds = [type(node).__name__ for node in nodes if _emits_rarely(node)]
    return [_RARE_EMITTERS.get(kind, kind) for kind in kinds]


def _emits_rarely(node: object) -> bool:
    """Whether a node is the state of a transformation that counts micro-batches, like MultiSteps and `accumulation`."""
    return isinstance(node, optax.ApplyEvery) or "mini_step" in getattr(node, "_fields", ())
