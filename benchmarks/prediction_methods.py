"""Ways to train with fewer backward passes: the library's, the baselines that they must beat, and earlier designs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import vsa_optax
from vsa_optax import Cycle, Guarded, Momentum, Recursive, Window
from vsa_optax.prediction import presets

WARMUP = 10
RECIPE = 0.25  # A typical recipe's rate, relative to the best rate of plain Adam.


class Method(NamedTuple):
    """A way to train.

    Attributes:
        make: ``rate, betas, steps, variant`` to an optimizer, the rate a cosine over all steps.
        needs: ``state, variant`` to whether the coming step wants a gradient.
        variants: of its own settings, to choose from.
        average: of the parameters with a decay, if the variant is one.
        is_lookahead: whether parameters are a slow and a fast copy.
        reads_value: whether it follows the loss, so that a skipped step needs a forward pass.
    """

    make: Callable[..., optax.GradientTransformation]
    needs: Callable[[Any, Any], Any] = lambda state, variant: True
    variants: tuple[Any, ...] = (None,)
    average: bool = False
    is_lookahead: bool = False
    reads_value: bool = False


def cosine(rate, steps):
    return optax.cosine_decay_schedule(rate, steps)


def adam(rate, betas):
    return optax.adam(rate, b1=betas[0], b2=betas[1])


def plain(rate, betas, steps, variant):
    del variant
    return adam(cosine(rate, steps), betas)


def lookahead(rate, betas, steps, variant):
    period, slow = variant
    return optax.lookahead(adam(cosine(rate, steps), betas), period, slow)


def switched(**settings):
    def make(rate, betas, steps, variant):
        return vsa_optax.phase_switched(adam(1.0, betas), learning_rate=cosine(rate, steps), **settings, **variant)

    return Method(make, lambda state, variant: vsa_optax.needs_backward(state), variants=({},))


def pair(schedule):
    """The legacy pair of vsa-optim-rs, which predicts gradients; and the same with updates."""
    settings = [vsa_optax.momentum_predictor(schedule, predicts=domain)._asdict() for domain in ("gradient", "update")]
    return switched()._replace(variants=tuple(settings), reads_value=schedule == "trainer")


class SkippingState(NamedTuple):
    """Of `skipping`: the steps so far, what Adam emitted last, and Adam's own state."""

    count: jax.Array
    last: Any
    adam: Any


def skipping(in_between, rate, betas, steps, every):
    """Adam in one of ``every`` steps; in the others it sees a gradient of zero, or its last update is repeated."""
    opt, schedule = adam(1.0, betas), cosine(rate, steps)

    def init(params):
        return SkippingState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params), opt.init(params))

    def update(gradient, state, params=None):
        if in_between == "coast":
            direction, adam_state = opt.update(gradient, state.adam, params)
        else:
            direction, adam_state = jax.lax.cond(
                is_true_step(state.count, every),
                lambda: opt.update(gradient, state.adam, params),
                lambda: (state.last, state.adam),
            )
        updates = optax.tree.scale(schedule(state.count), direction)
        return updates, SkippingState(state.count + 1, direction, adam_state)

    return optax.GradientTransformation(init, update)


def is_true_step(count, every):
    return (count < WARMUP) | (count % every == 0)


class SlopeState(NamedTuple):
    """State of `repeat_by_slope`.

    Attributes:
        count: the number of steps so far.
        left: the number of steps left in the leap.
        direction: the last update, before the rate.
        slope_before: the cosine between it and the gradient that made it.
        after, squared, before, weight: moving averages of the cosine at a leap's end, of its square, of the cosine at
            its beginning, and of one.
        num_seen: the number of leaps and steps in the averages.
        length, carry, stretch: the length of the next leap; its rounding error; the factor of its steps.
        adam: Adam's state.
    """

    count: jax.Array
    left: jax.Array
    direction: Any
    slope_before: jax.Array
    after: jax.Array
    squared: jax.Array
    before: jax.Array
    weight: jax.Array
    num_seen: jax.Array
    length: jax.Array
    carry: jax.Array
    stretch: jax.Array
    adam: Any


