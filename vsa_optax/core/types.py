"""Types that no checker can look into, by the name of what they hold.

Where gradients, parameters or an optimizer's state are meant, and Optax may be imported, ``optax.Updates``,
``optax.Params`` and ``optax.OptState`` say more. But these are unions of arrays, mappings and iterables: Pyright lets
nobody index them, nor pass a state that is a NamedTuple for one, and ``typing.get_type_hints`` cannot resolve them. So
the fields of a state, and a state that callers pass, are a `Tree`.
"""

from typing import Any, TypeAlias

# A pytree, or a leaf of one: arrays, or what stands in their place, in containers of the caller's or a codec's own.
Tree: TypeAlias = Any
