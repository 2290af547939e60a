"""Whatever is thrown at a transformation: named errors, finite states, finite updates, states that keep their types.

A *setup* (tree, settings, optimizer) is made from a number, a *stream* of gradients by Hypothesis. One ``lax.scan`` a
setup is compiled and serves all its streams, because compiling takes a thousand times as long as running.
"""

import dataclasses
import functools
import random
from fractions import Fraction
from typing import Any, NamedTuple

import blind
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import given, note, settings
from hypothesis import strategies as st
from samples import CHEAP

import vsa_optax
from vsa_optax import AdaptiveCycle, Cycle, Recursive, Secants, Window

STEPS = 14
LETTERS = "WFPC"
SHAPES = [(), (2,), (3,), (0,), (0, 3), (1, 2, 1, 1, 2)]
NAMES = ["w", "bias", "phase", "machine", "count", "value", "residual", "a/b", "", "ü"]
HALVES = [jnp.float16, jnp.bfloat16, jnp.float32]
MAGNITUDES = {"one": 1.0, "zero": 0.0, "huge": 1e30, "tiny": 1e-30, "top": np.inf}
BAD = [np.nan, np.inf, -np.inf]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    phase: Any
    machine: Any
    name: str = dataclasses.field(default="layer", metadata=dict(static=True))


@chex.dataclass
class Block:
    count: Any
    inner: Any


class Pair(NamedTuple):
    first: Any
    history: Any


class Setup(NamedTuple):
    """One transformation and one tree."""

    settings: dict[str, Any]
    optimizer: str
    params: Any

    def make(self):
        rest = dict(self.settings)
        if self.optimizer == "none":
            return blind.predict_gradients(**rest)
        optimizer = optax.sgd(0.1, momentum=0.9 if self.optimizer == "momentum" else None)
        return blind.phase_switched(optimizer, **rest)


def random_tree(rng, dtypes, depth):
    """A leaf, a None, or a container of such."""
    kind = rng.choice(["leaf", "leaf", "dict", "list", "tuple", "pair", "layer", "block", "none"])
    if kind == "none" and depth < 3:
        return None
    if kind in ("leaf", "none") or depth == 0:
        return np.zeros(rng.choice(SHAPES), rng.choice(dtypes))
    children = [random_tree(rng, dtypes, depth - 1) for _ in range(rng.randint(0, 3) if kind == "dict" else 2)]
    if kind == "dict":
        return dict(zip(rng.sample(NAMES, len(children)), children, strict=True))
    if kind == "block":
        return Block(count=children[0], inner=children[1])
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](children)
    return {"pair": Pair, "layer": Layer}[kind](*children)


def make_setup(number, dtypes):
    rng = random.Random(number)
    rng.seed(rng.random())  # Neighbouring numbers begin alike.
    chosen = dict(
        warmup_steps=rng.randint(2, 4),
        full_steps=rng.randint(1, 3),
        predict_steps=rng.choice([0, 1, 2, 3, 4, 6]),
        correct_every=rng.randint(1, 4),
        line=rng.choice([Window, Recursive, Secants]),
        length=rng.randint(2, 4),
        decay=rng.choice([1e-6, 0.3, 0.95, 1.0]),
        dtype=rng.choice([None, None, *dtypes]),
        residual_decay=None if rng.random() < 0.3 else rng.choice([0.0, 0.5, 0.95, 1.0]),
        when=AdaptiveCycle if rng.random() < 0.2 else Cycle,
        loss_threshold=rng.choice([0.0, 0.1]),
    )
    optimizer = rng.choice(["none", "sgd", "momentum"])
    if optimizer != "none":
        chosen |= dict(predicts=rng.choice(["update", "gradient"]), learning_rate=rng.choice([None, 0.0, 0.5]))
    return Setup(chosen, optimizer, random_tree(rng, dtypes, rng.randint(1, 3)))


