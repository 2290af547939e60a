"""The last W changes of parameters and gradients: what the gradient is elsewhere, not when.

A line in time extrapolates; this one looks up. It knows nothing that the parameters have not met, but on a loss without
noise it is right wherever the optimizer goes among the directions it came by, turns and oscillations included.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax.kernels import inner_products, numerics, secant
from vsa_optax.transforms.history import SecantHistoryState, zeros_as_stored


class SecantScalars(NamedTuple):
    """What one step's parameters are to the history.

    Attributes:
        horizon: ``[] float32``, steps from the newest record.
        coefficients: ``[R, W] float32``, of ``diff_gradients`` in the prediction, by each ridge.
        products: ``[W] float32``, of ``diff_params`` with the way from the newest record to the parameters.
        energy: ``[] float32``, that way's squared length.
    """

    horizon: jax.Array
    coefficients: jax.Array
    products: jax.Array
    energy: jax.Array


@dataclasses.dataclass(frozen=True)
class SecantHistory:
    """A linear model of the gradient through the last ``length`` changes.

    State cost: ``2 * length + 2`` times the parameters, plus ``4 * (length**2 + 2)`` bytes.
    """

    length: int
    dtype: jnp.dtype | None

    def describe(self) -> str:
        """Secant and length."""
        return f"secant of {self.length}"

    def init(self, params: Any) -> SecantHistoryState:
        """The empty history; its leaves are laid out on the devices as the parameters are."""

        def ring(zeros: jax.Array) -> jax.Array:
            return jnp.broadcast_to(zeros[None], (self.length, *zeros.shape))

        return SecantHistoryState(
            # Differences are small beside the parameters, which need all of their digits for them.
            params=zeros_as_stored(params, None),
            gradient=zeros_as_stored(params, self.dtype),
            diff_params=jax.tree.map(ring, zeros_as_stored(params, self.dtype)),
            diff_gradients=jax.tree.map(ring, zeros_as_stored(params, self.dtype)),
            gram=jnp.zeros([self.length, self.length], jnp.float32),
            num_records=jnp.zeros([], jnp.int32),
            last_step=jnp.zeros([], jnp.int32),
        )

    def example(self, state: SecantHistoryState) -> tuple[Any, int]:
        """The newest gradient."""
        return state.gradient, 0

    def scalars(self, state: SecantHistoryState, step: jax.Array, params: Any) -> SecantScalars:
        """One pass over ``diff_params``."""
        way = jax.tree.map(difference, params, state.params)
        products, energy = jnp.zeros([self.length], jnp.float32), jnp.zeros([], jnp.float32)
        for records, x in zip(jax.tree.leaves(state.diff_params), jax.tree.leaves(way), strict=True):
            products = products + inner_products.inner_of_records(records, x)
            energy = energy + inner_products.inner(x, x)
        # Before the first record there is no way from it.
        has_record = state.num_records > 0
        is_known = has_record & jnp.isfinite(energy) & jnp.all(jnp.isfinite(products))
        products, energy = jnp.where(is_known, products, 0), jnp.where(is_known, energy, 0)
        return SecantScalars(
            horizon=(step - state.last_step).astype(jnp.float32),
            coefficients=secant.coefficients(state.gram, products),
            products=products,
            energy=energy,
        )

    def record(
        self, state: SecantHistoryState, tree: Any, params: Any, step: jax.Array, scalars: SecantScalars
    ) -> SecantHistoryState:
        """Overwrites the oldest change; the first record has none, and leaves zeros."""
        slot = state.num_records % self.length
        has_record = state.num_records > 0

        def changed(records: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
            change = jnp.where(has_record, difference(new, old), 0)
            return records.at[slot].set(numerics.saturating_cast(change, records.dtype))

        def kept(old: jax.Array, new: jax.Array) -> jax.Array:
            return numerics.saturating_cast(new, old.dtype)

        row = scalars.products.at[slot].set(scalars.energy)
        return SecantHistoryState(
            params=jax.tree.map(kept, state.params, params),
            gradient=jax.tree.map(kept, state.gradient, tree),
            diff_params=jax.tree.map(changed, state.diff_params, params, state.params),
            diff_gradients=jax.tree.map(changed, state.diff_gradients, tree, state.gradient),
            gram=state.gram.at[slot].set(row).at[:, slot].set(row),
            num_records=optax.safe_increment(state.num_records),
            last_step=step,
        )


def difference(new: jax.Array, old: jax.Array) -> jax.Array:
    """``new - old`` in at least f32."""
    wide = jnp.promote_types(new.dtype, jnp.float32)
    return new.astype(wide) - old.astype(wide)
