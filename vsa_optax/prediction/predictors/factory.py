"""What predicts: the settings of a predictor, as objects that check themselves, and the predictor that they mean."""

import dataclasses
from typing import ClassVar, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from vsa_optax.codecs import codec as codecs
from vsa_optax.core import checks
from vsa_optax.prediction.predictors.base import Predictor
from vsa_optax.prediction.predictors.line import LinePredictor
from vsa_optax.prediction.predictors.momentum import MomentumPredictor
from vsa_optax.prediction.predictors.recursive import RecursiveHistory
from vsa_optax.prediction.predictors.secant import SecantHistory, SecantPredictor
from vsa_optax.prediction.predictors.window import CodedWindowHistory, WindowHistory

Predicted: TypeAlias = Literal["update", "gradient"]


@dataclasses.dataclass(frozen=True)
class Secants:
    """Predicts the gradient at the present parameters from the last changes of parameters and gradients.

    Least squares finds the mixture of past moves that leads to where the parameters are; the same mixture of the
    gradient's changes is the prediction, with a ridge that is chosen by what it was worth so far. See
    `prediction.fits.secant_fit`. Needs ``params`` at every ``update``. The optimizer runs at every step.

    Attributes:
        window: W, how many changes are kept, ``>= 2``.
        dtype: of the changes: float16, bfloat16, float32 or float64. None keeps float16 of leaves of float32, bfloat16
            or float16 with at least 65,536 coordinates, and every other leaf in its own dtype. In float16 each change
            of a leaf is stored relative to a power of two. Small leaves in float16 skip fewer steps, in short runs of
            small models a third fewer; large ones about as many as in float32 (benchmarks/history_memory.log,
            history_large_gpu.log). A complex leaf is kept in complex64 or complex128, and the newest parameters and
            gradient in their own dtype.

    State cost:
        for parameters of P bytes, and Q in the dtypes of the changes, ``2 * W * Q + 2 * P`` bytes,
        ``4 * (W**2 + 1)`` a leaf, and ``4 * W**2``; if any leaf is in float16, ``8 * W`` a leaf more. For a model in
        float32 with large leaves that is 18 copies of the parameters by default, and 34 with small ones.

    Raises:
        ValueError: an attribute outside its range; at ``update``, no ``params``.

    Example:
        >>> import optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.adamw(1e-3), predictor=vsa_optax.Secants(8, dtype="bfloat16"))
    """

    window: int = 16
    _: dataclasses.KW_ONLY
    dtype: jax.typing.DTypeLike | None = None
    predicts: ClassVar[Predicted] = "gradient"

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", checks.check_integer("window", self.window, 2))
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))


