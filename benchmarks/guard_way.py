"""How high does the loss peak if steps suddenly grow, with the guard and without predictions?

Run `JAX_PLATFORMS=cpu python benchmarks/guard_way.py | tee benchmarks/guard_way.log`; it takes minutes on one core.

There are three cases: a rate that jumps by 100 at step 300, a rate of 0 for 100 steps, and optimizers that find their
own rate. Two ordinary trainings follow; their skipped steps show the cost of the bound on the distance moved.
"""

import time

import codec_tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
from codec_tasks import print_row
from sklearn.datasets import load_digits

import vsa_optax

SEEDS = 3
WIDTHS = [26, 14, *[30] * SEEDS]
IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = jnp.asarray((IMAGES - IMAGES.mean(axis=0)) / (IMAGES.std(axis=0) + 1e-3), jnp.float32)
LABELS = jnp.asarray(LABELS, jnp.int32)
POINTS = jnp.linspace(-1, 1, 64)
CURVATURES = jnp.logspace(-2, 0, 30)


def net(sizes, seed):
    """Weights and biases of a net."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [(jax.random.normal(key, (a, b)) / a**0.5, jnp.zeros(b)) for key, a, b in pairs]


def outputs(layers, x):
    for weights, bias in layers[:-1]:
        x = jnp.tanh(x @ weights + bias)
    return x @ layers[-1][0] + layers[-1][1]


def digits(params, batch=slice(None)):
    logits = outputs(params, IMAGES[batch])
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[batch]).mean()


def curve(params):
    wanted = jnp.sin(3 * POINTS) + 0.3 * jnp.cos(9 * POINTS)
    return jnp.mean((outputs(params, POINTS[:, None])[:, 0] - wanted) ** 2)


def bowl(params):
    return 0.5 * jnp.sum(CURVATURES * params**2) + 0.02 * jnp.sum(jnp.cos(3 * params))


TASKS = {
    "digits": (digits, lambda seed: net((64, 32, 10), seed)),
    "curve": (curve, lambda seed: net((1, 24, 24, 1), seed)),
    "bowl": (bowl, lambda seed: 1 + 0.3 * jax.random.normal(jax.random.key(seed), (30,))),
}


def jumps(rate):
    return lambda step: jnp.where(step < 300, rate, 100 * rate)


def starts_late(rate):
    return lambda step: jnp.where(step < 100, 0.0, rate)


# Task, optimizer at rate 1 and its schedule (None: it has a rate of its own), steps, the first step to look at.
SUDDEN = {
    "digits, rate jumps": ("digits", lambda: optax.adam(1.0), jumps(3e-4), 450, 300),
    "curve, rate jumps": ("curve", lambda: optax.adam(1.0), jumps(1e-3), 450, 300),
    "digits, starts late": ("digits", lambda: optax.adam(1.0), starts_late(0.03), 300, 0),
    "curve, starts late": ("curve", lambda: optax.adam(1.0), starts_late(0.03), 300, 0),
    "digits, prodigy": ("digits", lambda: optax.contrib.prodigy(1.0), None, 200, 0),
    "bowl, prodigy": ("bowl", lambda: optax.contrib.prodigy(1.0), None, 200, 0),
    "digits, dadapt_adamw": ("digits", lambda: optax.contrib.dadapt_adamw(1.0), None, 200, 0),
    "bowl, dadapt_adamw": ("bowl", lambda: optax.contrib.dadapt_adamw(1.0), None, 200, 0),
}
PREDICTORS = {"secants": vsa_optax.Secants(), "window": vsa_optax.Window()}


def trainer(loss, opt, schedule, predictor, batches):
    """``params -> losses at each step, steps predicted``, compiled."""
    phases = None if predictor is None else vsa_optax.Guarded()
    opt = vsa_optax.phase_switched(
        opt, learning_rate=schedule, predictor=predictor or vsa_optax.Secants(), phases=phases
    )

    def step(carry, batch):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = opt.update(gradient, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def train(params):
        (params, state), values = jax.lax.scan(step, (params, opt.init(params)), batches)
        return values, vsa_optax.phase_stats(state).predict_steps, params

    return train


def sudden():
    print_row(WIDTHS, ["case", "predictor", *["peak: plain, guarded; skipped"] * SEEDS])
    for name, (task, make, schedule, steps, first) in SUDDEN.items():
        loss, fresh = TASKS[task]
        nothing = (jnp.zeros((steps, 0)),)
        plain = trainer(lambda p, _, loss=loss: loss(p), make(), schedule, None, nothing)
        peaks = [np.max(plain(fresh(seed))[0][first:]) for seed in range(SEEDS)]
        for label, predictor in PREDICTORS.items():
            guarded = trainer(lambda p, _, loss=loss: loss(p), make(), schedule, predictor, nothing)
            found = [guarded(fresh(seed)) for seed in range(SEEDS)]
            cells = [
                f"{peak:.3g}, {np.max(values[first:]):.3g}; {int(skipped)}"
                for peak, (values, skipped, _) in zip(peaks, found, strict=True)
            ]
            print_row(WIDTHS, [name, label, *cells])


def ordinary():
    steps, rate = 300, 3e-3
    print_row(WIDTHS, ["ordinary", "predictor", *["final loss; skipped"] * SEEDS])
    schedule = optax.cosine_decay_schedule(rate, steps)
    few = jnp.asarray(np.random.default_rng(0).integers(len(LABELS), size=(steps, 64)))
    whole = jnp.broadcast_to(jnp.arange(len(LABELS)), (steps, len(LABELS)))
    for name, batches in (("digits, all images", whole), ("digits, 64 images", few)):
        for label, predictor in PREDICTORS.items():
            train = trainer(digits, optax.adam(1.0), schedule, predictor, (batches,))
            found = [train(net((64, 32, 10), seed)) for seed in range(SEEDS)]
            cells = [f"{digits(params):.4g}; {int(skipped)}" for _, skipped, params in found]
            print_row(WIDTHS, [name, label, *cells])


def main():
    began = time.perf_counter()
    codec_tasks.print_header(
        "The loss's peak where steps grow at once, phase_switched with its defaults and with phases=None",
        "digits: 1797 images, 64-32-10 net, all in one batch; curve: 1-24-24-1 net; bowl: 30 parameters",
        f"n = {SEEDS} seeds, a column each; peaks from the jump on where the rate jumps",
        "ordinary: Adam at 0.003, cosine schedule, 300 steps",
    )
    sudden()
    ordinary()
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
