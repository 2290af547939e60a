"""Questions to a machine wherever it is nested; what it counts is in ``test_machine.py``."""

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsa_optax
from vsa_optax import Phase
from vsa_optax.prediction import stats


def state_in(phase):
    state = blind.predict_gradients().init(jnp.ones(2))
    counts = dict(warmup_steps=3, full_steps=2, predict_steps=4, correct_steps=1)
    counts = {name: jnp.int32(count) for name, count in counts.items()}
    return state._replace(machine=state.machine._replace(phase=jnp.int32(phase), **counts))


@pytest.mark.parametrize("phase", Phase)
def test_a_nested_machine_answers(phase):
    nested = (optax.EmptyState(), {"inner": [state_in(phase)]}, jnp.ones(3))
    assert stats.contains_machine(nested)
    assert bool(jax.jit(vsa_optax.needs_backward)(nested)) == (phase != Phase.PREDICT)
    found = vsa_optax.phase_stats(nested)
    assert found.phase == phase
    assert (found.total_steps, found.predict_steps) == (10, 4)
    np.testing.assert_allclose(found.steps_per_backward, 10 / 6, rtol=1e-6)
    assert (found.quality, found.guard) == (None, None)


@pytest.mark.parametrize("num", [0, 2])
@pytest.mark.parametrize("question", [stats.find_machine, vsa_optax.needs_backward, vsa_optax.phase_stats])
def test_none_or_several_machines_cannot_be_asked(question, num):
    states = [state_in(Phase.FULL)] * num
    assert stats.contains_machine(states) == bool(num)
    with pytest.raises(ValueError, match=f"expected one phase machine in the optimizer state, found {num}"):
        question(states)


def test_before_any_step_nothing_is_faster():
    fresh = vsa_optax.phase_stats(vsa_optax.predict_gradients().init(jnp.ones(2)))
    assert (fresh.total_steps, fresh.steps_per_backward, fresh.mean_prediction_error) == (0, 1, 0)
    assert fresh.guard is not None
