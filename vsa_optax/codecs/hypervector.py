"""Encodes a gradient as one hypervector: each chunk is bound with its own key, and all chunks are bundled.

A tree of arrays becomes one array of D dimensions that adds like the gradient itself. The work is O(1) per coordinate,
and keys are generated on the fly.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vsa_optax.codecs import codec as codecs
from vsa_optax.codecs.trit import CodedLeaf
from vsa_optax.core import checks
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics, signs, trit_blocks

_BLOCK = 1024  # The block size of a bundle that is kept in trits.


class HypervectorPayload(NamedTuple):
    """The payload that `HypervectorCodec.encode` returns: a pytree of arrays that adds like a vector.

    Payloads of one step can be added, subtracted and multiplied by numbers; they decode to the sum, the difference or
    the multiple. To reduce over devices, reduce ``bundle`` only, ``p._replace(bundle=lax.psum(p.bundle, axis))``, since
    the step must not be summed.

    Attributes:
        step: ``[] int32``, which selects the codec's random keys.
        bundle: ``[D] float32``, or the bundle as a `CodedLeaf` with ``use_ternary=True``.
        specs: static, the encoded tree with a `LeafSpec` in place of each array.
        settings: static, the settings of the codec that made the payload.
    """

    step: jax.Array
    bundle: Tree
    specs: Tree
    settings: codecs.Settings

    @property
    def codec(self) -> "HypervectorCodec":
        """The codec that made the payload."""
        return HypervectorCodec(**dict(self.settings.items))

    def __add__(self, other: object) -> "HypervectorPayload":
        """The payload of the sum of both gradients."""
        if not isinstance(other, HypervectorPayload):
            return NotImplemented
        codecs.check_payload(other, dict(self.settings.items), HypervectorPayload)
        checks.check_same_tree(codecs.shapes_of(self.specs), codecs.shapes_of(other.specs), what="payload")
        return self._replace(bundle=self._dense() + other._dense())

    def __mul__(self, factor: jax.typing.ArrayLike) -> "HypervectorPayload":  # type: ignore[override] # No repetition.
        """The payload of the gradient times ``factor``."""
        if isinstance(factor, HypervectorPayload):
            return NotImplemented
        return self._replace(bundle=self._dense() * factor)

    def __rmul__(self, factor: jax.typing.ArrayLike) -> "HypervectorPayload":  # type: ignore[override]
        """The payload of the gradient times ``factor``."""
        return self * factor

    def __neg__(self) -> "HypervectorPayload":
        """The payload of the negative gradient."""
        return self * -1.0

    def __sub__(self, other: object) -> "HypervectorPayload":
        """The payload of the difference of both gradients."""
        return self + -other if isinstance(other, HypervectorPayload) else NotImplemented

    def _dense(self) -> jax.Array:
        if self.codec.use_ternary:
            raise TypeError("payloads add only with use_ternary=False: trits do not add; add the decoded trees instead")
        return self.bundle


# A NumPy number times a payload must not convert the payload, which is a tuple, to an array.
HypervectorPayload.__array_ufunc__ = None  # type: ignore[attr-defined] # The class may declare fields only.


@dataclasses.dataclass(frozen=True)
class HypervectorCodec:
    """Keeps a whole gradient as one hypervector, a linear sketch: hypervectors add like gradients.

    The N coordinates of the tree are cut into ``ceil(N / D)`` chunks of D. Each chunk is bound with a random ±1 key,
    and the chunks are bundled into one vector:

        bundle = sum_c key_c * x_c,      decoded x_c = key_c * bundle / m

    where m is the number of chunks that overlap at a coordinate of the bundle. The other ``m - 1`` chunks remain in the
    decoded one as noise of random sign.

    ==============  ===============================================  ====================
    ``shrink``      error                                            mean over steps
    ==============  ===============================================  ====================
    ``True``        ``1 - D / N``                                    ``D / N`` times x
    ``False``       ``N / D - 1``; more if that is no whole number   x
    ==============  ===============================================  ====================

    where the error is ``E ||x - decoded||^2 / ||x||^2``, **for any data**. With a tenth of the dimensions, the decoded
    gradient has cosine 0.32 to the gradient; with the same bytes, `vsa_optax.TritCodec` reaches 0.986. The advantage of
    the hypervector is linearity, ``decode(encode(a) + encode(b)) = decode(encode(a + b))``: sums over devices, momentum
    and error feedback work on the sketch. In a leaf much smaller than the others, their noise dominates.

    **Ternary.** With ``use_ternary=True`` the bundle itself is kept in trits (1.62 bits per dimension), as in
    `vsa_optax.TritCodec`. Such payloads do not add.

    **Determinism.** Keys are drawn from ``seed`` and ``step``. They are the same in jit, in scan and in another process
    on the same backend. Only payloads of one step add.

    **Dtypes.** Arithmetic is f32. Leaves are decoded in their own dtype. A complex leaf is coded as twice as many
    reals.

    **Non-finite values.** A NaN or an infinity anywhere in the tree makes the whole decoded tree NaN.

    Attributes:
        compression_ratio: D / N, in (0, 1].
        dimension: D, ``>= 1``, instead of ``compression_ratio``. At most N dimensions are used.
        use_ternary: whether the bundle is kept in trits.
        shrink: True minimizes the error of the decoded gradient (Wiener's factor 1 / m); False makes it unbiased.
        seed: the seed of the random keys, ``>= 0``.

    State cost:
        none. A payload needs ``4 * D`` bytes (``0.2 * D`` with ``use_ternary``), and 4 bytes for the step.

    Raises:
        ValueError: if an attribute is outside its range; at ``decode``, if another codec made the payload.
        TypeError: at ``encode``, if a leaf is neither floating point nor complex.

    Example:
        >>> import jax, jax.numpy as jnp, vsa_optax
        >>> codec = vsa_optax.HypervectorCodec(compression_ratio=0.5)
        >>> a, b = jax.random.normal(jax.random.key(0), (2, 1000))
        >>> together = codec.decode(codec.encode(a) + codec.encode(b))
        >>> bool(jnp.allclose(together, codec.decode(codec.encode(a + b)), atol=1e-5)), codec.nbytes(a)
        (True, 2004)

    References:
        Gayler, "Multiplicative binding, representation operators and analogy" (1998): bind and bundle of the
        Multiply-Add-Permute architecture. Charikar et al., "Finding frequent items in data streams" (2002): this codec
        is one row of their sketch, with a balanced hash.
    """

    compression_ratio: float = 0.1
    _: dataclasses.KW_ONLY
    dimension: int | None = None
    use_ternary: bool = False
    shrink: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        # NumPy numbers become Python numbers, so that equal settings make equal codecs.
        ratio = checks.check_real("compression_ratio", self.compression_ratio, low=0.0, high=1.0, low_open=True)
        object.__setattr__(self, "compression_ratio", ratio)
        if self.dimension is not None:
            object.__setattr__(self, "dimension", checks.check_integer("dimension", self.dimension, 1))
        checks.check_bool("use_ternary", self.use_ternary)
        checks.check_bool("shrink", self.shrink)
        object.__setattr__(self, "seed", checks.check_integer("seed", self.seed, 0))

    def encode(self, tree: Tree, step: int | jax.Array = 0) -> HypervectorPayload:
        """Encodes a tree as a payload. Each ``step`` has its own keys, and only payloads of one step add.

        Args:
            tree: a tree of floating-point or complex arrays of any shapes.
            step: ``[] int``, which selects the random keys.
        """
        checks.check_encodable_leaves(tree)
        step = codecs.check_step(step)
        reals = [codecs.as_reals(leaf) for leaf in jax.tree.leaves(tree)]
        flat = jnp.concatenate([*reals, jnp.zeros([0], jnp.float32)])
        vector = self._bundle(flat, step)
        bundle: jax.Array | CodedLeaf = vector
        if self.use_ternary:
            key = signs.stream(self.seed, step, 1)
            codes, scales = trit_blocks.encode(vector, key, trits=1, block_size=_BLOCK, unbiased=not self.shrink)
            bundle = CodedLeaf(codes, scales)
        settings = codecs.Settings(tuple(dataclasses.asdict(self).items()))
        return HypervectorPayload(step, bundle, jax.tree.map(codecs.spec_of, tree), settings)

    def decode(self, payload: HypervectorPayload) -> Tree:
        """Decodes the tree in its original dtypes; only the payload is needed."""
        codecs.check_payload(payload, dataclasses.asdict(self), HypervectorPayload)
        stacked = jax.tree.map(lambda x: x[None], payload)
        sums = self.decode_sum(stacked, jnp.ones([1], jnp.float32))
        return jax.tree.map(lambda spec, x: codecs.as_decoded(x, spec), payload.specs, sums, is_leaf=codecs.is_spec)

    def decode_sum(self, payloads: HypervectorPayload, coefficients: jax.Array) -> Tree:
        """``sum_i coefficients[i] * decode(payloads[i])``, at the cost of one decoding.

        Args:
            payloads: payloads of one and the same step, each array stacked on a leading axis ``[n, ...]``.
            coefficients: ``[n] f32``.

        Returns:
            The tree in f32; complex leaves are complex64.
        """
        codecs.check_payload(payloads, dataclasses.asdict(self), HypervectorPayload)
        specs, treedef = jax.tree.flatten(payloads.specs, is_leaf=codecs.is_spec)
        sizes = [spec.num_reals for spec in specs]
        step = payloads.step[0]
        if self.use_ternary:
            codes, scales = jax.tree.leaves(payloads.bundle)
            total = trit_blocks.decode_sum(
                codes,
                scales,
                coefficients,
                signs.stream(self.seed, step, 1),
                size=self._dimension(sum(sizes)),
                block_size=_BLOCK,
                unbiased=not self.shrink,
            )
        else:
            total = numerics.linear_combination(list(coefficients), list(payloads.bundle))
        flat = self._unbind(total, sum(sizes), step)
        ends = [sum(sizes[:i]) for i in range(1, len(sizes))]
        pieces = [codecs.from_reals(p, s) for p, s in zip(jnp.split(flat, ends), specs, strict=bool(specs))]
        return jax.tree.unflatten(treedef, pieces)

    def nbytes(self, tree: Tree) -> int:
        """The bytes of a payload for arrays, or ``jax.ShapeDtypeStruct``, of these shapes and dtypes."""
        return codecs.nbytes_of(self.encode, tree)

    def specs(self, payload: HypervectorPayload) -> Tree:
        """The encoded tree, with a `LeafSpec` in place of each array."""
        codecs.check_payload(payload, dataclasses.asdict(self), HypervectorPayload)
        return payload.specs

    def _dimension(self, size: int) -> int:
        share = round(self.compression_ratio * size, 6)  # 0.07 * 100 is a little more than 7.
        wanted = math.ceil(share) if self.dimension is None else self.dimension
        return max(1, min(wanted, size))

    def _keys(self, size: int, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sign bits ``[chunks, D]``, and the index of the vector at which the first chunk begins.

        If the last chunk is not full, some coordinates overlap with more others than the rest. A random beginning gives
        each coordinate the same probability of that, so the expected error is the same for any data.
        """
        dimension = self._dimension(size)
        key = signs.stream(self.seed, step, 0)
        bits = signs.random_sign_bits(key, (max(1, -(-size // dimension)), dimension))
        return bits, jax.random.randint(jax.random.fold_in(key, 0), [], 0, max(size, 1))

    def _bundle(self, flat: jax.Array, step: jax.Array) -> jax.Array:
        """``[D]``: the sum of the bound chunks."""
        bits, begin = self._keys(flat.size, step)
        if bits.size != flat.size:
            flat = jnp.pad(jnp.roll(flat, -begin), (0, bits.size - flat.size))
        ones = jnp.ones([bits.shape[0]], jnp.float32)
        return jnp.matmul(ones, signs.flip(flat.reshape(bits.shape), bits), precision=jax.lax.Precision.HIGHEST)

    def _unbind(self, bundle: jax.Array, size: int, step: jax.Array) -> jax.Array:
        """``[size]``: an estimate of the chunks, from the bundle."""
        bits, begin = self._keys(size, step)
        # A NaN at one place of the bundle would appear at some places of the tree: make the whole tree NaN.
        bundle = jnp.where(jnp.all(jnp.isfinite(bundle)), bundle, jnp.nan)
        if self.shrink:
            chunks, dimension = bits.shape
            num_met = jnp.where(jnp.arange(dimension) >= size - (chunks - 1) * dimension, chunks - 1, chunks)
            bundle = bundle / jnp.maximum(num_met, 1).astype(jnp.float32)  # 0 only in an empty tree.
        flat = signs.flip(jnp.broadcast_to(bundle, bits.shape), bits).reshape(-1)[:size]
        return flat if bits.size == size else jnp.roll(flat, begin)
