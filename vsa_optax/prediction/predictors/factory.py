"""The choice of a predictor by settings."""

from typing import Literal, TypeAlias, get_args

import jax

from vsa_optax.codecs import codec as codecs
from vsa_optax.core import checks
from vsa_optax.prediction.predictors.base import Predictor
from vsa_optax.prediction.predictors.line import LineHistory, LinePredictor
from vsa_optax.prediction.predictors.recursive import RecursiveHistory
from vsa_optax.prediction.predictors.secant import SecantHistory, SecantPredictor
from vsa_optax.prediction.predictors.window import CodedWindowHistory, WindowHistory

HistoryKind: TypeAlias = Literal["secant", "window", "recursive"]
Domain: TypeAlias = Literal["update", "gradient"]


def make_predictor(
    *,
    history: HistoryKind | None,
    history_window: int | None,
    history_decay: float,
    history_dtype: jax.typing.DTypeLike | None,
    history_codec: codecs.Codec | None,
    residual: bool | None,
    residual_decay: float,
    calibrate: bool | None,
    guard: bool,
    predict_in: Domain | None,
) -> Predictor:
    """The predictor of these settings, checked; ranges and what None means as in `vsa_optax.predict_gradients`."""
    checks.check_choice("predict_in", "gradient" if predict_in is None else predict_in, get_args(Domain))
    asked: dict[str, object] = {"predict_in": predict_in} if predict_in == "update" else {}
    asked |= {} if history_codec is None else {"history_codec": history_codec}
    asked |= {name: True for name, value in (("calibrate", calibrate), ("residual", residual)) if value is True}
    kind = ("secant" if guard and not asked else "window") if history is None else history
    checks.check_choice("history", kind, get_args(HistoryKind))
    if kind == "secant" and asked:
        name, value = next(iter(asked.items()))
        raise ValueError(
            f"{name} must be left out with history='secant', which does not predict by a line in time, got {value!r}"
        )
    is_line = kind != "secant"
    if history_window is None:
        history_window = 8 if is_line else 16
    length = checks.check_integer("history_window", history_window, 2)
    decay = checks.check_real("history_decay", history_decay, low=0.0, high=1.0, low_open=True)
    dtype = checks.check_float_dtype("history_dtype", history_dtype)
    calibrates = checks.check_bool("calibrate", is_line if calibrate is None else calibrate)
    has_residual = checks.check_bool("residual", is_line and not calibrates if residual is None else residual)
    fading = checks.check_real("residual_decay", residual_decay, low=0.0, high=1.0)
    if has_residual and calibrates:
        raise ValueError(
            "residual must be False or None with calibrate=True, where the newest record does its work, got True"
        )
    if not is_line:
        return SecantPredictor(SecantHistory(length, dtype))
    memory: LineHistory = WindowHistory(length, decay, dtype) if kind == "window" else RecursiveHistory(decay, dtype)
    if history_codec is not None:
        if kind != "window":
            raise ValueError(
                "history_codec must be None with history='recursive', which would code its own decoded sums anew at "
                f"every step, got {history_codec!r}"
            )
        memory = CodedWindowHistory(length, decay, dtype, codecs.check_codec("history_codec", history_codec))
    return LinePredictor(memory, dtype, history_codec, has_residual, fading, calibrates)
