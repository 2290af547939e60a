import blind
import jax.numpy as jnp
import optax
import pytest

from vsa_optax import AdaptiveCycle, Guarded, Recursive, Secants

PARAMS = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (dict(line=Recursive), "predictor is Recursive, here Window"),
        (dict(line=Secants), "predictor is Secants, here Window"),
        (dict(length=3), "length is 3, here 8"),
        (dict(predict_steps=0), "phases is None, here Cycle"),
        (dict(residual_decay=None), "residual_decay is None, here a number"),
        (dict(when=AdaptiveCycle), "phases is AdaptiveCycle, here Cycle"),
        (dict(when=Guarded), "phases is Guarded, here Cycle"),
    ],
)
def test_a_state_of_other_settings(theirs, message):
    state = blind.predict_gradients(**theirs).init(PARAMS)
    with pytest.raises(ValueError, match=message):
        blind.predict_gradients().update(PARAMS, state)
    with pytest.raises(ValueError, match="state must be what init returned"):
        blind.predict_gradients().update(PARAMS, optax.EmptyState())
