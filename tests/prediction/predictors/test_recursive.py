import numpy as np
import pytest
import reference
from histories import run
from samples import relative

from vsa_optax.prediction.predictors.recursive import RecursiveHistory


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_recursion_equals_lstsq_over_many_records(decay):
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.integers(1, 5, size=600))
    records = (rng.normal(size=5) + 0.01 * steps[:, None] * rng.normal(size=5)).astype(np.float32)
    step = int(steps[-1]) + 7
    expected = reference.lstsq_prediction(steps, records, step, decay)
    assert relative(run(RecursiveHistory(decay, None), steps, records, step), expected) < 1e-5
