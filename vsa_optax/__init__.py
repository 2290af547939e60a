"""Cheaper gradients for Optax: skip backward passes by closed-form prediction, keep or send gradients in a few bits."""

from vsa_optax import trits, vsa
from vsa_optax.codecs.hypervector import HypervectorCodec
from vsa_optax.codecs.trit import TritCodec
from vsa_optax.transforms.accumulate import accumulate_ternary, ternary_multi_steps
from vsa_optax.transforms.compress import compress_gradients
from vsa_optax.transforms.phases import Phase
from vsa_optax.transforms.predict import phase_switched, predict_gradients
from vsa_optax.transforms.queries import PhaseStats, needs_backward, phase_stats
from vsa_optax.transforms.ternary_accumulator import ternary_accumulator
from vsa_optax.value_and_grad import value_and_grad_by_phase

__version__ = "0.1.0"

__all__ = [
    "HypervectorCodec",
    "Phase",
    "PhaseStats",
    "TritCodec",
    "accumulate_ternary",
    "compress_gradients",
    "needs_backward",
    "phase_stats",
    "phase_switched",
    "predict_gradients",
    "ternary_accumulator",
    "ternary_multi_steps",
    "trits",
    "value_and_grad_by_phase",
    "vsa",
]
