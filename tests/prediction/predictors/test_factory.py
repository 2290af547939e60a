"""The settings of predictors: their ranges, their defaults, and the predictors made from them."""

import jax.numpy as jnp
import optax
import pytest
from refusals import check_names_itself

import vsa_optax
from vsa_optax import Recursive, Secants, TritCodec, Window

LINES = [
    ("decay", 0, "> 0 and <= 1"),
    ("decay", 1.01, "> 0 and <= 1"),
    ("decay", float("nan"), "> 0 and <= 1"),
    ("decay", 10**400, "> 0 and <= 1"),
    ("decay", "0.9", "> 0 and <= 1"),
    ("predicts", "updates", "one of 'update', 'gradient'"),
    ("calibrate", 1, "True or False"),
    ("residual_decay", -0.1, ">= 0 and <= 1"),
    ("residual_decay", 1.5, ">= 0 and <= 1"),
    ("residual_decay", 0.95, "None with calibrate=True"),
]
DTYPES = [
    ("dtype", "int8", "None or one of float16, bfloat16, float32, float64"),
    ("dtype", "float8_e4m3fn", "None or one of float16, bfloat16, float32, float64"),
    ("dtype", "float64", "unless jax_enable_x64 is set"),
    ("dtype", "no such", "None or one of float16, bfloat16, float32, float64"),
]
BAD = [
    *((kind, *case) for kind in (Window, Recursive) for case in LINES),
    *((kind, *case) for kind in (Secants, Window, Recursive) for case in DTYPES),
    (Secants, "window", 1, "an integer >= 2"),
    (Window, "length", 1, "an integer >= 2"),
    (Window, "length", None, "an integer >= 2"),
    (Window, "codec", TritCodec, "a codec, such as TritCodec()"),
]


@pytest.mark.parametrize(("kind", "name", "value", "valid"), BAD)
def test_bad_arguments_name_themselves(kind, name, value, valid):
    check_names_itself(kind, name, value, valid)


def test_defaults_are_those_documented():
    line = "decay=0.95, predicts='update', calibrate=True, residual_decay=None, dtype=None"
    assert repr(Secants()) == "Secants(window=16, dtype=None)"
    assert repr(Window()) == f"Window(length=8, {line}, codec=None)"
    assert repr(Recursive()) == f"Recursive({line})"


def test_all_but_the_length_is_given_by_name():
    assert Secants(5).window == Window(5).length == 5
    for make in (lambda: Secants(5, "float32"), lambda: Window(5, 0.9), lambda: Recursive(0.9)):
        with pytest.raises(TypeError, match="positional argument"):
            make()


def test_what_another_predictor_has_cannot_be_written():
    for kind, name in ((Secants, "decay"), (Secants, "codec"), (Secants, "predicts"), (Recursive, "codec")):
        with pytest.raises(TypeError, match=name):
            kind(**{name: None})


@pytest.mark.parametrize(
    ("predictor", "history"),
    [
        (Secants(), "SecantHistoryState"),
        (Window(), "WindowHistoryState"),
        (Window(codec=TritCodec()), "CodedWindowHistoryState"),
        (Recursive(), "RecursiveHistoryState"),
    ],
)
def test_each_means_a_predictor_of_its_own(predictor, history):
    state = vsa_optax.phase_switched(optax.sgd(1.0), predictor=predictor).init(jnp.ones(3))
    assert type(state.history).__name__ == history
