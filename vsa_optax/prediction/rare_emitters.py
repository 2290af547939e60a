"""Which optimizers emit in some steps only, as their states show."""

import jax
import optax

# What emits rarely, by the name of its state, since the rooms of this package do not import each other.
_NAMES = {
    "MultiStepsState": "optax.MultiSteps",
    "TernaryMultiStepsState": "ternary_multi_steps",
    "AccumulateTernaryState": "accumulate_ternary",
    "ApplyEvery": "optax.apply_every",
}


def names_in(inner_state: optax.OptState) -> list[str]:
    """What a user calls the rare emitters in an optimizer's state."""
    nodes = jax.tree.leaves(inner_state, is_leaf=_emits_rarely)
    kinds = [type(node).__name__ for node in nodes if _emits_rarely(node)]
    return [_NAMES.get(kind, kind) for kind in kinds]


def _emits_rarely(node: object) -> bool:
    """Whether it is the state of what counts micro-batches, as those of MultiSteps and of `accumulation` do."""
    return isinstance(node, optax.ApplyEvery) or "mini_step" in getattr(node, "_fields", ())
