"""What a phase machine asks of whatever predicts, and the choice of it by settings."""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from vsa_optax import checks
from vsa_optax.codecs import codec as codecs
from vsa_optax.transforms.coded_history import CodedWindowHistory
from vsa_optax.transforms.comparison import Comparison, Memory
from vsa_optax.transforms.history import History, LineHistory
from vsa_optax.transforms.line_predictor import LinePredictor
from vsa_optax.transforms.recursive_history import RecursiveHistory
from vsa_optax.transforms.secant_history import SecantHistory
from vsa_optax.transforms.secant_predictor import SecantPredictor
from vsa_optax.transforms.window_history import WindowHistory


class Predictor(Protocol):
    """A history, and what is made of it. Scalars and calibrations are each predictor's own."""

    @property
    def history(self) -> History:
        """The memory."""

    @property
    def reads_params(self) -> bool:
        """Whether it needs the parameters; None is passed for them if not."""

    @property
    def calibrates(self) -> bool:
        """Whether it learns from its errors."""

    @property
    def has_residual(self) -> bool:
        """Whether the average of its errors is added."""

    def init_calibration(self, params: Any) -> Any:
        """Nothing measured; None if it does not calibrate."""

    def init_residual(self, params: Any) -> Any:
        """Zeros; None if there is no residual."""

    def scalars(self, history: Any, step: jax.Array, params: Any) -> Any:
        """All that a step is to the history; among it ``horizon``, ``[] float32``, steps from the newest record."""

    def record(self, history: Any, tree: Any, params: Any, step: jax.Array, scalars: Any) -> Any:
        """The history with one more record, taken at ``step`` and these parameters."""

    def weights(self, state: Any, scalars: Any) -> jax.Array | None:
        """What a calibrated prediction takes of each of its parts; None without calibration."""

    def predict(self, history: Any, residual: Any, scalars: Any, weights: Any) -> Any:
        """Tree of predictions, in at least f32."""

    def compare(self, memory: Memory, scalars: Any, target: Any, predicted: Callable[[], Any]) -> Comparison:
        """Of ``target``, which is to be recorded, with its prediction, which ``predicted`` forms if it is needed."""


def make_predictor(
    *,
    history: str | None,
    history_window: int | None,
    history_decay: float,
    history_dtype: Any,
    history_codec: Any,
    residual: bool | None,
    residual_decay: float,
    calibrate: bool | None,
    guard: bool,
    predict_in: str | None,
) -> Predictor:
    """The predictor of these settings, checked; ranges and what None means as in `vsa_optax.predict_gradients`."""
    checks.check_choice("predict_in", "gradient" if predict_in is None else predict_in, ("update", "gradient"))
    asked: dict[str, Any] = {"predict_in": predict_in} if predict_in == "update" else {}
    asked |= {} if history_codec is None else {"history_codec": history_codec}
    asked |= {name: True for name, value in (("calibrate", calibrate), ("residual", residual)) if value is True}
    kind = ("secant" if guard and not asked else "window") if history is None else history
    checks.check_choice("history", kind, ("secant", "window", "recursive"))
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
    window = WindowHistory(length, decay, dtype)
    memory: LineHistory = window if kind == "window" else RecursiveHistory(decay, dtype)
    if history_codec is not None:
        if kind != "window":
            raise ValueError(
                "history_codec must be None with history='recursive', which would code its own decoded sums anew at "
                f"every step, got {history_codec!r}"
            )
        memory = CodedWindowHistory(window, codecs.check_codec("history_codec", history_codec))
    return LinePredictor(memory, dtype, history_codec, has_residual, fading, calibrates)
