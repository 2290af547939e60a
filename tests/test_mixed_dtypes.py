"""Leaves of every dtype in one tree, gradients and losses wider than the parameters: the state's types are for good.

All is traced and nothing compiled: a type that changes, or does not fit, shows there.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from transformations import TRANSFORMATIONS

import vsa_optax
from vsa_optax import AdaptiveCycle, Cycle, Guarded, HypervectorCodec, Recursive, Secants, TritCodec, Window

TRITS = TritCodec(2, block_size=32)
# Each history, calibrated or not, with one of the three ways of when to predict.
PREDICTORS = {
    "secants": (Secants(3), Guarded()),
    "secants in float16": (Secants(3, dtype="float16"), Cycle()),
    "window": (Window(3), Guarded()),
    "window of gradients": (Window(3, predicts="gradient"), Cycle()),
    "window with a residual": (Window(3, calibrate=False, residual_decay=0.9), AdaptiveCycle()),
    "window in bfloat16": (Window(3, dtype="bfloat16"), AdaptiveCycle()),
    "window in trits": (Window(3, codec=TRITS), Cycle()),
    "window in trits with a residual": (Window(3, codec=TRITS, calibrate=False, residual_decay=0.9), Guarded()),
    "window of hypervectors": (Window(3, codec=HypervectorCodec(0.5)), Guarded()),
    "recursive": (Recursive(), AdaptiveCycle()),
    "recursive in float16": (Recursive(dtype="float16"), Guarded()),
    "recursive with a residual": (Recursive(calibrate=False, residual_decay=0.9), Cycle()),
}
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
momentum = optax.sgd(0.1, momentum=0.9)


def params_of_all_dtypes():
    """Of each dtype a leaf of more than a block, and a scalar."""
    return {name: [jnp.ones((5, 8), name), jnp.ones([], name)] for name in DTYPES}


def types_of(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def updates_that_leave_the_state_its_types(opt, params, gradients, value):
    """One step is enough: the next one starts with the same types."""
    state = jax.eval_shape(opt.init, params)
    updates, new_state = jax.eval_shape(
        lambda g, s, p, v: opt.update(g, s, p, value=v), gradients, state, params, value
    )
    assert types_of(new_state) == types_of(state)
    return updates


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_history_of_all_dtypes_in_double_precision(name):
    """Nothing is promoted: what is float64 by default in there, and is not cast, is refused."""
    predictor, phases = PREDICTORS[name]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        params = params_of_all_dtypes()
        opt = vsa_optax.phase_switched(momentum, predictor=predictor, phases=phases)
        updates = updates_that_leave_the_state_its_types(opt, params, params, jnp.float64(1.0))
    assert types_of(updates) == types_of(params)


@pytest.mark.parametrize("name", ["secants", "window with a residual", "recursive"])
def test_a_history_takes_wider_gradients_and_a_loss_of_any_dtype(name):
    predictor, phases = PREDICTORS[name]
    with jax.enable_x64(True):
        opt = vsa_optax.phase_switched(momentum, predictor=predictor, phases=phases)
        params = {"half": jnp.ones(40, "bfloat16"), "single": jnp.ones(40, "float32")}
        gradients = {"half": jnp.ones(40, "float32"), "single": jnp.ones(40, "float64")}
        for value in (jnp.bfloat16(1.0), jnp.int32(1)):
            updates_that_leave_the_state_its_types(opt, params, gradients, value)


@pytest.mark.parametrize("history_dtype", [None, "bfloat16", "float16", "float64"])
def test_leaps_among_all_dtypes_in_double_precision(history_dtype):
    with jax.enable_x64(True):
        opt = vsa_optax.multisecant(momentum, history_window=3, history_dtype=history_dtype)
        params = {"half": jnp.ones(40, "bfloat16"), "single": jnp.ones(40, "float32")}
        gradients = {"half": jnp.ones(40, "float32"), "single": jnp.ones(40, "float64")}
        for value in (jnp.bfloat16(1.0), jnp.int32(1)):
            updates_that_leave_the_state_its_types(opt, params, gradients, value)
        with jax.numpy_dtype_promotion("strict"):
            params = params_of_all_dtypes()
            updates = updates_that_leave_the_state_its_types(opt, params, params, jnp.float64(1.0))
    assert types_of(updates) == types_of(params)


@pytest.mark.parametrize("phases", [Cycle(), AdaptiveCycle()], ids=lambda phases: type(phases).__name__)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int32"])
def test_devices_average_a_loss_of_another_dtype_than_the_machine_keeps(dtype, phases):
    """The last one known is float32, and takes the loss's place in PREDICT."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    values = []
    collect = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda g, s, p=None, *, value, **_: (values.append(value.dtype), (g, s))[1]
    )
    with jax.enable_x64(True):
        opt = vsa_optax.phase_switched(optax.chain(collect, momentum), predictor=Window(2), phases=phases)
        params = jnp.ones(4)

        def step(losses, state):
            return opt.update(params, state, params, value=losses[0])[1]

        stepped = jax.shard_map(step, mesh=mesh, in_specs=(P("d"), P()), out_specs=P())
        state = jax.eval_shape(opt.init, params)
        assert types_of(jax.eval_shape(stepped, jnp.ones(2, dtype), state)) == types_of(state)
    assert set(values) == {np.dtype("float64" if dtype == "float64" else "float32")}


FIELD = re.compile(r"^ +(\w+): (?:\w+, )?``\[([^]`]*)\] (\w+)``", flags=re.MULTILINE)


def documented(node):
    """``(name of the field, axes and dtype in its class's docstring, array)`` of all named tuples in a tree."""
    if hasattr(node, "_fields"):
        written = {name: (axes, dtype) for name, axes, dtype in FIELD.findall(type(node).__doc__ or "")}
        for name, value in node._asdict().items():
            if name in written and value is not None:
                yield f"{type(node).__name__}.{name}", *written[name], value
            if name != "records":  # A codec's, stacked.
                yield from documented(value)
    elif isinstance(node, dict | list | tuple):
        for value in node.values() if isinstance(node, dict) else node:
            yield from documented(value)


@pytest.mark.parametrize("is_double", [False, True], ids=["x32", "x64"])
def test_arrays_have_the_axes_and_dtypes_of_their_docstrings(is_double):
    dtype, seen = "float64" if is_double else "bfloat16", set()
    with jax.enable_x64(is_double):
        params = {"w": jnp.ones(70, dtype)}
        states = [jax.eval_shape(opt.init, params) for opt in TRANSFORMATIONS.values()]
        payloads = [jax.eval_shape(codec.encode, params) for codec in (TRITS, HypervectorCodec(0.5))]
        carry = jax.eval_shape(vsa_optax.ternary_accumulator(4, block_size=32).init, params)
        stats = jax.eval_shape(vsa_optax.phase_stats, states[0])
    for name, axes, dtype, value in documented([states, payloads, carry, stats]):
        assert [(name, x.dtype) for x in jax.tree.leaves(value)] == [(name, jnp.dtype(dtype))]
        assert {"*", "."} & set(axes) or value.ndim == len([axis for axis in axes.split(",") if axis]), name
        seen.add(name)
    assert len(seen) > 60
