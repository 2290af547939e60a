"""The tasks without noise: those of the suite on skipping backward passes, and four typical tasks of users."""

import functools

import noiseless_field
import noiseless_poisson
import noiseless_qubits
import noiseless_wave
import numpy as np
import prediction_tasks
from noiseless_task import FullBatch, stored

from vsa_optax import demo


def of_suite(task, budgets, rates, floor, residuals=None):
    """A task of `prediction_tasks` whose loss ignores the batch."""
    return FullBatch(
        task.description.split(";")[0],
        init=task.init,
        loss=lambda params, data: task.loss(params, None),
        budgets=budgets,
        rates=rates,
        floor=floor,
        residuals=residuals,
    )


@functools.cache
def digits():
    if stored("digits_0") is not None:
        arrays = [stored(f"digits_{number}") for number in range(4)]
        demo.load_digits = lambda: (tuple(arrays[:2]), tuple(arrays[2:]))  # Scikit-learn need not be there.
    return of_suite(prediction_tasks.digits_full_batch(), (90, 150, 300), (4, 6, 8, 10, 12), floor=1e-9)


@functools.cache
def pinn(frequency):
    return of_suite(
        prediction_tasks.pinn(frequency),
        (450, 900, 2000),
        (4, 6, 8, 10, 12),
        floor=1e-9,
        residuals=prediction_tasks.pinn_residuals(frequency),
    )


TASKS = {
    "digits, full batch": digits,
    "PINN, sin(2 pi x)": lambda: pinn(2),
    "PINN, sin(6 pi x)": lambda: pinn(6),
    **noiseless_poisson.CASES,
    **noiseless_wave.CASES,
    **noiseless_qubits.CASES,
    **noiseless_field.CASES,
}


def export(path):
    """Writes the data from scikit-learn."""
    digits = [array for pair in demo.load_digits() for array in pair]
    arrays = {f"digits_{number}": array for number, array in enumerate(digits)}
    np.savez_compressed(path, china=noiseless_field.sample_image(), **arrays)