def types_of(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


@functools.cache
def compiled(number, is_double):
    """A setup, and the states and updates of all steps as a function of gradients and losses."""
    setup = make_setup(number, [*HALVES, jnp.float64] if is_double else HALVES)
    opt = setup.make()

    def step(state, inputs):
        grads, value = inputs
        updates, new = opt.update(grads, state, setup.params, value=value)
        assert types_of(new) == types_of(state)
        assert types_of(updates) == types_of(grads)
        return new, (updates, state.machine.phase, new)

    @functools.partial(jax.jit, **CHEAP)
    def run(grads, values):
        return jax.lax.scan(step, opt.init(setup.params), (grads, values))[1]

    return setup, run


@st.composite
def streams(draw):
    """A seed, a magnitude a step, and where which number is not finite."""
    magnitudes = draw(st.lists(st.sampled_from(sorted(MAGNITUDES)), min_size=STEPS, max_size=STEPS))
    where = st.tuples(st.integers(0, STEPS - 1), st.integers(0, 99), st.sampled_from(BAD))
    return (
        draw(st.integers(0, 2**16)),
        magnitudes,
        draw(st.lists(where, max_size=4)),
        draw(st.sampled_from([1.0, *BAD])),
    )


def gradients_of(setup, stream):
    """The tree of gradients of all steps, and the steps at which a number is not finite."""
    seed, magnitudes, bad, _ = stream
    rng = np.random.default_rng(seed)
    leaves, treedef = jax.tree.flatten(setup.params)
    values = []
    for leaf in leaves:
        top = float(jnp.finfo(leaf.dtype).max)
        x = rng.uniform(-1, 1, size=(STEPS, *leaf.shape))
        for step, kind in enumerate(magnitudes):
            x[step] = np.sign(x[step]) * top if kind == "top" else x[step] * min(MAGNITUDES[kind], top)
        values.append(x.astype(leaf.dtype))
    skipped = set()
    sizeable = [x for x in values if x.size]
    for step, which, number in bad if sizeable else []:
        flat = sizeable[which % len(sizeable)].reshape(STEPS, -1)
        flat[step, which % flat.shape[1]] = number
        skipped.add(step)
    return jax.tree.unflatten(treedef, values), skipped


def assert_finite(tree, what):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(np.asarray(leaf).astype(np.float64)).all(), f"{what}{jax.tree_util.keystr(path)}: {leaf}"


def check_trial(number, stream, *, is_double=False):
    setup, run = compiled(number, is_double)
    note(str(setup))
    grads, bad = gradients_of(setup, stream)
    values = np.where(np.arange(STEPS) % 3 == 1, stream[3], 1.0).astype(np.float32)
    updates, walked, states = jax.device_get(run(grads, values))
    walk = "".join(LETTERS[phase] for phase in walked)
    counted = np.flatnonzero(np.diff(states.machine.unpacked().nonfinite_count, prepend=0)).tolist()
    expected = [step for step in sorted(bad) if walk[step] != "P"]
    if setup.optimizer == "momentum":  # Its sum overflows where gradients do not.
        assert set(expected) <= set(counted)
    else:
        assert counted == expected
    used = {name: setup.settings[name] for name in ("warmup_steps", "full_steps", "predict_steps", "correct_every")}
    assert walk == reference.walk_phases(STEPS, **used, skipped=counted)
    if setup.settings["predict_steps"]:
        assert_finite(updates, "updates")
        assert_finite(states, "state")
        for leaf in jax.tree.leaves(updates):
            assert not leaf[counted].any()
    else:  # A gradient is the optimizer's affair.
        assert_finite(states._replace(inner_state=None), "state")


@settings(max_examples=150)
@given(number=st.integers(0, 19), stream=streams())
def test_anything_finite_or_not(number, stream):
    check_trial(number, stream)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(number=st.integers(0, 499), stream=streams())
def test_anything_finite_or_not_at_length(number, stream):
    check_trial(number, stream)


@settings(max_examples=40)
@given(number=st.integers(1000, 1007), stream=streams())
def test_anything_in_double_precision(number, stream):
    with jax.enable_x64(True):
        check_trial(number, stream, is_double=True)


WORDS = [None, "x", "", b"1", [], {}, (), object, 1j, np.ones(2), float("nan"), float("inf"), -1, -0.5, 1e9]
COUNTS = dict(warmup_steps=2, full_steps=1, predict_steps=0, correct_every=1)
INTEGERS = [2, 3, np.int64(5), 1000]
FRACTIONS = [0.5, 1, np.float32(0.25), Fraction(1, 3)]
# Valid values of each argument, and values that are not.
ARGUMENTS = {
    **{name: (INTEGERS, [*WORDS, True, 2.5, low - 1]) for name, low in COUNTS.items()},
    "tolerance": (FRACTIONS, [*WORDS, True, 0, 1.5]),
    "longest": (INTEGERS, [*WORDS, True, 2.5, 0]),
    "window": (INTEGERS, [*WORDS, True, 2.5, 1]),
    "length": (INTEGERS, [*WORDS, True, 2.5, 1]),
    "decay": (FRACTIONS, [*WORDS, True, 0, 1.5]),
    "dtype": ([None, "float16", jnp.bfloat16, np.dtype("float32")], [*WORDS[1:4], "int8", jnp.complex64, bool]),
    "predicts": (["update", "gradient"], [*WORDS, "updates"]),
    "calibrate": ([False], [*WORDS, 0, 1, np.True_]),  # True excludes a residual.
    "residual_decay": ([None, *FRACTIONS, 0], [*WORDS[1:], True, 1.5]),
    "loss_threshold": ([*FRACTIONS, 0], [*WORDS[:-1], True]),
    "learning_rate": ([None, *FRACTIONS, optax.constant_schedule(1.0)], [*WORDS[1:7], *WORDS[8:-1], True]),
}
KINDS = [*blind.TAKEN, vsa_optax.phase_switched]


@settings(max_examples=400)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_settings_are_taken_or_refused_by_name(data, kind):
    names = {"learning_rate"} if kind is vsa_optax.phase_switched else blind.TAKEN[kind] & set(ARGUMENTS)
    chosen, wrong = {}, set()
    for name in sorted(data.draw(st.sets(st.sampled_from(sorted(names)), max_size=4))):
        valid, invalid = ARGUMENTS[name]
        is_wrong = data.draw(st.integers(0, 3)) == 0
        chosen[name] = data.draw(st.sampled_from(invalid if is_wrong else valid))
        wrong |= {name} if is_wrong else set()
    if "residual_decay" in blind.TAKEN.get(kind, ()):
        chosen.setdefault("calibrate", False)
    if kind is vsa_optax.phase_switched:
        chosen["opt"] = optax.sgd(1.0)
    if not wrong:
        kind(**chosen)
        return
    with pytest.raises(ValueError, match=r" must be ") as error:
        kind(**chosen)
    assert str(error.value).split()[0] in wrong


@settings(max_examples=200)
@given(number=st.integers(0, 999), data=st.data())
def test_trees_that_do_not_fit_are_refused_by_leaf(number, data):
    """One leaf lost, reshaped, added or wrapped, after an init that saw the tree as it was."""
    setup = make_setup(number, HALVES)
    opt = setup.make()
    state = jax.eval_shape(opt.init, setup.params)
    leaves, treedef = jax.tree.flatten(setup.params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(setup.params)]
    if not leaves:
        return
    at = data.draw(st.integers(0, len(leaves) - 1))
    fault = data.draw(st.sampled_from(["reshaped", "lost", "wrapped", "integer"]))
    changed = {
        "reshaped": np.zeros((5, *leaves[at].shape), leaves[at].dtype),
        "lost": None,
        "wrapped": [leaves[at]],
        "integer": np.zeros(leaves[at].shape, np.int32),
    }[fault]
    tree = jax.tree.unflatten(treedef, [*leaves[:at], changed, *leaves[at + 1 :]])
    if fault == "integer":
        with pytest.raises(TypeError, match="has dtype int32") as error:
            jax.eval_shape(opt.init, tree)
    else:
        with pytest.raises(ValueError, match="gradients: ") as error:
            jax.eval_shape(opt.update, tree, state, setup.params, value=1.0)
    name = names[at] + "[0]" * (fault == "wrapped") or "(the tree is one leaf)"
    assert f"leaf {name}" in str(error.value)
