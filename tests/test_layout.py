"""The layout: the tests of each module, the imports, the modules that a call enters, and the completed names."""

import ast
import collections
import functools
import graphlib
import itertools
import json
import pathlib
import subprocess
import sys

import jedi
import pytest

import vsa_optax

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "vsa_optax"
# Modules whose behaviour is tested through what uses them; every other has a test file in its place.
TESTED_IN = {
    "accumulation/inner_optimizer.py": "accumulation/test_multi_steps.py",
    "__init__.py": "test_import.py",
    "checkpoint_files.py": "test_checkpoint.py",
    "checkpoint_leaves.py": "test_checkpoint.py",
    "checkpoint_manifest.py": "test_checkpoint.py",
    "compression/averaging.py": "compression/test_pmean.py",
    "compression/exchange.py": "compression/test_pmean.py",
    "core/kinds.py": "test_step_programs.py",
    "core/types.py": "test_typing.py",
    "kernels/gpu/relay_kernel.py": "kernels/gpu/test_trit_kernels.py",
    "kernels/gpu/rows.py": "kernels/gpu/test_trit_kernels.py",
    "core/versions.py": "core/test_mesh.py",
    "kernels/small_systems.py": "prediction/fits/test_secant_fit.py",
    "prediction/leap.py": "prediction/test_multisecant.py",
    "prediction/function_checks.py": "prediction/test_value_and_grad.py",
    "prediction/step.py": "prediction/test_update.py",
    "prediction/unsuited.py": "test_nesting.py",
    "probe_report.py": "test_probe.py",
    "probe_runs.py": "test_probe.py",
}
# The folders that each folder imports besides itself.
MAY_IMPORT = {
    "prediction": {"codecs", "core", "kernels"},
    "compression": {"codecs", "core", "kernels"},
    "accumulation": {"codecs", "core", "kernels"},
    "codecs": {"core", "kernels"},
    "core": {"kernels"},
    "kernels": set(),
}
# For each call, how many modules it may enter and how often it may go from one to another.
BOUNDS = {"phase_switched": (18, 165), "multisecant": (11, 115), "encode": (10, 45), "ternary_multi_steps": (19, 228)}
WALKS = """
import json, pathlib, sys
import jax, jax.numpy as jnp, optax
import vsa_optax

package = pathlib.Path(vsa_optax.__file__).parent

def places_of(function, *arguments):
    stack, places = [], []

    def note(frame, event, _):
        file = frame.f_code.co_filename
        if event not in ("call", "return") or not file.startswith(str(package)):
            return
        if event == "call":
            stack.append(pathlib.Path(file).relative_to(package).as_posix())
        elif stack:
            stack.pop()
        places.extend(stack[-1:])

    sys.setprofile(note)
    try:
        jax.make_jaxpr(function)(*arguments)
    finally:
        sys.setprofile(None)
    return places

params = jnp.ones((64, 64))
switched = vsa_optax.phase_switched(optax.adamw(1.0), learning_rate=1e-3)
leaping = vsa_optax.multisecant(optax.adamw(1e-3))
summed = vsa_optax.ternary_multi_steps(optax.adam(1e-3), 4)
print(json.dumps({
    "phase_switched": places_of(switched.update, params, switched.init(params), params),
    "multisecant": places_of(
        lambda g, s, p: leaping.update(g, s, p, value=1.0), params, leaping.init(params), params
    ),
    "encode": places_of(vsa_optax.TritCodec().encode, params),
    "ternary_multi_steps": places_of(summed.update, params, summed.init(params), params),
}))
"""


def is_more_than_a_docstring(file):
    return any(not isinstance(node, ast.Expr) for node in ast.parse(file.read_text()).body)


MODULES = [
    file.relative_to(PACKAGE).as_posix() for file in sorted(PACKAGE.rglob("*.py")) if is_more_than_a_docstring(file)
]


def dotted(module):
    parts = pathlib.PurePosixPath(module).with_suffix("").parts
    return ".".join(["vsa_optax", *(part for part in parts if part != "__init__")])


BY_NAME = {dotted(module): module for module in MODULES}


def folder_of(module):
    """The room; nothing for a module beside the rooms."""
    return module.rpartition("/")[0].partition("/")[0]


def place_of_tests(module):
    path = pathlib.PurePosixPath(module)
    return path.with_name(f"test_{path.name}").as_posix()


@functools.cache
def imported(module):
    """Dotted names of all that a module imports, wherever in it: modules, and names in modules."""
    found = []
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def uses(module):
    """Which of our modules a module imports, or names of; ``__init__.py`` is the package itself."""
    ours = [name for name in imported(module) if name.partition(".")[0] == "vsa_optax"]
    return {BY_NAME.get(name) or BY_NAME.get(name.rpartition(".")[0], "__init__.py") for name in ours}


@functools.cache
def walks():
    done = subprocess.run([sys.executable, "-c", WALKS], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", MODULES)
def test_a_modules_tests_are_found_by_its_name(module):
    place = place_of_tests(module)
    if module in TESTED_IN:
        assert not (TESTS / place).exists(), f"{place} exists: {module} is no exception"
        assert (TESTS / TESTED_IN[module]).is_file()
    else:
        assert (TESTS / place).is_file()


def test_exceptions_and_test_files_in_folders_have_a_module():
    assert set(TESTED_IN) <= set(MODULES)
    mirrored = {place_of_tests(module) for module in MODULES}
    for folder in MAY_IMPORT:
        of_folder = {file.relative_to(TESTS).as_posix() for file in (TESTS / folder).rglob("test_*.py")}
        assert of_folder <= mirrored


@pytest.mark.parametrize("module", [module for module in MODULES if folder_of(module)])
def test_rooms_import_only_what_they_stand_on(module):
    folder = folder_of(module)
    for used in uses(module):
        assert folder_of(used) in {folder, *MAY_IMPORT[folder]}, f"{module} imports {used}"
    if folder == "kernels":
        assert not [name for name in imported(module) if name.partition(".")[0] == "optax"]


def test_no_module_imports_itself_by_way_of_others():
    sorter = graphlib.TopologicalSorter({module: uses(module) for module in MODULES})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("call", BOUNDS)
def test_a_traced_call_stays_in_few_modules(call):
    """And seldom goes from one to another, by a call or a return, so that it can be followed by reading."""
    most_modules, most_moves = BOUNDS[call]
    places = walks()[call]
    moves = collections.Counter((a, b) for a, b in itertools.pairwise(places) if a != b)
    frequent = "\n".join(f"{count:4} {a} -> {b}" for (a, b), count in moves.most_common(12))
    assert 1 < len(set(places)) <= most_modules, sorted(set(places))
    assert moves.total() <= most_moves, f"{moves.total()} moves, the most frequent:\n{frequent}"


def test_dir_is_what_is_public():
    assert dir(vsa_optax) == sorted([*vsa_optax.__all__, "__version__"])


def test_completion_offers_what_is_public(monkeypatch, tmp_path):
    """Jedi lists the files of any package; private names are tolerated, those of other modules are not."""
    monkeypatch.setattr(jedi.settings, "cache_directory", tmp_path)
    text = "import vsa_optax\nvsa_optax."
    script = jedi.Script(text, project=jedi.Project(TESTS.parent), environment=jedi.InterpreterEnvironment())
    offered = {completion.name for completion in script.complete()}
    files = {path.stem for path in PACKAGE.iterdir()}
    assert set(vsa_optax.__all__) <= offered
    assert {name for name in offered if not name.startswith("_")} <= files | set(vsa_optax.__all__)
