"""Checkpoints: the same bits, wherever a run was interrupted, or an error that says what differs."""

import functools
import importlib
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import blind
import checkpoint_worker
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import CHEAP

import vsa_optax
from vsa_optax import AdaptiveCycle, Guarded, Phase, Recursive, Secants, checkpoint, checkpoint_manifest

SHORT = dict(warmup_steps=2, full_steps=2, predict_steps=4, correct_every=2, length=5)
STEPS = 20
SAVED_AT = (1, 3, 4, 6, 13)
X = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
WORKER = Path(__file__).with_name("checkpoint_worker.py")


def phase_switched(**kwargs):
    return blind.phase_switched(optax.adamw(1.0), learning_rate=0.02, **(SHORT | kwargs))


def chained(**kwargs):
    return optax.chain(blind.predict_gradients(**(SHORT | kwargs)), optax.adam(0.02))


CASES = {
    "window": phase_switched(),
    "recursive": phase_switched(line=Recursive),
    "gradient": phase_switched(predicts="gradient"),
    "adaptive": phase_switched(when=AdaptiveCycle, dtype="bfloat16"),
    "no residual": phase_switched(residual_decay=None),
    "off": phase_switched(predict_steps=0),
    "secants": phase_switched(line=Secants, when=Guarded),
    "chain": chained(),
    "chain, recursive": chained(line=Recursive, when=AdaptiveCycle),
    "injected": blind.phase_switched(optax.inject_hyperparams(optax.sgd)(0.02), **SHORT),
}
SLOW = {("off", False), ("no residual", False), ("injected", False)}
SLOW |= {(case, True) for case in CASES} - {("window", True), ("chain, recursive", True)}


def make_params():
    return {
        "w": jnp.eye(8, 16),
        "b": jnp.ones(16, jnp.bfloat16),
        "scale": jnp.ones([]),
        "empty": jnp.zeros((3, 0)),
        "absent": None,
    }


def loss(params):
    out = jnp.tanh(X @ params["w"] + params["b"]) * params["scale"]
    return jnp.mean((out - jnp.sin(X.sum(axis=1, keepdims=True))) ** 2) + jnp.sum(params["empty"])


