"""The manifest of a checkpoint, JSON that holds its own hash, and the settings in it.

`read` returns the manifest given to `write`, or raises ``ValueError`` with the reason. `config_differences` compares
settings.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vsa_optax import checkpoint_files

FORMAT_VERSION = 1
NAME = "manifest.json"
_SHOWN = 10  # The number of differences that an error names.


def write(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest with its hash; the file is on the disk when this returns."""
    text = json.dumps(manifest | {"manifest_sha256": sha256(manifest)}, indent=1, allow_nan=False)
    with path.open("x", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Any]:
    """Reads the manifest; ``ValueError`` unless it has this format version and its hash is right."""
    path = folder / NAME
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"checkpoint {folder}: damaged: {NAME} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {folder}: damaged: {NAME} cannot be read: {error}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"checkpoint {folder}: damaged: {NAME} does not hold a mapping")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"checkpoint {folder}: another format version: {version!r}, but this release reads {FORMAT_VERSION}"
        )
    written = manifest.pop("manifest_sha256", None)
    if written != sha256(manifest):
        raise ValueError(f"checkpoint {folder}: damaged: {NAME} is not what was written: its hash differs")
    if checkpoint_files.folder_name(manifest["step"]) != folder.name.rpartition("-")[2]:
        raise ValueError(f"checkpoint {folder}: damaged: its manifest is that of step {manifest['step']}")
    return manifest


def refuse(folder: Path, what: str, differences: list[str]) -> None:
    """``ValueError`` that names the differences, if there are any."""
    if differences:
        shown = differences[:_SHOWN]
        if len(differences) > _SHOWN:
            shown.append(f"and {len(differences) - _SHOWN} more")
        raise ValueError(f"checkpoint {folder}: {what}: {'; '.join(shown)}")


def plain_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings as JSON returns them: tuples become lists."""
    plain: dict[str, Any] = {}
    for key, value in (config or {}).items():
        if not isinstance(key, str):
            raise TypeError(f"config: the keys must be strings, got {key!r}")
        try:
            plain[key] = json.loads(_canonical(value))
        except (TypeError, ValueError) as error:
            raise TypeError(f"config[{key!r}] is {value!r}, which JSON cannot hold: {error}") from None
    return plain


def config_differences(saved: Any, given: Any, prefix: str = "") -> list[str]:
    """Describes each setting that differs, including those in nested mappings."""
    differences = []
    for key in sorted(saved.keys() | given.keys()):
        name = prefix + key
        if key not in given:
            differences.append(f"{name} is {saved[key]!r} in the checkpoint, and not given here")
        elif key not in saved:
            differences.append(f"{name} is not in the checkpoint, {given[key]!r} here")
        elif isinstance(saved[key], dict) and isinstance(given[key], dict):
            differences += config_differences(saved[key], given[key], f"{name}.")
        elif _canonical(saved[key]) != _canonical(given[key]):
            differences.append(f"{name} is {saved[key]!r} in the checkpoint, {given[key]!r} here")
    return differences


def sha256(value: Any) -> str:
    """The hash of a value; equal values have the same hash."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _canonical(value: Any) -> str:
    """The value as JSON text; equal values have the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
