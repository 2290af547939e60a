"""Cheaper gradients for Optax: skip backward passes by closed-form prediction, keep or send gradients in a few bits."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vsa_optax import trits, vsa
    from vsa_optax.codecs.hypervector import HypervectorCodec
    from vsa_optax.codecs.trit import TritCodec
    from vsa_optax.transforms.accumulate import accumulate_ternary, ternary_multi_steps
    from vsa_optax.transforms.collectives import compressed_pmean, state_specs
    from vsa_optax.transforms.compress import compress_gradients
    from vsa_optax.transforms.guard import GuardAction
    from vsa_optax.transforms.phases import Phase
    from vsa_optax.transforms.predict import phase_switched, predict_gradients
    from vsa_optax.transforms.queries import PhaseStats, needs_backward, phase_stats
    from vsa_optax.transforms.ternary_accumulator import ternary_accumulator
    from vsa_optax.value_and_grad import value_and_grad_by_phase

__version__ = "0.1.0"

__all__ = [
    "GuardAction",
    "HypervectorCodec",
    "Phase",
    "PhaseStats",
    "TritCodec",
    "accumulate_ternary",
    "compress_gradients",
    "compressed_pmean",
    "needs_backward",
    "phase_stats",
    "phase_switched",
    "predict_gradients",
    "state_specs",
    "ternary_accumulator",
    "ternary_multi_steps",
    "trits",
    "value_and_grad_by_phase",
    "vsa",
]

# Where each name lives. A module is imported when a name of it is first asked for: all together are slow to import.
_HOMES = {
    "GuardAction": "transforms.guard",
    "HypervectorCodec": "codecs.hypervector",
    "Phase": "transforms.phases",
    "PhaseStats": "transforms.queries",
    "TritCodec": "codecs.trit",
    "accumulate_ternary": "transforms.accumulate",
    "compress_gradients": "transforms.compress",
    "compressed_pmean": "transforms.collectives",
    "needs_backward": "transforms.queries",
    "phase_stats": "transforms.queries",
    "phase_switched": "transforms.predict",
    "predict_gradients": "transforms.predict",
    "state_specs": "transforms.collectives",
    "ternary_accumulator": "transforms.ternary_accumulator",
    "ternary_multi_steps": "transforms.accumulate",
    "value_and_grad_by_phase": "value_and_grad",
}

if not TYPE_CHECKING:  # A type checker would take every name for one of ours.

    def __getattr__(name: str) -> object:
        if name in ("trits", "vsa"):
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
