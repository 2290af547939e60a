"""The metadata of a release: one version everywhere, and a source archive with all files that the tests read.

`.ci/package` builds the archives and installs them; here nothing is built.
"""

import importlib.util
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

import vsa_optax

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version():
    version = SETTINGS["project"]["version"]
    assert vsa_optax.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert "\n## [Unreleased]\n" in changes
    releases = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", changes, flags=re.MULTILINE)
    assert releases[0] == version


def test_one_author_and_licence():
    (author,) = SETTINGS["project"]["authors"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f'name: "{author["name"]}"' in citation
    assert f"license: {SETTINGS['project']['license']}" in citation
    assert author["name"] in (ROOT / "NOTICE").read_text()


def test_the_source_archive_has_what_is_there():
    included = set(SETTINGS["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    assert {f"/{folder}" for folder in ("vsa_optax", "tests", "docs", "notebooks", "benchmarks")} <= included
    for path in included:
        assert (ROOT / path.removeprefix("/")).exists(), f"{path} is not there"


@pytest.fixture
def build(monkeypatch):
    """`hatch_build.py`, without Hatchling."""
    interface = types.ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", interface)
    for package in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_an_index_shows_has_no_relative_link(build):
    text = "![a](b.png)\nSee [docs](docs/x.md#y), [JAX](https://jax.dev) and `f(x)[0](y)`.\n"
    assert build.without_relative_links("See [docs](docs/x.md#y), [JAX](https://jax.dev).") == (
        "See docs, [JAX](https://jax.dev)."
    )
    assert build.without_relative_links(text).startswith("See docs, [JAX](https://jax.dev)")
    hook = build.ReadmeHook()
    hook.root = str(ROOT)
    metadata = {}
    hook.update(metadata)
    assert not re.findall(r"\]\((?!https?://)[^)]*\)", metadata["readme"]["text"])
    assert len(metadata["readme"]["text"]) > 1000
