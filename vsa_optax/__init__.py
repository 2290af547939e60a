"""Cheaper gradients for Optax: skip backward passes by closed-form prediction, keep or send gradients in a few bits."""

# The private names keep completion to the public ones.
import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from vsa_optax import checkpoint, plots, trits, vsa
    from vsa_optax.accumulation.microbatching import ternary_accumulator
    from vsa_optax.accumulation.multi_steps import accumulate_ternary, ternary_multi_steps
    from vsa_optax.codecs.hypervector import HypervectorCodec
    from vsa_optax.codecs.trit import TritCodec
    from vsa_optax.compression.gradients import compress_gradients
    from vsa_optax.compression.pmean import compressed_pmean, state_specs
    from vsa_optax.loss_history import track_loss
    from vsa_optax.loss_statistics import LossReport, LossStatistics, loss_report
    from vsa_optax.memory import StateBytes, state_bytes
    from vsa_optax.prediction.api import phase_switched, predict_gradients
    from vsa_optax.prediction.guard import GuardAction
    from vsa_optax.prediction.legacy import MomentumSettings, momentum_predictor
    from vsa_optax.prediction.machine import Phase
    from vsa_optax.prediction.multisecant import MultisecantStats, multisecant, multisecant_stats
    from vsa_optax.prediction.phases import AdaptiveCycle, Cycle, Guarded, LegacyCycle, QualityCycle
    from vsa_optax.prediction.predictors.base import PredictionQuality
    from vsa_optax.prediction.predictors.factory import Momentum, Recursive, Secants, Window
    from vsa_optax.prediction.presets import aggressive, balanced, conservative
    from vsa_optax.prediction.stats import GuardStats, PhaseStats, needs_backward, phase_stats
    from vsa_optax.prediction.value_and_grad import value_and_grad_by_phase
    from vsa_optax.probe import probe
    from vsa_optax.probe_report import ProbeReport, ProbeRun
    from vsa_optax.step_programs import jit_by_phase

__version__ = "0.1.0"

__all__ = [
    "AdaptiveCycle",
    "Cycle",
    "GuardAction",
    "GuardStats",
    "Guarded",
    "HypervectorCodec",
    "LegacyCycle",
    "LossReport",
    "LossStatistics",
    "Momentum",
    "MomentumSettings",
    "MultisecantStats",
    "Phase",
    "PhaseStats",
    "PredictionQuality",
    "ProbeReport",
    "ProbeRun",
    "QualityCycle",
    "Recursive",
    "Secants",
    "StateBytes",
    "TritCodec",
    "Window",
    "accumulate_ternary",
    "aggressive",
    "balanced",
    "checkpoint",
    "compress_gradients",
    "compressed_pmean",
    "conservative",
    "jit_by_phase",
    "loss_report",
    "momentum_predictor",
    "multisecant",
    "multisecant_stats",
    "needs_backward",
    "phase_stats",
    "phase_switched",
    "plots",
    "predict_gradients",
    "probe",
    "state_bytes",
    "state_specs",
    "ternary_accumulator",
    "ternary_multi_steps",
    "track_loss",
    "trits",
    "value_and_grad_by_phase",
    "vsa",
]

# The module of each name. A module is imported when one of its names is first used: importing all of them is slow.
_HOMES = {
    "AdaptiveCycle": "prediction.phases",
    "Cycle": "prediction.phases",
    "GuardAction": "prediction.guard",
    "GuardStats": "prediction.stats",
    "Guarded": "prediction.phases",
    "HypervectorCodec": "codecs.hypervector",
    "LegacyCycle": "prediction.phases",
    "LossReport": "loss_statistics",
    "LossStatistics": "loss_statistics",
    "Momentum": "prediction.predictors.factory",
    "MomentumSettings": "prediction.legacy",
    "MultisecantStats": "prediction.multisecant",
    "Phase": "prediction.machine",
    "PhaseStats": "prediction.stats",
    "PredictionQuality": "prediction.predictors.base",
    "ProbeReport": "probe_report",
    "ProbeRun": "probe_report",
    "QualityCycle": "prediction.phases",
    "Recursive": "prediction.predictors.factory",
    "Secants": "prediction.predictors.factory",
    "StateBytes": "memory",
    "TritCodec": "codecs.trit",
    "Window": "prediction.predictors.factory",
    "accumulate_ternary": "accumulation.multi_steps",
    "aggressive": "prediction.presets",
    "balanced": "prediction.presets",
    "compress_gradients": "compression.gradients",
    "compressed_pmean": "compression.pmean",
    "conservative": "prediction.presets",
    "jit_by_phase": "step_programs",
    "loss_report": "loss_statistics",
    "momentum_predictor": "prediction.legacy",
    "multisecant": "prediction.multisecant",
    "multisecant_stats": "prediction.multisecant",
    "needs_backward": "prediction.stats",
    "phase_stats": "prediction.stats",
    "phase_switched": "prediction.api",
    "predict_gradients": "prediction.api",
    "state_bytes": "memory",
    "state_specs": "compression.pmean",
    "ternary_accumulator": "accumulation.microbatching",
    "ternary_multi_steps": "accumulation.multi_steps",
    "track_loss": "loss_history",
    "value_and_grad_by_phase": "prediction.value_and_grad",
}

if not _typing.TYPE_CHECKING:  # With this function, a type checker would accept every attribute name.

    def __getattr__(name: str) -> object:
        if name in ("checkpoint", "plots", "probe", "trits", "vsa"):
            return _importlib.import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(_importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
