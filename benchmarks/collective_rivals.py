"""Other ways to average gradients over devices: small implementations, used like `vsa_optax.compressed_pmean`.

Each is a transformation for `jax.shard_map` that receives a device's own gradient and returns an estimate of the mean,
the same on all devices.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec


class Rival(NamedTuple):
    """A way to average.

    Attributes:
        opt: the transformation.
        specs: of its state over the mesh, a prefix of it.
        sent: shapes of the gradients, number of devices -> bytes that each device sends a step.
    """

    opt: optax.GradientTransformation
    specs: Any
    sent: Callable[[Any, int], float]


class PowerSGDState(NamedTuple):
    """State of `power_sgd`.

    Attributes:
        residual: tree like the gradients, what this device has not sent yet.
        factors: list of ``[..., columns, rank]``, the last right factors; None for a leaf that is sent as it is.
    """

    residual: Any
    factors: list[Any]


def pmean(axis_name, dtype=jnp.float32):
    """``jax.lax.pmean`` in ``dtype``."""

    def update(updates, state, params=None):
        del params
        small = jax.tree.map(lambda g: g.astype(dtype), updates)
        mean = jax.lax.pmean(small, axis_name)
        return jax.tree.map(lambda m, g: m.astype(g.dtype), mean, updates), state

    def sent(shapes, num):
        return all_reduced(jnp.dtype(dtype).itemsize * size_of(shapes), num)

    return Rival(optax.GradientTransformation(lambda params: optax.EmptyState(), update), PartitionSpec(), sent)


def power_sgd(axis_name, rank=4):
    """PowerSGD with error feedback and warm start (arXiv 1905.13727, algorithms 1 and 2), without its momentum.

    It takes one step of the power iteration on each matrix: P = mean(M Q), orthonormalised; Q = mean(M^T P); the result
    is P Q^T. The last two axes of a leaf are the matrix. Vectors, and leaves that would not become smaller, are sent
    uncompressed.
    """

    def is_low_rank(leaf):
        return leaf.ndim >= 2 and rank * sum(leaf.shape[-2:]) < math.prod(leaf.shape[-2:])

    def init(params):
        leaves = jax.tree.leaves(params)
        keys = jax.random.split(jax.random.key(7), len(leaves))
        factors = [
            jax.random.normal(key, (*leaf.shape[:-2], leaf.shape[-1], rank)) if is_low_rank(leaf) else None
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return PowerSGDState(jax.tree.map(jnp.zeros_like, params), factors)

    def average(pending, factor):
        if factor is None:
            return jax.lax.pmean(pending, axis_name), None
        left = jnp.linalg.qr(jax.lax.pmean(pending @ factor, axis_name))[0]
        factor = jax.lax.pmean(jnp.swapaxes(pending, -1, -2) @ left, axis_name)
        return left @ jnp.swapaxes(factor, -1, -2), factor

    def update(updates, state, params=None):
        del params
        pending, treedef = jax.tree.flatten(jax.tree.map(jnp.add, updates, state.residual))
        means, factors = zip(*(average(*pair) for pair in zip(pending, state.factors, strict=True)), strict=True)
        # A leaf that was sent as it is leaves no residual.
        lost = [jnp.zeros_like(x) if f is None else x - m for x, m, f in zip(pending, means, factors, strict=True)]
        return treedef.unflatten(means), PowerSGDState(treedef.unflatten(lost), list(factors))

    def sent(shapes, num):
        sizes = [
            rank * sum(leaf.shape[-2:]) * math.prod(leaf.shape[:-2]) if is_low_rank(leaf) else leaf.size
            for leaf in jax.tree.leaves(shapes)
        ]
        return all_reduced(4 * sum(sizes), num)

    specs = PowerSGDState(PartitionSpec(axis_name), PartitionSpec())
    return Rival(optax.GradientTransformation(init, update), specs, sent)


def top_k(axis_name, share=0.01):
    """The largest ``share`` of all coordinates, f32 with an int32 index each, with error feedback.

    Devices keep different coordinates, so all are gathered, and each device adds them up.
    """

    def num_kept(size):
        return math.ceil(share * size)

    def init(params):
        return jnp.zeros(size_of(params))

    def update(updates, residual, params=None):
        del params
        flat, unravel = ravel_pytree(updates)
        pending = flat + residual
        places = jax.lax.top_k(jnp.abs(pending), num_kept(flat.size))[1]
        values, everywhere = jax.lax.all_gather((pending[places], places), axis_name)
        mean = jnp.zeros_like(flat).at[everywhere].add(values) / len(values)
        return unravel(mean), pending.at[places].set(0.0)

    def sent(shapes, num):
        return gathered(8 * num_kept(size_of(shapes)) * num, num)

    return Rival(optax.GradientTransformation(init, update), PartitionSpec(axis_name), sent)


def size_of(shapes):
    """How many coordinates a tree has."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def all_reduced(size, num):
    """The bytes that each of ``num`` devices sends to reduce ``size`` bytes: a reduce-scatter and an all-gather."""
    return 2 * gathered(size, num)


def gathered(size, num):
    """The bytes that each of ``num`` devices sends in an all-gather, or an all-to-all, of ``size`` bytes in total."""
    return (num - 1) / num * size
