"""Types that a type checker treats as opaque.

For gradients, parameters or an optimizer's state, ``optax.Updates``, ``optax.Params`` and ``optax.OptState`` say more
if Optax may be imported. But these are unions of arrays, mappings and iterables. Pyright does not allow indexing them
or passing a NamedTuple as a state, and ``typing.get_type_hints`` cannot resolve them. So the fields of a state, and a
state that callers pass, are a `Tree`.
"""

from typing import Any, TypeAlias

# A pytree or a leaf: arrays, or objects in their place, in any containers of the caller or a codec.
Tree: TypeAlias = Any
