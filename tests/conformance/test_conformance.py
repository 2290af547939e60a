"""Optax's own generic tests, from its wheel, on our transformations; and that these predict meanwhile."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance.registered import BARE, NEED_THE_LOSS, STEPS_BEFORE_PREDICT, VARIANTS
from conformance.run_theirs import AT_LENGTH, MODULES

import vsa_optax
from vsa_optax import Phase


def _run(opt, state, steps):
    """A run on a parabola in which the gradients of PREDICT are NaN; parameters and state."""

    def step(carry, _):
        params, state = carry
        gradients = jnp.where(vsa_optax.needs_backward(state), 2 * (params - 1), jnp.nan)
        updates, state = opt.update(gradients, state, params, value=jnp.sum((params - 1) ** 2))
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])((jnp.zeros(3), state))


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.predicts and not v.is_started])
def test_what_they_run_predicts(name):
    check_that_it_predicts(VARIANTS[name].factory(VARIANTS[name].learning_rate))


def test_the_adaptive_one_predicts():
    check_that_it_predicts(NEED_THE_LOSS["momo"].factory(NEED_THE_LOSS["momo"].learning_rate))


@pytest.mark.parametrize("name", BARE)
def test_a_transformation_that_is_no_optimizer_predicts(name):
    check_that_it_predicts(optax.chain(BARE[name](), optax.sgd(0.1)))


def check_that_it_predicts(opt):
    steps = 100
    params, state = _run(opt, opt.init(jnp.zeros(3)), steps)
    stats = vsa_optax.phase_stats(state)
    assert int(stats.total_steps) == steps
    assert int(stats.predict_steps) > 0.2 * steps
    assert int(stats.correct_steps) > 0 or stats.guard is not None
    assert int(stats.nonfinite_count) == 0
    assert np.all(np.isfinite(params))


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.is_started])
def test_the_first_step_of_a_started_one_is_predicted(name):
    opt = VARIANTS[name].factory(1e-3)
    state = opt.init(jnp.zeros(3))
    stats = vsa_optax.phase_stats(state)
    assert (int(stats.total_steps), int(stats.phase)) == (STEPS_BEFORE_PREDICT, Phase.PREDICT)
    updates, state = jax.jit(opt.update)(jnp.full(3, jnp.nan), state, jnp.zeros(3))
    assert int(vsa_optax.phase_stats(state).predict_steps) == 1
    assert np.all(np.isfinite(updates))
    assert np.all(np.asarray(updates) < 0)  # The gradients were positive.


# A coded record has no leaf for each parameter.
MAPPED = [name for name, v in VARIANTS.items() if v.optimizes and v.predicts and name != "coded_history"]


@pytest.mark.parametrize("name", MAPPED)
def test_map_params_maps_what_has_a_leaf_for_each_parameter(name):
    opt = VARIANTS[name].factory(1e-3)
    params = {"w": jnp.ones((2, 3)), "b": [jnp.ones(3), jnp.ones([])]}
    state = opt.init(params)
    marked = optax.tree.map_params(
        opt,
        lambda leaf, parameter: leaf.shape[leaf.ndim - parameter.ndim :] == parameter.shape,
        state,
        params,
        transform_non_params=lambda leaf: None,
    )
    found = jax.tree.leaves(marked)
    assert all(found)
    records = 4 if name.startswith("defaults") else 2 if name.endswith("recursive") else 1
    residuals = 0 if name in ("lean", "last_difference") or name.startswith("defaults") else 1
    moments = 1 if name.startswith("momentum") else 2
    assert len(found) == (records + residuals + moments) * len(jax.tree.leaves(params))
    assert jax.tree.structure(optax.tree.map_params(opt, lambda leaf: leaf, state)) == jax.tree.structure(state)


APART = {"contrib", "sharding", "float64"}  # In a step of their own, which keeps the default run short.
RUNS = [pytest.param(suite, "short", marks=[pytest.mark.apart] if suite in APART else []) for suite in MODULES]
RUNS += [pytest.param(suite, "long", marks=pytest.mark.slow) for suite in sorted({suite for suite, _ in AT_LENGTH})]


@pytest.mark.parametrize(("suite", "length"), RUNS)
def test_optax_tests_pass_on_ours(suite, length):
    """In a process of its own, in which a worker waits for it: a suite replaces parts of Optax."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "JAX_PLATFORMS": "cpu",
        "PYTEST_ADDOPTS": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-P", "-m", "conformance.run_theirs", suite, length, "-q", "-rfEx"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    output = done.stdout
    assert done.returncode == 0, output
    summary = output.strip().splitlines()[-1]
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (\w+)", summary.split(" in ")[0])}
    assert counts["passed"] > 0, output
    assert counts.keys() <= {"passed", "xfailed", "deselected"}, output
