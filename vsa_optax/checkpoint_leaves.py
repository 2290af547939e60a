"""The leaves of a training state: how Orbax stores each of them, how it is restored, and how two trees differ.

`flatten` returns one `Leaf` for each array or None in a tree. Orbax refuses zero-size arrays and does not keep weak
types. The manifest keeps both, as well as None and the name of a typed PRNG key's generator.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_DTYPES = (np.bool_, np.number, jax.dtypes.prng_key)


class Leaf(NamedTuple):
    """One leaf of a tree: its path, the name of its array in Orbax (None if it has no array), and its value."""

    path: str
    key: str | None
    value: Any

    @property
    def is_key(self) -> bool:
        """Whether the leaf is a typed PRNG key."""
        return self.value is not None and jnp.issubdtype(self.value.dtype, jax.dtypes.prng_key)

    def entry(self) -> dict[str, Any]:
        """The manifest's entry of the leaf."""
        is_none = self.value is None
        has_generator = self.is_key and isinstance(self.value, jax.Array)  # A template's struct has none.
        return {
            "path": self.path,
            "key": self.key,
            "shape": None if is_none else list(self.value.shape),
            "dtype": None if is_none else str(self.value.dtype),
            "weak_type": bool(getattr(self.value, "weak_type", False)),
            "generator": str(jax.random.key_impl(self.value)) if has_generator else None,
        }

    def to_store(self) -> Any:
        """The array that Orbax stores."""
        if self.is_key:
            return np.asarray(jax.random.key_data(self.value))
        return np.asarray(self.value) if isinstance(self.value, np.generic) else self.value

    @property
    def _sharding(self) -> Any:
        """The sharding of the restored array; None if JAX may move it."""
        return self.value.sharding if getattr(self.value, "committed", True) else None

    def restore_args(self, ocp: Any) -> Any:
        """Tells Orbax how to read the array: onto devices, or into host memory if `from_stored` completes it."""
        is_host = isinstance(self.value, np.ndarray | np.generic)
        if is_host or self.is_key or self._sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=self._sharding)

    def from_stored(self, data: Any, entry: dict[str, Any]) -> Any:
        """The restored leaf of the template; ``data`` is None if Orbax holds no array for it."""
        if self.value is None:
            return None
        if data is None:  # Its size is zero.
            bare = jax.ShapeDtypeStruct(self.value.shape, self.value.dtype)
            like = jax.eval_shape(jax.random.key_data, bare) if self.is_key else bare
            data = np.zeros(like.shape, like.dtype)
        if isinstance(self.value, np.ndarray | np.generic):
            return np.asarray(data)[()] if isinstance(self.value, np.generic) else np.asarray(data)
        array = data if isinstance(data, jax.Array) else jnp.array(data)
        if self.is_key:
            array = jax.random.wrap_key_data(array, impl=entry["generator"])
        if entry["weak_type"]:
            array = _weakly_typed(array)
        return array if self._sharding is None else jax.device_put(array, self._sharding)


def flatten(tree: Any, *, values: bool = True) -> tuple[list[Leaf], Any]:
    """The leaves, including None, and the structure; an error for a leaf that cannot be stored or described."""
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    allowed = jax.Array | np.ndarray | np.generic
    leaves: list[Leaf] = []
    for index, (keys, value) in enumerate(found):
        path = jax.tree_util.keystr(keys) or "(the tree is one leaf)"
        is_struct = not values and isinstance(value, jax.ShapeDtypeStruct)
        is_array = isinstance(value, allowed) and not isinstance(value, jax.core.Tracer)
        if not (value is None or is_struct or is_array):
            kind = "traced array" if isinstance(value, jax.core.Tracer) else type(value).__name__
            raise TypeError(f"leaf {path} is a {kind}, not an array: make a number one with jnp.asarray")
        if value is not None and not any(jnp.issubdtype(value.dtype, family) for family in _DTYPES):
            raise TypeError(f"leaf {path} has dtype {value.dtype}, which a checkpoint cannot hold")
        if values and isinstance(value, jax.Array) and value.is_deleted():
            raise ValueError(f"leaf {path} is a deleted array: it was donated to a jitted function")
        if values and isinstance(value, jax.Array) and value.is_fully_addressable and jax.process_count() > 1:
            raise ValueError(
                f"leaf {path} is an array of this process alone: make it under jax.jit, with out_shardings over the "
                f"devices of all {jax.process_count()} processes"
            )
        is_stored = value is not None and math.prod(value.shape) > 0
        leaves.append(Leaf(path, f"{index:06d}" if is_stored else None, value))
    if len({leaf.path for leaf in leaves}) < len(leaves):
        raise ValueError("two leaves of the tree have the same path; a checkpoint tells leaves apart by it")
    return leaves, treedef


def differences(entries: dict[str, dict[str, Any]], wanted: list[Leaf]) -> list[str]:
    """Describes each leaf that is missing, left over or of another kind."""
    found = []
    for leaf in wanted:
        have = kind_of(entries[leaf.path]) if leaf.path in entries else "missing"
        if have != (want := kind_of(leaf.entry())):
            found.append(f"leaf {leaf.path} is {have} in the checkpoint, {want} in the template")
    paths = {leaf.path for leaf in wanted}
    for path, entry in entries.items():
        if path not in paths:
            found.append(f"leaf {path} is {kind_of(entry)} in the checkpoint, missing in the template")
    return found


def _weakly_typed(array: jax.Array) -> jax.Array:
    """The scalar with the weak type of a Python number; unchanged if it has axes or JAX would choose another dtype."""
    if array.ndim == 0 and (weak := jnp.asarray(array.item())).dtype == array.dtype:
        return weak
    return array


def kind_of(entry: dict[str, Any]) -> str:
    """The dtype and shape of the entry's leaf, in words."""
    return "None" if entry["shape"] is None else f"{entry['dtype']}{entry['shape']}"
