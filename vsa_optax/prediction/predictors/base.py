"""The interfaces of a history and of a predictor, and the data that the phase machine exchanges with them.

The *scalars* of a step are computed before any leaf is read, and outside the conditionals that use them. If a scalar
were fused into a loop over a leaf, XLA would compute it again for each element.

Axes: L leaves, K features of a calibrated line, W records.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics

# Each is a NamedTuple of arrays; only the history or the predictor that made it reads its fields.
HistoryState: TypeAlias = Any
OwnScalars: TypeAlias = Any
OwnCalibration: TypeAlias = Any


# The settings of each history's state, by the name of its class.
_MADE_BY = {
    "SecantHistoryState": "Secants",
    "WindowHistoryState": "Window",
    "CodedWindowHistoryState": "Window(codec=...)",
    "RecursiveHistoryState": "Recursive",
    "MomentumHistoryState": "Momentum",
}


class PredictionQuality(NamedTuple):
    """The accuracy of predictions, leaf by leaf in the order of ``jax.tree.leaves(params)``.

    Attributes:
        coefficients: ``[L, K] float32``, a line's coefficients: of the records' mean (α), of the line's change from
            there to the predicted step (β), and, with a window, of the newest record. None with another predictor.
        ridge: ``[] float32``, the secants' ridge that has predicted best so far; infinite if that is the newest
            gradient. None with another predictor.
        r_squared: ``[L] float32``, ``1 - ||x - x̂||² / ||x||²`` out of sample, averaged over about twenty true steps
            (with secants over ten, each at least -3); 0, as for predicting zero, before any measurement.
        mean_r_squared: ``[] float32``, the mean of ``r_squared`` over the leaves.
    """

    coefficients: jax.Array | None
    ridge: jax.Array | None
    r_squared: jax.Array
    mean_r_squared: jax.Array


class Calibration(Protocol):
    """The measured errors of past predictions: a NamedTuple of arrays, different for each predictor."""

    def quality(self) -> PredictionQuality:
        """The accuracy of the predictions."""


class Experience(NamedTuple):
    """The part of a predictor's state that it learns from its errors.

    Attributes:
        residual: tree of ``[*shape]``, the averaged error of past predictions, or a codec's payload of it; None if
            there is no residual.
        calibration: a `Calibration`, or None.
    """

    residual: Tree = None
    calibration: OwnCalibration = None


class Comparison(NamedTuple):
    """The comparison of a prediction with its true target.

    Attributes:
        experience: the experience after this comparison.
        error: ``[] float32``, ``||g - ĝ|| / ||g||`` over the whole tree; meaningless unless it was measured.
        is_measured: ``[] bool``, true if there was a prediction and its target was non-zero.
    """

    experience: Experience
    error: jax.Array
    is_measured: jax.Array


class Scalars(Protocol):
    """The scalars of one step: a NamedTuple of small arrays, different for each predictor."""

    @property
    def horizon(self) -> jax.Array:
        """The horizon, ``[] float32``: the number of steps from the newest record."""

    @property
    def distance(self) -> jax.Array | None:
        """The distance ``[] float32`` from the newest record's parameters; None if they are not read."""


class History(Protocol):
    """A memory of gradients or updates.

    Attributes:
        encodes: whether records are encoded.
    """

    @property
    def encodes(self) -> bool: ...  # noqa: D102 # The class says it.

    def init(self, params: optax.Params) -> HistoryState:
        """The empty history for ``params``."""

    def check_state(self, state: HistoryState) -> None:
        """``ValueError`` that names the setting if ``state`` was made with other settings."""

    def example(self, state: HistoryState) -> tuple[Tree, int]:
        """A tree with the parameters' structure, and the number of leading axes of its leaves."""

    def record(
        self,
        state: HistoryState,
        tree: optax.Updates,
        params: optax.Params | None,
        step: jax.Array,
        scalars: OwnScalars,
        is_recorded: jax.Array,
    ) -> HistoryState:
        """The history with one more record, taken at ``step`` and ``params``, if ``is_recorded``."""


class Predictor(Protocol):
    """Predicts from a history.

    Attributes:
        reads_params: whether it needs the parameters; if not, they are passed as None.
        calibrates: whether it learns from its errors.
        has_residual: whether it adds the average of its errors to predictions.
    """

    @property
    def history(self) -> History:
        """The history."""

    @property
    def reads_params(self) -> bool: ...  # noqa: D102 # The class says it.

    @property
    def calibrates(self) -> bool: ...  # noqa: D102

    @property
    def has_residual(self) -> bool: ...  # noqa: D102

    def init_experience(self, params: optax.Params) -> Experience:
        """The experience before any comparison."""

    def scalars(self, history: HistoryState, step: jax.Array, params: optax.Params | None) -> Scalars:
        """The scalars of a step."""

    def weights(self, calibration: OwnCalibration, scalars: OwnScalars) -> jax.Array | None:
        """The coefficients of a calibrated prediction's parts; None without calibration."""

    def predict(
        self, history: HistoryState, residual: Tree, scalars: OwnScalars, weights: jax.Array | None
    ) -> optax.Updates:
        """A tree of predictions, in at least f32."""

    def compare(
        self,
        history: HistoryState,
        experience: Experience,
        scalars: OwnScalars,
        target: optax.Updates,
        predicted: Callable[[], optax.Updates],
    ) -> Comparison:
        """Compares ``target``, before it is recorded, with its prediction, which ``predicted`` computes if needed."""


def check_settings(**settings: tuple[object, object]) -> None:
    """``ValueError`` unless each setting of a state, given first, equals that of the transformation."""
    for name, (given, wanted) in settings.items():
        if given != wanted:
            raise ValueError(f"state was made with other settings: {name} is {given}, here {wanted}")


def check_history(state: HistoryState, kind: type | None) -> None:
    """``ValueError`` unless a history's state is a ``kind``; if that is None, there must be no history."""
    given = None if state is None else _settings_of(type(state))
    check_settings(predictor=(given, None if kind is None else _settings_of(kind)))


def _settings_of(kind: type) -> str:
    """The user's name for the settings of a history's state."""
    return _MADE_BY.get(kind.__name__, kind.__name__)


def num_measured_leaves(params: optax.Params) -> int:
    """L, the number of leaves in a calibration's arrays.

    It is at least 1 even without leaves, since some formats cannot save a zero-size array. None would not work instead:
    functions that map over an optimizer's state compare it with the state of other parameters.
    """
    return max(1, len(jax.tree.leaves(params)))


def not_measured(experience: Experience) -> Comparison:
    """The comparison of a tree without leaves."""
    return Comparison(experience, jnp.zeros([], jnp.float32), jnp.array(False))


def zeros_as_stored(params: optax.Params, dtype: jnp.dtype | None) -> Tree:
    """Zeros for ``params``, in the dtypes in which their records are stored."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=numerics.stored_dtype(leaf, dtype)), params)
