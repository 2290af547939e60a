"""The warning of an update without ``value=``: where it fires, and where it points."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsa_optax

SWITCHED = vsa_optax.phase_switched(optax.adam(0.1))
NESTED = optax.chain(optax.clip(1.0), optax.apply_if_finite(SWITCHED, 3))
LINE = vsa_optax.phase_switched(
    optax.sgd(1.0), predictor=vsa_optax.Recursive(calibrate=False), phases=vsa_optax.Cycle()
)
NEVER = vsa_optax.phase_switched(optax.adam(0.1), phases=None)
PARAMS = jnp.arange(3.0)


def loss(params):
    return jnp.sum(params**2)


def traced(opt, *, by_phase=True, value_in_predict=False, **extra_args):
    """A step, traced, and the warnings of it."""

    def step(params, state):
        if by_phase:
            run = vsa_optax.value_and_grad_by_phase(loss, value_in_predict=value_in_predict)
            _, grads = run(params, state=state)
        else:
            grads = jax.grad(loss)(params)
        return opt.update(grads, state, params, **extra_args)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(step, PARAMS, opt.init(PARAMS))
    return caught


@pytest.mark.parametrize("opt", [SWITCHED, NESTED], ids=["alone", "nested"])
def test_an_update_without_the_loss_names_the_line_to_write(opt):
    (warning,) = traced(opt)
    assert warning.category is UserWarning
    assert "opt.update(grads, state, params, value=value)" in str(warning.message)
    assert warning.filename == __file__


def test_it_is_silent_where_no_nan_can_come_of_it():
    assert not traced(SWITCHED, value=1.0)
    assert not traced(SWITCHED, value_in_predict=True)
    assert not traced(SWITCHED, by_phase=False)
    assert not traced(NEVER)


def test_outside_jit_too():
    state = LINE.init(PARAMS)
    _, grads = vsa_optax.value_and_grad_by_phase(loss)(PARAMS, state=state)
    with pytest.warns(UserWarning, match="value= was not given"):
        updates, _ = LINE.update(grads, state, PARAMS)
    np.testing.assert_allclose(updates, -grads)
