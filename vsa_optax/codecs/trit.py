"""Encodes a gradient in about 1.6, 3.2 or 4.8 bits per coordinate: bind, rotate, quantise, pack.

A tree of arrays becomes a payload of packed trits with a bfloat16 scale per block. The work is O(log block_size) per
coordinate, and no memory is needed besides the data.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from vsa_optax.codecs import codec as codecs
from vsa_optax.core import checks
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics, signs, trit_blocks


class CodedLeaf(NamedTuple):
    """One array as trits.

    Attributes:
        codes: ``[trits, ceil(padded / 5)] uint8``, the base-three digits of the level numbers, lowest digit first.
            `kernels.trit_blocks` defines the order of the coordinates.
        scales: ``[blocks] bfloat16``, the scale of each block.
    """

    codes: jax.Array
    scales: jax.Array


class RawLeaf(NamedTuple):
    """One array that is not coded.

    Attributes:
        values: ``[*shape]``, the array itself.
    """

    values: jax.Array


class TritPayload(NamedTuple):
    """The payload that `TritCodec.encode` returns: a pytree of arrays.

    Attributes:
        step: ``[] int32``, which selects the codec's random rotations.
        leaves: the encoded tree, with a `CodedLeaf` for each array, or a `RawLeaf` if the array is smaller than a
            block. A container may replace these nodes with its own: only the arrays and their order are read.
        specs: static, the encoded tree with a `LeafSpec` in place of each array.
        settings: static, the settings of the codec that made the payload.
    """

    step: jax.Array
    leaves: Tree
    specs: Tree
    settings: codecs.Settings

    @property
    def codec(self) -> "TritCodec":
        """The codec that made the payload."""
        return TritCodec(**dict(self.settings.items))


@dataclasses.dataclass(frozen=True)
class TritCodec:
    """Keeps gradients in one, two or three trits per coordinate with a small error.

    Each leaf is cut into blocks. A block is bound with a random ±1 key and mixed by a Walsh-Hadamard transform, which
    makes its coordinates close to Gaussian whatever they were. The block is scaled to rms 1, and each coordinate is
    rounded to the nearest of 3, 9 or 27 Lloyd-Max levels. A byte holds five trits, and each block has a bfloat16 scale.

    ==========  ============  ====================  ======================
    ``trits``   bits          error, ``unbiased=``  ``unbiased=True``
                a coordinate  ``False``
    ==========  ============  ====================  ======================
    1           1.62          0.190                 0.235
    2           3.22          0.0278                0.0286
    3           4.82          0.0035                0.0035
    ==========  ============  ====================  ======================

    where the error is ``||x - decoded||^2 / ||x||^2``, for any dense data.

    **Unbiased.** With ``unbiased=True`` the mean of ``decode(encode(x, step))`` over steps is x. The scale is chosen
    for that and rounded stochastically. The rotation has two rounds, since after one round the mean of a block with two
    or three non-zero coordinates is off by up to a third. In blocks of 64 or more, 20,000 rotations resolve no bias; in
    narrower blocks sparse data were off by 0.003 (32), 0.013 (16), 0.10 (8) or 0.3 (4) of their norm.

    **Small leaves.** Leaves with fewer than ``block_size`` coordinates are not coded, and `nbytes` counts them at their
    full size. The remainder of a larger leaf after its whole blocks is cut into narrower blocks.

    **Determinism.** Rotations are drawn from ``seed``, ``step`` and the leaf's position in the tree. They are the same
    in jit, in scan and in another process on the same backend.

    **Dtypes.** Arithmetic is f32. Leaves are decoded in their own dtype. A complex leaf is coded as twice as many
    reals. float64 is rounded to f32.

    **Many devices.** Blocks straddle shards, so codes cannot have the sharding of a leaf: under ``jax.jit`` codes are
    replicated on every device. Encoding gathers each leaf, once if a mesh is set (``jax.set_mesh``). Without a mesh,
    XLA splits the work itself; if the first axis of a leaf is not a multiple of 1024, it may send the leaf several
    times. Decoding sends nothing. Inside ``jax.shard_map`` each device codes its own shard, and nothing is sent.

    **On an NVIDIA GPU**, Pallas kernels code leaves of at least 131,072 coordinates in blocks of 1024. They run on a
    machine with one GPU, and inside ``jax.shard_map`` on each of several. Their rotation rounds to bfloat16, which
    costs 5e-6 of a block's energy each way. A payload decodes to the same levels everywhere. Codes made on a GPU and on
    a CPU may differ by one level where a coordinate is about halfway between two.

    **In a file.** ``vsa_optax.checkpoint``, ``pickle`` of ``jax.device_get(payload)``, ``flax.serialization`` and Orbax
    save a payload without loss. ``np.savez`` loses bfloat16, the dtype of scales: save ``array.view(jnp.uint16)``.

    **Non-finite values.** A block with a NaN, an infinity or, in float64, a number beyond f32's range decodes to NaN
    throughout. Finite blocks may have any magnitude from 1e-35 to 1e35.

    Attributes:
        trits: the number of trits per coordinate, 1, 2 or 3.
        block_size: the number of coordinates that share a scale, a power of two from 2 to 65536.
        unbiased: True makes the decoded gradient unbiased; False minimizes its error.
        seed: the seed of the random rotations, ``>= 0``.

    State cost:
        none. A payload needs ``(1.6 * trits + 16 / block_size) / 8`` bytes per coordinate, and 4 bytes for the step.
        Leaves of at least 131,072 coordinates and 125 blocks are padded to a multiple of five blocks: by at most 4 %.

    Raises:
        ValueError: if an attribute is outside its range; at ``decode``, if another codec made the payload.
        TypeError: at ``encode``, if a leaf is neither floating point nor complex.

    Example:
        >>> import jax, jax.numpy as jnp, vsa_optax
        >>> codec = vsa_optax.TritCodec(trits=2)
        >>> grads = {"kernel": jax.random.normal(jax.random.key(0), (256, 256)), "bias": jnp.ones(256)}
        >>> payload = codec.encode(grads, step=0)
        >>> error = codec.decode(payload)["kernel"] - grads["kernel"]
        >>> bool(jnp.mean(error**2) < 0.03), round(8 * codec.nbytes(grads["kernel"]) / 256**2, 2)
        (True, 3.22)

    References:
        Suresh et al. (arXiv 1611.00429): rotation before quantisation. Vargaftik et al., "DRIVE" (arXiv 2105.08339)
        and "EDEN" (arXiv 2108.08842): the unbiased scale; there, the number of levels is a power of two.
    """

    trits: checks.NumTrits = 2
    _: dataclasses.KW_ONLY
    block_size: int = 1024
    unbiased: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        # NumPy integers become Python integers, so that equal settings make equal codecs.
        object.__setattr__(self, "trits", checks.check_trits("trits", self.trits))
        object.__setattr__(self, "block_size", checks.check_block_size("block_size", self.block_size))
        checks.check_bool("unbiased", self.unbiased)
        object.__setattr__(self, "seed", checks.check_integer("seed", self.seed, 0))

    def encode(self, tree: Tree, step: int | jax.Array = 0) -> TritPayload:
        """Encodes a tree as a payload; each ``step`` has its own rotation.

        Args:
            tree: a tree of floating-point or complex arrays of any shapes.
            step: ``[] int``, which selects the random rotation.
        """
        checks.check_encodable_leaves(tree)
        step = codecs.check_step(step)
        leaves, treedef = jax.tree.flatten(tree)
        specs = [codecs.spec_of(leaf) for leaf in leaves]
        coded = [self._encode_leaf(*pair, step, i) for i, pair in enumerate(zip(leaves, specs, strict=True))]
        of_tree = jax.tree.unflatten(treedef, coded), jax.tree.unflatten(treedef, specs)
        return TritPayload(step, *of_tree, codecs.Settings(tuple(dataclasses.asdict(self).items())))

    def decode(self, payload: TritPayload) -> Tree:
        """Decodes the tree in its original dtypes; only the payload is needed."""
        codecs.check_payload(payload, dataclasses.asdict(self), TritPayload)
        specs, treedef = jax.tree.flatten(payload.specs, is_leaf=codecs.is_spec)
        stacked = jax.tree.map(lambda x: x[None], payload)
        sums = jax.tree.leaves(self.decode_sum(stacked, jnp.ones([1], jnp.float32)))
        decoded = [
            leaf.values if isinstance(leaf, RawLeaf) else codecs.as_decoded(x, spec)
            for leaf, x, spec in zip(self._leaves(payload, specs), sums, specs, strict=True)
        ]
        return jax.tree.unflatten(treedef, decoded)

    def decode_sum(self, payloads: TritPayload, coefficients: jax.Array) -> Tree:
        """``sum_i coefficients[i] * decode(payloads[i])``, at the cost of one rotation.

        Args:
            payloads: payloads of one and the same step, each array stacked on a leading axis ``[n, ...]``.
            coefficients: ``[n] f32``.

        Returns:
            The tree in f32; complex leaves are complex64.
        """
        codecs.check_payload(payloads, dataclasses.asdict(self), TritPayload)
        specs, treedef = jax.tree.flatten(payloads.specs, is_leaf=codecs.is_spec)
        pairs = zip(self._leaves(payloads, specs), specs, strict=True)
        sums = [self._decode_leaf(*pair, coefficients, payloads.step[0], i) for i, pair in enumerate(pairs)]
        return jax.tree.unflatten(treedef, sums)

    def nbytes(self, tree: Tree) -> int:
        """The bytes of a payload for arrays, or ``jax.ShapeDtypeStruct``, of these shapes and dtypes."""
        return codecs.nbytes_of(self.encode, tree)

    def specs(self, payload: TritPayload) -> Tree:
        """The encoded tree, with a `LeafSpec` in place of each array."""
        codecs.check_payload(payload, dataclasses.asdict(self), TritPayload)
        return payload.specs

    def _is_small(self, spec: codecs.LeafSpec) -> bool:
        return spec.num_reals < self.block_size

    def _leaves(self, payload: TritPayload, specs: Sequence[codecs.LeafSpec]) -> list[CodedLeaf | RawLeaf]:
        """The `CodedLeaf` or `RawLeaf` of each array, whatever nodes the payload's arrays are in."""
        wanted = sum(1 if self._is_small(spec) else 2 for spec in specs)
        arrays = jax.tree.leaves(payload.leaves)
        if len(arrays) != wanted or any(map(_is_foreign, jax.tree.leaves(payload.leaves, is_leaf=_is_foreign))):
            raise ValueError(
                f"payload.leaves must be those that encode returned for {len(specs)} arrays, with codes and scales for "
                f"each of at least a block, got {len(arrays)} arrays in {jax.tree.structure(payload.leaves)}"
            )
        rest = iter(arrays)
        return [RawLeaf(next(rest)) if self._is_small(spec) else CodedLeaf(next(rest), next(rest)) for spec in specs]

    def _encode_leaf(self, leaf: ArrayLike, spec: codecs.LeafSpec, step: jax.Array, index: int) -> CodedLeaf | RawLeaf:
        if self._is_small(spec):
            return RawLeaf(jnp.asarray(leaf))
        codes, scales = trit_blocks.encode(
            codecs.as_reals(leaf),
            signs.stream(self.seed, step, index),
            trits=self.trits,
            block_size=self.block_size,
            unbiased=self.unbiased,
        )
        return CodedLeaf(codes, scales)

    def _decode_leaf(
        self,
        leaf: CodedLeaf | RawLeaf,
        spec: codecs.LeafSpec,
        coefficients: jax.Array,
        step: jax.Array,
        index: int,
    ) -> jax.Array:
        if isinstance(leaf, RawLeaf):
            return numerics.linear_combination(list(coefficients), list(leaf.values))
        reals = trit_blocks.decode_sum(
            leaf.codes,
            leaf.scales,
            coefficients,
            signs.stream(self.seed, step, index),
            size=spec.num_reals,
            block_size=self.block_size,
            unbiased=self.unbiased,
        )
        return codecs.from_reals(reals, spec)


def _is_foreign(node: object) -> bool:
    """Whether a node has the fields of a `CodedLeaf` but another class, whose trits may have another order."""
    has_its_fields = isinstance(node, tuple) and getattr(node, "_fields", None) == CodedLeaf._fields
    return has_its_fields and not isinstance(node, CodedLeaf) and jax.tree_util.all_leaves(node)  # type: ignore[arg-type]
