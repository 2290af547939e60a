"""Groups arrays of the same types, so that one launch can serve several.

For many small arrays, launching a kernel for each takes longer than its work.
"""

from collections.abc import Sequence

import jax


def numbers_of_alike(*lists: Sequence[jax.Array], most: int | None = None) -> list[list[int]]:
    """Groups the indices at which the arrays of each list have the same type.

    With ``most``, groups of more indices are divided into parts of about the same size.
    """
    of_types: dict[object, list[int]] = {}
    for i, row in enumerate(zip(*lists, strict=True)):
        of_types.setdefault(tuple(map(jax.typeof, row)), []).append(i)
    return [part for numbers in of_types.values() for part in _parts(numbers, most or len(numbers))]


def _parts(numbers: list[int], most: int) -> list[list[int]]:
    num = -(-len(numbers) // most)
    return [numbers[len(numbers) * i // num : len(numbers) * (i + 1) // num] for i in range(num)]
