"""What every codec offers, and what a payload knows of the arrays it was made of."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from vsa_optax.core import checks
from vsa_optax.core.axis_names import without_names
from vsa_optax.core.trees import is_placeholder
from vsa_optax.core.types import Tree

# A pytree of arrays that a codec made, of a type of the codec's own.
Payload: TypeAlias = Any


@runtime_checkable
class Codec(Protocol):
    """A lossy code for trees of gradients; arrays of zeros in the place of a payload's decode to zeros."""

    def encode(self, tree: Tree, step: int | jax.Array = 0) -> Payload:
        """A payload, a pytree of arrays; ``step`` chooses the random key."""

    def decode(self, payload: Payload) -> Tree:
        """A tree like the one that was encoded, in its dtypes."""

    def decode_sum(self, payloads: Payload, coefficients: jax.Array) -> Tree:
        """``sum_i coefficients[i] * decode(payloads[i])`` in f32; payloads of one step, stacked on a leading axis."""

    def nbytes(self, tree: Tree) -> int:
        """The bytes of a payload for arrays of these shapes and dtypes."""

    def specs(self, payload: Payload) -> Tree:
        """The tree that was encoded, with a `LeafSpec` for each array."""


@jax.tree_util.register_static
class LeafSpec(NamedTuple):
    """Shape and dtype of an array, in its place in a tree: a pytree node without children.

    Like all that is static in a payload or a state, it is a NamedTuple of Python's own numbers and strings: what saves
    and restores states node by node, as ``flax.serialization`` does, knows these.

    Attributes:
        shape: of the array.
        dtype_name: that of its dtype.
        axes: how it is laid out over the explicit axes of a mesh, the entries of a ``PartitionSpec``; None without such
            axes, which is the usual case.
    """

    shape: tuple[int, ...]
    dtype_name: str
    axes: tuple[Any, ...] | None = None

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        return jnp.dtype(self.dtype_name)

    @property
    def sharding(self) -> PartitionSpec | None:
        """Over the explicit axes of a mesh; None without such axes."""
        return None if self.axes is None else PartitionSpec(*self.axes)

    @property
    def num_reals(self) -> int:
        """Coordinates, a complex number counting as two."""
        return math.prod(self.shape) * (2 if self.dtype.kind == "c" else 1)


@jax.tree_util.register_static
class Settings(NamedTuple):
    """A codec's settings, in a payload: a pytree node without children.

    Attributes:
        items: those of ``dataclasses.asdict(codec)``, names and numbers, bools or None.
    """

    items: tuple[tuple[str, Any], ...]


def spec_of(leaf: ArrayLike) -> LeafSpec:
    """The leaf's shape and dtype."""
    # A shape that was made of an array knows the layout, too.
    is_typed = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    layout = jax.typeof(leaf).sharding.spec if is_typed else PartitionSpec()
    axes = tuple(layout) if any(axis is not None for axis in layout) else None
    return LeafSpec(tuple(jnp.shape(leaf)), np.dtype(jnp.result_type(leaf)).name, axes)


def is_spec(node: object) -> bool:
    """Whether the node of a tree is a `LeafSpec`."""
    return isinstance(node, LeafSpec)


def zeros_of(spec: LeafSpec) -> jax.Array:
    """An array of zeros of that shape and dtype, laid out so."""
    zeros = jnp.zeros(spec.shape, spec.dtype)
    return zeros if spec.sharding is None else jax.sharding.reshard(zeros, spec.sharding)


def shapes_of(specs: Tree) -> Tree:
    """A tree of `LeafSpec` as one of ``jax.ShapeDtypeStruct``."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=is_spec)


def as_reals(leaf: ArrayLike) -> jax.Array:
    """``[num_reals] f32``: the leaf's coordinates, imaginary parts behind the real ones; all on every device."""
    array = jnp.asarray(leaf)
    if spec_of(array).sharding is not None:
        array = jax.sharding.reshard(array, PartitionSpec(*[None] * array.ndim))
    array = _on_every_device(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag])
    return array.astype(jnp.float32).reshape(-1)


