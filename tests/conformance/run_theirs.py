"""Runs one of Optax's own test modules on our transformations: ``python -m conformance.run_theirs SUITE``.

The module is the one in the installed wheel, where pytest collects it; this was written against Optax 0.2.8.
Its tables of optimizers are arguments of absl's ``parameterized.product`` and ``named_parameters``. Both are
replaced before pytest imports the module: a table of transformations becomes ours, every other argument stays,
and so do the bodies of the tests and their tolerances. The factories are found by name on ``optax.contrib`` or
on Optax's module of aliases.

Nothing is lost on the way without an error: a test that takes no table of transformations must be in `LEFT_OUT`,
every name in `LEFT_OUT` and `XFAILS` must exist, an expected failure must fail, and a skip is a failure.

Each module takes a process of its own: what is replaced, and 64-bit types, stay as they are until the end.
"""

import contextlib
import functools
import importlib.util
import itertools
import pathlib
import sys
import unittest
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from conformance.registered import BARE, BARE_CODECS, NEED_THE_LOSS, VARIANTS
from jax._src import compiler

MODULES = {
    "contrib": "optax.contrib._common_test",
    "alias": "optax._src.alias_test",
    "float64": "optax._src.float64_test",
    "sharding": "optax._src.sharding_test",
}

# Tests, or classes of tests, without a table of transformations, and what they test instead.
LEFT_OUT: dict[str, dict[str, str]] = {
    "contrib": {},
    "alias": {
        "test_explicit_dtype": "the dtype arguments of sgd, adam and adamw",
        "LBFGSTest": "L-BFGS",
    },
    "float64": {},
    "sharding": {"test_microbatch_with_explicit_sharding": "optax.microbatching; its table is one of shardings"},
}


class Xfail(NamedTuple):
    """Why a test cannot pass, and with which exception it fails."""

    reason: str
    raises: type[Exception] = AssertionError


_BLIND = Xfail(
    "phases of the default lengths extrapolate updates up to five steps ahead along a straight line; "
    "Rosenbrock's valley bends, and at this learning rate, where Adam alone converges, the run keeps circling "
    "the minimum at several times the tolerance of 3e-2"
)
XFAILS: dict[str, dict[str, Xfail]] = {
    "contrib": {"test_optimizers_default_lengths_rosenbrock_float32": _BLIND},
    "alias": {
        "test_optimization_default_lengths_rosenbrock_complex64": _BLIND,
    },
    "float64": {},
    "sharding": {},
}

# Arguments of tests that make no difference to a row which names no wrapper, as ours do not; one value is enough.
FOR_WRAPPERS = {"wrap"}

# Tests that are not repeated: `test_optimizers` has the same problems in float32.
REPEATED = {"test_optimization": {"dtype": (jnp.float32,)}}

# The tests that optimize until convergence, for 10000 or 30000 steps.
OPTIMIZING = {"test_optimizers", "test_optimization"}

# The one of them that calls its compiled step for each step, which takes ten times as long as the steps do.
CALLS_EACH_STEP = {"test_optimization"}
STRIDE = 100


