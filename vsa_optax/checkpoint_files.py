"""Folders that are whole or not there, and files that are as they were written: what is under a checkpoint.

step_00000042             whole
.saving-step_00000042     being written; left behind, worthless
.replaced-step_00000042   whole, and in force until its successor has its name
.removing-step_00000042   no longer a checkpoint
"""

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

_WHOLE = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"\.(saving|removing|replaced)-(step_\d{8,})")


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Path, size and hash of every file in the folder and below, all of which are on the disk when this returns."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): size_and_hash(path, flush=True) for path in paths}


def size_and_hash(path: Path, *, flush: bool = False) -> dict[str, Any]:
    """``bytes`` and ``sha256`` of the file; with ``flush`` it is on the disk when this returns."""
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


def file_differences(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Each file that is missing, or whose size or hash is not as written; what was added is not looked at."""
    differences = []
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            differences.append(f"{name} is missing")
        elif (size := path.stat().st_size) != written["bytes"]:
            differences.append(f"{name} has {size} bytes of {written['bytes']}")
        elif size_and_hash(path) != written:
            differences.append(f"{name} is not what was written: its hash differs")
    return differences


def folder_name(step: int) -> str:
    """The name of a whole checkpoint."""
    return f"step_{step:08d}"


def whole(root: Path) -> dict[int, Path]:
    """The complete checkpoints; one that was being replaced when its process was killed is one of them."""
    names = set(os.listdir(root)) if root.is_dir() else set()
    folders: dict[int, Path] = {}
    for name in names:
        match = _WHOLE.fullmatch(name.removeprefix(".replaced-"))
        if (
            match
            and name[-len(match[0]) :] == folder_name(int(match[1]))
            and (name == match[0] or match[0] not in names)
        ):
            folders[int(match[1])] = root / name
    return folders


def publish(root: Path, unfinished: Path, final: Path) -> None:
    """Gives the complete folder its name; one of that name stays readable until then."""
    replaced = root / f".replaced-{final.name}"
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    flush_folder(root)
    if replaced.exists():
        remove(root, replaced)


def remove(root: Path, folder: Path) -> None:
    """Takes a checkpoint's name away, so that it is not half a one, and then its files."""
    doomed = folder.rename(root / f".removing-{folder.name.removeprefix('.replaced-')}")
    shutil.rmtree(doomed)


def clean(root: Path) -> None:
    """Undoes what killed saves began."""
    for entry in sorted(root.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if match and match[1] == "replaced" and not (root / match[2]).exists():
            entry.rename(root / match[2])
        elif match:
            shutil.rmtree(entry)
