"""Checkpoints of a whole training state through Orbax, written atomically and verified when they are restored.

`save` writes a tree of arrays to a folder. `restore` reads the same bits back, given a template such as a fresh state.
Each array gets the sharding of the template's array:

    step_00000042/arrays/        Orbax's own files, one array per leaf
    step_00000042/manifest.json  format version, settings and their fingerprint, all leaves, all files' sizes and hashes

The folder is written under another name, flushed to the disk, and renamed when it is complete. The remains of a killed
process do not count as a checkpoint, and the next `save` removes them. A checkpoint holds JSON and arrays only; nothing
is unpickled.

Besides Orbax's own work, saving and restoring each compute a SHA-256 over the files. The module needs the extra
``vsa-optax[checkpoint]``, a POSIX file system, and a separate folder for each run.

With several processes (``jax.distributed``), all call `save` and `restore` with a folder that all can access. Each
process writes and reads its own shards of global arrays, and process 0 does the rest. `save` returns in all processes,
or fails in all, once process 0 is done. Another number of processes can restore the checkpoint.

Flax linen, whose ``TrainState`` is a tree of arrays once its step is an array:

    >>> import tempfile
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, vsa_optax
    >>> from flax.training.train_state import TrainState
    >>> from vsa_optax import checkpoint
    >>> settings = dict(warmup_steps=2, full_steps=1, predict_steps=4)
    >>> def fresh_state():
    ...     net, opt = nn.Dense(1), vsa_optax.phase_switched(optax.adamw(0.1), phases=vsa_optax.Cycle(**settings))
    ...     params = net.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    ...     return TrainState.create(apply_fn=net.apply, params=params, tx=opt).replace(step=jnp.int32(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = checkpoint.save(folder, 42, fresh_state(), config=settings)
    ...     step, state = checkpoint.restore(folder, fresh_state(), config=settings)
    >>> step, state.params["kernel"].shape
    (42, (3, 1))

Flax nnx, whose objects are turned into arrays and updated from them:

    >>> from flax import nnx
    >>> def fresh_model():
    ...     model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    ...     opt = vsa_optax.phase_switched(optax.adamw(0.1), phases=vsa_optax.Cycle(**settings))
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

import importlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vsa_optax import checkpoint_files, checkpoint_leaves, checkpoint_manifest, checkpoint_upgrade
from vsa_optax.core import checks

FORMAT_VERSION = checkpoint_manifest.FORMAT_VERSION
_ARRAYS = "arrays"


def save(
    directory: str | os.PathLike[str],
    step: int,
    tree: Any,
    *,
    config: Mapping[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Writes ``tree`` as the checkpoint of ``step``, and returns once it is on the disk.

    If the process is killed or the machine loses power at any moment, all earlier checkpoints stay complete, and this
    one is complete or absent. A checkpoint of the same step is replaced; it stays valid until the new one is complete.

    Zero-size leaves, which Orbax refuses, and None are kept in the manifest only. Typed PRNG keys are kept as their
    data and the name of their generator. The weak type of a scalar is kept; that of a larger array is not.

    Args:
        directory: a local folder for the checkpoints of one run, created if missing. Its other files are left alone.
        step: the number of the checkpoint, ``>= 0``.
        tree: any pytree of arrays: parameters, optimizer state, batch statistics, or a dict of them all.
        config: the settings that the state was made with, which `restore` compares. It maps strings to JSON values,
            e.g. the lengths of a `vsa_optax.Cycle`. None is the empty mapping.
        keep: the number of checkpoints to keep, ``>= 1``: this one and the others of the highest steps. None keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        ImportError: if Orbax is not installed.
        TypeError: if a leaf is not an array, e.g. a Python number, or if JSON cannot represent ``config``.
        ValueError: if an argument is outside its range, if an array is deleted (donated), or, with several processes,
            if an array is not global.
        OSError: if this process or process 0 cannot write the folder. The unfinished checkpoint is removed.

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
    settings = checkpoint_manifest.plain_config(config)
    leaves, _ = checkpoint_leaves.flatten(tree)
    data = {leaf.key: leaf.to_store() for leaf in leaves if leaf.key is not None}
    final = root / checkpoint_files.folder_name(step)
    unfinished = root / f".saving-{final.name}"

    def finish() -> None:
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "config": settings,
            "config_fingerprint": checkpoint_manifest.sha256(settings),
            "leaves": [leaf.entry() for leaf in leaves],
            "files": checkpoint_files.describe(unfinished),
            "written_with": {"jax": jax.__version__, "orbax": getattr(ocp, "__version__", None)},
        }
        checkpoint_manifest.write(unfinished / checkpoint_manifest.NAME, manifest)
        checkpoint_files.publish(unfinished, final)

    _in_process_0(lambda: checkpoint_files.begin(root, unfinished))
    try:
        if data:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save(unfinished / _ARRAYS, args=ocp.args.PyTreeSave(data))
        _in_process_0(finish)
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if keep is not None and jax.process_index() == 0:
        others = checkpoint_files.whole(root)
        others.pop(step)
        for number in sorted(others, reverse=True)[keep - 1 :]:
            checkpoint_files.remove(others[number])
    return final


def restore(
    directory: str | os.PathLike[str],
    template: Any,
    *,
    step: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[int, Any]:
    """Reads a checkpoint into the structure and the shardings of ``template``.

    Everything is checked before any array is read: the format version, the settings, the place, shape and dtype of
    every leaf, and the hash of every file. A damaged checkpoint is an error. `restore` does not fall back to an older
    one; pass its step to read it. The hashes detect accidents; they are not a signature. A scalar that the library
    added to states after the checkpoint was made is restored as 0 (``ignored_gradients``, the guard's path lengths).

    Args:
        directory: the folder given to `save`.
        template: a tree of arrays or of ``jax.ShapeDtypeStruct``, e.g. the state of a fresh run, or ``jax.eval_shape``
            of it. Its values are not used. A restored array gets the sharding of its array or struct, if that has one.
            Arrays that are not committed to a device stay uncommitted; NumPy arrays stay NumPy arrays.
        step: the step of the checkpoint; None for the highest step.
        config: the settings, which must equal those given to `save`.

    Returns:
        ``(step, tree)``.

    Raises:
        ImportError: if Orbax is not installed.
        FileNotFoundError: if there is no folder, no checkpoint in it, or none of that step.
        TypeError: if a leaf of the template is not an array, or if JSON cannot represent ``config``.
        ValueError: if the format version or the settings differ, if leaves are missing, left over, or of another shape
            or dtype, or if the manifest or a file is missing or damaged. The error names each difference.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> from vsa_optax import checkpoint
        >>> settings = dict(warmup_steps=2, predict_steps=4)
        >>> opt = vsa_optax.phase_switched(optax.sgd(0.1), phases=vsa_optax.Cycle(**settings))
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
    settings = checkpoint_manifest.plain_config(config)
    wanted, treedef = checkpoint_leaves.flatten(template, values=False)
    folders = checkpoint_files.whole(root)
    if step is not None:
        step = checks.check_integer("step", step, 0)
    elif folders:
        step = max(folders)
    if step is None or step not in folders:
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        if not root.is_dir():
            raise FileNotFoundError(f"no {what} in {root}: the folder does not exist")
        there = f"there are those of steps {sorted(folders)}" if folders else "the folder holds none"
        raise FileNotFoundError(f"no {what} in {root}; {there}")
    folder = folders[step]
    manifest = checkpoint_manifest.read(folder)
    checkpoint_manifest.refuse(
        folder, "other settings", checkpoint_manifest.config_differences(manifest["config"], settings)
    )
    stored = {entry["path"]: entry for entry in manifest["leaves"]}
    entries = checkpoint_upgrade.upgraded(stored, wanted)
    checkpoint_manifest.refuse(folder, "other leaves", checkpoint_leaves.differences(entries, wanted))
    checkpoint_manifest.refuse(folder, "damaged", checkpoint_files.differences(folder, manifest["files"]))

    keys = [entries[leaf.path]["key"] for leaf in wanted]
    args: dict[str, Any] = {}
    for key, leaf in zip(keys, wanted, strict=True):
        if isinstance(key, list):  # An earlier release stored the elements of this array one by one.
            args |= {one: ocp.RestoreArgs(restore_type=np.ndarray) for one in key if one is not None}
        elif key is not None:
            args[key] = leaf.restore_args(ocp)
    data: dict[str, Any] = {}
    if args:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            item = dict.fromkeys(args, 0)
            restore_args = ocp.args.PyTreeRestore(item=item, restore_args=args)
            data = checkpointer.restore(folder / _ARRAYS, args=restore_args)

    def stored_data(key: str | list[str | None] | None, leaf: checkpoint_leaves.Leaf) -> Any:
        if isinstance(key, list):
            return np.asarray([0 if one is None else data[one] for one in key], leaf.value.dtype)
        return None if key is None else data[key]

    restored = [
        leaf.from_stored(stored_data(key, leaf), entries[leaf.path]) for key, leaf in zip(keys, wanted, strict=True)
    ]
    return step, jax.tree.unflatten(treedef, restored)


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """Returns the highest step that has a checkpoint, or None; the remains of a killed `save` do not count.

    It reads names only, since a folder gets its name when it is complete. `restore` checks the contents.

    Args:
        directory: the folder given to `save`. It need not exist.

    Returns:
        The step, or None.

    Example:
        >>> from vsa_optax import checkpoint
        >>> checkpoint.latest_step("no/such/folder") is None
        True
    """
    return max(checkpoint_files.whole(_local_folder(directory)), default=None)


def _in_process_0(fun: Callable[[], None]) -> None:
    """Calls ``fun`` in process 0 while the others wait for it. If it fails, all processes fail."""
    error = None
    if jax.process_index() == 0:
        try:
            fun()
        except Exception as caught:
            error = caught
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils  # A single process does not need it.

        if multihost_utils.broadcast_one_to_all(np.int32(error is not None)) and error is None:
            raise OSError("process 0 could not write the checkpoint; its own error says why")
    if error is not None:
        raise error


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
