"""Trees and numbers that do not fit, named by what is made with them."""

import blind
import jax.numpy as jnp
import numpy as np
import pytest
from blind import MAKERS

from vsa_optax import AdaptiveCycle, Cycle, Recursive, Window

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
@pytest.mark.parametrize("line", [Window, Recursive])
@pytest.mark.parametrize("predict_steps", [0, 5])
@pytest.mark.parametrize("case", WRONG)
def test_gradients_unlike_the_parameters_name_the_leaf(maker, line, predict_steps, case):
    gradients, message = WRONG[case]
    opt = MAKERS[maker](line=line, predict_steps=predict_steps)
    with pytest.raises(ValueError, match=message):
        opt.update(gradients, opt.init(PARAMS), PARAMS)


@pytest.mark.parametrize("maker", MAKERS)
def test_integer_leaves_are_refused_by_name(maker):
    with pytest.raises(TypeError, match=r"\['count'\] has dtype int32"):
        MAKERS[maker]().init({"w": jnp.ones(2), "count": jnp.int32(3)})


@pytest.mark.parametrize("value", [np.ones(1), jnp.ones(2), "abc", 1j, True, 2**70, object()])
@pytest.mark.parametrize("when", [Cycle, AdaptiveCycle])
def test_a_loss_that_is_no_real_number(value, when):
    opt = blind.predict_gradients(when=when)
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