def make_step(opt):
    @functools.partial(jax.jit, **CHEAP)
    def step(params, opt_state):
        value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=opt_state)
        updates, opt_state = opt.update(grads, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state

    return step


def assert_same(actual, expected):
    """Structure, dtypes, weak types and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(e.dtype, jax.dtypes.prng_key):
            assert a.dtype == e.dtype
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        name = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype, getattr(a, "weak_type", 0)) == (e.shape, e.dtype, getattr(e, "weak_type", 0)), name
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes(), name


@pytest.mark.parametrize(
    ("case", "is_sharded"),
    [
        pytest.param(case, is_sharded, marks=pytest.mark.slow if (case, is_sharded) in SLOW else ())
        for case in CASES
        for is_sharded in (False, True)
    ],
)
def test_training_continues_with_the_same_bits(case, is_sharded, tmp_path):
    opt, params = CASES[case], make_params()
    if is_sharded:
        mesh = Mesh(np.array(jax.devices()), ("d",))
        specs = {"w": P(None, "d"), "b": P("d"), "scale": P(), "empty": P(), "absent": None}
        params = {k: x if x is None else jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in params.items()}
    step = make_step(opt)
    fresh = params, opt.init(params)
    state, saved, phases, records = fresh, [], set(), set()
    for count in range(STEPS):
        if count in SAVED_AT:
            saved.append(state)
            stats = vsa_optax.phase_stats(state[1])
            phases.add(Phase(int(stats.phase)))
            records.add(int(stats.total_steps - stats.predict_steps) % 5)
        state = step(*state)
    if case != "off":
        assert phases == set(Phase) - ({Phase.CORRECT} if case == "secants" else set())
        assert len(records) >= 3  # the window's ring was met at different places
    checkpoint.save(tmp_path, STEPS, saved, config=SHORT)
    _, restored = checkpoint.restore(tmp_path, [fresh] * len(saved), config=SHORT)
    for count, resumed in zip(SAVED_AT, restored, strict=True):
        for a, e in zip(jax.tree.leaves(resumed), jax.tree.leaves(fresh), strict=True):
            assert a.sharding == e.sharding
            assert a.committed == e.committed
        for _ in range(count, STEPS):
            resumed = step(*resumed)
        assert_same(resumed, state)


class Pair(NamedTuple):
    left: object
    right: object


def test_every_kind_of_leaf(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("d",))
    tree = {
        "pair": Pair(jnp.arange(3), [None, (jnp.ones((2, 1, 1, 1, 2)),)]),
        "weak": [jnp.asarray(0.1), jnp.asarray(3), jnp.asarray(1j)],
        "complex": jnp.array([1 + 2j, -0.0]),
        "special": jnp.array([jnp.nan, -jnp.nan, jnp.inf, -0.0, 1e-45], jnp.float32),
        "small": {
            name: jnp.ones(5, name) for name in ("bool", "int8", "uint8", "float16", "bfloat16", "float8_e4m3fn")
        },
        "key": jax.random.key(3),
        "keys": jax.device_put(jax.random.split(jax.random.key(4, impl="rbg"), 8), NamedSharding(mesh, P("d"))),
        "no keys": jax.random.split(jax.random.key(5), 0),
        "empty": jax.device_put(jnp.zeros((0, 8), jnp.bfloat16), NamedSharding(mesh, P(None, "d"))),
        "on another": jax.device_put(jnp.ones(2), jax.devices()[3]),
        "numpy": np.arange(4.0),
        "number": np.float64(0.1),
        "none": None,
    }
    checkpoint.save(tmp_path, 1, tree)
    _, restored = checkpoint.restore(tmp_path, tree)
    assert_same(restored, tree)
    for a, e in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        assert isinstance(a, jax.Array) == isinstance(e, jax.Array)
        assert isinstance(a, np.generic) == isinstance(e, np.generic)
        if isinstance(e, jax.Array):
            assert a.sharding == e.sharding
    del tree["numpy"], tree["number"]
    checkpoint.save(tmp_path, 2, tree)
    _, restored = checkpoint.restore(tmp_path, jax.eval_shape(lambda: tree))
    assert_same(restored, tree)


@pytest.mark.parametrize("tree", [{}, None, {"a": jnp.zeros(0), "b": None}, jnp.arange(3)], ids=repr)
def test_trees_of_little(tree, tmp_path):
    checkpoint.save(tmp_path, 0, tree)
    assert_same(checkpoint.restore(tmp_path, tree)[1], tree)


def test_another_number_of_devices(tmp_path):
    arrays = [jnp.arange(16.0)]
    for count in (1, 2, 8):
        mesh = Mesh(np.array(jax.devices()[:count]), ("d",))
        arrays.append(jax.device_put(arrays[0], NamedSharding(mesh, P("d"))))
    for number, saved in enumerate(arrays):
        checkpoint.save(tmp_path, number, saved)
        for wanted in arrays:
            restored = checkpoint.restore(tmp_path, wanted, step=number)[1]
            assert_same(restored, wanted)
            assert restored.sharding == wanted.sharding
            struct = jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=wanted.sharding)
            assert checkpoint.restore(tmp_path, struct, step=number)[1].sharding == wanted.sharding


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))


class LinenState(TrainState):
    batch_stats: dict


@pytest.mark.filterwarnings("ignore:value= was not given")  # TrainState.apply_gradients does not forward it.
def test_linen(tmp_path):
    apply = LinenNet().apply  # One function for all states, which are compared with it inside.
    init = jax.jit(lambda key: LinenNet().init(key, X, train=False), **CHEAP)

    def fresh():
        state = LinenState.create(apply_fn=apply, tx=CASES["window"], **init(jax.random.key(0)))
        return state.replace(step=jnp.zeros([], jnp.int32))

    @functools.partial(jax.jit, **CHEAP)
    def step(state):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            out, changed = apply(variables, X, train=True, mutable=["batch_stats"])
            return jnp.mean((out - 1) ** 2), changed["batch_stats"]

        run = vsa_optax.value_and_grad_by_phase(loss, has_aux=True)
        (_, stats), grads = run(state.params, state=state.opt_state, aux_in_predict=state.batch_stats)
        return state.apply_gradients(grads=grads, batch_stats=stats)

    state = fresh()
    for count in range(14):
        if count == 7:
            checkpoint.save(tmp_path, count, state)
        state = step(state)
    count, resumed = checkpoint.restore(tmp_path, fresh())
    for _ in range(count, 14):
        resumed = step(resumed)
    assert_same(resumed, state)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def test_nnx(tmp_path):
    """Both as nnx.State and as the plain dicts made of it."""

    def fresh():
        model = NnxNet(nnx.Rngs(0))
        return model, nnx.Optimizer(model, CASES["window"], wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - 1) ** 2))(model)
        optimizer.update(model, grads, value=value)

    straight = fresh()
    for count in range(14):
        if count == 7:
            checkpoint.save(tmp_path / "state", count, nnx.state(straight))
            checkpoint.save(tmp_path / "pure", count, nnx.to_pure_dict(nnx.state(straight)))
        step(*straight)
    for folder in ("state", "pure"):
        resumed = fresh()
        state = nnx.state(resumed)
        if folder == "state":
            count, state = checkpoint.restore(tmp_path / folder, state)
        else:
            count, pure = checkpoint.restore(tmp_path / folder, nnx.to_pure_dict(state))
            nnx.replace_by_pure_dict(state, pure)
        nnx.update(resumed, state)
        for _ in range(count, 14):
            step(*resumed)
        assert_same(nnx.state(resumed), nnx.state(straight))


TREE = {"w": jnp.arange(6.0).reshape(2, 3), "b": {"x": jnp.ones(3, jnp.int32), "y": None}, "z": jnp.zeros(0)}
CONFIG = dict(learning_rate=0.1, steps=[1, 2], nested={"a": 1, "b": None})


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path, 5, TREE, config=CONFIG)
    return tmp_path


def edit(folder, change):
    """The manifest changed by someone who knows how to write one."""
    path = folder / "step_00000005" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]
    change(manifest)
    path.unlink()
    checkpoint_manifest.write(path, manifest)


def test_another_configuration_is_refused(saved):
    def differences(config):
        with pytest.raises(ValueError, match=r"checkpoint .*step_00000005: other settings: ") as caught:
            checkpoint.restore(saved, TREE, config=config)
        return str(caught.value).partition("other settings: ")[2]

    assert differences(CONFIG | {"learning_rate": 0.2}) == "learning_rate is 0.1 in the checkpoint, 0.2 here"
    assert differences(CONFIG | {"nested": {"a": 2, "b": None}}) == "nested.a is 1 in the checkpoint, 2 here"
    both = differences({"steps": [1, 3], "nested": CONFIG["nested"], "more": True})
    assert both == (
        "learning_rate is 0.1 in the checkpoint, and not given here; more is not in the checkpoint, True here; "
        "steps is [1, 2] in the checkpoint, [1, 3] here"
    )
    assert "nested is" in differences(None)
    checkpoint.restore(saved, TREE, config=dict(reversed((CONFIG | {"steps": (1, 2)}).items())))


def test_another_version_is_refused(saved):
    edit(saved, lambda manifest: manifest.update(format_version=2))
    with pytest.raises(ValueError, match="step_00000005: another format version: 2, but this release reads 1"):
        checkpoint.restore(saved, TREE, config=CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jnp.zeros((3, 2))}, "leaf ['w'] is float32[2, 3] in the checkpoint, float32[3, 2] in the template"),
        ({"w": jnp.zeros((2, 3), int)}, "leaf ['w'] is float32[2, 3] in the checkpoint, int32[2, 3] in the template"),
        ({"w": None}, "leaf ['w'] is float32[2, 3] in the checkpoint, None in the template"),
        ({"z": jnp.zeros((0, 1))}, "leaf ['z'] is float32[0] in the checkpoint, float32[0, 1] in the template"),
        ({"z": jnp.zeros(1)}, "leaf ['z'] is float32[0] in the checkpoint, float32[1] in the template"),
        ({"b": {"x": TREE["b"]["x"]}}, "leaf ['b']['y'] is None in the checkpoint, missing in the template"),
        ({"new": jnp.ones(1)}, "leaf ['new'] is missing in the checkpoint, float32[1] in the template"),
        (
            {"b": [TREE["b"]["x"], None]},
            "leaf ['b'][0] is missing in the checkpoint, int32[3] in the template; leaf ['b'][1] is missing in the "
            "checkpoint, None in the template; leaf ['b']['x'] is int32[3] in the checkpoint, missing in the template; "
            "leaf ['b']['y'] is None in the checkpoint, missing in the template",
        ),
    ],
)
def test_another_tree_is_refused(change, message, saved):
    with pytest.raises(ValueError, match="step_00000005: other leaves: ") as caught:
        checkpoint.restore(saved, TREE | change, config=CONFIG)
    assert str(caught.value).endswith(f"other leaves: {message}")


def test_a_long_list_of_differences_is_cut(saved):
    with pytest.raises(ValueError, match=r"\['10'\].*; and 2 more$"):
        checkpoint.restore(saved, TREE | {str(i): jnp.ones(1) for i in range(12)}, config=CONFIG)


def test_every_damage_is_refused(saved, tmp_path_factory):
    """Each file of the checkpoint emptied, cut, lengthened, with one bit changed, deleted."""

    def flipped(data):
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]

    damages = {
        "emptied": lambda data: b"",
        "cut": lambda data: data[: len(data) // 2],
        "cut by one": lambda data: data.rstrip()[:-1],
        "lengthened": lambda data: data + b"}",
        "flipped": flipped,
        "deleted": None,
    }
    good = saved / "step_00000005"
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
    assert Path("manifest.json") in files
    assert len(files) > 4
    for file in files:
        for damage in damages.values():
            root = tmp_path_factory.mktemp("damaged")
            path = shutil.copytree(good, root / good.name) / file
            data = path.read_bytes()
            path.unlink()
            if damage is not None:
                path.write_bytes(damage(data))
            with pytest.raises(ValueError, match=rf"step_00000005: (damaged: {file}|another format)"):
                checkpoint.restore(root, TREE, config=CONFIG)
    checkpoint.restore(saved, TREE, config=CONFIG)


@pytest.mark.parametrize("text", ["[]", "null", "1", "{}", "{", "\xff", "[" * 100_000, '{"format_version": 1}'])
def test_a_garbled_manifest_is_refused(text, saved):
    (saved / "step_00000005" / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"damaged: manifest\.json|another format version: None"):
        checkpoint.restore(saved, TREE, config=CONFIG)


def test_a_renamed_checkpoint_is_refused(saved):
    (saved / "step_00000005").rename(saved / "step_00000006")
    with pytest.raises(ValueError, match="damaged: its manifest is that of step 5"):
        checkpoint.restore(saved, TREE, config=CONFIG)


@pytest.mark.parametrize("leaf", [3, 1.0, True, "text", object(), np.array(["text"]), np.array([None])])
def test_leaves_that_are_no_arrays_are_refused(leaf, saved):
    for call in (lambda tree: checkpoint.save(saved, 6, tree), lambda tree: checkpoint.restore(saved, tree)):
        with pytest.raises(TypeError, match=r"leaf \['a'\]\[0\] (is a|has dtype)"):
            call({"a": [leaf]})
    assert os.listdir(saved) == ["step_00000005"]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"step must be an integer >= 0.*, got -1"):
        checkpoint.save(tmp_path, -1, TREE)
    with pytest.raises(ValueError, match=r"keep must be an integer >= 1.*, got 0"):
        checkpoint.save(tmp_path, 1, TREE, keep=0)
    with pytest.raises(ValueError, match="directory must be a local folder, got 'gs://bucket'"):
        checkpoint.save("gs://bucket", 1, TREE)
    with pytest.raises(TypeError, match=r"config\['rate'\] is <function .*>, which JSON cannot hold"):
        checkpoint.save(tmp_path, 1, TREE, config={"rate": lambda: 0})
    with pytest.raises(TypeError, match=r"config\['rate'\] is nan"):
        checkpoint.save(tmp_path, 1, TREE, config={"rate": math.nan})
    with pytest.raises(TypeError, match="config: the keys must be strings, got 1"):
        checkpoint.save(tmp_path, 1, TREE, config={1: 1})
    with pytest.raises(TypeError, match=r"leaf \['w'\] is a ShapeDtypeStruct"):
        checkpoint.save(tmp_path, 1, {"w": jax.ShapeDtypeStruct((), int)})
    with pytest.raises(TypeError, match=r"leaf \['w'\] is a traced array"):
        jax.jit(lambda tree: checkpoint.save(tmp_path, 1, tree) and 0)({"w": 1.0})
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(ValueError, match=r"leaf \['w'\] is a deleted array"):
        checkpoint.save(tmp_path, 1, {"w": gone})
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*none: the folder does not exist"):
        checkpoint.restore(tmp_path / "none", TREE)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*; the folder holds none"):
        checkpoint.restore(tmp_path, TREE)
    assert os.listdir(tmp_path) == []
    checkpoint.save(tmp_path, 1, TREE)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2 in .*; there are those of steps \[1\]"):
        checkpoint.restore(tmp_path, TREE, step=2)


def test_only_the_newest_are_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_1").mkdir()
    for step in (1, 3, 100_000_000, 2):
        checkpoint.save(tmp_path, step, jnp.full(2, step), keep=2)
    names = {"notes.txt", "step_1"}
    assert set(os.listdir(tmp_path)) == names | {"step_00000002", "step_100000000"}
    assert checkpoint.latest_step(tmp_path) == 100_000_000
    checkpoint.save(tmp_path, 4, jnp.full(2, 4), keep=1)
    assert set(os.listdir(tmp_path)) == names | {"step_00000004"}
    assert checkpoint.restore(tmp_path, jnp.zeros(2, int))[1].tolist() == [4, 4]


@pytest.mark.parametrize("is_replaced", [False, True], ids=["new step", "same step"])
def test_interrupted_at_every_operation(is_replaced, tmp_path, monkeypatch):
    """The process dies before the n-th operation on the disk, for every n, and nothing cleans up."""

    class Died(BaseException):
        pass

    new = 1 if is_replaced else 2
    wanted = jnp.zeros(2, int)
    checkpoint.save(tmp_path / "first", 1, jnp.array([1, 1]))
    for last in range(1000):
        root = shutil.copytree(tmp_path / "first", tmp_path / str(last))
        count = 0

        def dying(function, last=last):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > last:
                    raise Died
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dying(os.fsync))
            patch.setattr(Path, "rename", dying(Path.rename))
            patch.setattr(checkpoint.shutil, "rmtree", dying(shutil.rmtree))
            try:
                checkpoint.save(root, new, jnp.array([2, 2]), keep=1)
                break
            except Died:
                pass
        values = [1, 1], [2, 2]
        step, value = checkpoint.restore(root, wanted)
        assert checkpoint.latest_step(root) == step
        assert value.tolist() in values
        assert is_replaced or value.tolist() == values[step - 1]
        checkpoint.save(root, 3, {})
        assert not [name for name in os.listdir(root) if name.startswith(".")]
        assert checkpoint.restore(root, wanted, step=step)[1].tolist() == value.tolist()
    assert last > 10
    assert os.listdir(root) == [f"step_{new:08d}"]


@pytest.mark.parametrize("is_replaced", [False, True], ids=["new step", "same step"])
def test_killed_while_an_old_one_is_removed(is_replaced, tmp_path, monkeypatch):
    """Some of its files are gone, and it no longer counts."""

    class Died(BaseException):
        pass

    def dying(*args, unlink=os.unlink, **kwargs):
        removed.append(args)
        if len(removed) > 3:
            raise Died
        return unlink(*args, **kwargs)

    checkpoint.save(tmp_path, 1, jnp.array([1, 1]))
    removed, new = [], 1 if is_replaced else 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", dying)
        with pytest.raises(Died):
            checkpoint.save(tmp_path, new, jnp.array([2, 2]), keep=1)
    assert checkpoint.latest_step(tmp_path) == new
    assert checkpoint.restore(tmp_path, jnp.zeros(2, int))[1].tolist() == [2, 2]
    if not is_replaced:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 1 in .*; there are those of steps \[2\]"):
            checkpoint.restore(tmp_path, jnp.zeros(2, int), step=1)
    checkpoint.save(tmp_path, 3, {})
    assert set(os.listdir(tmp_path)) == {f"step_{new:08d}", "step_00000003"}


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, TREE)
    monkeypatch.setattr(checkpoint_manifest, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, TREE)
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_nothing_is_unpickled(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(np, "load", refuse)
    checkpoint.restore(saved, TREE, config=CONFIG)
    modules = sorted(Path(checkpoint.__file__).parent.glob("checkpoint*.py"))
    assert len(modules) == 5
    for module in modules:
        assert "pickle" not in module.read_text().replace("unpickled", "")


def test_orbax_is_optional(monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="orbax")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r'pip install "vsa-optax\[checkpoint\]"'):
        checkpoint.save(tmp_path, 1, TREE)
    with pytest.raises(ImportError, match=r'pip install "vsa-optax\[checkpoint\]"'):
        checkpoint.restore(tmp_path, TREE)


def test_an_event_loop_may_be_running(tmp_path):
    """As in a notebook; in a process of its own, since old releases of Orbax change asyncio for good."""
    script = """if True:
        import asyncio, sys, jax.numpy as jnp
        from vsa_optax import checkpoint

        async def main():
            checkpoint.save(sys.argv[1], 1, jnp.arange(3))
            return checkpoint.restore(sys.argv[1], jnp.zeros(3, int))[1]

        assert asyncio.run(main()).tolist() == [0, 1, 2]"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)


def start(folder, steps, save_every):
    # -W error: what Orbax would warn of, it would warn of here too.
    command = [sys.executable, "-W", "error", str(WORKER), str(folder), str(steps), str(save_every)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last_line(worker):
    out, err = worker.communicate(timeout=300)
    assert err == ""
    assert "end" in out
    return out.splitlines()[-1]


def kill_and_resume(folder, kills, save_every, rng):
    """Kills a run that often, each time checking what it left; then its result against that of a run left alone.

    Some moments are counted from a line that the run prints, and most of these fall into a save; the others from its
    start, so that importing, restoring and compiling are hit as well.
    """
    latest, in_saves = 0, 0
    for kill in range(kills):
        worker = start(folder, 10**6, save_every)
        saved, word = latest, None
        if kill % 5 != 4:
            milestones = rng.randrange(2, 8)
            for line in worker.stdout:
                word, number = line.split()
                assert word != "from" or int(number) == latest
                saved = int(number) if word == "saved" else saved
                milestones -= 1
                if not milestones:
                    break
            time.sleep(rng.uniform(0, 0.15))
        else:
            time.sleep(rng.uniform(0, 5))
        worker.kill()
        rest, err = worker.communicate()
        assert worker.returncode == -9, err
        assert err == ""
        for line in rest.splitlines():
            word, number = line.split()
            saved = int(number) if word == "saved" else saved
        in_saves += word == "saving"
        latest = checkpoint.latest_step(folder) or 0
        assert latest >= saved  # a save that returned is there
    steps = latest + 10
    assert last_line(start(folder, steps, save_every)) == f"end {checkpoint_worker.train(folder / 'none', steps, 0)}"
    return in_saves


def test_killed_once(tmp_path):
    kill_and_resume(tmp_path, 1, 1, random.Random(0))


@pytest.mark.slow
def test_killed_fifty_times(tmp_path):
    in_saves = kill_and_resume(tmp_path, 50, 3, random.Random(1))
    print(f"{in_saves} of 50 kills fell into a save")
    assert in_saves >= 5