def repeat_by_slope(rate, betas, steps, variant):
    """Repeats Adam's last update for as long as the next gradient shows that the direction still leads downhill.

    The gradient at a leap's end belongs to its own batch, so its inner product with the direction is unbiased, whatever
    the noise. The ratio of its running mean to its standard error decides. Below -z the leaps grow, to one step, or to
    ``most`` if the slope at the end is at least half of that at the beginning. Then their steps grow, up to twofold.
    Above -z / 2 they shrink.
    """
    most, z = variant
    opt, schedule = adam(1.0, betas), cosine(rate, steps)
    decay, warmup, growth, shrink, longest = 0.9, 3, 1.25, 0.7, 2.0
    num_averaged = (1 + decay) / (1 - decay)

    def init(params):
        zero, none = jnp.zeros([]), jnp.zeros([], jnp.int32)
        scalars = dict(slope_before=zero, after=zero, squared=zero, before=zero, weight=zero, length=zero, carry=zero)
        return SlopeState(
            count=none,
            left=none,
            direction=optax.tree.zeros_like(params),
            num_seen=none,
            stretch=jnp.ones([]),
            adam=opt.init(params),
            **scalars,
        )

    def cosine_of(a, b):
        norms = optax.tree.norm(a) * optax.tree.norm(b)
        return optax.tree.vdot(a, b) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)

    def true_step(gradient, state, params):
        cos, seen = cosine_of(gradient, state.direction), optax.tree.norm(state.direction) > 0

        def averaged(old, new):
            return jnp.where(seen, decay * old + (1 - decay) * new, old)

        after, squared = averaged(state.after, cos), averaged(state.squared, cos**2)
        before, weight = averaged(state.before, state.slope_before), averaged(state.weight, 1.0)
        num_seen = state.num_seen + seen
        count = jnp.minimum(num_seen, num_averaged)
        error = jnp.sqrt(jnp.maximum(squared * weight, 1e-20) / jnp.maximum(count, 1))  # Of after, if its mean is 0.
        score, kept = after / error, after / jnp.minimum(before, -1e-9)
        goes_down, goes_up = score < -z, score > -z / 2
        limit = jnp.where(kept > 0.5, most, jnp.where(kept < 0.3, 1.0, jnp.maximum(state.length, 1.0)))
        grown = jnp.maximum(
            jnp.minimum(jnp.maximum(state.length * growth, 0.5), limit),
            state.length * shrink,
        )
        shrunk = jnp.where(goes_up & (state.stretch <= 1), state.length * shrink, state.length)
        length = jnp.where(goes_down, grown, shrunk)
        length = jnp.where((length < 0.3) | (num_seen < warmup), 0, length)
        stretched = jnp.where(goes_up, jnp.maximum(0.8 * state.stretch, 1), state.stretch)
        at_limit = state.length >= 0.99 * limit
        stretch = jnp.where(goes_down & at_limit, jnp.minimum(1.15 * state.stretch, longest), stretched)
        direction, adam_state = opt.update(gradient, state.adam, params)
        left = jnp.floor(length + state.carry)
        return direction, SlopeState(
            count=state.count + 1,
            left=left.astype(jnp.int32),
            direction=direction,
            slope_before=cosine_of(gradient, direction),
            after=after,
            squared=squared,
            before=before,
            weight=weight,
            num_seen=num_seen,
            length=length,
            carry=length + state.carry - left,
            stretch=stretch,
            adam=adam_state,
        )

    def repeat(gradient, state, params):
        del gradient, params
        direction = optax.tree.scale(state.stretch, state.direction)
        return direction, state._replace(count=state.count + 1, left=state.left - 1)

    def update(gradient, state, params=None):
        direction, new = jax.lax.cond(state.left > 0, repeat, true_step, gradient, state, params)
        return optax.tree.scale(schedule(state.count), direction), new

    return optax.GradientTransformation(init, update)


def cycled(in_between):
    return Method(
        functools.partial(skipping, in_between), lambda state, every: is_true_step(state.count, every), variants=(2, 3)
    )


BLIND = Window(predicts="gradient", calibrate=False, residual_decay=0.95)
LINES = (dict(predictor=Window()), dict(predictor=Recursive(decay=0.8)))
PRESETS = {
    "conservative": switched(**presets.CONSERVATIVE._asdict()),
    "balanced, the default": switched(**presets.BALANCED._asdict()),
    "aggressive": switched(**presets.AGGRESSIVE._asdict()),
}
METHODS = {
    "plain": Method(plain),
    **PRESETS,
    "coast": cycled("coast"),
    "repeat the last update": cycled("repeat"),
    "lookahead": Method(lookahead, variants=((5, 0.5), (5, 0.8)), is_lookahead=True),
    "average of plain": Method(plain, variants=(0.9, 0.99), average=True),
    "vsa-optim-rs": switched(predictor=BLIND, phases=Cycle()),
    "momentum, trainer": pair("trainer"),
    "momentum, 4 of 5": pair("predictor"),
    "momentum, guarded": switched(predictor=Momentum(), phases=Guarded()),
    "line, guarded": switched()._replace(variants=LINES),
    "line, 1 of 2": switched(predictor=Window(), phases=Cycle(full_steps=1, predict_steps=1)),
    "repeat by slope": Method(
        repeat_by_slope, lambda state, variant: state.left == 0, variants=((1.0, 3.0), (1.0, 2.0), (4.0, 3.0))
    ),
}
