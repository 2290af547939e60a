"""`typed_usage.py` is for the type checker; here it is run, and seen to leave nothing out."""

import ast
import inspect
import pathlib

import typed_usage

import vsa_optax

TREE = ast.parse(pathlib.Path(typed_usage.__file__).read_text())

OTHERS = ("compress_gradients", "TritCodec", "HypervectorCodec")


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
    for name in ("predict_gradients", "phase_switched", "value_and_grad_by_phase", *OTHERS):
        arguments = inspect.signature(getattr(vsa_optax, name)).parameters
        named = {argument for argument, p in arguments.items() if p.kind == p.KEYWORD_ONLY}
        assert named <= given[name]
