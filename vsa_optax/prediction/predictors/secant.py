"""Predicts by secants: the last W changes of parameters and gradients give the gradient at other parameters.

A line extrapolates in time; this predictor models the gradient as a function of the parameters. It knows only the
directions in which the parameters have moved. On a loss without noise it is accurate wherever the optimizer moves
within these directions, including turns and oscillations.
`prediction.fits.secant_fit` has the equations.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vsa_optax.core import trees
from vsa_optax.core.axis_names import with_axis_in_front
from vsa_optax.core.types import Tree
from vsa_optax.kernels import inner_products, numerics
from vsa_optax.prediction.fits import calibration, secant_fit
from vsa_optax.prediction.predictors import base
from vsa_optax.prediction.predictors.base import Comparison, Experience, PredictionQuality

_HALF_RANGE = 15  # The range of float16 ends at 2^16.
# Without a dtype, the changes of leaves with at least this many coordinates are kept in float16. The rounding errors of
# so many coordinates average out in the inner products that predict: their error is 2^-11 / sqrt(coordinates), about
# 1e-6. With 2^16 it shows a little: 19 and 29 % skipped instead of 25 and 38 % (benchmarks/history_large_gpu.log).
_LARGE, _ROUNDED = 2**18, (jnp.float32, jnp.bfloat16, jnp.float16)


class SecantHistoryState(NamedTuple):
    """The newest record, and a ring of the changes that led to it.

    Attributes:
        params: tree of ``[*shape]``, the parameters of the newest record.
        gradient: tree of ``[*shape]``, the gradient of the newest record.
        diff_params: tree of ``[W, *shape]``, the changes of the parameters from record to record; slots not yet written
            are 0.
        diff_gradients: tree of ``[W, *shape]``, the changes of the gradient; slots not yet written are 0.
        gram: ``[W, W] float32``, inner products of ``diff_params`` before they were rounded.
        scales: two arrays ``[L, W] float32``, powers of two that multiply the stored ``diff_params`` and
            ``diff_gradients``, so that float16 holds any magnitude; 1 for a leaf in another dtype. None if no leaf is
            in float16.
        num_records: ``[] int32``, the number of records so far; the next change goes to slot ``num_records % W``.
        last_step: ``[] int32``, the newest record's step.
    """

    params: Tree
    gradient: Tree
    diff_params: Tree
    diff_gradients: Tree
    gram: jax.Array
    scales: tuple[jax.Array, jax.Array] | None
    num_records: jax.Array
    last_step: jax.Array


class SecantScalars(NamedTuple):
    """The scalars of one step and its parameters.

    Attributes:
        horizon: ``[] float32``, the number of steps from the newest record.
        coefficients: ``[R, W] float32``, the coefficients of ``diff_gradients`` in the prediction of each ridge.
        products: ``[W] float32``, the inner products of ``diff_params`` with the displacement from the newest record's
            parameters.
        squared_norm: ``[] float32``, the squared norm of that displacement.
    """

    horizon: jax.Array
    coefficients: jax.Array
    products: jax.Array
    squared_norm: jax.Array

    @property
    def distance(self) -> jax.Array:
        """The distance, ``[] float32``: the norm of the displacement."""
        return jnp.sqrt(self.squared_norm)


@dataclasses.dataclass(frozen=True)
class SecantHistory:
    """Keeps the last ``length`` changes in ``dtype``; None means float16 for large leaves, and each other leaf's own.

    State cost: twice the parameters and ``2 * length`` times the parameters in ``dtype``, plus ``4 * (length**2 + 2)``
    bytes, and ``8 * length`` bytes per leaf if any leaf is kept in float16.
    """

    length: int
    dtype: jnp.dtype | None
    encodes: ClassVar[bool] = False

    def _dtype_of(self, leaf: jax.Array) -> jax.typing.DTypeLike:
        """The dtype in which the changes of a leaf are kept."""
        dtype = jnp.result_type(leaf)
        if self.dtype is None and np.size(leaf) >= _LARGE and dtype in _ROUNDED:
            return jnp.float16
        return numerics.stored_dtype(leaf, self.dtype) or dtype

    def _is_scaled(self, params: optax.Params) -> bool:
        """Whether the changes of any leaf are kept relative to a power of two."""
        if self.dtype is not None:
            return self.dtype == jnp.float16
        leaves = jax.tree.leaves(params)
        return any(np.size(leaf) >= _LARGE and self._dtype_of(leaf) == jnp.float16 for leaf in leaves)

    def init(self, params: optax.Params) -> SecantHistoryState:
        """The empty history, with the parameters' sharding."""

        def ring(zeros: jax.Array) -> jax.Array:
            return jnp.broadcast_to(zeros[None], (self.length, *zeros.shape))

        changes = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=self._dtype_of(leaf)), params)
        of_leaves = jnp.ones([base.num_measured_leaves(params), self.length], jnp.float32)
        return SecantHistoryState(
            # Changes are small differences of large numbers, so the newest record keeps all of its digits.
            params=base.zeros_as_stored(params, None),
            gradient=base.zeros_as_stored(params, None),
            diff_params=with_axis_in_front(jax.tree.map(ring, changes)),
            diff_gradients=with_axis_in_front(jax.tree.map(ring, changes)),
            gram=jnp.zeros([self.length, self.length], jnp.float32),
            scales=(of_leaves, jnp.ones_like(of_leaves)) if self._is_scaled(params) else None,
            num_records=jnp.zeros([], jnp.int32),
            last_step=jnp.zeros([], jnp.int32),
        )

    def check_state(self, state: base.HistoryState) -> None:
        """``ValueError`` unless the state is a `SecantHistoryState` with the same W and the same use of float16."""
        base.check_history(state, SecantHistoryState)
        is_scaled = self._is_scaled(state.gradient)
        names = {True: "float16", False: "another" if is_scaled else str(self.dtype)}
        base.check_settings(dtype=(names[state.scales is not None], names[is_scaled]))
        base.check_settings(window=(state.gram.shape[0], self.length))

    def example(self, state: SecantHistoryState) -> tuple[optax.Updates, int]:
        """The tree of the newest gradient, whose leaves have no leading axis."""
        return state.gradient, 0

    def record(
        self,
        state: SecantHistoryState,
        tree: optax.Updates,
        params: optax.Params | None,
        step: jax.Array,
        scalars: SecantScalars,
        is_recorded: jax.Array,
    ) -> SecantHistoryState:
        """Overwrites the oldest change; the first record has no change, and writes zeros."""
        slot = state.num_records % self.length
        has_record = state.num_records > 0

        def kept(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(is_recorded, numerics.saturating_cast(new, old.dtype), old)

        def all_changed(records: Tree, new: Tree, old: Tree, scales: jax.Array | None) -> tuple[Tree, jax.Array | None]:
            # This maps over leaves, since the axis names in the parameters' containers may differ.
            leaves, treedef = jax.tree.flatten(records)
            written, used = [], []
            for record, n, o in zip(leaves, jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
                change = jnp.where(has_record, _difference(n, o), 0)
                if scales is not None:
                    used.append(_scale(change) if record.dtype == jnp.float16 else jnp.ones([], jnp.float32))
                    change = change / used[-1].astype(change.dtype)
                change = numerics.saturating_cast(change, record.dtype)
                written.append(record.at[slot].set(jnp.where(is_recorded, change, record[slot])))
            if scales is not None and used:
                scales = scales.at[:, slot].set(jnp.where(is_recorded, jnp.stack(used), scales[:, slot]))
            return jax.tree.unflatten(treedef, written), scales

        of_params, of_gradients = (None, None) if state.scales is None else state.scales
        diff_params, of_params = all_changed(state.diff_params, params, state.params, of_params)
        diff_gradients, of_gradients = all_changed(state.diff_gradients, tree, state.gradient, of_gradients)
        row = scalars.products.at[slot].set(scalars.squared_norm)
        return SecantHistoryState(
            params=jax.tree.map(kept, state.params, params),
            gradient=jax.tree.map(kept, state.gradient, tree),
            diff_params=diff_params,
            diff_gradients=diff_gradients,
            gram=jnp.where(is_recorded, state.gram.at[slot].set(row).at[:, slot].set(row), state.gram),
            scales=None if of_params is None or of_gradients is None else (of_params, of_gradients),
            num_records=jnp.where(is_recorded, optax.safe_increment(state.num_records), state.num_records),
            last_step=jnp.where(is_recorded, step, state.last_step),
        )


class SecantCalibrationState(NamedTuple):
    """The measured errors of past predictions, and the inner products that measure the next.

    Attributes:
        scores: `prediction.fits.secant_fit.Scores`, the errors of all ridges.
        gram: ``[L, W, W] float32``, the inner products of the changes of the gradient.
    """

    scores: secant_fit.Scores
    gram: jax.Array

    def quality(self) -> PredictionQuality:
        """The ridge in use, and R² of each leaf."""
        ridge = jnp.asarray(secant_fit.RIDGES, jnp.float32)[secant_fit.best(self.scores)]
        r_squared = calibration.r_squared(self.scores.of_leaves, self.scores.weight)
        return PredictionQuality(None, ridge, r_squared, jnp.mean(r_squared))


@dataclasses.dataclass(frozen=True)
class SecantPredictor:
    """Adds weighted changes to the newest gradient, with the ridge that has predicted best so far.

    It is always calibrated and has no residual.
    """

    history: SecantHistory
    reads_params: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True
    has_residual: ClassVar[bool] = False

    def init_experience(self, params: optax.Params) -> Experience:
        """The experience before any comparison."""
        num_leaves, length = base.num_measured_leaves(params), self.history.length
        gram = jnp.zeros([num_leaves, length, length], jnp.float32)
        return Experience(calibration=SecantCalibrationState(secant_fit.no_scores(num_leaves), gram))

    def scalars(self, history: SecantHistoryState, step: jax.Array, params: optax.Params | None) -> SecantScalars:
        """The scalars of a step, in one pass over ``diff_params``."""
        displacement = jax.tree.map(_difference, params, history.params)
        products, squared_norm = jnp.zeros([self.history.length], jnp.float32), jnp.zeros([], jnp.float32)
        for of_leaf, x in zip(_products(history, 0, displacement), jax.tree.leaves(displacement), strict=True):
            products, squared_norm = products + of_leaf, squared_norm + inner_products.inner(x, x)
        # Before the first record there is no displacement.
        has_record = history.num_records > 0
        is_known = has_record & jnp.isfinite(squared_norm) & jnp.all(jnp.isfinite(products))
        products, squared_norm = jnp.where(is_known, products, 0), jnp.where(is_known, squared_norm, 0)
        return SecantScalars(
            horizon=(step - history.last_step).astype(jnp.float32),
            coefficients=secant_fit.coefficients(history.gram, products),
            products=products,
            squared_norm=squared_norm,
        )

    def weights(self, calibration: SecantCalibrationState, scalars: SecantScalars) -> jax.Array:
        """``[W]``: the coefficients of the changes with the best ridge."""
        return scalars.coefficients[secant_fit.best(calibration.scores)]

    def predict(
        self, history: SecantHistoryState, residual: None, scalars: SecantScalars, weights: jax.Array | None
    ) -> optax.Updates:
        """The predictions, in one pass over the changes of the gradient."""
        del residual, scalars
        assert weights is not None
        leaves, treedef = jax.tree.flatten(history.gradient)
        one, slots = jnp.ones([], jnp.float32), range(self.history.length)

        def combined(leaf: int, gradient: jax.Array, changes: jax.Array) -> jax.Array:
            of_stored = weights if history.scales is None else weights * history.scales[1][leaf]
            terms = [gradient, *(changes[i] for i in slots)]
            return numerics.linear_combination([one, *(of_stored[i] for i in slots)], terms)

        changes = jax.tree.leaves(history.diff_gradients)
        return jax.tree.unflatten(treedef, map(combined, range(len(leaves)), leaves, changes))

    def compare(
        self,
        history: SecantHistoryState,
        experience: Experience,
        scalars: SecantScalars,
        target: optax.Updates,
        predicted: Callable[[], optax.Updates],
    ) -> Comparison:
        """Compares a target with the predictions of all ridges in one pass over the changes; computes none of them."""
        del predicted
        if not jax.tree.leaves(target):
            return base.not_measured(experience)
        state: SecantCalibrationState = experience.calibration
        change = jax.tree.map(_difference, target, history.gradient)
        products = jnp.stack(_products(history, 1, change))
        missed, squared_norms = trees.squared_norms(change), trees.squared_norms(target)
        squared = secant_fit.errors(scalars.coefficients, state.gram, products, missed)
        # Before the first record nothing was predicted, and the record has no change.
        has_record = history.num_records > 0
        total = jnp.sum(squared_norms)
        is_measured = has_record & (total > 0) & jnp.isfinite(total) & jnp.all(jnp.isfinite(squared))
        scores = secant_fit.scored(state.scores, squared, squared_norms, secant_fit.FORGET)
        scores = trees.tree_where(is_measured, scores, state.scores)
        slot = history.num_records % self.history.length
        row = products.at[:, slot].set(missed)
        row = jnp.where(has_record & jnp.all(jnp.isfinite(row)), row, 0)
        gram = state.gram.at[:, slot, :].set(row).at[:, :, slot].set(row)
        ratio = jnp.sum(squared[secant_fit.best(state.scores)]) / jnp.where(total > 0, total, 1)
        error = numerics.saturating_cast(jnp.sqrt(ratio), jnp.float32)
        learned = Experience(experience.residual, SecantCalibrationState(scores, gram))
        return Comparison(learned, error, is_measured)


def _difference(new: jax.Array, old: jax.Array) -> jax.Array:
    """``new - old`` in at least f32."""
    wide = new.dtype if new.dtype.itemsize >= 4 else jnp.float32
    return new.astype(wide) - old.astype(wide)


def _products(history: SecantHistoryState, which: int, tree: Tree) -> list[jax.Array]:
    """``[W] float32`` per leaf of ``tree``: its inner products with the changes of parameters (0) or gradient (1)."""
    records = jax.tree.leaves((history.diff_params, history.diff_gradients)[which])
    products = [inner_products.inner_of_each(r, x) for r, x in zip(records, jax.tree.leaves(tree), strict=True)]
    if history.scales is None:
        return [p.astype(jnp.float32) for p in products]
    # A tree without leaves still has the scales of one leaf.
    return [p.astype(jnp.float32) * scale for p, scale in zip(products, history.scales[which], strict=False)]


def _scale(change: jax.Array) -> jax.Array:
    """``[] float32``: the power of two by which a change is divided before it is stored in float16.

    The norm is then below 2^15, so no number overflows. In leaves of up to 10^9 coordinates, numbers down to a
    thousandth of the root mean square keep all of their digits.
    """
    norm = jnp.sqrt(inner_products.inner(change, change))
    exponent = numerics.power_of_two(jnp.where(jnp.isfinite(norm), norm, jnp.finfo(jnp.float32).max))
    return jnp.ldexp(jnp.ones([], jnp.float32), exponent - _HALF_RANGE)