def in_strides(step: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled ``step`` that takes its first two steps when it is called, and later ones a hundred at a time.

    In between it returns what it was given; the test makes a hundred times a hundred calls. It is one program for all
    of them: whether the second call compiles another is what Optax's test asks.
    """
    run = jax.jit(lambda num, carry: jax.lax.fori_loop(0, num, lambda _, carry: step(*carry), carry))
    calls = itertools.count(1)
    taken = 0

    def strided(*carry: Any) -> Any:
        nonlocal taken
        call = next(calls)
        if call > 2 and call % STRIDE:
            return carry
        taken, due = call, call - taken
        return run(due, carry)

    return strided


def with_steps_in_strides(test: Callable[..., None]) -> Callable[..., None]:
    """The test, with `in_strides` for what it compiles itself."""
    jit = jax.jit

    def jit_in_strides(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        is_of_the_test = function.__module__ == test.__module__
        return in_strides(function) if is_of_the_test else jit(function, *args, **kwargs)

    @functools.wraps(test)
    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        with unittest.mock.patch.object(jax, "jit", jit_in_strides):
            test(self, *args, **kwargs)

    return run


class OurTables:
    """The decorators in the place of absl's, and the pytest plugin that accounts for what they made."""

    def __init__(self, suite: str, parameterized: Any) -> None:
        self._suite = suite
        self._cases: set[str] = set()
        self._named_parameters = parameterized.named_parameters
        self._product = parameterized.product
        parameterized.named_parameters = self.named_parameters
        parameterized.product = self.product

    def product(self, *tables: Sequence[Mapping[str, Any]], **grid: Sequence[Any]) -> Callable[..., Any]:
        """Our rows, in the place of a table of optimizers, with every combination of the rest."""
        if not tables or "opt_name" not in tables[0][0]:
            return self._product(*tables, **grid)
        fields = tables[0][0].keys()
        grid = {name: values[:1] if name in FOR_WRAPPERS else values for name, values in grid.items()}

        def decorate(test: Callable[..., None]) -> Any:
            cases = {}
            repeated = REPEATED.get(test.__name__, {})
            left = {name: [value for value in grid[name] if value not in repeated.get(name, ())] for name in grid}
            for row, values in itertools.product(self._rows(test.__name__), itertools.product(*left.values())):
                case = dict.fromkeys(fields) | row | dict(zip(left, values, strict=True))
                cases["_".join([row["opt_name"], *map(_name, values)])] = case
            return self._generate(test, [{"testcase_name": name, **case} for name, case in cases.items()])

        return decorate

    def named_parameters(self, *cases: Any) -> Callable[..., Any]:
        """Ours in the place of ``(name, factory, arguments)`` or ``(name, transformation)``."""
        listed = list(cases[0]) if len(cases) == 1 else list(cases)
        kind = listed[0][1]
        checked = {name: variant for name, variant in VARIANTS.items() if self._suite in variant.suites}
        ours: list[tuple[Any, ...]]
        if isinstance(kind, optax.GradientTransformation):
            ours = [(name, variant.factory(variant.learning_rate)) for name, variant in checked.items()]
            ours += [(name, factory()) for name, factory in (BARE | BARE_CODECS).items()]
        elif callable(kind):
            ours = [(name, v.factory, {"learning_rate": v.learning_rate}) for name, v in checked.items()]
            ours += [(name, factory, {}) for name, factory in (BARE | BARE_CODECS).items()]
        else:
            return self._named_parameters(*cases)
        return lambda test: self._generate(test, ours)

    def _generate(self, test: Callable[..., None], cases: list[Any]) -> Any:
        if test.__name__ in CALLS_EACH_STEP:
            test = with_steps_in_strides(test)
        names = [case["testcase_name"] if isinstance(case, dict) else case[0] for case in cases]
        self._cases |= {f"{test.__name__}_{name}" for name in names}
        return self._named_parameters(*cases)(test)

    def _rows(self, test: str) -> Iterator[dict[str, Any]]:
        for name, variant in VARIANTS.items():
            if variant.optimizes if test in OPTIMIZING else self._suite in variant.suites:
                yield {"opt_name": name, "opt_kwargs": {"learning_rate": variant.learning_rate}}
        if self._suite == "contrib":  # Optax's tests give the loss to optimizers of these names.
            for name, variant in NEED_THE_LOSS.items():
                if test in OPTIMIZING or self._suite in variant.suites:
                    yield {"opt_name": name, "opt_kwargs": {"learning_rate": variant.learning_rate}}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves out what is in `LEFT_OUT`, marks what is in `XFAILS`, and misses nothing."""
        left_out, xfails = LEFT_OUT[self._suite], XFAILS[self._suite]
        used = set()
        ours, others = [], []
        for item in items:
            if item.name in self._cases:
                ours.append(item)
                continue
            assert item.parent is not None
            reasons = {name for name in left_out if name == item.parent.name or item.name.startswith(name)}
            if not reasons:
                raise pytest.UsageError(
                    f"{item.nodeid} of Optax {optax.__version__} does not run on ours: it has no table of "
                    "transformations that is recognized. Recognize it, or leave the test out by name"
                )
            used |= reasons
            others.append(item)
        missing = (self._cases | xfails.keys()) - {item.name for item in ours} | left_out.keys() - used
        if missing:
            raise pytest.UsageError(f"Optax {optax.__version__} has no tests of these names: {sorted(missing)}")
        for item in ours:
            if item.name in xfails:
                reason, raises = xfails[item.name]
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason, raises=raises))
        items[:] = ours
        config.hook.pytest_deselected(items=others)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        """A skip is a failure."""
        report = yield
        if report.skipped and not hasattr(report, "wasxfail"):
            report.outcome, report.longrepr = (
                "failed",
                f"a skip, none of which is expected: {report.longrepr}",
            )
        return report


class _Release(str):
    """A release that compares by its numbers."""

    __slots__ = ()

    def __lt__(self, other: str) -> bool:
        return _numbers(self) < _numbers(other)


def _numbers(release: str) -> list[int]:
    return [int(part) for part in release.split(".")[:3] if part.isdigit()]


def compile_once() -> None:
    """Has programs of the same text compiled once: JAX does it for the same function, and these tests make their own.

    It is no cache of what JAX counts as a compilation, about which some tests ask.
    """
    compile_and_load = compiler.backend_compile_and_load
    programs: dict[tuple[str, str, bytes], Any] = {}

    def compiled(backend: Any, module: Any, devices: Any, options: Any, host_callbacks: Sequence[Any]) -> Any:
        if host_callbacks:
            return compile_and_load(backend, module, devices, options, host_callbacks)
        key = str(module), str(list(devices)), options.SerializeAsString()
        if key not in programs:
            programs[key] = compile_and_load(backend, module, devices, options, host_callbacks)
        return programs[key]

    compiler.backend_compile_and_load = compiled


def _name(value: Any) -> str:
    """The part of a test's name for the value of a parameter."""
    return getattr(value, "__name__", str(value)).removeprefix("_setup_")


def main(suite: str, *pytest_args: str) -> int:
    """The exit status: zero if every test passes, or fails as expected, and there are some."""
    spec = importlib.util.find_spec(MODULES[suite])
    if spec is None or spec.origin is None or not pathlib.Path(spec.origin).is_file():
        sys.exit(
            f"Optax {optax.__version__} is installed without its test module {MODULES[suite]}, run here: "
            "install a release whose wheel has it, such as 0.2.8"
        )
    try:
        from absl.testing import parameterized
    except ImportError:
        sys.exit("Optax's tests need absl.testing: pip install absl-py")
    for name, variant in (VARIANTS | NEED_THE_LOSS).items():
        setattr(optax.contrib, name, variant.factory)
        setattr(optax._src.alias, name, variant.factory)
    # A test ends where it fails first, as if it had no parts: pytest then sees one outcome a test.
    unittest.TestCase.subTest = lambda self, *args, **kwargs: contextlib.nullcontext()
    # Optax's tests of sharding skip themselves for JAX < 0.7.2, compared as strings: for JAX 0.10, that is.
    jax.__version__ = _Release(jax.__version__)
    # Before Optax's tests of sharding set XLA_FLAGS: with those of this run, compilation takes half the time.
    jax.devices()
    compile_once()
    site = pathlib.Path(optax.__file__).parents[1]
    arguments = [
        spec.origin,
        f"--rootdir={site}",
        "-c",
        "/dev/null",
        "-p",
        "no:cacheprovider",
        "--assert=plain",
    ]
    # Warnings are errors, except for one that Optax's module of sharding tests causes when it is imported.
    arguments += ["-W", "error", "-W", "ignore:Specifying a key will be required:UserWarning"]
    return pytest.main([*arguments, *pytest_args], plugins=[OurTables(suite, parameterized)])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
