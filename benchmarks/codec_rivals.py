"""Other ways to compress a gradient, for comparison with the codecs: small implementations, and published figures.

Each has the methods of a codec that `vsa_optax.compress_gradients` uses. Its bytes are counted, not packed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from vsa_optax import trits

# Distortion E|x - decoded|^2 / E|x|^2 of a unit Gaussian at the best 2 and 4 levels: 1 - 2 / pi, and Max (1960).
_DISTORTION_1_BIT, _DISTORTION_2_BITS = 1 - 2 / math.pi, 0.1175
# EDEN, unbiased: bits a coordinate and vNMSE, for many dimensions (arXiv 2108.08842, arXiv 2604.18555). At 1.6 bits,
# two coordinates in five have one bit and the others two, with one scale: D / (1 - D) of the mean distortion D.
_MIXED = 0.4 * _DISTORTION_1_BIT + 0.6 * _DISTORTION_2_BITS
EDEN = {1.0: math.pi / 2 - 1, 1.6: _MIXED / (1 - _MIXED), 2.0: 0.133, 4.0: 0.0096}


@dataclasses.dataclass(frozen=True)
class Rival:
    """A lossy code of which only the loss and the size are known.

    Attributes:
        lossy: tree, random key -> the tree that a receiver would decode.
        bits: sizes of the leaves -> bits of the whole payload.
    """

    lossy: Callable[[Any, jax.Array], Any]
    bits: Callable[[list[int]], float]

    def encode(self, tree, step=0):
        return self.lossy(tree, jax.random.fold_in(jax.random.key(7), step))

    def decode(self, payload):
        return payload

    def nbytes(self, tree):
        return math.ceil(self.bits([leaf.size for leaf in jax.tree.leaves(tree)]) / 8)

    def decode_sum(self, payloads, coefficients):
        raise NotImplementedError

    def specs(self, payload):
        raise NotImplementedError


def top_k(bits_a_coordinate):
    """The largest entries of the whole tree, float16 over the largest one, each with its index in ceil(log2 N) bits."""

    def num_kept(size):
        return int((bits_a_coordinate * size - 32) // (16 + math.ceil(math.log2(size))))

    def lossy(flat, key):
        del key
        magnitude = jnp.abs(flat)
        peak = jnp.maximum(jnp.max(magnitude), 1e-30)
        is_kept = magnitude >= kth_largest(magnitude, num_kept(flat.size))
        return jnp.where(is_kept, _rounded(flat / peak, jnp.float16) * peak, 0.0)

    return Rival(_on_flat(lossy), lambda sizes: bits_a_coordinate * sum(sizes))


def kth_largest(magnitude, k):
    """The k-th largest of non-negative numbers, by bisection of their bits: a sort takes ten times as long on a CPU."""
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)

    def refine(i, lowest):
        candidate = lowest | (1 << (30 - i))
        return jnp.where(jnp.sum(bits >= candidate) >= k, candidate, lowest)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, refine, jnp.int32(0)), jnp.float32)


def count_sketch(ratio):
    """One row of a count sketch (Charikar et al. 2002) in f32, each estimate shrunk by Wiener's factor.

    Every coordinate gets a random sign and a random bucket of ``ratio * N``; a bucket of m coordinates is decoded to
    1 / m of its sum at each of them.
    """

    def lossy(flat, key):
        buckets = math.ceil(ratio * flat.size)
        for_place, for_sign = jax.random.split(key)
        place = jax.random.randint(for_place, flat.shape, 0, buckets)
        sign = jax.random.rademacher(for_sign, flat.shape, jnp.float32)
        sums = jnp.zeros(buckets).at[place].add(sign * flat)
        counts = jnp.zeros(buckets).at[place].add(1.0)
        return sign * (sums / jnp.maximum(counts, 1))[place]

    return Rival(_on_flat(lossy), lambda sizes: 32 * math.ceil(ratio * sum(sizes)))


def terngrad():
    """TernGrad without clipping (arXiv 1705.07878): stochastic trits, each leaf scaled by its largest entry."""

    def lossy(leaf, key):
        return trits.dequantize(*trits.quantize_stochastic(leaf, key))

    return Rival(_on_leaves(lossy), lambda sizes: 1.6 * sum(sizes) + 32 * len(sizes))


def unrotated_trits():
    """Deterministic trits without a rotation, one scale a leaf: cut at 0.7 of the mean magnitude."""

    def lossy(leaf, key):
        del key
        return trits.dequantize(*trits.quantize_deterministic(leaf))

    return Rival(_on_leaves(lossy), lambda sizes: 1.6 * sum(sizes) + 32 * len(sizes))


def bfloat16():
    """Rounded to the nearest bfloat16."""

    def lossy(leaf, key):
        del key
        return _rounded(leaf, jnp.bfloat16)

    return Rival(_on_leaves(lossy), lambda sizes: 16 * sum(sizes))


def int8():
    """Rounded to the nearest of 255 multiples of a leaf's largest entry over 127."""

    def lossy(leaf, key):
        del key
        scale = jnp.maximum(jnp.max(jnp.abs(leaf)), 1e-30) / 127
        return jnp.round(leaf / scale) * scale

    return Rival(_on_leaves(lossy), lambda sizes: 8 * sum(sizes) + 32 * len(sizes))


