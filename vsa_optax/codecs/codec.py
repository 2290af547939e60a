"""The interface of every codec, and a payload's description of the arrays that it encodes."""

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

# A pytree of arrays that a codec made; each codec has its own type.
Payload: TypeAlias = Any


@runtime_checkable
class Codec(Protocol):
    """A lossy code for trees of gradients. A payload whose arrays are replaced by zeros decodes to zeros."""

    def encode(self, tree: Tree, step: int | jax.Array = 0) -> Payload:
        """Encodes a tree as a payload, a pytree of arrays; ``step`` chooses the random key."""

    def decode(self, payload: Payload) -> Tree:
        """Decodes a tree like the encoded one, in its dtypes."""

    def decode_sum(self, payloads: Payload, coefficients: jax.Array) -> Tree:
        """``sum_i coefficients[i] * decode(payloads[i])`` in f32; payloads of one step, stacked on a leading axis."""

    def nbytes(self, tree: Tree) -> int:
        """The bytes of a payload for arrays of these shapes and dtypes."""

    def specs(self, payload: Payload) -> Tree:
        """The encoded tree, with a `LeafSpec` in place of each array."""


@jax.tree_util.register_static
class LeafSpec(NamedTuple):
    """Shape and dtype of an array, in its place in a tree: a pytree node without children.

    Like all static data in a payload or a state, it is a NamedTuple of Python numbers and strings, because
    ``flax.serialization`` and other tools that save states node by node support these.

    Attributes:
        shape: the shape of the array.
        dtype_name: the name of its dtype.
        axes: its sharding over the explicit axes of a mesh, as the entries of a ``PartitionSpec``; None without such
            axes, which is the usual case.
    """

    shape: tuple[int, ...]
    dtype_name: str
    axes: tuple[Any, ...] | None = None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the array."""
        return jnp.dtype(self.dtype_name)

    @property
    def sharding(self) -> PartitionSpec | None:
        """The sharding over the explicit axes of a mesh; None without such axes."""
        return None if self.axes is None else PartitionSpec(*self.axes)

    @property
    def num_reals(self) -> int:
        """The number of coordinates; a complex number counts as two."""
        return math.prod(self.shape) * (2 if self.dtype.kind == "c" else 1)


@jax.tree_util.register_static
class Settings(NamedTuple):
    """The settings of a codec inside a payload: a pytree node without children.

    Attributes:
        items: the items of ``dataclasses.asdict(codec)``: names with numbers, bools or None.
    """

    items: tuple[tuple[str, Any], ...]


def spec_of(leaf: ArrayLike) -> LeafSpec:
    """The leaf's shape, dtype and explicit sharding."""
    # A ShapeDtypeStruct made from an array has the sharding as well.
    is_typed = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    layout = jax.typeof(leaf).sharding.spec if is_typed else PartitionSpec()
    axes = tuple(layout) if any(axis is not None for axis in layout) else None
    return LeafSpec(tuple(jnp.shape(leaf)), np.dtype(jnp.result_type(leaf)).name, axes)


def is_spec(node: object) -> bool:
    """Whether a node of a tree is a `LeafSpec`."""
    return isinstance(node, LeafSpec)


def zeros_of(spec: LeafSpec) -> jax.Array:
    """An array of zeros with this shape, dtype and sharding."""
    zeros = jnp.zeros(spec.shape, spec.dtype)
    return zeros if spec.sharding is None else jax.sharding.reshard(zeros, spec.sharding)


def shapes_of(specs: Tree) -> Tree:
    """Turns a tree of `LeafSpec` into a tree of ``jax.ShapeDtypeStruct``."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=is_spec)


def as_reals(leaf: ArrayLike) -> jax.Array:
    """``[num_reals] f32``: the leaf's coordinates, imaginary parts after real ones; replicated on every device."""
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
    """The array, constrained to be replicated if there is a mesh whose axes are automatic.

    Blocks straddle shards. Without the constraint, XLA gives each device some blocks of a leaf that is split along its
    first axis. It then sends coded data back and forth between the shards: several times the bytes of the leaf.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not isinstance(array, jax.core.Tracer) or mesh.empty or mesh.manual_axes or mesh.explicit_axes:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec())


def as_decoded(leaf: jax.Array, spec: LeafSpec) -> jax.Array:
    """The leaf in the encoded dtype. Values beyond its range become its largest finite value; a NaN stays NaN."""
    if spec.dtype.kind != "c" and jnp.finfo(spec.dtype).max < jnp.finfo(jnp.float32).max:
        largest = float(jnp.finfo(spec.dtype).max)
        leaf = jnp.clip(leaf, -largest, largest)
    return leaf.astype(spec.dtype)


def check_codec(name: str, codec: object) -> Codec:
    """Returns ``codec``, or raises ``ValueError`` unless it is a codec."""
    if isinstance(codec, type) or not isinstance(codec, Codec):
        raise ValueError(f"{name} must be a codec, such as TritCodec() or HypervectorCodec(), got {codec!r}")
    return codec


def check_step(step: int | jax.Array) -> jax.Array:
    """``step`` as ``[] int32``; ``ValueError`` unless it is one integer. A Python integer must fit into 32 bits."""
    if isinstance(step, int) and not isinstance(step, bool):
        return jnp.int32(checks.check_integer("step", step, -(2**31)))
    array = jnp.asarray(step)
    if array.shape != () or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"step must be one integer, got shape {array.shape} and dtype {array.dtype}")
    return array.astype(jnp.int32)


def check_payload(payload: Payload, settings: dict[str, Any], kind: type) -> None:
    """``ValueError`` unless ``payload`` is a ``kind`` and was made by a codec with these settings."""
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
    """A payload of zeros for arrays like the leaves of ``tree``; unless ``num`` is None, a stack of ``num`` of them."""
    if is_placeholder(tree):
        return jnp.zeros([])
    batch = () if num is None else (num,)
    payload = jax.eval_shape(codec.encode, without_names(tree))
    # An array that a codec does not code keeps its explicit sharding, which its shape struct contains.
    return jax.tree.map(lambda x: jnp.broadcast_to(jnp.zeros_like(x), (*batch, *x.shape)), payload)


def nbytes_of(encode: Callable[[Tree], Payload], tree: Tree) -> int:
    """The total bytes of the arrays that ``encode`` returns for arrays like the leaves of ``tree``."""
    checks.check_encodable_leaves(tree)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(encode, shapes)))
