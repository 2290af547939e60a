import blind
import jax.numpy as jnp
import numpy as np
import optax
import pytest

MAKERS = {
    "predict_gradients": blind.predict_gradients,
    "phase_switched": lambda **kwargs: blind.phase_switched(optax.adam(0.1), **kwargs),
}
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


PARAMS = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
WRONG = {
    "shape": (
        {"layer": {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}},
        r"\['layer'\]\['w'\] has shape \(3, 2\).*\(2, 3\)",
    ),
    "missing": ({"layer": {"w": jnp.ones((2, 3))}}, r"\['layer'\]\['b'\] is missing"),
    "extra": ({"layer": {**PARAMS["layer"], "z": jnp.ones(1)}}, r"\['layer'\]\['z'\] was not among"),
    "none": ({"layer": {"w": None, "b": jnp.ones(3)}}, r"\['layer'\]\['w'\] is missing"),
    "scalar": ({"layer": {"w": jnp.ones((2, 3)), "b": jnp.float32(1)}}, r"\['layer'\]\['b'\] has shape \(\)"),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("history", ["window", "recursive"])
@pytest.mark.parametrize("predict_steps", [0, 5])
@pytest.mark.parametrize("case", WRONG)
def test_gradients_unlike_the_parameters_name_the_leaf(maker, history, predict_steps, case):
    gradients, message = WRONG[case]
    opt = MAKERS[maker](history=history, predict_steps=predict_steps)
    with pytest.raises(ValueError, match=message):
        opt.update(gradients, opt.init(PARAMS), PARAMS)


@pytest.mark.parametrize("maker", MAKERS)
def test_integer_leaves_are_refused_by_name(maker):
    with pytest.raises(TypeError, match=r"\['count'\] has dtype int32"):
        MAKERS[maker]().init({"w": jnp.ones(2), "count": jnp.int32(3)})


@pytest.mark.parametrize("rate", [np.float32(np.nan), np.float64(-1.0), jnp.float32(np.inf)])
def test_arrays_as_rates_are_checked_too(rate):
    with pytest.raises(ValueError, match="learning_rate must be a finite number >= 0"):
        MAKERS["phase_switched"](learning_rate=rate)


@pytest.mark.parametrize("value", [np.ones(1), jnp.ones(2), "abc", 1j, True, 2**70, object()])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_loss_that_is_no_real_number(value, adaptive):
    opt = blind.predict_gradients(adaptive=adaptive)
    with pytest.raises(ValueError, match="value must be one real number"):
        opt.update(PARAMS, opt.init(PARAMS), value=value)


@pytest.mark.parametrize("leaf", ["text", b"bytes", object(), jnp.bool_(True), np.array([1, 2])])
def test_leaves_that_are_no_floats_name_themselves(leaf):
    opt = blind.predict_gradients()
    with pytest.raises(TypeError, match=r"leaf \['odd'\] has dtype"):
        opt.init({"w": jnp.ones(2), "odd": leaf})
    state = opt.init({"odd": jnp.ones(jnp.shape(leaf) if hasattr(leaf, "shape") else ())})
    with pytest.raises((TypeError, ValueError), match=r"leaf \['odd'\] has"):
        opt.update({"odd": leaf}, state)


def test_complex_gradients_of_real_parameters():
    opt = blind.predict_gradients()
    with pytest.raises(TypeError, match=r"\['w'\] has dtype complex64, but init saw a parameter of dtype float32"):
        opt.update({"w": jnp.ones(2, jnp.complex64)}, opt.init({"w": jnp.ones(2)}))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (dict(history="recursive"), "history is 'RecursiveHistoryState', here 'WindowHistoryState'"),
        (dict(history_window=3), "history_window is 3, here 8"),
        (dict(predict_steps=0), "history is None, here 'WindowHistoryState'"),
        (dict(residual=False), "residual is False, here True"),
        (dict(adaptive=True), "adaptive is True, here False"),
    ],
)
def test_a_state_of_other_settings(theirs, message):
    state = blind.predict_gradients(**theirs).init(PARAMS)
    with pytest.raises(ValueError, match=message):
        blind.predict_gradients().update(PARAMS, state)
    with pytest.raises(ValueError, match="state must be what init returned"):
        blind.predict_gradients().update(PARAMS, optax.EmptyState())
