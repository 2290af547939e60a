"""The notebooks: stored clean, ready to install the package, and executed from top to bottom."""

import ast
import os
from pathlib import Path
from typing import Any

import pytest

import vsa_optax

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
for _package in ("flax", "ipykernel", "matplotlib", "sklearn"):
    pytest.importorskip(_package)

_ROOT = Path(__file__).parents[1]
_NOTEBOOKS = sorted((_ROOT / "notebooks").glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)


def _code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert "quickstart" in [path.stem for path in _NOTEBOOKS]


@every_notebook
def test_is_stored_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in _code_cells(notebook):
        assert not cell.outputs
        assert cell.execution_count is None


@every_notebook
def test_installs_from_one_variable_if_need_be(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0]
    assert first.cell_type == "code"
    lines = first.source.splitlines()
    (install,) = (number for number, line in enumerate(lines) if "pip install" in line)
    assert lines[install].split() == ["%pip", "install", "-q", '"$PACKAGE"']
    lines[install] = "    pass"
    tree = ast.parse("\n".join(lines))
    (variable,) = (node for node in tree.body if isinstance(node, ast.Assign))
    assert [ast.unparse(target) for target in variable.targets] == ["PACKAGE"]
    assert ast.literal_eval(variable.value).startswith("vsa-optax[")
    (condition,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(condition.test) == "importlib.util.find_spec('vsa_optax') is None"
    assert "pip install" not in "".join(cell.source for cell in notebook.cells[1:])


@every_notebook
def test_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel starts in another folder, and must find the package under test: it would install another one.
    monkeypatch.setenv("PYTHONPATH", str(Path(vsa_optax.__file__).parents[1]), prepend=os.pathsep)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    for cell in _code_cells(notebook):
        assert cell.execution_count is not None
        for output in cell.outputs:
            assert output.output_type != "error"
            assert "Warning" not in output.get("text", "")
