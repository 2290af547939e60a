"""Questions to a machine wherever it is nested; what it counts is in ``test_machine.py``."""

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsa_optax
from vsa_optax import Phase
from vsa_optax.core import trees
from vsa_optax.prediction import stats, step

SWITCHED = blind.phase_switched(optax.sgd(0.1), warmup_steps=2, full_steps=1, predict_steps=4)


def state_in(phase):
    state = blind.predict_gradients().init(jnp.ones(2))
    counts = dict(warmup_steps=3, full_steps=2, predict_steps=4, correct_steps=1)
    counts = {name: jnp.int32(count) for name, count in counts.items()}
    machine = state.machine.unpacked()._replace(phase=jnp.int32(phase), **counts)
    return state._replace(machine=machine.packed())


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


def test_gradients_in_predict_are_counted_as_ignored():
    """Of a run that computes each of them, of one that skips them, and a single number among zeros, or a NaN."""
    params = {"w": jnp.arange(1.0, 4.0), "b": jnp.zeros((2, 2)), "empty": jnp.zeros((0, 2))}
    opt = SWITCHED

    @jax.jit
    def run(grads_in_predict):
        def one_step(state, _):
            ones = jax.tree.map(jnp.ones_like, params)
            grads = trees.tree_where(vsa_optax.needs_backward(state), ones, grads_in_predict)
            return opt.update(grads, state, params)[1], None

        return vsa_optax.phase_stats(jax.lax.scan(one_step, opt.init(params), None, length=12)[0])

    zeros = jax.tree.map(jnp.zeros_like, params)
    for grads, is_ignored in (
        (zeros, False),
        (jax.tree.map(jnp.ones_like, params), True),
        (zeros | {"b": zeros["b"].at[1, 1].set(-1e-30)}, True),
        (zeros | {"w": zeros["w"].at[0].set(jnp.nan)}, True),
    ):
        found = run(grads)
        assert found.predict_steps > 4
        assert found.ignored_gradients == (found.predict_steps if is_ignored else 0)
        assert found.nonfinite_count == 0


@pytest.mark.parametrize(
    ("sizes", "looked_at"),
    [
        ([0, 3], [3]),
        ([65537, 2, 65536, 9, 7, 5], [5, 7, 9, 65536]),
        ([70000, 65537], [65537]),
        ([0], []),
    ],
)
def test_a_look_at_the_gradient_of_a_predicted_step_is_at_few_numbers(sizes, looked_at):
    leaves = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes]
    assert [leaf.size for leaf in step._telling_leaves(leaves)] == looked_at
