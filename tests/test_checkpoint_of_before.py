"""A checkpoint that an earlier release wrote restores with this one, whatever the library kept in the state."""

import json
import re

import checkpoint_of_before as before
import jax
import numpy as np
import pytest

from vsa_optax import checkpoint
from vsa_optax.prediction.machine_state import PhaseMachineState


@pytest.fixture(scope="module")
def restored():
    step, states = checkpoint.restore(before.FOLDER, before.fresh_states(), config=before.CONFIG)
    assert step == before.STEPS
    return states


@pytest.fixture(scope="module")
def expected():
    with np.load(before.FOLDER / "expected.npz") as arrays:
        return dict(arrays)


def test_it_is_found():
    assert checkpoint.latest_step(before.FOLDER) == before.STEPS
    other = before.CONFIG | {"steps": 1}
    with pytest.raises(ValueError, match="other settings: steps is 23 in the checkpoint, 1 here"):
        checkpoint.restore(before.FOLDER, before.fresh_states(), config=other)
    missing = {name: state for name, state in before.fresh_states().items() if name != "chain"}
    with pytest.raises(ValueError, match=r"leaf \['chain'\].*in the checkpoint, missing in the template"):
        checkpoint.restore(before.FOLDER, missing, config=before.CONFIG)


@pytest.mark.parametrize("name", before.CASES)
def test_every_leaf_has_the_bits_that_were_saved(name, restored, expected):
    """In the order in which they were; the machine's scalars have been packed since. One that was added since is 0."""
    state, template = restored[name], before.fresh_states()[name]
    assert jax.tree.structure(state) == jax.tree.structure(template)
    for (path, leaf), like in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(template), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype), jax.tree_util.keystr(path)
        assert leaf.weak_type == like.weak_type, jax.tree_util.keystr(path)
    manifest = json.loads((before.FOLDER / f"step_{before.STEPS:08d}" / "manifest.json").read_text())
    data = expected[name].tobytes()
    for entry in manifest["leaves"]:
        path = entry["path"].removeprefix(f"['{name}']")
        if path == entry["path"] or entry["shape"] is None:
            continue
        leaf = np.asarray(at(state, path.replace(".machine.", ".machine.unpacked.")))
        mine, data = data[: leaf.nbytes], data[leaf.nbytes :]
        assert (leaf.tobytes(), str(leaf.dtype)) == (mine, entry["dtype"]), path
    assert data == b""
    for machine in (x for x in jax.tree.leaves(state, is_leaf=is_machine) if is_machine(x)):
        machine = machine.unpacked()
        assert machine.ignored_gradients == 0
        assert machine.guard is None or (machine.guard.way, machine.guard.pace, machine.guard.drift) == (0, 0, 0)


def at(tree, path):
    """The node at a path; ``.unpacked`` calls the method."""
    for field, key, index in re.findall(r"\.(\w+)|\['([^']+)'\]|\[(\d+)\]", path):
        tree = getattr(tree, field) if field else tree[key or int(index)]
        tree = tree() if field == "unpacked" else tree
    return tree


def is_machine(node):
    return isinstance(node, PhaseMachineState)


@pytest.mark.parametrize("name", before.CASES)
def test_training_goes_on(name, restored, expected):
    """Its next step is what it was, to rounding on another machine; that of a fresh state is not."""
    wanted = expected[f"{name}, one step later"]
    np.testing.assert_allclose(before.one_step(name, restored[name], before.STEPS), wanted, rtol=1e-4, atol=1e-5)
    state = restored[name] | {key: value for key, value in before.fresh_states()[name].items() if key != "params"}
    assert np.abs(before.one_step(name, state, before.STEPS) - wanted).max() > 2e-3
