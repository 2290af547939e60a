"""Cheaper gradients for Optax: skip backward passes by predicting them in closed form."""

from vsa_optax.transforms.phases import Phase
from vsa_optax.transforms.predict import phase_switched, predict_gradients
from vsa_optax.transforms.queries import PhaseStats, needs_backward, phase_stats
from vsa_optax.value_and_grad import value_and_grad_by_phase

__version__ = "0.1.0"

__all__ = [
    "Phase",
    "PhaseStats",
    "needs_backward",
    "phase_stats",
    "phase_switched",
    "predict_gradients",
    "value_and_grad_by_phase",
]
