"""The presets: their settings, the steps that they skip, and their state cost."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsa_optax
from vsa_optax import Guarded, Secants
from vsa_optax.prediction import presets

PRESETS = {preset.__name__: preset for preset in (vsa_optax.conservative, vsa_optax.balanced, vsa_optax.aggressive)}
STEPS = 300


def bowl(params):
    """Thirty curvatures, and a little of what is no quadratic."""
    curvature = jnp.logspace(-2, 0, 30)
    return 0.5 * jnp.sum(curvature * params["x"] ** 2) + 0.02 * jnp.sum(1 - jnp.cos(3 * params["x"]))


def train(opt, noise=None, by_phase=True):
    """The last parameters, and the state behind all steps."""
    noise = jnp.zeros([STEPS, 30]) if noise is None else noise

    def step(carry, shift):
        params, state = carry
        if by_phase:
            value, grads = vsa_optax.value_and_grad_by_phase(bowl)(params, state=state)
        else:
            value, grads = jax.value_and_grad(bowl)(params)
        grads = jax.tree.map(lambda g: g + shift, grads)
        updates, state = opt.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    params = {"x": jnp.linspace(-2, 3, 30)}
    return jax.jit(lambda: jax.lax.scan(step, (params, opt.init(params)), noise)[0])()


@pytest.fixture(scope="module")
def plain():
    schedule = optax.cosine_decay_schedule(0.02, STEPS)
    return train(optax.with_extra_args_support(optax.adamw(schedule)), by_phase=False)[0]


def test_the_bolder_one_skips_more_and_none_loses(plain):
    shares = []
    for preset in PRESETS.values():
        params, state = train(preset(optax.cosine_decay_schedule(0.02, STEPS)))
        stats = vsa_optax.phase_stats(state)
        shares.append(int(stats.predict_steps) / (STEPS - int(stats.warmup_steps)))
        assert bowl(params) <= 1.02 * bowl(plain)
    assert shares == sorted(shares)
    assert shares[0] > 0.3
    assert shares[2] >= 0.8


@pytest.mark.parametrize("name", PRESETS)
def test_under_noise_it_is_adamw(name):
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(STEPS, 30)), jnp.float32)
    ours, state = train(PRESETS[name](0.01), noise, by_phase=False)
    theirs, _ = train(optax.with_extra_args_support(optax.adamw(0.01)), noise, by_phase=False)
    assert vsa_optax.phase_stats(state).predict_steps == 0
    np.testing.assert_allclose(ours["x"], theirs["x"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "small", "large"), [("conservative", 80, 48), ("balanced", 144, 80), ("aggressive", 208, 112)]
)
def test_its_state_costs_what_it_says(name, small, large):
    """A leaf of at least 262,144 coordinates keeps its changes in float16."""
    for size, bytes_each in ((200_000, small), (300_000, large)):
        state = jax.eval_shape(PRESETS[name](1e-3).init, jnp.zeros([size]))
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert 0 <= total - bytes_each * size < 8_000
    assert f" {small} bytes per float32 parameter" in PRESETS[name].__doc__
    assert f" {large} bytes per parameter" in PRESETS[name].__doc__


@pytest.mark.parametrize("name", PRESETS)
def test_a_rate_that_is_none_is_named(name):
    for wrong in (None, -1e-3, "1e-3"):
        with pytest.raises((TypeError, ValueError), match="learning_rate must be"):
            PRESETS[name](wrong)


def test_they_are_what_their_docstrings_say():
    """The settings, and that each docstring names them as one would write them."""
    wanted = {
        "conservative": (Secants(window=8), Guarded(tolerance=0.07)),
        "balanced": (Secants(), Guarded()),
        "aggressive": (Secants(window=24), Guarded(tolerance=0.32, longest=40)),
    }
    for name, settings in wanted.items():
        assert getattr(presets, name.upper()) == settings
        written = re.search(r"``phase_switched\((.*?)\)``", " ".join(PRESETS[name].__doc__.split()))[1]
        given = eval(f"dict(opt={written})", {"optax": optax, "learning_rate": 1e-3} | vars(vsa_optax))
        assert (given.get("predictor", Secants()), given.get("phases", Guarded())) == settings