@dataclasses.dataclass(frozen=True)
class Window:
    """Predicts by a line in time, fitted by weighted least squares to the last records.

    Attributes:
        length: W, how many records are kept, ``>= 2``.
        decay: the weight of a record relative to the next newer one, in ``(0, 1]``.
        predicts: ``"update"`` records what the wrapped optimizer emits and leaves its state as it is in PREDICT;
            ``"gradient"`` records gradients, and the optimizer runs at every step.
        calibrate: whether each leaf weighs the records' mean, the slope and the newest record by what they were worth
            in predictions so far: see `prediction.fits.calibration`.
        residual_decay: a number in ``[0, 1]`` adds the average error of past predictions, with this decay γ both of the
            average and, a step, of what is added. None adds nothing, which ``calibrate=True`` needs.
        dtype: of records and residual: float16, bfloat16, float32 or float64; None keeps each leaf's own. A complex
            leaf is kept in complex64 or complex128. It has no effect with a codec.
        codec: keeps records and residual, such as `vsa_optax.TritCodec`; None keeps them as they are. A prediction then
            costs one decoding, whatever W, and the residual's.

    State cost:
        for parameters of P bytes in the records' dtype, or as ``codec.nbytes`` counts them, ``W * P``, and P for the
        residual; calibrated, ``4 * (W**2 + 14)`` a leaf, or 56 with a codec.

    Raises:
        ValueError: an attribute outside its range.

    Example:
        >>> import optax, vsa_optax
        >>> line = vsa_optax.Window(predicts="update", codec=vsa_optax.TritCodec())
        >>> opt = vsa_optax.phase_switched(optax.adamw(1.0), learning_rate=1e-3, predictor=line)

    References:
        With ``calibrate=False, residual_decay=0.95`` it is the predictor of the Rust crate vsa-optim-rs 0.1.1, whose
        window holds two records more, whose residual is measured without itself and starts to fade one step later.
    """

    length: int = 8
    _: dataclasses.KW_ONLY
    decay: float = 0.95
    predicts: Predicted = "update"
    calibrate: bool = True
    residual_decay: float | None = None
    dtype: jax.typing.DTypeLike | None = None
    codec: codecs.Codec | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", checks.check_integer("length", self.length, 2))
        _check_line(self)
        if self.codec is not None:
            codecs.check_codec("codec", self.codec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recursive:
    """Predicts by a line in time, fitted to all records so far, whose weights fade.

    It does the same work and takes the same memory whatever the decay.

    Attributes:
        decay: as in `Window`, and so are the attributes that follow.
        predicts: see `Window`.
        calibrate: see `Window`; a leaf weighs the mean and the slope.
        residual_decay: see `Window`.
        dtype: see `Window`.

    State cost:
        for parameters of P bytes in the records' dtype, ``2 * P``, and P for the residual; calibrated, 32 a leaf.

    Raises:
        ValueError: an attribute outside its range.

    Example:
        >>> import optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.adamw(1.0), learning_rate=1e-3, predictor=vsa_optax.Recursive())
    """

    decay: float = 0.95
    predicts: Predicted = "update"
    calibrate: bool = True
    residual_decay: float | None = None
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self) -> None:
        _check_line(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum:
    """Predicts the newest record, moved on by a share of its difference from the one before.

    All steps of a leap have the same prediction. The true gradient (or update) that ends a leap leaves with
    ``correction_weight`` times what its prediction missed added to it; the record of it is without that. Nothing is
    learned: ``Window(2)`` is the same two records with calibrated coefficients.

    Attributes:
        momentum: μ in ``x_last + μ (x_last - x_before)``, ``>= 0``; 0 repeats the newest record.
        correction_weight: ω in ``x + ω (x - x̂)``, ``>= 0``; 0 corrects nothing.
        predicts: as in `Window`.

    State cost:
        for parameters of P bytes ``2 * P``, ``8`` a leaf, and 52.

    Raises:
        ValueError: an attribute outside its range.

    Example:
        >>> import optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.adamw(1e-3), predictor=vsa_optax.Momentum(momentum=0.5))

    References:
        The momentum predictor of the Rust crate vsa-optim-rs 0.1.1, which keeps more records than it reads. What else
        differs is in docs/migration.md.
    """

    momentum: float = 0.9
    correction_weight: float = 0.5
    predicts: Predicted = "gradient"

    def __post_init__(self) -> None:
        for name in ("momentum", "correction_weight"):
            value = checks.check_real(name, getattr(self, name), low=0.0, high=float(jnp.finfo(jnp.float32).max))
            object.__setattr__(self, name, value)
        checks.check_choice("predicts", self.predicts, get_args(Predicted))


PredictorSettings: TypeAlias = Secants | Window | Recursive | Momentum


def make_predictor(settings: PredictorSettings) -> Predictor:
    """The predictor of these settings."""
    if isinstance(settings, Momentum):
        return MomentumPredictor(settings.momentum, settings.correction_weight)
    dtype = None if settings.dtype is None else jnp.dtype(settings.dtype)
    if isinstance(settings, Secants):
        return SecantPredictor(SecantHistory(settings.window, dtype))
    residual_decay, calibrate = settings.residual_decay, settings.calibrate
    if isinstance(settings, Recursive):
        return LinePredictor(RecursiveHistory(settings.decay, dtype), dtype, None, residual_decay, calibrate)
    history, codec = WindowHistory(settings.length, settings.decay, dtype), settings.codec
    if codec is not None:
        history = CodedWindowHistory(settings.length, settings.decay, dtype, codec)
    return LinePredictor(history, dtype, codec, residual_decay, calibrate)


def _check_line(line: Window | Recursive) -> None:
    """What both lines take, checked, and as plain Python values."""
    decay = checks.check_real("decay", line.decay, low=0.0, high=1.0, low_open=True)
    object.__setattr__(line, "decay", decay)
    checks.check_choice("predicts", line.predicts, get_args(Predicted))
    checks.check_bool("calibrate", line.calibrate)
    if line.residual_decay is not None:
        residual_decay = checks.check_real("residual_decay", line.residual_decay, low=0.0, high=1.0)
        if line.calibrate:
            raise ValueError(
                "residual_decay must be None with calibrate=True, whose coefficients already learn from the errors "
                f"that a residual averages, got {line.residual_decay!r}: give calibrate=False for a residual"
            )
        object.__setattr__(line, "residual_decay", residual_decay)
    object.__setattr__(line, "dtype", _dtype_name(line.dtype))


def _dtype_name(value: jax.typing.DTypeLike | None) -> str | None:
    """A dtype as its name, so that the settings' ``repr`` can be pasted."""
    dtype = checks.check_float_dtype("dtype", value)
    return None if dtype is None else dtype.name
