"""Other ways to accumulate gradients in less memory: small implementations with the semantics of `optax.MultiSteps`.

Each is a transformation that emits zeros except at every K-th micro-batch. Optax's own bfloat16 accumulator needs no
implementation: `optax.MultiSteps(..., accumulator_dtype=jnp.bfloat16)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax import trits

_BLOCK = 256


class Code(NamedTuple):
    """How the running sum of one leaf's gradients is kept.

    Attributes:
        zeros: leaf -> the empty sum.
        add: sum, gradient, random key -> the sum with one more micro-batch.
        finish: sum, last gradient, random key -> ``[*shape] f32``, the decoded sum of all.
    """

    zeros: Callable[[jax.Array], Any]
    add: Callable[[Any, jax.Array, jax.Array], Any]
    finish: Callable[[Any, jax.Array, jax.Array], jax.Array]


class MultiStepsState(NamedTuple):
    """State of `multi_steps`.

    Attributes:
        mini_step: ``[] int32``, micro-batches in the present window.
        gradient_step: ``[] int32``, updates of the inner optimizer so far.
        inner_opt_state: the inner optimizer's state.
        acc_grads: list of coded sums, one a leaf.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: Any
    acc_grads: list[Any]


def multi_steps(opt, every_k, code):
    """`optax.MultiSteps` with a coded sum: ``opt`` runs at every K-th micro-batch on the mean."""

    def init(params):
        sums = [code.zeros(leaf) for leaf in jax.tree.leaves(params)]
        return MultiStepsState(jnp.int32(0), jnp.int32(0), opt.init(params), sums)

    def update(updates, state, params=None):
        gradients, treedef = jax.tree.flatten(updates)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), state.gradient_step), state.mini_step)
        keys = [jax.random.fold_in(key, index) for index in range(len(gradients))]

        def finish():
            parts = zip(state.acc_grads, gradients, keys, strict=True)
            mean = treedef.unflatten([code.finish(*part) / every_k for part in parts])
            emitted, inner = opt.update(mean, state.inner_opt_state, params)
            empty = [code.zeros(leaf) for leaf in gradients]
            return emitted, MultiStepsState(jnp.int32(0), state.gradient_step + 1, inner, empty)

        def add():
            sums = [code.add(*part) for part in zip(state.acc_grads, gradients, keys, strict=True)]
            return jax.tree.map(jnp.zeros_like, updates), state._replace(mini_step=state.mini_step + 1, acc_grads=sums)

        return jax.lax.cond(state.mini_step == every_k - 1, finish, add)

    return optax.GradientTransformation(init, update)


class Int8Sum(NamedTuple):
    """A sum in 8 bits.

    Attributes:
        codes: ``[blocks, 256] int8``, multiples of the scale.
        scales: ``[blocks] bfloat16``, a block's largest entry over 127.
    """

    codes: jax.Array
    scales: jax.Array


def int8_blocks():
    """Rounded to the nearest multiple of a scale for each 256 coordinates, at every micro-batch but the last."""

    def zeros(leaf):
        blocks = -(-leaf.size // _BLOCK)
        return Int8Sum(jnp.zeros([blocks, _BLOCK], jnp.int8), jnp.zeros([blocks], jnp.bfloat16))

    def decode(total, like):
        values = total.codes * total.scales[:, None].astype(jnp.float32)
        return values.reshape(-1)[: like.size].reshape(like.shape)

    def add(total, gradient, key):
        del key
        flat = (decode(total, gradient) + gradient).reshape(-1)
        blocks = jnp.pad(flat, (0, -flat.size % _BLOCK)).reshape(-1, _BLOCK)
        scales = (jnp.max(jnp.abs(blocks), axis=1) / 127).astype(jnp.bfloat16)
        unit = blocks / jnp.maximum(scales.astype(jnp.float32), 1e-30)[:, None]
        return Int8Sum(jnp.clip(jnp.round(unit), -127, 127).astype(jnp.int8), scales)

    return Code(zeros, add, lambda total, last, key: decode(total, last) + last)


def ternary_counts():
    """The sum, in f32, of stochastic trits of each micro-gradient, the last included, scaled by its largest entry."""

    def add(total, gradient, key):
        return total + trits.dequantize(*trits.quantize_stochastic(gradient, key))

    return Code(jnp.zeros_like, add, add)


class AdamAState(NamedTuple):
    """State of `adam_a`.

    Attributes:
        mini_step: ``[] int32``, micro-batches in the present window.
        count: ``[] int32``, updates so far.
        mu: tree like the parameters, the first moment.
        nu: tree like the parameters, the second.
    """

    mini_step: jax.Array
    count: jax.Array
    mu: Any
    nu: Any


def adam_a(schedule, every_k, b1=0.9, b2=0.999, eps=1e-8):
    """Adam that folds micro-gradients into its moments at once and keeps no sum of them (AdamA, arXiv 2305.19982).

    At the first of a window the moments decay; each then adds ``(1 - b1) g / K`` to one, ``(1 - b2) (g / K)^2`` to the
    other, where Adam would add the square of the mean.
    """

    def init(params):
        moments = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return AdamAState(jnp.int32(0), jnp.int32(0), *moments)

    def update(updates, state, params=None):
        del params
        is_first, is_last = state.mini_step == 0, state.mini_step == every_k - 1

        def folded(moment, decay, order):
            kept = jnp.where(is_first, decay, 1.0)
            return jax.tree.map(lambda m, g: kept * m + (1 - decay) * (g / every_k) ** order, moment, updates)

        mu, nu = folded(state.mu, b1, 1), folded(state.nu, b2, 2)
        rate, steps = jnp.where(is_last, schedule(state.count), 0.0), state.count + 1

        def emitted(m, v):
            return -rate * (m / (1 - b1**steps)) / (jnp.sqrt(v / (1 - b2**steps)) + eps)

        state = AdamAState(jnp.where(is_last, 0, state.mini_step + 1), state.count + is_last, mu, nu)
        return jax.tree.map(emitted, mu, nu), state

    return optax.GradientTransformation(init, update)
