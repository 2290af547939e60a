import jax.numpy as jnp
import numpy as np
import pytest
from blind import MAKERS

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


@pytest.mark.parametrize("maker", MAKERS)
def test_the_bounds_themselves_are_valid(maker):
    smallest = dict(warmup_steps=2, full_steps=1, predict_steps=0, correct_every=1, history_window=2)
    MAKERS[maker](**smallest, residual_decay=0, loss_threshold=0)
    MAKERS[maker](full_steps=2**31 - 1, history_decay=1, residual_decay=1)


def test_numpy_settings_are_welcome():
    MAKERS["phase_switched"](warmup_steps=np.int64(3), history_decay=np.float32(0.5), learning_rate=np.float32(0.1))


@pytest.mark.parametrize("rate", [np.float32(np.nan), np.float64(-1.0), jnp.float32(np.inf)])
def test_arrays_as_rates_are_checked_too(rate):
    with pytest.raises(ValueError, match="learning_rate must be a finite number >= 0"):
        MAKERS["phase_switched"](learning_rate=rate)
