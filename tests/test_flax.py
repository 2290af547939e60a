"""Training steps as Flax users write them, on both of its APIs."""

import functools
import inspect

import blind
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import vsa_optax
from vsa_optax import Phase

SHORT = dict(warmup_steps=2, full_steps=2, predict_steps=4, correct_every=2)
X = jax.random.normal(jax.random.key(1), (16, 4))
Y = jnp.sin(X.sum(axis=1, keepdims=True))
STEPS = 40


def make_opt():
    return blind.phase_switched(optax.adamw(1.0), learning_rate=0.02, **SHORT)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(1)(x)


class LinenState(TrainState):
    batch_stats: dict


@jax.jit
def linen_step(state, key):
    def loss(params):
        out, changed = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            X,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return jnp.mean((out - Y) ** 2), changed["batch_stats"]

    run = vsa_optax.value_and_grad_by_phase(loss, has_aux=True)
    (value, batch_stats), grads = run(state.params, state=state.opt_state, aux_in_predict=state.batch_stats)
    # TrainState.apply_gradients does not forward the loss: these three lines do.
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value=value)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, batch_stats=batch_stats), value


def test_linen_with_batch_norm_and_dropout():
    variables = LinenNet().init(jax.random.key(0), X, train=False)
    state = LinenState.create(
        apply_fn=LinenNet().apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=make_opt(),
    )
    values = []
    for i in range(STEPS):
        before, phase = state.batch_stats, Phase(int(state.opt_state.machine.phase))
        state, value = linen_step(state, jax.random.fold_in(jax.random.key(2), i))
        moved = any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, state.batch_stats)))
        assert moved == (phase != Phase.PREDICT)
        values.append(float(value))
    assert np.isfinite(values).all()
    assert values[-1] < 0.5 * values[0]
    assert vsa_optax.needs_backward(state) in (True, False)  # a whole TrainState will do
    assert vsa_optax.phase_stats(state.opt_state).predict_steps > 10


def test_linen_apply_gradients():
    net = nn.Dense(1)
    state = TrainState.create(apply_fn=net.apply, params=net.init(jax.random.key(0), X)["params"], tx=make_opt())

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((net.apply({"params": params}, X) - Y) ** 2)

        value, grads = vsa_optax.value_and_grad_by_phase(loss)(state.params, state=state.opt_state)
        return state.apply_gradients(grads=grads), value

    with pytest.warns(UserWarning, match=r"value=value.*apply_gradients does not forward it"):
        state, first = step(state)
    for _ in range(STEPS):
        state, _ = step(state)
    assert jnp.mean((net.apply({"params": state.params}, X) - Y) ** 2) < first
    assert np.isnan(step(state.replace(opt_state=in_phase(state.opt_state, Phase.PREDICT)))[1])  # no value was given


def in_phase(opt_state, phase):
    return opt_state._replace(machine=opt_state.machine._replace(phase=jnp.int32(phase)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


# Newer releases of Flax reuse the given Variables, which belong to another trace, unless told to copy them.
takes_copy = "copy" in inspect.signature(nnx.merge).parameters
merge = functools.partial(nnx.merge, copy=True) if takes_copy else nnx.merge


@nnx.jit
def nnx_step(model, optimizer):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest):
        model = merge(graphdef, params, rest)
        value = jnp.mean((model(X) - Y) ** 2)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    run = vsa_optax.value_and_grad_by_phase(loss, has_aux=True)
    (value, rest), grads = run(params, rest, state=optimizer.opt_state, aux_in_predict=rest)
    nnx.update(model, rest)
    optimizer.update(model, grads, value=value)
    return value


def test_nnx_with_batch_norm_and_dropout():
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make_opt(), wrt=nnx.Param)
    values = []
    for _ in range(STEPS):
        needs = bool(vsa_optax.needs_backward(optimizer.opt_state))
        mean = np.array(model.norm.mean[...])
        values.append(float(nnx_step(model, optimizer)))
        assert (np.array(model.norm.mean[...]) != mean).any() == needs
    stats = vsa_optax.phase_stats(optimizer.opt_state)
    assert stats.total_steps == STEPS
    assert stats.predict_steps > 10
    assert values[-1] < 0.5 * values[0]


def test_nnx_modules_are_refused():
    model = NnxNet(nnx.Rngs(0))
    state = make_opt().init(nnx.state(model, nnx.Param))
    with pytest.raises(TypeError, match=r"nnx Module.*nnx\.split.*nnx\.merge\(graphdef, params, rest, copy=True\)"):
        vsa_optax.value_and_grad_by_phase(lambda m: jnp.mean(m(X)))(model, state=state)
    with pytest.raises(TypeError, match="Flax nnx Module"):
        vsa_optax.value_and_grad_by_phase(lambda w, m: w)(1.0, {"model": model}, state=state)
    with pytest.raises(TypeError, match="Flax nnx Module"):
        vsa_optax.value_and_grad_by_phase(model)(X, state=state)


def test_leaps_of_linen():
    """`TrainState.apply_gradients` does not forward the loss, and is told so; the optimizer's update takes it."""
    net, opt = nn.Dense(1), vsa_optax.multisecant(optax.adam(0.02), history_window=4)
    state = TrainState.create(apply_fn=net.apply, params=net.init(jax.random.key(0), X)["params"], tx=opt)
    with pytest.raises(ValueError, match=r"value must be given.*TrainState\.apply_gradients does not forward it"):
        jax.eval_shape(lambda: state.apply_gradients(grads=state.params))

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(lambda p: jnp.mean((net.apply({"params": p}, X) - Y) ** 2))(state.params)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value=value)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), value

    values = []
    for _ in range(STEPS // 2):
        state, value = step(state)
        values.append(float(value))
    # A linear model's least squares.
    design = np.concatenate([X, np.ones((len(X), 1))], axis=1)
    residual = np.linalg.lstsq(design, Y, rcond=None)[1]
    assert min(values) < 1.05 * float(residual[0]) / len(X) < 0.5 * values[0]
    assert vsa_optax.multisecant_stats(state.opt_state).evaluations == STEPS // 2


def test_leaps_of_nnx():
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, vsa_optax.multisecant(optax.adam(0.02), history_window=4), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads, value=value)
        return value

    values = [float(step(model, optimizer)) for _ in range(STEPS // 2)]
    assert min(values) < 0.5 * values[0]
    stats = vsa_optax.multisecant_stats(optimizer.opt_state)
    assert (stats.evaluations, stats.nonfinite_count) == (STEPS // 2, 0)
    accepted = jax.tree.leaves(nnx.state(optimizer)["opt_state"]["params"])
    assert [x.shape for x in accepted] == [x.shape for x in jax.tree.leaves(nnx.state(model, nnx.Param))]
