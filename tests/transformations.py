"""Every transformation that has a state, small, for tests of what must hold for all of them."""

import jax
import jax.numpy as jnp
import optax

import vsa_optax
from vsa_optax import (
    AdaptiveCycle,
    Cycle,
    HypervectorCodec,
    LegacyCycle,
    Momentum,
    Recursive,
    Secants,
    TritCodec,
    Window,
)

TRITS = TritCodec(2, block_size=32)
momentum = optax.sgd(0.1, momentum=0.9)


def coded_window(codec, *, calibrate=True):
    window = Window(3, codec=codec, calibrate=calibrate)
    return vsa_optax.phase_switched(optax.sgd(1.0), learning_rate=0.1, predictor=window, phases=Cycle())


TRANSFORMATIONS = {
    "secants": vsa_optax.phase_switched(momentum, predictor=Secants(3)),
    "window": vsa_optax.phase_switched(optax.sgd(1.0), learning_rate=0.1, predictor=Window(3), phases=Cycle()),
    "adaptive": vsa_optax.phase_switched(
        momentum, predictor=Window(3, calibrate=False, residual_decay=0.95), phases=AdaptiveCycle()
    ),
    "recursive": vsa_optax.phase_switched(momentum, predictor=Recursive(), phases=Cycle()),
    "momentum": vsa_optax.phase_switched(momentum, predictor=Momentum(), phases=LegacyCycle(full_steps=2)),
    "never predicts": vsa_optax.phase_switched(momentum, phases=None),
    "window in trits": coded_window(TRITS, calibrate=False),
    "window of hypervectors": coded_window(HypervectorCodec(0.5)),
    "window of ternary hypervectors": coded_window(HypervectorCodec(0.5, use_ternary=True), calibrate=False),
    "multisecant": vsa_optax.multisecant(momentum, history_window=3),
    "predict_gradients": optax.chain(vsa_optax.predict_gradients(predictor=Secants(3)), momentum),
    "ternary_multi_steps": vsa_optax.ternary_multi_steps(momentum, 2, block_size=32),
    "accumulate_ternary": vsa_optax.accumulate_ternary(2, block_size=32, rounding="stochastic"),
    "compress_gradients": vsa_optax.compress_gradients(TRITS, error_feedback=True),
    "compressed_pmean": vsa_optax.compressed_pmean("d", TRITS, error_feedback=True),
}


def params_of(dtype=jnp.float32):
    """A leaf of whole blocks, one of less, and a scalar."""
    return {"kernel": jnp.ones((8, 6), dtype), "bias": jnp.ones(6, dtype), "scale": jnp.ones([], dtype)}


def traced(run, name):
    """The shapes of ``run()``, which makes a state and updates it; on two devices if it sends something."""
    if name != "compressed_pmean":
        return jax.eval_shape(run)
    return jax.eval_shape(jax.vmap(lambda _: run(), axis_name="d", axis_size=2), jnp.zeros(2))


def states_of(name, params, steps, *, is_jitted=False):
    """The states after each of a few updates; if they are jitted, those of equal types are traced once."""
    opt = optax.with_extra_args_support(TRANSFORMATIONS[name])
    update = jax.jit(opt.update) if is_jitted else opt.update
    state, states = opt.init(params), []
    for _ in range(steps):
        updates, state = update(params, state, params, value=jnp.ones([], jnp.float32))
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        states.append(state)
    return states
