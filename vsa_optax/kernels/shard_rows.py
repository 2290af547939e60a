"""A list of vectors as one row a device, for a reduce-scatter, and back.

Axes: n rows, one a device; w coordinates.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How vectors are cut into rows.

    A vector of ``num_rows * block`` coordinates or more is cut by itself. The others are put together, the largest
    first, so that only the smallest of them share their blocks with many: their rows alone would be too short to code.

    Attributes:
        sizes: coordinates of each vector.
        num_rows: n.
        block: coordinates from which on a row is coded.
        worth_padding: coordinates from which on a shorter row costs less if it is padded to a block, and coded.
    """

    sizes: tuple[int, ...]
    num_rows: int
    block: int
    worth_padding: int

    def cut(self, vectors: Sequence[jax.Array]) -> list[jax.Array]:
        """Arrays ``[n, w]``, zeros behind the coordinates, of the vectors ``[size] f32``; none for empty vectors."""
        rows = []
        for group in self._groups():
            flat = jnp.concatenate([vectors[i] for i in group])
            width = self._width(flat.size)
            rows.append(jnp.pad(flat, (0, self.num_rows * width - flat.size)).reshape(self.num_rows, width))
        return rows

    def join(self, rows: Sequence[jax.Array]) -> list[jax.Array]:
        """The inverse of `cut`."""
        vectors = [jnp.zeros([0], jnp.float32)] * len(self.sizes)
        for group, of_group in zip(self._groups(), rows, strict=True):
            flat, start = of_group.reshape(-1), 0
            for i in group:
                vectors[i] = flat[start : start + self.sizes[i]]
                start += self.sizes[i]
        return vectors

    def _groups(self) -> list[list[int]]:
        """Which vectors are cut together."""
        by_size = sorted((i for i, size in enumerate(self.sizes) if size), key=lambda i: -self.sizes[i])
        alone = [[i] for i in by_size if self.sizes[i] >= self.num_rows * self.block]
        together = by_size[len(alone) :]
        return [*alone, together] if together else alone

    def _width(self, size: int) -> int:
        width = -(-size // self.num_rows)
        return self.block if self.worth_padding <= width < self.block else width
