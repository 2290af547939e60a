"""The settings of each predictor, as objects that check themselves, and the predictor made from them."""

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

    Least squares finds the combination of past moves that leads to the present parameters. The same combination of the
    gradient's changes is added to the newest gradient. The ridge is the one that has predicted best so far
    (`prediction.fits.secant_fit`). Every ``update`` needs ``params``. The optimizer runs at every step.

    Attributes:
        window: W, the number of changes kept, ``>= 2``.
        dtype: the dtype of the changes: float16, bfloat16, float32 or float64. None uses float16 for leaves of float32,
            bfloat16 or float16 with at least 262,144 coordinates, and each other leaf's own dtype. A complex leaf is
            kept in complex64 or complex128; the newest parameters and gradient keep their own dtype. In float16, each
            change of a leaf is stored relative to a power of two. With small leaves, float16 skips fewer steps: a third
            fewer in short runs of small models, and up to a quarter fewer with leaves of 65,536 coordinates
            (benchmarks/history_memory.log, history_large_gpu.log).

    State cost:
        ``2 * W * Q + 2 * P`` bytes for parameters of P bytes that need Q bytes in the dtypes of the changes, and
        ``4 * (W**2 + 1)`` bytes per leaf and ``4 * W**2`` bytes. If any leaf is in float16, ``8 * W`` bytes more per
        leaf. With the defaults, a float32 model with large leaves needs 18 copies of the parameters, and one with small
        leaves 34.

    Raises:
        ValueError: if an attribute is outside its range; at ``update``, if ``params`` is missing.

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
    """Predicts with a line in time, fitted by weighted least squares to the last records.

    Attributes:
        length: W, the number of records kept, ``>= 2``.
        decay: the weight of a record relative to the next newer one, in ``(0, 1]``.
        predicts: ``"update"`` records the updates of the wrapped optimizer, which does not run in PREDICT;
            ``"gradient"`` records gradients, and the optimizer runs at every step.
        calibrate: whether each leaf has its own coefficients for the records' mean, the slope and the newest record,
            fitted by least squares to the errors of past predictions (`prediction.fits.calibration`).
        residual_decay: a number γ in ``[0, 1]`` adds the average error of past predictions. The average decays by γ
            with each new error, and the added term by γ with each step. None adds nothing; ``calibrate=True`` needs
            None.
        dtype: the dtype of records and residual: float16, bfloat16, float32 or float64. None keeps each leaf's own. A
            complex leaf is kept in complex64 or complex128. It has no effect with a codec.
        codec: a codec that compresses records and residual, such as `vsa_optax.TritCodec`; None keeps them
            uncompressed. A prediction then costs three decodings, whatever W is; with ``calibrate=False`` one, and one
            more for the residual.

    State cost:
        ``W * P`` bytes for parameters of P bytes in the records' dtype, or as ``codec.nbytes`` counts them; P more
        with a residual; ``4 * (W**2 + 14)`` bytes per leaf with ``calibrate=True``, or 56 with a codec.

    Raises:
        ValueError: if an attribute is outside its range.

    Example:
        >>> import optax, vsa_optax
        >>> line = vsa_optax.Window(predicts="update", codec=vsa_optax.TritCodec())
        >>> opt = vsa_optax.phase_switched(optax.adamw(1.0), learning_rate=1e-3, predictor=line)

    References:
        With ``calibrate=False, residual_decay=0.95`` this is the predictor of the Rust crate vsa-optim-rs 0.1.1, with
        two differences: the window of the crate holds two more records, and its residual is measured without the
        residual itself and starts to decay one step later.
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
    """Predicts with a line in time, fitted to all records so far with weights that decay.

    Work and memory do not depend on the decay.

    Attributes:
        decay: the weight of a record relative to the next newer one, in ``(0, 1]``.
        predicts: ``"update"`` records the updates of the wrapped optimizer, which does not run in PREDICT;
            ``"gradient"`` records gradients, and the optimizer runs at every step.
        calibrate: whether each leaf has its own coefficients for the mean and the slope, fitted by least squares to
            the errors of past predictions (`prediction.fits.calibration`).
        residual_decay: a number γ in ``[0, 1]`` adds the average error of past predictions. The average decays by γ
            with each new error, and the added term by γ with each step. None adds nothing; ``calibrate=True`` needs
            None.
        dtype: the dtype of records and residual: float16, bfloat16, float32 or float64. None keeps each leaf's own. A
            complex leaf is kept in complex64 or complex128.

    State cost:
        ``2 * P`` bytes for parameters of P bytes in the records' dtype; P more with a residual; 32 bytes per leaf with
        ``calibrate=True``.

    Raises:
        ValueError: if an attribute is outside its range.

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
    """Predicts the newest record plus a fraction of its difference from the record before it.

    All steps of a leap have the same prediction. The true gradient (or update) that ends a leap is emitted with
    ``correction_weight`` times the prediction's error added to it, and recorded without that term. No coefficient is
    learned: ``Window(2)`` keeps the same two records with calibrated coefficients.

    Attributes:
        momentum: μ in ``x_last + μ (x_last - x_before)``, ``>= 0``. 0 repeats the newest record.
        correction_weight: ω in ``x + ω (x - x̂)``, ``>= 0``. 0 corrects nothing.
        predicts: ``"update"`` records the updates of the wrapped optimizer, which does not run in PREDICT;
            ``"gradient"`` records gradients, and the optimizer runs at every step.

    State cost:
        ``2 * P`` bytes for parameters of P bytes, 8 bytes per leaf, and 52 bytes.

    Raises:
        ValueError: if an attribute is outside its range.

    Example:
        >>> import optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.adamw(1e-3), predictor=vsa_optax.Momentum(momentum=0.5))

    References:
        The momentum predictor of the Rust crate vsa-optim-rs 0.1.1, which keeps more records than it reads.
        docs/migration.md lists the other differences.
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
    """The predictor made from ``settings``."""
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
    """Checks the attributes that both lines share, and turns them into plain Python values."""
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
    """The name of a dtype, so that the ``repr`` of the settings can be pasted."""
    dtype = checks.check_float_dtype("dtype", value)
    return None if dtype is None else dtype.name
