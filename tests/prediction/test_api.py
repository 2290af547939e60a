import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blind import MAKERS
from samples import PARAMS, flat_of, gradient_stream, tree_of

import vsa_optax

BAD = [
    ("warmup_steps", 1, "an integer >= 2"),
    ("warmup_steps", 2.5, "an integer >= 2"),
    ("warmup_steps", True, "an integer >= 2"),
    ("full_steps", 0, "an integer >= 1"),
    ("predict_steps", -1, "an integer >= 0"),
    ("predict_steps", None, "an integer >= 0"),
    ("predict_steps", 2**40, "an integer >= 0 and < 2**31"),
    ("correct_every", 0, "an integer >= 1"),
    ("history", "kalman", "one of 'secant', 'window', 'recursive'"),
    ("history_window", 1, "an integer >= 2"),
    ("history_decay", 0, "> 0 and <= 1"),
    ("history_decay", 1.01, "> 0 and <= 1"),
    ("history_decay", float("nan"), "> 0 and <= 1"),
    ("history_decay", 10**400, "> 0 and <= 1"),
    ("history_decay", "0.9", "> 0 and <= 1"),
    ("history_dtype", "int8", "None or one of float16, bfloat16, float32, float64"),
    ("history_dtype", "float8_e4m3fn", "None or one of float16, bfloat16, float32, float64"),
    ("history_dtype", "float64", "unless jax_enable_x64 is set"),
    ("history_dtype", "no such", "None or one of float16, bfloat16, float32, float64"),
    ("residual", 1, "True or False"),
    ("residual_decay", -0.1, ">= 0 and <= 1"),
    ("residual_decay", 1.5, ">= 0 and <= 1"),
    ("adaptive", "yes", "True or False"),
    ("loss_threshold", -1.0, ">= 0"),
    ("loss_threshold", float("inf"), ">= 0"),
]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("name", "value", "valid"), BAD)
def test_bad_arguments_name_themselves(maker, name, value, valid):
    with pytest.raises(ValueError, match=name) as error:
        MAKERS[maker](**{name: value})
    assert repr(value) in str(error.value)
    assert valid in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("predict_in", "updates", "one of 'update', 'gradient'"),
        ("learning_rate", -0.1, ">= 0"),
        ("learning_rate", float("nan"), ">= 0"),
        ("learning_rate", "0.1", ">= 0"),
        ("learning_rate", 1e300, ">= 0 and <= 3.40282e+38"),
    ],
)
def test_bad_arguments_of_the_wrapper(name, value, valid):
    with pytest.raises(ValueError, match=name) as error:
        MAKERS["phase_switched"](**{name: value})
    assert repr(value) in str(error.value)
    assert valid in str(error.value)


def test_a_rate_that_is_no_scalar():
    with pytest.raises(ValueError, match=r"learning_rate.*shape \(2,\)"):
        MAKERS["phase_switched"](learning_rate=jnp.ones(2))


def run(opt, steps):
    """All updates of that many steps on a drifting, noisy gradient, and the last state."""
    update, state, updates = jax.jit(opt.update), opt.init(PARAMS), []
    for gradient in gradient_stream(steps):
        emitted, state = update(tree_of(gradient), state, PARAMS, value=1.0)
        updates.append(flat_of(emitted))
    assert np.isfinite(updates).all()
    return np.stack(updates), state


@pytest.mark.parametrize("maker", MAKERS)
def test_the_bounds_themselves_are_valid(maker):
    """What is made at a bound trains, in the phases and with the state that the bound implies."""
    smallest = dict(warmup_steps=2, full_steps=1, predict_steps=0, correct_every=1, history_window=2)
    _, state = run(MAKERS[maker](**smallest, residual_decay=0, loss_threshold=0), 6)
    assert vsa_optax.phase_stats(state)[1:6] == (6, 2, 4, 0, 0)
    assert (state.history, state.residual) == (None, None)
    _, state = run(MAKERS[maker](full_steps=2**31 - 1, history_decay=1, residual_decay=1), 20)
    assert vsa_optax.phase_stats(state)[1:6] == (20, 10, 10, 0, 0)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state.history.records)} == {8}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("decay", [0, 1])
def test_the_shortest_cycle_and_what_becomes_of_its_residual(maker, decay):
    """A window of two records. Of errors, a decay of 0 keeps the last one alone, and a decay of 1 takes none in."""
    shortest = dict(warmup_steps=2, full_steps=1, predict_steps=1, correct_every=1, history_window=2)
    opt = MAKERS[maker](**shortest, residual_decay=decay, history_decay=1, adaptive=True, loss_threshold=0)
    _, state = run(opt, 8)
    assert vsa_optax.phase_stats(state)[1:6] == (8, 2, 2, 2, 2)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state.history.records)} == {2}
    assert flat_of(state.residual).any() == (decay == 0)


def test_numpy_settings_are_welcome():
    """And give the updates that the same Python numbers give, to the bit."""
    settings = dict(warmup_steps=np.int64(3), history_decay=np.float32(0.5), learning_rate=np.float32(0.1))
    updates, state = run(MAKERS["phase_switched"](**settings), 20)
    python_numbers = {name: setting.item() for name, setting in settings.items()}
    expected, expected_state = run(MAKERS["phase_switched"](**python_numbers), 20)
    np.testing.assert_array_equal(updates, expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    assert vsa_optax.phase_stats(state).predict_steps > 5


@pytest.mark.parametrize("rate", [np.float32(np.nan), np.float64(-1.0), jnp.float32(np.inf)])
def test_arrays_as_rates_are_checked_too(rate):
    with pytest.raises(ValueError, match="learning_rate must be a finite number >= 0"):
        MAKERS["phase_switched"](learning_rate=rate)
