"""The cost of `import vsa_optax`, and the modules that it does not import."""

import importlib.metadata
import json
import re
import subprocess
import sys

OPTIONAL = ("flax", "matplotlib", "sklearn", "tqdm", "orbax", "chex")
# Without the garbage collector: whether a collection of all that JAX has made, 40 ms, falls due here is chance.
TIMED = """
import gc, time
import optax
gc.disable()
begin = time.perf_counter()
import vsa_optax
print(time.perf_counter() - begin)
"""
LISTED = f"""
import json, sys
import optax
before = set(sys.modules)
from vsa_optax import *
top = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps([sorted(top), [name for name in {OPTIONAL} if name in sys.modules and name not in before]]))
"""


def output_of(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_takes_at_most_50_ms_more_than_optax():
    """The fastest of up to five processes: what else the machine does can only make an import slower."""
    seconds = []
    while len(seconds) < 5 and min(seconds, default=1.0) > 0.05:
        seconds.append(float(output_of(TIMED)))
    assert min(seconds) <= 0.05, seconds


def test_import_brings_nothing_that_optax_does_not():
    added, optional = json.loads(output_of(LISTED))
    assert optional == []
    beyond = [name for name in added if name not in sys.stdlib_module_names and name != "vsa_optax"]
    assert beyond == []


def test_every_public_name_is_there_when_asked_for():
    code = """
import jax, vsa_optax
jax.jit(lambda: [getattr(vsa_optax, name) for name in vsa_optax.__all__] and 0)()  # Even in a trace.
assert set(vsa_optax.__all__) <= set(dir(vsa_optax))
from vsa_optax import *
import sys
names = [phase_switched.__module__, trits.__name__, checkpoint.__name__]
print(*names, hasattr(vsa_optax, "nothing"), "orbax" in sys.modules)
"""
    names = ["vsa_optax.prediction.api", "vsa_optax.trits", "vsa_optax.checkpoint"]
    assert output_of(code).split() == [*names, "False", "False"]


def test_the_runtime_needs_jax_and_optax_only():
    wanted = importlib.metadata.requires("vsa-optax")
    assert wanted is not None
    names = [re.match(r"[\w-]+", line)[0] for line in wanted if "extra ==" not in line]
    assert sorted(names) == ["jax", "optax"]
