"""Slow, obvious twins in NumPy, written from the equations and not from the code they check."""

import numpy as np


def lstsq_prediction(steps, records, step, decay):
    """The weighted line through ``records`` (float64 ``[n, d]``, oldest first), read at ``step``."""
    steps = np.asarray(steps, np.float64)
    records = np.asarray(records, np.float64)
    if len(set(steps)) < 2:
        return records[-1]
    root = np.sqrt(float(decay) ** np.arange(len(steps))[::-1])
    design = np.stack([np.ones_like(steps), steps - steps[-1]], axis=1)
    (baseline, velocity), *_ = np.linalg.lstsq(design * root[:, None], records * root[:, None], rcond=None)
    return baseline + velocity * (step - steps[-1])


class Predictor:
    """History, residual and error of one flat gradient; ``window=None`` keeps every record."""

    def __init__(self, *, window=8, decay=0.95, residual_decay=0.95, has_residual=True):
        self.window, self.decay = window, decay
        self.residual_decay, self.has_residual = residual_decay, has_residual
        self.steps, self.records, self.residual, self.errors = [], [], 0.0, []

    def predict(self, step):
        kept = slice(None) if self.window is None else slice(-self.window, None)
        prediction = lstsq_prediction(self.steps[kept], self.records[kept], step, self.decay)
        if self.has_residual:
            prediction = prediction + self.residual_decay ** (step - self.steps[-1]) * self.residual
        return prediction

    def correct(self, step, gradient):
        error = gradient - self.predict(step)
        self.errors.append(np.linalg.norm(error) / np.linalg.norm(gradient))
        self.residual = self.residual_decay * self.residual + (1 - self.residual_decay) * error

    def record(self, step, gradient):
        self.steps.append(step)
        self.records.append(np.asarray(gradient, np.float64))


def walk_phases(steps, *, warmup_steps=10, full_steps=5, predict_steps=20, correct_every=5, skipped=()):
    """The phases of ``steps`` steps as a string, each PREDICT phase written out whole before it is walked.

    ``skipped`` holds the numbers of steps whose gradient is not finite.
    """
    leap, position, previous = [], 0, ""
    while predict_steps and not (position >= predict_steps and (position % correct_every or previous == "C")):
        previous = "C" if position and position % correct_every == 0 and previous != "C" else "P"
        leap.append(previous)
        position += 1
    out, recorded = "", 0
    while len(out) < steps and recorded < warmup_steps:
        recorded += len(out) not in skipped
        out += "W"
    while len(out) < steps:
        out += "F" * full_steps + "".join(leap)
    return out[:steps]