def from_reals(reals: jax.Array, spec: LeafSpec) -> jax.Array:
    """The inverse of `as_reals`, in complex64 if the leaf was complex, else in f32."""
    if spec.dtype.kind == "c":
        parts = reals.reshape(2, *spec.shape)
        leaf = jax.lax.complex(parts[0], parts[1])
    else:
        leaf = reals.reshape(spec.shape)
    leaf = _on_every_device(leaf)
    return leaf if spec.sharding is None else jax.sharding.reshard(leaf, spec.sharding)


def _on_every_device(array: jax.Array) -> jax.Array:
    """All of it, if there is a mesh to say so with, whose axes are XLA's to use.

    Blocks do not end where shards do. Left to itself, XLA gives each device some blocks of a leaf that is split along
    its first axis, and where these straddle shards, sends what is coded to and fro: several times the leaf's bytes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not isinstance(array, jax.core.Tracer) or mesh.empty or mesh.manual_axes or mesh.explicit_axes:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec())


def as_decoded(leaf: jax.Array, spec: LeafSpec) -> jax.Array:
    """The leaf in the dtype that was encoded; beyond its range the largest finite value, while a NaN stays one."""
    if spec.dtype.kind != "c" and jnp.finfo(spec.dtype).max < jnp.finfo(jnp.float32).max:
        largest = float(jnp.finfo(spec.dtype).max)
        leaf = jnp.clip(leaf, -largest, largest)
    return leaf.astype(spec.dtype)


def check_codec(name: str, codec: object) -> Codec:
    """``codec``; ``ValueError`` unless it is one."""
    if isinstance(codec, type) or not isinstance(codec, Codec):
        raise ValueError(f"{name} must be a codec, such as TritCodec() or HypervectorCodec(), got {codec!r}")
    return codec


def check_step(step: int | jax.Array) -> jax.Array:
    """``step`` as ``[] int32``; ``ValueError`` unless it is one integer, of 32 bits if it is Python's."""
    if isinstance(step, int) and not isinstance(step, bool):
        return jnp.int32(checks.check_integer("step", step, -(2**31)))
    array = jnp.asarray(step)
    if array.shape != () or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"step must be one integer, got shape {array.shape} and dtype {array.dtype}")
    return array.astype(jnp.int32)


def check_payload(payload: Payload, settings: dict[str, Any], kind: type) -> None:
    """``ValueError`` unless ``payload`` is of that kind and was made by a codec of these settings."""
    if not isinstance(payload, kind):
        raise ValueError(f"payload must be a {kind.__name__}, got {type(payload).__name__}")
    made_by: Any = payload
    if dict(made_by.settings.items) != settings:
        codec = type(made_by.codec)(**settings)
        raise ValueError(f"payload was encoded by {made_by.codec}, not by {codec}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(payload):
        if isinstance(leaf, np.ndarray) and leaf.dtype.type is np.void:
            raise ValueError(
                f"payload {jax.tree_util.keystr(path[1:])} has dtype {leaf.dtype.str[1:]}: npz loses bfloat16; keep "
                "payloads by vsa_optax.checkpoint or pickle, or give the array its dtype back by "
                "array.view(jnp.bfloat16)"
            )


def zero_payload(codec: Codec, tree: Tree, num: int | None = None) -> Payload:
    """A payload of zeros for arrays like the leaves of ``tree``; ``num`` of them, stacked, unless that is None."""
    if is_placeholder(tree):
        return jnp.zeros([])
    batch = () if num is None else (num,)
    payload = jax.eval_shape(codec.encode, without_names(tree))
    # What a codec leaves as it is keeps its layout over a mesh's explicit axes, which the shapes know.
    return jax.tree.map(lambda x: jnp.broadcast_to(jnp.zeros_like(x), (*batch, *x.shape)), payload)


def nbytes_of(encode: Callable[[Tree], Payload], tree: Tree) -> int:
    """The summed bytes of the arrays that ``encode`` makes of arrays like the leaves of ``tree``."""
    checks.check_encodable_leaves(tree)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(encode, shapes)))
