import blind
import jax.numpy as jnp
import optax
import pytest

PARAMS = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}


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
