"""Looks into a wheel and a source archive: ``python .ci/archives.py CLONE WHEEL SOURCE``; fails where one is wrong."""

import email
import email.policy
import pathlib
import re
import sys
import tarfile
import zipfile

# What a release leaves to the repository.
NOT_IN_SOURCE = {".ci", ".github", ".gitignore", ".pre-commit-config.yaml"}


def files_of(clone: pathlib.Path) -> set[str]:
    """All files of a fresh clone."""
    files = (path.relative_to(clone) for path in clone.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if path.parts[0] != ".git"}


def main(clone: str, wheel: str, source: str) -> None:
    """Raises an ``AssertionError`` that names the files."""
    files = files_of(pathlib.Path(clone))
    with tarfile.open(source) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    wanted = {file for file in files if file.partition("/")[0] not in NOT_IN_SOURCE}
    assert not wanted - packed, f"missing in the source archive: {sorted(wanted - packed)}"
    extra = packed - wanted - {"PKG-INFO", ".gitignore"}
    assert not extra, f"in the source archive, but not in the repository: {sorted(extra)}"

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (place,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(place), policy=email.policy.default)
    modules = {file for file in files if file.startswith("vsa_optax/")}
    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == modules, f"not the same in wheel and repository: {sorted(installed ^ modules)}"
    for licence in ("LICENSE", "NOTICE"):
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names), f"the wheel lacks {licence}"
    assert metadata["Author"] == "The vsa_optax authors", metadata["Author"]
    assert metadata["Requires-Python"] == ">=3.11", metadata["Requires-Python"]
    description = metadata.get_payload()
    relative = re.findall(r"\]\((?!https?://)[^)]*\)", description)
    assert len(description) > 1000, "the description is empty"
    assert not relative, f"links that lead nowhere on a package index: {relative}"
    print(f"{len(installed)} files in the wheel, {len(packed)} in the source archive, version {metadata['Version']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
