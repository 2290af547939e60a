"""Checkpoints of a whole training state through Orbax: whole or not there, and refused with the reason if they differ.

A tree of arrays enters, a folder leaves. From that folder and a template (a fresh state, say) the same bits come back,
each array laid out on the devices as the template's is:

    step_00000042/arrays/        Orbax's own files, one array a leaf
    step_00000042/manifest.json  format version, settings and their fingerprint, all leaves, all files' sizes and hashes

The folder is written under another name, flushed to the disk, and renamed when complete; what a killed process leaves
behind is not taken for a checkpoint, and the next `save` removes it. All is JSON and arrays: nothing is unpickled.

It costs, beyond Orbax's own reading and writing, a SHA-256 over the files in each direction. Needs the extra
``vsa-optax[checkpoint]``; a POSIX file system, one run a folder.

With several processes (``jax.distributed``) all call `save` and `restore` alike, on a folder that all of them see. Each
writes and reads its shards of arrays that are global; process 0 does the rest, and `save` returns everywhere, or fails
everywhere, once it has. A checkpoint may be restored by another number of processes.

Flax linen, whose ``TrainState`` is a tree of arrays once its step is one:

    >>> import tempfile
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, vsa_optax
    >>> from flax.training.train_state import TrainState
    >>> from vsa_optax import checkpoint
    >>> settings = dict(learning_rate=0.1, warmup_steps=2, full_steps=1, predict_steps=4)
    >>> def fresh_state():
    ...     net, opt = nn.Dense(1), vsa_optax.phase_switched(optax.adamw(1.0), **settings)
    ...     params = net.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    ...     return TrainState.create(apply_fn=net.apply, params=params, tx=opt).replace(step=jnp.int32(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = checkpoint.save(folder, 42, fresh_state(), config=settings)
    ...     step, state = checkpoint.restore(folder, fresh_state(), config=settings)
    >>> step, state.params["kernel"].shape
    (42, (3, 1))

Flax nnx, whose objects give their arrays and take them back:

    >>> from flax import nnx
    >>> def fresh_model():
    ...     model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    ...     opt = vsa_optax.phase_switched(optax.adamw(1.0), **settings)
    ...     return model, nnx.Optimizer(model, opt, wrt=nnx.Param)
    >>> def arrays(model, optimizer):
    ...     return nnx.to_pure_dict(nnx.state((model, optimizer)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = checkpoint.save(folder, 42, arrays(*fresh_model()), config=settings)
    ...     model, optimizer = fresh_model()
    ...     step, restored = checkpoint.restore(folder, arrays(model, optimizer), config=settings)
    >>> state = nnx.state((model, optimizer))
    >>> nnx.replace_by_pure_dict(state, restored)
    >>> nnx.update((model, optimizer), state)
    >>> step, model.kernel.shape
    (42, (3, 1))
"""

import hashlib
import importlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vsa_optax import checkpoint_files as files
from vsa_optax.core import checks

FORMAT_VERSION = 1
_ARRAYS = "arrays"
_MANIFEST = "manifest.json"
_DTYPES = (np.bool_, np.number, jax.dtypes.prng_key)
_SHOWN = 10  # Differences named in an error.


