"""What the phase machine asks of a history and of a predictor, and what passes between them.

What a step is to a history (its *scalars*) is computed before any leaf is touched, and outside the conditionals that
use it: if a scalar were fused into a loop over a leaf, XLA would compute it anew for each element.

Axes: L leaves, K features of a calibrated line, W records.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics

# What only the history or the predictor that made it looks into: a NamedTuple of arrays, of a type of its own.
HistoryState: TypeAlias = Any
OwnScalars: TypeAlias = Any
OwnCalibration: TypeAlias = Any


# By a history's state.
_MADE_BY = {
    "SecantHistoryState": "Secants",
    "WindowHistoryState": "Window",
    "CodedWindowHistoryState": "Window(codec=...)",
    "RecursiveHistoryState": "Recursive",
    "MomentumHistoryState": "Momentum",
}


class PredictionQuality(NamedTuple):
    """What predictions are worth, leaf by leaf in the order of ``jax.tree.leaves(params)``.

    Attributes:
        coefficients: ``[L, K] float32``, of a line: those of the records' mean (α), of what the line adds from there to
            the predicted step (β), and, with a window, of the newest record; None of a secant.
        ridge: ``[] float32``, of a secant: the regularization that served best so far, infinite where the newest
            gradient did; None of a line.
        r_squared: ``[L] float32``, ``1 - ||x - x̂||² / ||x||²`` out of sample, averaged over about twenty true steps (of
            a secant ten, each at least -3); 0, as for predicting zero, if nothing is known.
        mean_r_squared: ``[] float32``, their mean.
    """

    coefficients: jax.Array | None
    ridge: jax.Array | None
    r_squared: jax.Array
    mean_r_squared: jax.Array


class Calibration(Protocol):
    """What past predictions were worth: a NamedTuple of arrays, each predictor's own."""

    def quality(self) -> PredictionQuality:
        """What it says of the predictions."""


class Experience(NamedTuple):
    """What a predictor has learned from its errors.

    Attributes:
        residual: tree of ``[*shape]``, the averaged error of past predictions, or a codec's payload of it; None if
            there is no residual.
        calibration: a `Calibration`, or None.
    """

    residual: Tree = None
    calibration: OwnCalibration = None


class Comparison(NamedTuple):
    """One prediction beside what came.

    Attributes:
        experience: with this comparison in it.
        error: ``[] float32``, ``||g - ĝ|| / ||g||`` over the whole tree; meaningless unless it was measured.
        is_measured: ``[] bool``, true if there was a prediction and its target was not zero.
    """

    experience: Experience
    error: jax.Array
    is_measured: jax.Array


class Scalars(Protocol):
    """What one step is to a history: a NamedTuple of small arrays, each predictor's own."""

    @property
    def horizon(self) -> jax.Array:
        """``[] float32``, steps from the newest record."""

    @property
    def distance(self) -> jax.Array | None:
        """``[] float32``, from the newest record's parameters; None for a predictor that does not read them."""


class History(Protocol):
    """A memory of gradients or updates."""

    def init(self, params: optax.Params) -> HistoryState:
        """The empty history for ``params``."""

    def check_state(self, state: HistoryState) -> None:
        """``ValueError`` that names the setting if ``state`` was made with other settings."""

    def example(self, state: HistoryState) -> tuple[Tree, int]:
        """A tree of the parameters' structure, and how many axes its leaves have before theirs."""

    def record(
        self,
        state: HistoryState,
        tree: optax.Updates,
        params: optax.Params | None,
        step: jax.Array,
        scalars: OwnScalars,
        is_recorded: jax.Array,
    ) -> HistoryState:
        """The history with one more record, taken at ``step`` and these parameters, if it is recorded."""


class Predictor(Protocol):
    """A history, and what is made of it.

    Attributes:
        reads_params: whether it needs the parameters; None is passed for them if not.
        calibrates: whether it learns from its errors.
        has_residual: whether the average of its errors is added.
    """

    @property
    def history(self) -> History:
        """The memory."""

    @property
    def reads_params(self) -> bool: ...  # noqa: D102 # The class says it.

    @property
    def calibrates(self) -> bool: ...  # noqa: D102

    @property
    def has_residual(self) -> bool: ...  # noqa: D102

    def init_experience(self, params: optax.Params) -> Experience:
        """Nothing measured."""

    def scalars(self, history: HistoryState, step: jax.Array, params: optax.Params | None) -> Scalars:
        """All that a step is to the history."""

    def weights(self, calibration: OwnCalibration, scalars: OwnScalars) -> jax.Array | None:
        """How much a calibrated prediction takes of each of its parts; None without calibration."""

    def predict(
        self, history: HistoryState, residual: Tree, scalars: OwnScalars, weights: jax.Array | None
    ) -> optax.Updates:
        """Tree of predictions, in at least f32."""

    def compare(
        self,
        history: HistoryState,
        experience: Experience,
        scalars: OwnScalars,
        target: optax.Updates,
        predicted: Callable[[], optax.Updates],
    ) -> Comparison:
        """Compares ``target``, which is to be recorded, with its prediction, which ``predicted`` forms if needed."""


def check_settings(**settings: tuple[object, object]) -> None:
    """``ValueError`` unless each setting that a state was made with, given first, is that of the transformation."""
    for name, (given, wanted) in settings.items():
        if given != wanted:
            raise ValueError(f"state was made with other settings: {name} is {given}, here {wanted}")


def check_history(state: HistoryState, kind: type | None) -> None:
    """``ValueError`` unless a history's state is of that kind; with None for a kind there must be no history."""
    given = None if state is None else _settings_of(type(state))
    check_settings(predictor=(given, None if kind is None else _settings_of(kind)))


def _settings_of(kind: type) -> str:
    """The settings that a history's state was made with, in the words of a user."""
    return _MADE_BY.get(kind.__name__, kind.__name__)


def num_measured_leaves(params: optax.Params) -> int:
    """L, leaves that a calibration has numbers for.

    It is at least 1, although there may be no leaf: some formats cannot save an array of no size. None in its place
    would not do, since what maps a function over an optimizer's state compares it with the state of other parameters.
    """
    return max(1, len(jax.tree.leaves(params)))


def not_measured(experience: Experience) -> Comparison:
    """The comparison of a tree without leaves."""
    return Comparison(experience, jnp.zeros([], jnp.float32), jnp.array(False))


def zeros_as_stored(params: optax.Params, dtype: jnp.dtype | None) -> Tree:
    """Zeros for ``params`` in the dtypes that records of them are kept in."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=numerics.stored_dtype(leaf, dtype)), params)
