"""Mistakes that a type checker must notice, one a line: a mark that is not needed any more is an error, too."""

import jax
import jax.numpy as jnp
import optax

from vsa_optax import (
    Cycle,
    Guarded,
    HypervectorCodec,
    Momentum,
    QualityCycle,
    Recursive,
    Secants,
    TritCodec,
    Window,
    accumulate_ternary,
    compress_gradients,
    compressed_pmean,
    momentum_predictor,
    phase_switched,
    predict_gradients,
    ternary_accumulator,
    ternary_multi_steps,
    trits,
    value_and_grad_by_phase,
    vsa,
)


def loss(params: jax.Array) -> jax.Array:
    """``[] float32``."""
    return jnp.sum(params**2)


def choices(opt: optax.GradientTransformation, x: jax.Array, key: jax.Array) -> None:
    """A word that is none of those to choose from."""
    predict_gradients(predictor="secants")  # type: ignore[arg-type]
    phase_switched(opt, predictor=Secants)  # type: ignore[arg-type]
    phase_switched(opt, phases=Cycle)  # type: ignore[arg-type]
    predict_gradients(phases=Secants())  # type: ignore[arg-type]
    Window(predicts="updates")  # type: ignore[arg-type]
    Recursive(predicts="gradients")  # type: ignore[arg-type]
    Momentum(predicts="gradients")  # type: ignore[arg-type]
    momentum_predictor("trainers")  # type: ignore[arg-type]
    QualityCycle(full_steps=2)  # type: ignore[call-arg]
    accumulate_ternary(4, rounding="near")  # type: ignore[arg-type]
    ternary_multi_steps(opt, 4, rounding="near")  # type: ignore[arg-type]
    ternary_accumulator(4, rounding="near")  # type: ignore[arg-type]
    vsa.bundle(x, majority="x")  # type: ignore[arg-type]
    vsa.random_hypervectors(key, 2, 64, "x")  # type: ignore[arg-type]
    trits.quantize_deterministic(x, rule="x")  # type: ignore[arg-type]


def numbers(opt: optax.GradientTransformation) -> None:
    """More trits than there are, and things that are no numbers."""
    TritCodec(4)  # type: ignore[arg-type]
    TritCodec(trits=0)  # type: ignore[arg-type]
    accumulate_ternary(4, trits=5)  # type: ignore[arg-type]
    ternary_multi_steps(opt, 4, trits=5)  # type: ignore[arg-type]
    ternary_accumulator(4, trits=5)  # type: ignore[arg-type]
    accumulate_ternary("4")  # type: ignore[arg-type]
    accumulate_ternary(lambda step: "4")  # type: ignore[arg-type,return-value]
    Guarded(tolerance="0.1")  # type: ignore[arg-type]
    Cycle(full_steps=2.5)  # type: ignore[arg-type]
    Window(calibrate="off")  # type: ignore[arg-type]


def codecs() -> None:
    """Arguments that are not codecs."""
    compress_gradients(TritCodec)  # type: ignore[arg-type]
    compress_gradients("trits")  # type: ignore[arg-type]
    compressed_pmean("data", 2)  # type: ignore[arg-type]
    compressed_pmean("data", HypervectorCodec(), bucket_bytes="25MB")  # type: ignore[arg-type]
    compressed_pmean(["data"], HypervectorCodec())  # type: ignore[arg-type]
    Window(codec=2)  # type: ignore[arg-type]
    Recursive(codec=TritCodec())  # type: ignore[call-arg]
    Secants(16, "float32")  # type: ignore[call-arg]
    TritCodec().decode(HypervectorCodec().encode(jnp.ones(4)))  # type: ignore[arg-type]


def states(params: jax.Array, state: optax.OptState) -> str:
    """The optimizer's state forgotten, or not by keyword; and the loss taken for something else."""
    value_and_grad_by_phase(loss)(params)  # type: ignore[call-arg]
    value_and_grad_by_phase(loss)(params, state)  # type: ignore[call-arg]
    value, _ = value_and_grad_by_phase(loss)(params, state=state)
    return value  # type: ignore[return-value]