def save(
    directory: str | os.PathLike[str],
    step: int,
    tree: Any,
    *,
    config: Mapping[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Writes ``tree`` as the checkpoint of ``step``; returns once it is on the disk.

    At every moment a killed process, or a machine that loses power, leaves every earlier checkpoint whole, and this one
    whole or absent. A checkpoint of the same step is replaced, and stays in force until the new one is complete.

    Zero-size leaves, which Orbax refuses, and None are kept in the manifest only. Typed PRNG keys are kept as their
    data and the name of their generator. A scalar's weak type is kept, that of a larger array is not.

    Args:
        directory: a local folder for the checkpoints of one run; made if missing. Other files in it are left alone.
        step: number of the checkpoint, ``>= 0``.
        tree: any pytree of arrays: parameters, optimizer state, batch statistics, or a dict of them all.
        config: the settings the state was made with, which `restore` compares: a mapping of strings to what JSON can
            hold, e.g. the keyword arguments of `vsa_optax.phase_switched`. None is the empty mapping.
        keep: how many checkpoints to keep, ``>= 1``: this one, and of the others those of the highest steps. None keeps
            all.

    Returns:
        The checkpoint's folder.

    Raises:
        ImportError: Orbax is not installed.
        TypeError: a leaf that is no array, a Python number for instance; a ``config`` that JSON cannot hold.
        ValueError: an argument outside its range; a deleted (donated) array; with several processes, an array that is
            not global.
        OSError: the folder cannot be written, here or by process 0; what was written of it is removed.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from vsa_optax import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in (10, 20, 30):
        ...         path = checkpoint.save(folder, step, {"w": jnp.ones(3)}, keep=2)
        ...     path.name, checkpoint.latest_step(folder)
        ('step_00000030', 30)
    """
    ocp = _orbax()
    root = _local_folder(directory)
    step = checks.check_integer("step", step, 0)
    keep = None if keep is None else checks.check_integer("keep", keep, 1)
    settings = _plain_config(config)
    leaves, _ = _flatten(tree)
    data = {leaf.key: leaf.to_store() for leaf in leaves if leaf.key is not None}

    unfinished = root / f".saving-{files.folder_name(step)}"

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        files.flush_folder(root.parent)
        files.clean(root)
        unfinished.mkdir()

    def finish() -> None:
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "config": settings,
            "config_fingerprint": _sha256(settings),
            "leaves": [leaf.entry() for leaf in leaves],
            "files": files.describe(unfinished),
            "written_with": {"jax": jax.__version__, "orbax": getattr(ocp, "__version__", None)},
        }
        _write_manifest(unfinished / _MANIFEST, manifest)
        for folder, _, _ in os.walk(unfinished):
            files.flush_folder(folder)
        files.publish(root, unfinished, root / files.folder_name(step))

    _in_process_0(begin)
    try:
        if data:
            with ocp.Checkpointer(_writer(ocp)) as checkpointer:
                checkpointer.save(unfinished / _ARRAYS, args=ocp.args.PyTreeSave(data))
        _in_process_0(finish)
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if keep is not None and jax.process_index() == 0:
        others = {number: folder for number, folder in files.whole(root).items() if number != step}
        for number in sorted(others, reverse=True)[keep - 1 :]:
            files.remove(root, others[number])
    return root / files.folder_name(step)


def restore(
    directory: str | os.PathLike[str],
    template: Any,
    *,
    step: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[int, Any]:
    """Reads a checkpoint into the structure, and onto the devices, of ``template``.

    Everything is checked before any array is read: the format version, the settings, every leaf's place, shape and
    dtype, and the hash of every file. A damaged checkpoint is refused, not passed over for an older one, which can be
    asked for by its step. The hashes find accidents; they are no signature.

    Args:
        directory: the folder given to `save`.
        template: a tree of arrays or of ``jax.ShapeDtypeStruct``, e.g. the state a fresh run starts with, or
            ``jax.eval_shape`` of it. Its values are not used. An array, or a struct with a sharding, gets its sharding;
            arrays that are not committed to a device stay so; NumPy arrays stay NumPy arrays.
        step: which checkpoint; None for the one of the highest step.
        config: the settings, which must equal those given to `save`.

    Returns:
        ``(step, tree)``.

    Raises:
        ImportError: Orbax is not installed.
        FileNotFoundError: there is no checkpoint, or none of that step.
        TypeError: a template leaf that is no array; a ``config`` that JSON cannot hold.
        ValueError: another format version; other settings, each named with both values; leaves that are missing, left
            over, or of another shape or dtype, each named; a missing or damaged manifest or file, named.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> from vsa_optax import checkpoint
        >>> settings = dict(warmup_steps=2, predict_steps=4)
        >>> opt = vsa_optax.phase_switched(optax.sgd(0.1), **settings)
        >>> params = {"w": jnp.arange(3.0)}
        >>> state = {"params": params, "opt_state": opt.init(params)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = checkpoint.save(folder, 7, state, config=settings)
        ...     template = jax.eval_shape(lambda: state)
        ...     step, restored = checkpoint.restore(folder, template, config=settings)
        ...     try:
        ...         checkpoint.restore(folder, template, config=settings | {"predict_steps": 5})
        ...     except ValueError as error:
        ...         print(str(error).partition(": ")[2])
        other settings: predict_steps is 4 in the checkpoint, 5 here
        >>> step, restored["params"]["w"].tolist()
        (7, [0.0, 1.0, 2.0])
    """
    ocp = _orbax()
    root = _local_folder(directory)
    settings = _plain_config(config)
    wanted, treedef = _flatten(template, values=False)
    folders = files.whole(root)
    if step is not None:
        step = checks.check_integer("step", step, 0)
    elif folders:
        step = max(folders)
    if step is None or step not in folders:
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"no {what} in {root}; there are those of steps {sorted(folders)}")
    folder = folders[step]
    manifest = _read_manifest(folder)
    _refuse(folder, "other settings", _config_differences(manifest["config"], settings))
    entries = {entry["path"]: entry for entry in manifest["leaves"]}
    _refuse(folder, "other leaves", _leaf_differences(entries, wanted))
    _refuse(folder, "damaged", files.file_differences(folder, manifest["files"]))

    keys = [entries[leaf.path]["key"] for leaf in wanted]
    args = {key: leaf.restore_args(ocp) for key, leaf in zip(keys, wanted, strict=True) if key is not None}
    data: dict[str, Any] = {}
    if args:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            item = dict.fromkeys(args, 0)
            restore_args = ocp.args.PyTreeRestore(item=item, restore_args=args)
            data = checkpointer.restore(folder / _ARRAYS, args=restore_args)
    restored = [
        leaf.from_stored(None if key is None else data[key], entries[leaf.path])
        for key, leaf in zip(keys, wanted, strict=True)
    ]
    return step, jax.tree.unflatten(treedef, restored)


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The highest step that has a checkpoint, or None; remains of a killed `save` do not count.

    Looks at names only, since a folder gets its name when it is complete; `restore` checks what is inside.

    Args:
        directory: the folder given to `save`; need not exist.

    Returns:
        The step, or None.

    Example:
        >>> from vsa_optax import checkpoint
        >>> checkpoint.latest_step("no/such/folder") is None
        True
    """
    return max(files.whole(_local_folder(directory)), default=None)


class _Leaf(NamedTuple):
    """One leaf of a tree: its place, the name of its array in Orbax (None if it has none), and what it is."""

    path: str
    key: str | None
    value: Any

    @property
    def is_key(self) -> bool:
        """Whether it is a typed PRNG key."""
        return self.value is not None and jnp.issubdtype(self.value.dtype, jax.dtypes.prng_key)

    def entry(self) -> dict[str, Any]:
        """What the manifest says of the leaf."""
        is_none = self.value is None
        has_generator = self.is_key and isinstance(self.value, jax.Array)  # A template's struct does not tell.
        return {
            "path": self.path,
            "key": self.key,
            "shape": None if is_none else list(self.value.shape),
            "dtype": None if is_none else str(self.value.dtype),
            "weak_type": bool(getattr(self.value, "weak_type", False)),
            "generator": str(jax.random.key_impl(self.value)) if has_generator else None,
        }

    def to_store(self) -> Any:
        """The array to give to Orbax."""
        if self.is_key:
            return np.asarray(jax.random.key_data(self.value))
        return np.asarray(self.value) if isinstance(self.value, np.generic) else self.value

    @property
    def _sharding(self) -> Any:
        """Where the restored array must lie; None if JAX may move it."""
        return self.value.sharding if getattr(self.value, "committed", True) else None

    def restore_args(self, ocp: Any) -> Any:
        """How Orbax is to read the array: onto the devices, or, for what is finished here, into memory."""
        is_host = isinstance(self.value, np.ndarray | np.generic)
        if is_host or self.is_key or self._sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=self._sharding)

    def from_stored(self, data: Any, entry: dict[str, Any]) -> Any:
        """The leaf that the template asks for; ``data`` is None for what Orbax does not hold."""
        if self.value is None:
            return None
        if isinstance(self.value, np.ndarray | np.generic):
            host = np.zeros(self.value.shape, self.value.dtype) if data is None else np.asarray(data)
            return host[()] if isinstance(self.value, np.generic) else host
        if self.is_key:
            like = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(self.value.shape, self.value.dtype))
            bits = jnp.zeros(like.shape, like.dtype) if data is None else jnp.array(data)
            array = jax.random.wrap_key_data(bits, impl=entry["generator"])
        else:
            array = jnp.zeros(self.value.shape, self.value.dtype) if data is None else data
            array = array if isinstance(array, jax.Array) else jnp.array(array)
        if entry["weak_type"]:
            array = _weakly_typed(array)
        return array if self._sharding is None else jax.device_put(array, self._sharding)


def _flatten(tree: Any, *, values: bool = True) -> tuple[list[_Leaf], Any]:
    """Leaves, None among them, and the structure; refuses what cannot be stored (``values``) or described."""
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    allowed = jax.Array | np.ndarray | np.generic
    leaves: list[_Leaf] = []
    for index, (keys, value) in enumerate(found):
        path = jax.tree_util.keystr(keys) or "(the tree is one leaf)"
        is_struct = not values and isinstance(value, jax.ShapeDtypeStruct)
        is_array = isinstance(value, allowed) and not isinstance(value, jax.core.Tracer)
        if not (value is None or is_struct or is_array):
            kind = "traced array" if isinstance(value, jax.core.Tracer) else type(value).__name__
            raise TypeError(f"leaf {path} is a {kind}, not an array: make a number one with jnp.asarray")
        if value is not None and not any(jnp.issubdtype(value.dtype, family) for family in _DTYPES):
            raise TypeError(f"leaf {path} has dtype {value.dtype}, which a checkpoint cannot hold")
        if values and isinstance(value, jax.Array) and value.is_deleted():
            raise ValueError(f"leaf {path} is a deleted array: it was donated to a jitted function")
        if values and isinstance(value, jax.Array) and value.is_fully_addressable and jax.process_count() > 1:
            raise ValueError(
                f"leaf {path} is an array of this process alone: make it under jax.jit, with out_shardings over the "
                f"devices of all {jax.process_count()} processes"
            )
        is_stored = value is not None and math.prod(value.shape) > 0
        leaves.append(_Leaf(path, f"{index:06d}" if is_stored else None, value))
    if len({leaf.path for leaf in leaves}) < len(leaves):
        raise ValueError("two leaves of the tree have the same path; a checkpoint tells leaves apart by it")
    return leaves, treedef


def _writer(ocp: Any) -> Any:
    """What writes a tree of arrays: each process what it has to."""
    if jax.process_count() == 1 or hasattr(jax, "set_mesh"):
        return ocp.PyTreeCheckpointHandler()
    # With the oldest JAX, Orbax cannot divide among the processes what all of them hold: one writes it.
    kinds = ocp.type_handlers
    registry = kinds.create_type_handler_registry(
        (jax.Array, kinds.ArrayHandler(use_replica_parallel=False)), (np.ndarray, kinds.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _in_process_0(fun: Callable[[], None]) -> None:
    """Process 0 calls ``fun``, and the others wait until it has; where it fails, it fails in all."""
    error = None
    if jax.process_index() == 0:
        try:
            fun()
        except Exception as caught:
            error = caught
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(error is not None)) and error is None:
        raise OSError("process 0 could not write the checkpoint; its own error says why")
    if error is not None:
        raise error


def _weakly_typed(array: jax.Array) -> jax.Array:
    """The scalar as JAX makes it of a Python number; as it is if it has axes, or JAX would choose another dtype."""
    if array.ndim == 0 and (weak := jnp.asarray(array.item())).dtype == array.dtype:
        return weak
    return array


def _orbax() -> Any:
    try:
        return importlib.import_module("orbax.checkpoint")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "orbax":
            raise
        raise ImportError('checkpoints need Orbax: run pip install "vsa-optax[checkpoint]"') from error


def _local_folder(directory: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(directory):
        raise ValueError(f"directory must be a local folder, got {os.fspath(directory)!r}")
    return Path(directory).absolute()


def _plain_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings as JSON gives them back: tuples are lists."""
    plain: dict[str, Any] = {}
    for key, value in (config or {}).items():
        if not isinstance(key, str):
            raise TypeError(f"config: the keys must be strings, got {key!r}")
        try:
            plain[key] = json.loads(_canonical(value))
        except (TypeError, ValueError) as error:
            raise TypeError(f"config[{key!r}] is {value!r}, which JSON cannot hold: {error}") from None
    return plain


def _canonical(value: Any) -> str:
    """The same text for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _sha256(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest | {"manifest_sha256": _sha256(manifest)}, indent=1, allow_nan=False)
    with path.open("x", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest; ``ValueError`` unless it is of this format version and as it was written."""
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"checkpoint {folder}: damaged: {_MANIFEST} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {folder}: damaged: {_MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"checkpoint {folder}: damaged: {_MANIFEST} does not hold a mapping")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"checkpoint {folder}: another format version: {version!r}, but this release reads {FORMAT_VERSION}"
        )
    written = manifest.pop("manifest_sha256", None)
    if written != _sha256(manifest):
        raise ValueError(f"checkpoint {folder}: damaged: {_MANIFEST} is not what was written: its hash differs")
    if files.folder_name(manifest["step"]) != folder.name.rpartition("-")[2]:
        raise ValueError(f"checkpoint {folder}: damaged: its manifest is that of step {manifest['step']}")
    return manifest


def _refuse(folder: Path, what: str, differences: list[str]) -> None:
    if differences:
        shown = differences[:_SHOWN]
        if len(differences) > _SHOWN:
            shown.append(f"and {len(differences) - _SHOWN} more")
        raise ValueError(f"checkpoint {folder}: {what}: {'; '.join(shown)}")


def _config_differences(saved: Any, given: Any, prefix: str = "") -> list[str]:
    """Each setting that differs, mappings within looked into."""
    differences = []
    for key in sorted(saved.keys() | given.keys()):
        name = prefix + key
        if key not in given:
            differences.append(f"{name} is {saved[key]!r} in the checkpoint, and not given here")
        elif key not in saved:
            differences.append(f"{name} is not in the checkpoint, {given[key]!r} here")
        elif isinstance(saved[key], dict) and isinstance(given[key], dict):
            differences += _config_differences(saved[key], given[key], f"{name}.")
        elif _canonical(saved[key]) != _canonical(given[key]):
            differences.append(f"{name} is {saved[key]!r} in the checkpoint, {given[key]!r} here")
    return differences


def _leaf_differences(entries: dict[str, dict[str, Any]], wanted: list[_Leaf]) -> list[str]:
    """Each leaf that is missing, left over or of another kind."""
    differences = []
    for leaf in wanted:
        have = _kind(entries[leaf.path]) if leaf.path in entries else "missing"
        if have != (want := _kind(leaf.entry())):
            differences.append(f"leaf {leaf.path} is {have} in the checkpoint, {want} in the template")
    paths = {leaf.path for leaf in wanted}
    for path, entry in entries.items():
        if path not in paths:
            differences.append(f"leaf {path} is {_kind(entry)} in the checkpoint, missing in the template")
    return differences


def _kind(entry: dict[str, Any]) -> str:
    return "None" if entry["shape"] is None else f"{entry['dtype']}{entry['shape']}"
