"""The configuration of all tests: eight host devices, programs compiled quickly, and deterministic Hypothesis.

Most of a run's time would be the compilation of some thousand small programs that run a few times. So XLA skips its
optimizations, and compilation takes a fifth of the time. Tests of optimized programs compile them like a user's program
(`samples.AS_USERS_DO`). With ``XLA_FLAGS`` set, its options apply to all programs except `samples.CHEAP` ones. With
``XLA_FLAGS=--xla_force_host_platform_device_count=8`` programs are compiled like a user's, which takes twice as long.
"""

import os
import subprocess
import sys

_DEVICES = "--xla_force_host_platform_device_count=8"
_QUICK_TO_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# XLA ends a process that is given an option it does not have.
_PRINT_KNOWN = f"""
import jax
for name, value in {_QUICK_TO_COMPILE}.items():
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={{name: value}})
    except jax.errors.JaxRuntimeError:
        continue
    print(f"--{{name}}={{value}}".lower())
"""


def _quick_flags():
    done = subprocess.run([sys.executable, "-c", _PRINT_KNOWN], capture_output=True, text=True, check=True)
    return " ".join([_DEVICES, *done.stdout.split()])


if "XLA_FLAGS" not in os.environ:  # Workers and other processes inherit it.
    os.environ["XLA_FLAGS"] = _quick_flags()

import pytest  # noqa: E402 # JAX, which some plugins import, reads the variables once.
from hypothesis import settings  # noqa: E402 # It comes after pytest.

settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("fixed")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A skipped test fails: what cannot run is deselected by a marker, or a strict xfail with its reason."""
    report = (yield).get_result()
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"unexpected skip: {report.longrepr}"
