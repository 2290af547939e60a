"""Entries of an earlier release's manifest; `test_checkpoint_of_before` restores a whole checkpoint of it."""

import jax
import jax.numpy as jnp
import pytest

from vsa_optax import checkpoint_leaves, checkpoint_upgrade
from vsa_optax.prediction.machine_state import PhaseMachineState

SCALARS = {
    "phase": "int32",
    **dict.fromkeys(("steps_in_phase", "warmup_steps", "full_steps", "predict_steps", "correct_steps"), "int32"),
    **dict.fromkeys(("cycles", "nonfinite_count", "errors/num_measured"), "int32"),
    **{"errors/mean": "float32", "errors/last": "float32", "value": "float32", "has_value": "bool"},
}


def entry(path, key, dtype):
    return dict(path=path, key=key, shape=dtype and [], dtype=dtype, weak_type=False, generator=None)


@pytest.mark.parametrize("joined", [".{}", "['{}']"])
def test_scalars_are_packed_and_missing_ones_are_zero(joined):
    """In a NamedTuple, and in a dict made of one."""
    start = "['state']" + joined.format("machine")

    def path_of(name):
        return start + "".join(joined.format(part) for part in name.split("/"))

    old = {path_of(name): entry(path_of(name), name, dtype) for name, dtype in SCALARS.items()}
    old |= {path_of(name): entry(path_of(name), None, None) for name in ("adaptive", "guard", "calibration")}
    other = {"['w']": entry("['w']", "w", "float32")}
    wanted = [checkpoint_leaves.Leaf(path_of("counts"), None, jax.ShapeDtypeStruct((10,), jnp.int32))]
    new = checkpoint_upgrade.upgraded(old | other, wanted)
    names = list(SCALARS)
    assert new[path_of("counts")]["key"] == [*names[1:8], None, "has_value", "errors/num_measured"]
    assert new[path_of("numbers")]["key"] == ["value", "errors/mean", "errors/last"]
    assert [checkpoint_leaves.kind_of(new[path_of(name)]) for name in ("counts", "numbers")] == [
        "int32[10]",
        "float32[3]",
    ]
    # A tree of the user's own may have such a name, too.
    assert checkpoint_upgrade.upgraded(other | {path_of("steps_in_phase"): {}}, []).keys() > other.keys()
    assert set(new) == {path_of(name) for name in PhaseMachineState._fields} | set(other)
