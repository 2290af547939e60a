"""The notebooks: stored as they ran, ready to install the package, and executed from top to bottom."""

import ast
import asyncio
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vsa_optax

jupyter_client = pytest.importorskip("jupyter_client")
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
def test_is_stored_as_it_ran(path: Path) -> None:
    """From top to bottom in one go, without times, paths and warnings; so it can be read without being run."""
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = _code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(cell.metadata for cell in cells)
    assert not cells[0].outputs
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_together_they_are_small() -> None:
    assert sum(path.stat().st_size for path in _NOTEBOOKS) < 1_000_000


@every_notebook
def test_installs_from_one_variable_if_need_be(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0]
    assert first.cell_type == "code"
    lines = first.source.splitlines()
    (install,) = (number for number, line in enumerate(lines) if "pip install" in line)
    assert lines[install].strip() == '%pip install -q "vsa-optax[demo] @ $URL"'
    lines[install] = "    pass"
    tree = ast.parse("\n".join(lines))
    (variable,) = (node for node in tree.body if isinstance(node, ast.Assign))
    assert [ast.unparse(target) for target in variable.targets] == ["URL"]
    assert ast.literal_eval(variable.value) == ""
    assert any(line.startswith("#") and "git+https://" in line for line in lines)
    (condition,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(condition.test) == "importlib.util.find_spec('vsa_optax') is None"
    condition.test = ast.Constant(value=True)  # As if it were not installed.
    with pytest.raises(ValueError, match="put the address of the package in URL"):
        exec(compile(ast.fix_missing_locations(tree), path.name, "exec"), {})
    assert "pip install" not in "".join(cell.source for cell in notebook.cells[1:])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Any], None]]:
    """Runs a notebook, all in one kernel, which imports their libraries once; each finds it without any name."""
    manager = jupyter_client.AsyncKernelManager(kernel_name="python3")
    resources = {"metadata": {"path": str(tmp_path_factory.mktemp("notebooks"))}}

    def run(notebook: Any) -> None:
        notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
        client = nbclient.NotebookClient(notebook, km=manager, timeout=300, resources=resources)
        try:
            client.execute()  # The first one starts the kernel.
        finally:
            if client.kc is not None:
                client.kc.stop_channels()

    with pytest.MonkeyPatch.context() as environment:
        # The kernel starts in another folder, and must find the package under test: it would install another one.
        environment.setenv("PYTHONPATH", str(Path(vsa_optax.__file__).parents[1]), prepend=os.pathsep)
        environment.setenv("MPLBACKEND", "Agg")
        yield run
    if manager.has_kernel:
        asyncio.run(manager.shutdown_kernel(now=True))


def _words(cell: Any) -> list[str]:
    """The output of a cell without its numbers, and without names that depend on them, such as those of phases."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?|\b[A-Z]{4,}\b", "#", text).split()


@pytest.mark.apart
@every_notebook
def test_runs_from_top_to_bottom(path: Path, run: Callable[[Any], None]) -> None:
    notebook = nbformat.read(path, as_version=4)
    stored = [_words(cell) for cell in _code_cells(notebook)]
    run(notebook)
    assert [_words(cell) for cell in _code_cells(notebook)[1:]] == stored
    for cell in _code_cells(notebook):
        assert cell.execution_count is not None
        for output in cell.outputs:
            assert output.output_type != "error"
            assert "Warning" not in output.get("text", "")


@pytest.mark.apart
def test_finds_no_name_of_the_notebook_before(run: Callable[[Any], None]) -> None:
    first, second = (nbformat.v4.new_code_cell(source) for source in ("import ast", "ast"))
    run(nbformat.v4.new_notebook(cells=[first]))
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="name 'ast' is not defined"):
        run(nbformat.v4.new_notebook(cells=[second]))


def _file_of(module: str) -> Path | None:
    """Where a package, or a module in one, is written in Python; found without importing it."""
    root, *names = module.split(".")
    spec = importlib.util.find_spec(root)
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *names)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.exists():
                return file
    return None


def _imported(tree: ast.AST) -> dict[str, str]:
    """The imports anywhere in the tree, by the names that they get."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


@every_notebook
def test_imports_the_submodules_that_it_uses(path: Path) -> None:
    """A package has a submodule, such as `jax.flatten_util`, once anything imports it: another notebook may have."""
    tree = ast.parse("\n".join(cell.source for cell in _code_cells(nbformat.read(path, as_version=4))[1:]))
    imported = _imported(tree)
    assert "jax" in imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            package = imported[node.value.id]
            file = _file_of(package)
            is_submodule = file is not None and file.name == "__init__.py" and _file_of(f"{package}.{node.attr}")
            if is_submodule and f"{package}.{node.attr}" not in imported.values():
                assert node.attr in _imported(ast.parse(file.read_text())), f"{package}.{node.attr} is not imported"


def test_eight_devices_are_asked_for_before_jax_is_imported() -> None:
    """The run does not tell: where another notebook has started JAX, it has the devices that the tests ask for."""
    notebook = nbformat.read(_ROOT / "notebooks" / "data_parallel.ipynb", as_version=4)
    lines = "\n".join(cell.source for cell in _code_cells(notebook)).splitlines()
    (asked,) = (number for number, line in enumerate(lines) if line.startswith('os.environ["XLA_FLAGS"] = '))
    assert "--xla_force_host_platform_device_count=8" in lines[asked]
    assert asked < lines.index("import jax")
