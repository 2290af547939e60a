"""Where the range of each number ends: the last one that is taken, and the next one, which is not."""

import math

import optax
import pytest

import vsa_optax
from vsa_optax import (
    AdaptiveCycle,
    Cycle,
    Guarded,
    HypervectorCodec,
    Momentum,
    QualityCycle,
    Recursive,
    Secants,
    TritCodec,
    Window,
)

LARGEST = 2**31 - 1
TINY = 5e-324  # The smallest float above 0.
BELOW_0, ABOVE_1 = -TINY, math.nextafter(1.0, 2.0)


def learning_rate(**given):
    return vsa_optax.phase_switched(optax.sgd(1.0), **given)


def residual_decay(**given):
    return Window(calibrate=False, **given)


def accumulate(**given):
    return vsa_optax.accumulate_ternary(4, **given)


# A factory, one of its arguments, and the smallest and largest number that it accepts.
INTEGERS = [
    (Secants, "window", 2, LARGEST),
    (Window, "length", 2, LARGEST),
    (Guarded, "longest", 1, LARGEST),
    (Guarded, "warmup_steps", 2, LARGEST),
    (Cycle, "warmup_steps", 0, LARGEST),
    (QualityCycle, "predict_steps", 1, LARGEST),
    (Cycle, "full_steps", 1, LARGEST),
    (Cycle, "predict_steps", 0, LARGEST),
    (AdaptiveCycle, "correct_every", 1, LARGEST),
    (TritCodec, "trits", 1, 3),
    (TritCodec, "seed", 0, LARGEST),
    (HypervectorCodec, "dimension", 1, LARGEST),
    (HypervectorCodec, "seed", 0, LARGEST),
    (vsa_optax.accumulate_ternary, "every_k_schedule", 1, LARGEST),
    (vsa_optax.ternary_accumulator, "num_microbatches", 1, LARGEST),
    (accumulate, "trits", 1, 3),
    (accumulate, "seed", 0, LARGEST),
]
# The first number that is not taken below, and the last one that is; and likewise above.
REALS = [
    (Guarded, "tolerance", (0.0, TINY), (1.0, ABOVE_1)),
    (Window, "decay", (0.0, TINY), (1.0, ABOVE_1)),
    (Recursive, "decay", (0.0, TINY), (1.0, ABOVE_1)),
    (residual_decay, "residual_decay", (BELOW_0, 0.0), (1.0, ABOVE_1)),
    (Momentum, "momentum", (BELOW_0, 0.0), (3.4e38, 3.5e38)),
    (Momentum, "correction_weight", (BELOW_0, 0.0), (3.4e38, 3.5e38)),
    (QualityCycle, "most_error", (0.0, TINY), (1.7e308, math.inf)),
    (AdaptiveCycle, "loss_threshold", (BELOW_0, 0.0), (1.7e308, math.inf)),
    (HypervectorCodec, "compression_ratio", (0.0, TINY), (1.0, ABOVE_1)),
    (learning_rate, "learning_rate", (BELOW_0, 0.0), (3.4e38, 3.5e38)),
]
BLOCKS = [(TritCodec, "block_size", size) for size in (2, 65536)] + [
    (accumulate, "block_size", size) for size in (2, 65536)
]


@pytest.mark.parametrize(
    ("make", "name", "taken", "refused"),
    [(make, name, first, first - 1) for make, name, first, _ in INTEGERS]
    + [(make, name, last, last + 1) for make, name, _, last in INTEGERS]
    + [(make, name, taken, refused) for make, name, (refused, taken), _ in REALS]
    + [(make, name, taken, refused) for make, name, _, (taken, refused) in REALS]
    + [(make, name, size, size // 2 if size == 2 else 2 * size) for make, name, size in BLOCKS],
)
def test_the_next_number_is_refused_by_name(make, name, taken, refused):
    make(**{name: taken})
    with pytest.raises(ValueError, match=f"^{name} must be"):
        make(**{name: refused})