def vsa_optim_rs(tensors, dimension, rng, *, multiply=False):
    """The compressor of the Rust crate vsa-optim-rs 0.1.1, written anew.

    Each tensor is projected by a random matrix, made ternary at its mean magnitude and bound with a ternary key, a
    third of it zeros; the bundle is their majority. Decoding unbinds, and multiplies by the transposed matrix.

    Args:
        tensors: list of ``[n] f32``.
        dimension: of the hypervector.
        rng: NumPy's generator.
        multiply: whether to bind by multiplication, as vector symbolic architectures do, so that the key's zeros erase;
            the crate's dependency trit-vsa subtracts modulo 3, which erases nothing but does not distribute over sums.

    Returns:
        ``(decoded, bits)``: list of ``[n] f32``, and bits as it stores them: two a dimension, 32 a scale.
    """
    matrices, keys, scales = [], [], []
    votes = np.zeros(dimension, np.int32)
    for tensor in tensors:
        draw = rng.random((tensor.size, dimension), np.float32)
        entry = np.float32(math.sqrt(3 / dimension))
        matrix = np.where(draw < 0.16, entry, np.where(draw < 0.32, -entry, np.float32(0)))
        projected = tensor @ matrix
        scale = np.abs(projected).mean()
        key = rng.integers(-1, 2, dimension)
        ternary = np.sign(projected).astype(np.int32) * (np.abs(projected) > scale)
        votes += ternary * key if multiply else _balanced(ternary - key)
        for what, kept in ((matrix, matrices), (key, keys), (scale, scales)):
            kept.append(what)
    bundle = np.sign(votes)
    unbound = [bundle * key if multiply else _balanced(bundle + key) for key in keys]
    decoded = [m @ (u * s).astype(np.float32) for m, u, s in zip(matrices, unbound, scales, strict=True)]
    return decoded, 2 * dimension + 32 * len(tensors)


def gaussian_sketch(tensor, ratio, rng):
    """The least-squares estimate from ``ratio * n`` projections on dense Gaussian vectors."""
    matrix = rng.standard_normal((math.ceil(ratio * tensor.size), tensor.size), np.float32)
    return matrix.T @ np.linalg.solve(matrix @ matrix.T, matrix @ tensor)


def _rounded(x, dtype):
    """To the nearest number of the type, in f32; XLA leaves out a pair of conversions there and back."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def _balanced(numbers):
    """Modulo 3, to -1, 0, 1."""
    return (numbers + 1) % 3 - 1


def _on_leaves(lossy):
    def on_tree(tree, key):
        leaves, treedef = jax.tree.flatten(tree)
        return treedef.unflatten([lossy(leaf, jax.random.fold_in(key, i)) for i, leaf in enumerate(leaves)])

    return on_tree


def _on_flat(lossy):
    def on_tree(tree, key):
        flat, unravel = jax.flatten_util.ravel_pytree(tree)
        return unravel(lossy(flat, key))

    return on_tree
