"""Products that an accelerator would round to TF32 or bfloat16 request full f32 precision.

Prediction, rotation and similarities take small differences of large products. On a CPU precision= changes nothing, so
the tests look for it in the traced programs.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from transformations import TRANSFORMATIONS, params_of, states_of

import vsa_optax
from vsa_optax import HypervectorCodec, TritCodec, vsa
from vsa_optax.prediction.fits import calibration, secant_fit

LARGE = TritCodec(2)


def equations(jaxpr):
    """All of them, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def precisions(fun, *args):
    """Those of all products of f32, or wider, numbers."""
    found = []
    for equation in equations(jax.make_jaxpr(fun)(*args).jaxpr):
        if equation.primitive.name == "dot_general" and any(x.aval.dtype.itemsize >= 4 for x in equation.invars):
            precision = equation.params["precision"]
            found.append(precision if isinstance(precision, tuple) else (precision, precision))
    return found


def of_transformation(name):
    return lambda: states_of(name, params_of(), 1)


CALLS = {
    **{name: of_transformation(name) for name in TRANSFORMATIONS if name != "compressed_pmean"},
    "TritCodec": lambda: LARGE.decode(LARGE.encode(jnp.ones(3000))),
    "HypervectorCodec": lambda: HypervectorCodec().encode(jnp.ones(3000)),
    "ternary_accumulator": lambda: optax.microbatching.microbatch(
        lambda x: x[0], 0, 2, vsa_optax.ternary_accumulator(2, block_size=32)
    )(jnp.ones((4, 64))),
    "dot_similarity": lambda: vsa.dot_similarity(jnp.ones((2, 8)), jnp.ones((3, 8))),
    "cleanup": lambda: vsa.cleanup(jnp.ones((2, 8)), jnp.ones((3, 8))),
    "bundle": lambda: vsa.bundle(jnp.ones((2, 8))),
    "errors of ridges": lambda: secant_fit.errors(jnp.ones((7, 3)), jnp.ones((2, 3, 3)), jnp.ones((2, 3)), jnp.ones(2)),
    "a measurement": lambda: calibration.measure(
        calibration.zeros(2, 3), jnp.ones((2, 3)), jnp.ones((2, 3, 3)), jnp.ones((2, 3)), jnp.ones(2), 0.9
    ),
}
WITHOUT_PRODUCTS = {"adaptive", "momentum", "never predicts"}  # Sums that XLA fuses, and nothing.


@pytest.mark.parametrize("name", CALLS)
def test_products_keep_every_digit(name):
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    found = precisions(CALLS[name])
    assert bool(found) == (name not in WITHOUT_PRODUCTS)
    assert [precision for precision in found if precision != highest] == []
