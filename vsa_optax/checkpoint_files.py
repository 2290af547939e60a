"""The folders and files of checkpoints: a folder is complete or absent, and each file has a recorded size and hash.

step_00000042             complete
.saving-step_00000042     being written; worthless if left behind
.replaced-step_00000042   complete, and valid until its successor has its name
.removing-step_00000042   no longer a checkpoint

Orbax writes and reads the arrays. Its ``CheckpointManager`` would also name, replace and remove the folders, but:

- It refuses a step that exists, and ``Checkpointer.save(force=True)`` removes the old one before it writes the new one.
- It removes a checkpoint file by file under its own name. If it is killed then, it treats the rest as a checkpoint.
- It writes two files after a handler's last hook, ``finalize``, so the manifest cannot contain their hashes.
- It flushes neither folders nor its metadata to the disk, and if one process fails, the others wait for it.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

_WHOLE = re.compile(r"(?:\.replaced-)?step_(0\d{7}|[1-9]\d{7,})", re.ASCII)
_LEFTOVER = re.compile(r"\.(saving|removing|replaced)-(step_\d{8,})", re.ASCII)


def folder_name(step: int) -> str:
    """The name of a complete checkpoint's folder."""
    return f"step_{step:08d}"


def whole(root: Path) -> dict[int, Path]:
    """The complete checkpoints by step, including one that was being replaced when its process was killed."""
    names = sorted(os.listdir(root)) if root.is_dir() else []  # ".replaced-" comes before the name of its successor.
    return {int(match[1]): root / name for name in names if (match := _WHOLE.fullmatch(name))}


def begin(root: Path, unfinished: Path) -> None:
    """Removes the remains of killed saves, and creates the folder to write to."""
    root.mkdir(parents=True, exist_ok=True)
    flush_folder(root.parent)
    for entry in sorted(root.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if match and match[1] == "replaced" and not (root / match[2]).exists():
            entry.rename(root / match[2])
        elif match:
            shutil.rmtree(entry)
    unfinished.mkdir()


def publish(unfinished: Path, final: Path) -> None:
    """Gives the complete folder its final name; an older folder of that name stays readable until then."""
    for folder, _, _ in os.walk(unfinished):
        flush_folder(folder)
    replaced = final.with_name(f".replaced-{final.name}")
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    flush_folder(final.parent)
    if replaced.exists():
        remove(replaced)


def remove(folder: Path) -> None:
    """Removes a checkpoint: first its name, so that it never counts while incomplete, then its files."""
    shutil.rmtree(folder.rename(folder.with_name(f".removing-{folder.name.removeprefix('.replaced-')}")))


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Path, size and hash of every file below the folder; all files are on the disk when this returns."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): size_and_hash(path, flush=True) for path in paths}


def differences(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Describes each file that is missing, or whose size or hash differs; added files are ignored."""
    found = []
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != written["bytes"]:
            found.append(f"{name} has {size} bytes of {written['bytes']}")
        elif size_and_hash(path) != written:
            found.append(f"{name} is not what was written: its hash differs")
    return found


def size_and_hash(path: Path, *, flush: bool = False) -> dict[str, Any]:
    """``bytes`` and ``sha256`` of the file; with ``flush`` the file is on the disk when this returns."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest}


def flush_folder(folder: str | os.PathLike[str]) -> None:
    """Waits until the names in the folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
