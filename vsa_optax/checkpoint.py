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

Flax nnx, whose objects give their arrays and take them back:

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

from vsa_optax import checkpoint_files, checkpoint_leaves, checkpoint_manifest
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
    """Reads a checkpoint into the structure, and onto the devices, of ``template``.

    Everything is checked before any array is read: the format version, the settings, every leaf's place, shape and
    dtype, and the hash of every file. A damaged checkpoint is refused, not passed over for an older one, which can be
    asked for by its step. The hashes find accidents; they are no signature. A scalar that states did not have when the
    checkpoint was made (``ignored_gradients``, what the guard knows of the way) is restored as 0.

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
        FileNotFoundError: there is no folder, no checkpoint in it, or none of that step.
        TypeError: a template leaf that is no array; a ``config`` that JSON cannot hold.
        ValueError: another format version; other settings, each named with both values; leaves that are missing, left
            over, or of another shape or dtype, each named; a missing or damaged manifest or file, named.

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
    entries = checkpoint_leaves.with_added_scalars(stored, wanted)
    checkpoint_manifest.refuse(folder, "other leaves", checkpoint_leaves.differences(entries, wanted))
    checkpoint_manifest.refuse(folder, "damaged", checkpoint_files.differences(folder, manifest["files"]))

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
    return max(checkpoint_files.whole(_local_folder(directory)), default=None)


def _in_process_0(fun: Callable[[], None]) -> None:
    """Process 0 calls ``fun``, and the others wait until it has; where it fails, it fails in all."""
    error = None
    if jax.process_index() == 0:
        try:
            fun()
        except Exception as caught:
            error = caught
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils  # One process needs none of it.

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
