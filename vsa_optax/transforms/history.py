"""What the predictor remembers of past gradients: the last W of them, or an exact recursion over all.

Two histories with one interface: ``init(params)``; ``scalars(state, step)``, all that is known of a step before any
leaf is touched; ``terms(state, scalars)``, the numbers and trees whose weighted sum is the prediction;
``record(state, tree, step, scalars)``; and for a calibrated prediction ``combine``, its features weighted anew in each
leaf, and ``products``, those of the features with each other and with what came.

The scalars are a function of their own because they must be computed outside the conditionals that use them: fused into
a loop over a leaf, XLA computes them anew for each element.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax

from vsa_optax.kernels import numerics, wls


class WindowHistoryState(NamedTuple):
    """The last W records, in a ring.

    Attributes:
        records: tree of ``[W, *shape]``, in the leaf's dtype or ``history_dtype``; slots not yet written are 0.
        steps: ``[W] int32``, the step of each record.
        num_records: ``[] int32``, records written so far; the next goes to slot ``num_records % W``.
    """

    records: Any
    steps: jax.Array
    num_records: jax.Array


class CodedWindowHistoryState(NamedTuple):
    """The last W records as payloads of a codec, in a ring.

    Attributes:
        records: a payload, each of its arrays ``[W, ...]``; slots not yet written are 0.
        steps: ``[W] int32``, the step of each record.
        num_records: ``[] int32``, records written so far; the next goes to slot ``num_records % W``.
    """

    records: Any
    steps: jax.Array
    num_records: jax.Array


class RecursiveHistoryState(NamedTuple):
    """The fitted line itself, and the moments of the record times that the next update needs.

    Attributes:
        mean: tree of ``[*shape]``, the weighted mean of the records, which is the line's value at their mean step.
        velocity: tree of ``[*shape]``, the line's change a step.
        weight: ``[] float32``, sum of all weights.
        lag: ``[] float32``, the newest record's step minus the weighted mean step.
        spread: ``[] float32``, weighted sum of squared deviations from the mean step.
        last_step: ``[] int32``, the newest record's step.
    """

    mean: Any
    velocity: Any
    weight: jax.Array
    lag: jax.Array
    spread: jax.Array
    last_step: jax.Array


_Ring = TypeVar("_Ring", WindowHistoryState, CodedWindowHistoryState)


class Scalars(NamedTuple):
    """What one step is to the history.

    Attributes:
        horizon: ``[] float32``, steps from the newest record.
        coefficients: ``[terms] float32``, the prediction's weights.
        features: ``[K, terms] float32``, those of a calibrated prediction's parts: the records' mean, the line's slope,
            and, with a window, the newest record.
        reach: ``[K] float32``, what the features are multiplied by: 1, the steps from the mean record, 1.
        moments: ``weight, lag, spread`` as they will be after a record at this step; None for the window.
        gains: ``mean_gain, keep, velocity_gain`` of such a record; None for the window.
    """

    horizon: jax.Array
    coefficients: jax.Array
    features: jax.Array
    reach: jax.Array
    moments: tuple[jax.Array, jax.Array, jax.Array] | None = None
    gains: tuple[jax.Array, jax.Array, jax.Array] | None = None


def describe_state(state: Any) -> str:
    """Which history ``state`` belongs to, as `History.describe` says it."""
    if isinstance(state, WindowHistoryState | CodedWindowHistoryState):
        coded = "coded " if isinstance(state, CodedWindowHistoryState) else ""
        return f"{coded}window of {state.steps.shape[0]}"
    return "recursive" if isinstance(state, RecursiveHistoryState) else type(state).__name__


class History(Protocol):
    """A memory of gradients that predicts the coming one."""

    def describe(self) -> str:
        """The settings that the shape of the state depends on."""

    def init(self, params: Any) -> Any:
        """The empty history for ``params``."""

    def example(self, state: Any) -> tuple[Any, int]:
        """A tree of the parameters' structure, and how many axes its leaves have before theirs."""

    def scalars(self, state: Any, step: jax.Array) -> Scalars:
        """What ``step`` is to the history."""

    def terms(self, state: Any, scalars: Scalars) -> tuple[list[jax.Array], list[Any]]:
        """Numbers and trees whose weighted sum is the prediction; it is zero while nothing is recorded."""

    def record(self, state: Any, tree: Any, step: jax.Array, scalars: Scalars) -> Any:
        """The history with one more record, taken at ``step``."""

    def num_features(self) -> int:
        """K, the parts of a calibrated prediction."""

    def init_gram(self, num_leaves: int) -> jax.Array | None:
        """The records' products with each other, if they are kept: ``[L, W, W] float32``."""

    def combine(self, state: Any, scalars: Scalars, weights: jax.Array) -> Any:
        """The features' sum with weights ``[L, K]``, in at least f32."""

    def products(
        self, state: Any, scalars: Scalars, gram: jax.Array | None, tree: Any, energy: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Of the features, without their reach, with each other and with ``tree``: ``[L, K, K]`` and ``[L, K]``.

        And the gram, if it is kept, as it will be once the tree is recorded, whose squared norms are ``energy``.
        """


def zeros_as_stored(params: Any, dtype: jnp.dtype | None) -> Any:
    """Zeros for ``params`` in the dtypes that records of them are kept in."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=numerics.stored_dtype(leaf, dtype)), params)


@dataclasses.dataclass(frozen=True)
class WindowHistory:
    """Weighted least squares over the last ``length`` records, exactly.

    State cost: ``length`` times the parameters, plus 4 bytes a slot.
    """

    length: int
    decay: float
    dtype: jnp.dtype | None

    def describe(self) -> str:
        """Window and length."""
        return f"window of {self.length}"

    def init(self, params: Any) -> WindowHistoryState:
        """The empty window; its leaves are laid out on the devices as the parameters are."""

        def empty(leaf: jax.Array) -> jax.Array:
            zeros = jnp.zeros_like(leaf, dtype=numerics.stored_dtype(leaf, self.dtype))
            return jnp.broadcast_to(zeros[None], (self.length, *zeros.shape))

        steps, num_records = self.init_ring()
        return WindowHistoryState(jax.tree.map(empty, params), steps, num_records)

    def init_ring(self) -> tuple[jax.Array, jax.Array]:
        """Steps and number of records of the empty window."""
        return jnp.zeros([self.length], jnp.int32), jnp.zeros([], jnp.int32)

    def example(self, state: WindowHistoryState) -> tuple[Any, int]:
        """The records."""
        return state.records, 1

    def scalars(self, state: WindowHistoryState | CodedWindowHistoryState, step: jax.Array) -> Scalars:
        """One coefficient a slot."""
        newest = (state.num_records - 1) % self.length
        rank = (newest - jnp.arange(self.length, dtype=jnp.int32)) % self.length
        weights = jnp.where(rank < state.num_records, jnp.float32(self.decay) ** rank, 0.0)
        ages = (state.steps - state.steps[newest]).astype(jnp.float32)
        horizon = (step - state.steps[newest]).astype(jnp.float32)
        mean, slope, age = wls.line_weights(ages, weights, newest)
        last = (rank == 0) & (weights > 0)
        return Scalars(
            horizon,
            mean + (horizon - age) * slope,
            features=jnp.stack([mean, slope, last.astype(jnp.float32)]),
            reach=jnp.ones([3], jnp.float32).at[1].set(horizon - age),
        )

    def terms(self, state: WindowHistoryState, scalars: Scalars) -> tuple[list[jax.Array], list[Any]]:
        """One term a slot."""
        slots = range(self.length)
        rows = [jax.tree.map(lambda r, i=i: r[i], state.records) for i in slots]
        return [scalars.coefficients[i] for i in slots], rows

    def record(self, state: _Ring, tree: Any, step: jax.Array, scalars: Scalars) -> _Ring:
        """Overwrites the oldest slot."""
        del scalars
        slot = state.num_records % self.length
        return state._replace(
            records=jax.tree.map(
                lambda r, x: r.at[slot].set(numerics.saturating_cast(x, r.dtype)), state.records, tree
            ),
            steps=state.steps.at[slot].set(step),
            num_records=optax.safe_increment(state.num_records),
        )

    def num_features(self) -> int:
        """The mean, the slope, and the newest record."""
        return 3

    def init_gram(self, num_leaves: int) -> jax.Array | None:
        """Kept, so that a true step reads each record once."""
        return jnp.zeros([num_leaves, self.length, self.length], jnp.float32)

    def combine(self, state: WindowHistoryState, scalars: Scalars, weights: jax.Array) -> Any:
        """One pass over the records."""
        leaves, treedef = jax.tree.flatten(state.records)
        of_records = weights @ scalars.features
        sums = [
            wls.combine([of_records[leaf, i] for i in range(self.length)], [r[i] for i in range(self.length)])
            for leaf, r in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, sums)

    def products(
        self, state: WindowHistoryState, scalars: Scalars, gram: jax.Array | None, tree: Any, energy: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """One pass over the records."""
        assert gram is not None
        leaves = zip(jax.tree.leaves(state.records), jax.tree.leaves(tree), strict=True)
        with_tree = jnp.stack([_inner(r, x) for r, x in leaves])
        features = scalars.features
        of_features = jnp.einsum("ia,lab,jb->lij", features, gram, features, precision="highest")
        slot = state.num_records % self.length
        row = with_tree.at[:, slot].set(energy)
        grown = gram.at[:, slot, :].set(row).at[:, :, slot].set(row)
        return of_features, jnp.einsum("ia,la->li", features, with_tree, precision="highest"), grown


@dataclasses.dataclass(frozen=True)
class RecursiveHistory:
    """Weighted least squares over every record so far, the weights fading by ``decay`` a record.

    The normal equations' sums are kept in the form of their solution, mean and velocity, which a new record moves by
    its distance from the mean times scalar gains: the same numbers, without sums that outgrow f32.

    State cost: twice the parameters, plus 16 bytes.
    """

    decay: float
    dtype: jnp.dtype | None

    @property
    def _mean_first(self) -> bool:
        # With both computed from the old mean, XLA copies it; a decay this small needs the digits more.
        return self.decay >= 0.5

    def describe(self) -> str:
        """Recursive."""
        return "recursive"

    def init(self, params: Any) -> RecursiveHistoryState:
        """The empty recursion."""
        return RecursiveHistoryState(
            mean=zeros_as_stored(params, self.dtype),
            velocity=zeros_as_stored(params, self.dtype),
            weight=jnp.zeros([], jnp.float32),
            lag=jnp.zeros([], jnp.float32),
            spread=jnp.zeros([], jnp.float32),
            last_step=jnp.zeros([], jnp.int32),
        )

    def example(self, state: RecursiveHistoryState) -> tuple[Any, int]:
        """The mean."""
        return state.mean, 0

    def scalars(self, state: RecursiveHistoryState, step: jax.Array) -> Scalars:
        """Coefficients of mean and velocity, and what a record at ``step`` would do."""
        horizon = (step - state.last_step).astype(jnp.float32)
        moments, gains = wls.forget_and_add(
            state.weight, state.lag, state.spread, horizon, self.decay, mean_first=self._mean_first
        )
        one = jnp.ones([], jnp.float32)
        return Scalars(
            horizon,
            jnp.stack([one, horizon + state.lag]),
            features=jnp.eye(2, dtype=jnp.float32),
            reach=jnp.stack([one, horizon + state.lag]),
            moments=moments,
            gains=gains,
        )

    def terms(self, state: RecursiveHistoryState, scalars: Scalars) -> tuple[list[jax.Array], list[Any]]:
        """Mean and velocity."""
        return [scalars.coefficients[0], scalars.coefficients[1]], [state.mean, state.velocity]

    def num_features(self) -> int:
        """The mean and the slope."""
        return 2

    def init_gram(self, num_leaves: int) -> jax.Array | None:
        """Not kept."""
        del num_leaves
        return None

    def combine(self, state: RecursiveHistoryState, scalars: Scalars, weights: jax.Array) -> Any:
        """One pass over mean and velocity."""
        del scalars
        return combine_trees(weights, [state.mean, state.velocity])

    def products(
        self, state: RecursiveHistoryState, scalars: Scalars, gram: jax.Array | None, tree: Any, energy: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Those of mean and velocity, taken anew."""
        del gram, energy, scalars
        return *products_of_trees([state.mean, state.velocity], tree), None

    def record(
        self, state: RecursiveHistoryState, tree: Any, step: jax.Array, scalars: Scalars
    ) -> RecursiveHistoryState:
        """Moves mean and velocity by the record's distance from the mean."""
        assert scalars.moments is not None
        assert scalars.gains is not None
        weight, lag, spread = scalars.moments
        mean_gain, keep, velocity_gain = scalars.gains

        def moved_mean(m: jax.Array, x: jax.Array) -> jax.Array:
            return numerics.saturating_cast(wls.combine([1 - mean_gain, mean_gain], [m, x]), m.dtype)

        def moved_velocity(v: jax.Array, m: jax.Array, x: jax.Array) -> jax.Array:
            terms = [keep, velocity_gain, -velocity_gain], [v, x, m]
            return numerics.saturating_cast(wls.combine(*terms), v.dtype)

        mean = jax.tree.map(moved_mean, state.mean, tree)
        seen_mean = mean if self._mean_first else state.mean
        return RecursiveHistoryState(
            mean=mean,
            velocity=jax.tree.map(moved_velocity, state.velocity, seen_mean, tree),
            weight=weight,
            lag=lag,
            spread=spread,
            last_step=step,
        )


def combine_trees(weights: jax.Array, trees: list[Any]) -> Any:
    """The trees' sum with weights ``[L, trees]``, in at least f32."""
    leaves = [jax.tree.leaves(tree) for tree in trees]
    sums = [
        wls.combine([weights[leaf, i] for i in range(len(trees))], list(arrays))
        for leaf, arrays in enumerate(zip(*leaves, strict=True))
    ]
    return jax.tree.unflatten(jax.tree.structure(trees[0]), sums)


def products_of_trees(trees: list[Any], other: Any) -> tuple[jax.Array, jax.Array]:
    """Of the trees with each other and with another one: ``[L, trees, trees]`` and ``[L, trees]``."""
    leaves = list(zip(*(jax.tree.leaves(tree) for tree in [*trees, other]), strict=True))
    num = len(trees)
    table = jnp.stack([jnp.stack([jnp.stack([_inner_whole(x, y) for y in xs]) for x in xs[:num]]) for xs in leaves])
    return table[:, :, :num], table[:, :, num]


def energies(tree: Any) -> jax.Array:
    """``[L] float32``: the leaves' squared norms."""
    return jnp.stack([_inner_whole(x, x) for x in jax.tree.leaves(tree)])


def _inner(records: jax.Array, x: jax.Array) -> jax.Array:
    """``[W] float32``: the real inner products of ``[W, *shape]`` with ``[*shape]``.

    A product of a matrix with a vector, in the records' precision, which reads each record once.
    """
    x = numerics.saturating_cast(x, records.dtype)
    wide = jnp.promote_types(records.dtype, jnp.float32)
    inner = jnp.tensordot(records.conj(), x, axes=x.ndim, precision="highest", preferred_element_type=wide)
    return inner.real.astype(jnp.float32)


def _inner_whole(x: jax.Array, y: jax.Array) -> jax.Array:
    wide = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    return jnp.sum((x.conj().astype(wide) * y.astype(wide)).real).astype(jnp.float32)
