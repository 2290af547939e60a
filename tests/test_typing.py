"""`typed_usage.py` and `typed_mistakes.py` are for the type checker; here they are seen to leave nothing out."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import tomllib
import typing

import pytest
import typed_usage

import vsa_optax
from vsa_optax import accumulation, compression, prediction

HERE = pathlib.Path(typed_usage.__file__).parent
TREE = ast.parse(pathlib.Path(typed_usage.__file__).read_text())
MARK = "  # type: ignore["
MISTAKES = (HERE / "typed_mistakes.py").read_text().splitlines()

OTHERS = ("compress_gradients", "TritCodec", "HypervectorCodec")
OTHERS += ("Secants", "Window", "Recursive", "Momentum", "Guarded", "Cycle", "AdaptiveCycle", "LegacyCycle")
OTHERS += ("QualityCycle", "momentum_predictor", "track_loss")


def test_typed_usage_runs():
    typed_usage.main()


def test_typed_usage_covers_every_public_name():
    used = {node.id for node in ast.walk(TREE) if isinstance(node, ast.Name)}
    assert set(vsa_optax.__all__) <= used


def test_typed_usage_gives_every_argument():
    given: dict[str, set[str | None]] = {}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            given.setdefault(node.func.id, set()).update(keyword.arg for keyword in node.keywords)
    for name in ("predict_gradients", "phase_switched", "value_and_grad_by_phase", "multisecant", *OTHERS):
        arguments = inspect.signature(getattr(vsa_optax, name)).parameters
        named = {argument for argument, p in arguments.items() if p.kind == p.KEYWORD_ONLY}
        assert named <= given[name]


@pytest.mark.parametrize(
    "mistake",
    [
        'predict_gradients(predictor="secants")',
        "phase_switched(opt, predictor=Secants)",
        'Window(predicts="updates")',
        "TritCodec(4)",
        'accumulate_ternary(4, rounding="near")',
        "accumulate_ternary(4, trits=5)",
        "value_and_grad_by_phase(loss)(params)",
        "value_and_grad_by_phase(loss)(params, state)",
        'vsa.bundle(x, majority="x")',
        'trits.quantize_deterministic(x, rule="x")',
    ],
)
def test_typed_mistakes_holds(mistake):
    assert [line.partition(MARK)[0].strip() for line in MISTAKES if MARK in line].count(mistake) == 1


def test_a_mistake_that_is_not_noticed_any_more_is_an_error():
    settings = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"]  # So warn_unused_ignores is on.
    assert settings.get("warn_unused_ignores", True)
    assert {f"tests/{name}.py" for name in ("typed_usage", "typed_mistakes")} <= set(settings["files"])


def test_annotations_are_names_at_run_time():
    """Optax reads them, and so may others: of what is public, and of the states."""
    for name in vsa_optax.__all__:
        typing.get_type_hints(getattr(vsa_optax, name))
    for room in (accumulation, compression, prediction):
        for found in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            for name, value in vars(importlib.import_module(found.name)).items():
                if name.endswith("State") and hasattr(value, "_fields"):
                    assert typing.get_type_hints(value).keys() == set(value._fields)


def test_the_type_checker_is_told_the_names_that_are_loaded():
    """The package writes its public names down three times: for both kinds of import, and for readers."""
    (block,) = [node for node in ast.parse(inspect.getsource(vsa_optax)).body if is_for_type_checkers(node)]
    imported = {alias.name: statement.module for statement in block.body for alias in statement.names}
    homes = {name: f"vsa_optax.{home}" for name, home in vsa_optax._HOMES.items()}
    assert imported == {
        **homes,
        **dict.fromkeys(("checkpoint", "plots", "trits", "vsa"), "vsa_optax"),
        "probe": "vsa_optax.probe",
    }
    assert sorted(imported) == vsa_optax.__all__


def is_for_type_checkers(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Attribute) and node.test.attr == "TYPE_CHECKING"
