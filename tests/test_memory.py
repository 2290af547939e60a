"""Bytes by part: of every transformation, nested ones, shapes alone, sharded arrays, and what Flax keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from transformations import TRANSFORMATIONS, TRITS, params_of

import vsa_optax
from vsa_optax import memory, state_bytes

PARAMS = params_of()
COPY = 4 * (8 * 6 + 6 + 1)  # Bytes of the parameters.


def abstract(opt):
    return jax.eval_shape(opt.init, PARAMS)


def named(**parts):
    return memory.StateBytes(**{**dict.fromkeys(memory.StateBytes._fields, 0), **parts})


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_parts_add_up_and_no_array_of_ours_counts_as_a_moment(name):
    """In these transformations ``optax.sgd`` has one moment, or none; `multisecant` has one of its own."""
    state = TRANSFORMATIONS[name].init(PARAMS)
    found = state_bytes(state)
    assert found.total == sum(found) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    traces = [x for x in jax.tree.leaves(state, is_leaf=is_trace) if is_trace(x)]
    own = 2 * (COPY // 4) if name == "multisecant" else 0  # In bfloat16.
    assert found.moments == len(traces) * COPY + own


def is_trace(node):
    return isinstance(node, optax.TraceState)


def test_parts_by_hand():
    history = (2 * 3 + 2) * COPY  # Three moves, three changes, the newest parameters and gradient.
    secants = state_bytes(TRANSFORMATIONS["secants"].init(PARAMS))
    assert secants.moments == COPY
    assert 0 < secants.history - history < 100
    assert secants.accumulator == secants.residual == secants.losses == 0
    assert state_bytes(TRANSFORMATIONS["compress_gradients"].init(PARAMS)) == named(residual=COPY, bookkeeping=8)
    in_trits = state_bytes(TRANSFORMATIONS["ternary_multi_steps"].init(PARAMS))
    # 48 coordinates are padded to five blocks of 32: a byte for five trits, and five scales. Seven stay as they are.
    assert in_trits == named(moments=COPY, accumulator=2 * 32 + 2 * 5 + 4 * 7, bookkeeping=12)
    residual = state_bytes(TRANSFORMATIONS["adaptive"].init(PARAMS))
    assert residual.residual == COPY
    assert residual.bookkeeping > 4 * 100  # The ring of losses by which it adapts is the machine's.


def test_optax_accumulation_and_losses_are_parts_too():
    of_optax = optax.MultiSteps(optax.adam(0.1), 4).gradient_transformation()
    assert state_bytes(abstract(of_optax)) == named(moments=2 * COPY + 4, accumulator=COPY, bookkeeping=8)
    losses = vsa_optax.track_loss(optax.sgd(0.1), max_history=50)
    assert state_bytes(abstract(losses)) == named(losses=50 * 8, bookkeeping=6 * 4 + 5 * 4)
    watched = vsa_optax.track_loss(vsa_optax.phase_switched(optax.sgd(0.1)), max_history=50)
    assert state_bytes(abstract(watched)).losses == 50 * 16


def test_nested_states_are_told_apart():
    sent = vsa_optax.compress_gradients(TRITS, error_feedback=True)
    switched = vsa_optax.phase_switched(optax.chain(sent, optax.adam(0.1)))
    nested = vsa_optax.track_loss(vsa_optax.ternary_multi_steps(switched, 4, block_size=32))
    found = state_bytes(abstract(nested))
    alone = state_bytes(abstract(vsa_optax.phase_switched(optax.adam(0.1))))
    assert found.moments == alone.moments == 2 * COPY + 4
    assert found.history == alone.history
    assert found.residual == COPY
    assert found.accumulator == state_bytes(abstract(TRANSFORMATIONS["ternary_multi_steps"])).accumulator
    assert found.losses > 0
    # A state is told by its type where another part has claimed what it lies in.
    inside = {"sum": memory.AccumulateTernaryState(0, 0, {"a": sent.init(PARAMS)}, 0)}
    assert state_bytes(inside) == named(accumulator=0, residual=COPY, bookkeeping=5 * 4)


def test_shapes_are_enough_and_nothing_is_computed():
    large = {"w": jax.ShapeDtypeStruct((1_000_000, 1_000_000), jnp.bfloat16)}
    found = state_bytes(jax.eval_shape(vsa_optax.phase_switched(optax.adamw(1e-3)).init, large))
    assert found.moments == 2 * 2 * 10**12 + 4
    assert str(found).startswith("72 TB: moments 4 TB, history 68 TB")
    traced = jax.jit(lambda state: state_bytes(state).total)(TRANSFORMATIONS["secants"].init(PARAMS))
    assert traced == state_bytes(abstract(TRANSFORMATIONS["secants"])).total


def test_sharded_arrays_count_whole_or_by_device():
    mesh = Mesh(jax.devices(), ("data",))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    params = {"w": jax.device_put(jnp.ones((16, 4)), split), "b": jax.device_put(jnp.ones(8), whole)}
    for tree in (params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)):
        assert state_bytes(tree).total == 16 * 4 * 4 + 8 * 4
        assert state_bytes(tree, per_device=True).total == 2 * 4 * 4 + 8 * 4
    state = optax.adam(0.1).init(params)
    assert state_bytes(state, per_device=True).total == 2 * (2 * 4 * 4 + 8 * 4) + 4
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert state_bytes(state, per_device=True).total == on_one


def test_numbers_and_other_leaves():
    assert state_bytes({"a": 1, "b": None, "c": np.ones(3), "d": jnp.ones(2, jnp.int8), "e": ()}).total == 4 + 24 + 2
    assert state_bytes({}) == named()
    assert str(state_bytes({})) == "0 B"
    with pytest.raises(TypeError, match=r"must be arrays or numbers, got function at \['opt'\]\.init: pass the state"):
        state_bytes({"opt": optax.adam(0.1)})


def test_in_a_flax_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    opt = vsa_optax.phase_switched(optax.adam(0.1))
    optimizer = nnx.Optimizer(model, opt, wrt=nnx.Param)
    found = state_bytes(optimizer.opt_state)
    assert found == state_bytes(opt.init({"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}))
    assert state_bytes(optimizer) == found._replace(moments=found.moments + 4)  # The optimizer's own count of steps.


def test_units():
    assert [memory.in_units(n) for n in (0, 999, 1000, 1234, 10**6, 2 * 10**9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.23 kB",
        "1 MB",
        "2 GB",
    ]


def test_parts_name_fields_that_exist():
    for state, fields in memory._PARTS.items():
        assert set(fields) <= set(state._fields)
        assert set(fields.values()) <= set(memory.StateBytes._fields)
