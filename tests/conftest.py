"""What every test shares: eight host devices, programs compiled quickly and once, and Hypothesis without surprises.

Most of a run's time would be compilation. The programs are small and run a few times, so XLA compiles them without
LLVM's optimizations; and what a worker, a notebook or another process has compiled, the others read from a folder that
lives as long as the run. The run on the oldest versions (``.ci/run``) sets ``XLA_FLAGS`` so that all programs are
compiled as a user's are, and so does each test of what an optimized program computes (`samples.AS_USERS_DO`).
"""

import os
import shutil
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
_compiled = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # Workers and other processes find the folder here.
    _compiled = tempfile.mkdtemp(prefix="vsa_optax_tests_")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }

import pytest  # noqa: E402 # JAX, which some plugins import, reads the variables once.
from hypothesis import settings  # noqa: E402

settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("fixed")


def pytest_unconfigure():
    """The process that made the folder removes it."""
    if _compiled is not None:
        shutil.rmtree(_compiled, ignore_errors=True)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A skipped test fails: what cannot run is deselected by a marker, or a strict xfail with its reason."""
    report = (yield).get_result()
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"unexpected skip: {report.longrepr}"
