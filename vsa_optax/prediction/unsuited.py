"""What an optimizer must not hold to be wrapped, as its state shows: a line search, what emits in some steps only."""

import jax
import optax

# What emits rarely, by the name of its state, since the rooms of this package do not import each other.
_RARE_EMITTERS = {
    "MultiStepsState": "optax.MultiSteps",
    "TernaryMultiStepsState": "ternary_multi_steps",
    "AccumulateTernaryState": "accumulate_ternary",
    "ApplyEvery": "optax.apply_every",
}
_LINE_SEARCHES = optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState


def check_no_line_search(inner_state: optax.OptState) -> None:
    """``ValueError`` if there is one."""
    nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, _LINE_SEARCHES))
    if any(isinstance(node, _LINE_SEARCHES) for node in nodes):
        raise ValueError("opt must not contain a line search: it evaluates the loss itself at every step")


def rare_emitters(inner_state: optax.OptState) -> list[str]:
    """What a user calls the rare emitters in an optimizer's state."""
    nodes = jax.tree.leaves(inner_state, is_leaf=_emits_rarely)
    kinds = [type(node).__name__ for node in nodes if _emits_rarely(node)]
    return [_RARE_EMITTERS.get(kind, kind) for kind in kinds]


def _emits_rarely(node: object) -> bool:
    """Whether it is the state of what counts micro-batches, as those of MultiSteps and of `accumulation` do."""
    return isinstance(node, optax.ApplyEvery) or "mini_step" in getattr(node, "_fields", ())
