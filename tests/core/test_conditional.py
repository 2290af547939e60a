import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsa_optax
from vsa_optax.core import conditional


@pytest.mark.parametrize("is_jitted", [False, True], ids=["eager", "jit"])
def test_the_function_runs_once_or_not_at_all(is_jitted):
    calls = []

    def grow(carry, step):
        jax.debug.callback(lambda: calls.append(None))
        return {"x": carry["x"] + step, "count": carry["count"] + 1}

    run = conditional.in_place_if(grow)
    run = jax.jit(run) if is_jitted else run
    carry = {"x": jnp.arange(3.0), "count": jnp.int32(4)}
    skipped = run(jnp.array(False), carry, jnp.float32(2.0))
    jax.effects_barrier()
    assert not calls
    jax.tree.map(np.testing.assert_array_equal, skipped, carry)
    grown = run(jnp.array(True), carry, jnp.float32(2.0))
    jax.block_until_ready(grown)
    jax.effects_barrier()
    assert len(calls) == 1
    np.testing.assert_array_equal(grown["x"], [2.0, 3.0, 4.0])
    assert (grown["count"], grown["count"].dtype) == (5, jnp.int32)


def test_extra_arguments_that_are_arrays_are_told_from_the_others():
    arrays = {"value": jnp.float32(1.0), "tree": {"a": np.ones(2), "b": [np.float64(3.0)]}}
    others = {"number": 1.0, "text": "x", "function": abs, "mixed": [np.ones(1), "x"], "nothing": None, "empty": {}}
    assert conditional.split_extra_args({**arrays, **others}) == (arrays, others)


@pytest.mark.parametrize(
    ("flags", "backend", "warns"),
    [
        ("--xla_gpu_enable_command_buffer=FUSION,WHILE --xla_gpu_autotune_level=0", "gpu", True),
        ("--xla_gpu_enable_command_buffer=+while", "gpu", True),
        ("--xla_gpu_enable_command_buffer=WHILE --xla_gpu_enable_command_buffer=FUSION,CONDITIONAL", "gpu", False),
        ("--xla_gpu_enable_command_buffer=WHILE", "cpu", False),
        ("--xla_gpu_autotune_level=0", "gpu", False),
        ("", "gpu", False),
    ],
)
def test_loops_in_command_buffers_are_warned_of_where_a_state_is_made(monkeypatch, flags, backend, warns):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for opt in (
        vsa_optax.phase_switched(optax.sgd(0.1)),
        vsa_optax.ternary_multi_steps(optax.sgd(0.1), 2),
        vsa_optax.accumulate_ternary(2),
    ):
        with pytest.warns(UserWarning, match="loops into command buffers") if warns else contextlib.nullcontext():
            opt.init(jnp.zeros(3))
