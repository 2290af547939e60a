"""When to predict, as settings: their ranges and their defaults, and phases that follow the loss."""

import jax.numpy as jnp
import pytest
from refusals import check_names_itself

from vsa_optax import AdaptiveCycle, Cycle, Guarded, LegacyCycle, QualityCycle
from vsa_optax.prediction import machine

BAD = [
    (Guarded, "tolerance", 0, "> 0 and <= 1"),
    (Guarded, "tolerance", 1.5, "> 0 and <= 1"),
    (Guarded, "tolerance", float("nan"), "> 0 and <= 1"),
    (Guarded, "tolerance", "0.1", "> 0 and <= 1"),
    (Guarded, "longest", 0, "an integer >= 1"),
    (Guarded, "longest", 2.0, "an integer >= 1"),
    (Guarded, "warmup_steps", 1, "an integer >= 2"),
    (Cycle, "warmup_steps", -1, "an integer >= 0"),
    (Cycle, "warmup_steps", 2.5, "an integer >= 0"),
    (Cycle, "warmup_steps", True, "an integer >= 0"),
    (Cycle, "full_steps", 0, "an integer >= 1"),
    (Cycle, "predict_steps", -1, "an integer >= 0"),
    (Cycle, "predict_steps", None, "an integer >= 0"),
    (Cycle, "predict_steps", 2**40, "an integer >= 0 and < 2**31"),
    (Cycle, "correct_every", 0, "an integer >= 1"),
    (AdaptiveCycle, "full_steps", 0, "an integer >= 1"),
    (AdaptiveCycle, "loss_threshold", -1.0, ">= 0"),
    (LegacyCycle, "loss_threshold", -1.0, ">= 0"),
    (LegacyCycle, "full_steps", 0, "an integer >= 1"),
    (QualityCycle, "predict_steps", 0, "an integer >= 1"),
    (QualityCycle, "most_error", 0, "> 0"),
    (AdaptiveCycle, "loss_threshold", float("inf"), ">= 0"),
]


@pytest.mark.parametrize(("kind", "name", "value", "valid"), BAD)
def test_bad_arguments_name_themselves(kind, name, value, valid):
    check_names_itself(kind, name, value, valid)


def test_defaults_are_those_documented():
    assert repr(Guarded()) == "Guarded(tolerance=0.14, longest=20, warmup_steps=10)"
    assert repr(Cycle()) == "Cycle(warmup_steps=10, full_steps=5, predict_steps=20, correct_every=5)"
    assert repr(AdaptiveCycle()) == f"Adaptive{repr(Cycle())[:-1]}, loss_threshold=0.1)"
    lengths = "warmup_steps=0, full_steps=10, predict_steps=40, correct_every=10"
    assert repr(LegacyCycle()) == f"LegacyCycle({lengths}, loss_threshold=0.1)"
    assert repr(QualityCycle()) == "QualityCycle(predict_steps=4, most_error=0.5)"


def test_arguments_are_given_by_name():
    for kind in (Guarded, Cycle, AdaptiveCycle, LegacyCycle, QualityCycle):
        with pytest.raises(TypeError, match="positional argument"):
            kind(10)


def test_what_a_rhythm_has_the_guard_does_not_take():
    for name in ("full_steps", "correct_every", "predict_steps", "loss_threshold"):
        with pytest.raises(TypeError, match=name):
            Guarded(**{name: 5})


@pytest.mark.parametrize("known", [19, 20, 21])
def test_phases_follow_the_loss_once_twenty_are_known(known):
    """With rising losses: the first ten and the last ten are compared, so there must be as many."""
    phases = AdaptiveCycle()
    state = machine.init(phases).adaptive
    state = state._replace(losses=1.0 + jnp.arange(100.0), num_losses=jnp.int32(known))
    adapted = machine._adapt(phases, state, jnp.array(True))
    worse = known >= 20
    assert (adapted.full_length, adapted.predict_length) == ((7, 15) if worse else (5, 20))


@pytest.mark.parametrize(("last", "moves"), [(1.5, 0), (1.5625, 1), (0.953125, 0), (0.9375, -1)])
def test_phases_follow_a_loss_beyond_the_threshold_only(last, moves):
    """More than half as large again counts as worse, here, and a fall of more than 5 % as better."""
    phases = AdaptiveCycle(loss_threshold=0.5)
    losses = jnp.zeros(100).at[:10].set(1.0).at[10:20].set(last)
    state = machine.init(phases).adaptive._replace(losses=losses, num_losses=jnp.int32(20))
    adapted = machine._adapt(phases, state, jnp.array(True))
    assert (adapted.full_length, adapted.predict_length) == {0: (5, 20), 1: (7, 15), -1: (4, 23)}[moves]
