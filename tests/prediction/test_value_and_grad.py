import functools

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsa_optax
from vsa_optax import Phase

SHORT = dict(warmup_steps=2, full_steps=2, predict_steps=4, correct_every=2)
OPT = blind.phase_switched(optax.adam(0.05), **SHORT)
SECANTS = vsa_optax.phase_switched(optax.adam(0.05))
NEVER = vsa_optax.phase_switched(optax.adam(0.05), phases=None)
# Transformations that follow the loss, at places where they receive a loss in PREDICT, and where they do not.
PLATEAU = optax.contrib.reduce_on_plateau(patience=5)
FOLLOWING = {
    "behind": optax.chain(SECANTS, PLATEAU),
    "around": optax.chain(optax.chain(OPT), optax.contrib.momo(0.1)),
    "inside, fed with predicted gradients": vsa_optax.phase_switched(optax.chain(optax.adam(0.05), PLATEAU)),
}
NOT_FOLLOWING = {
    "inside, updates predicted": blind.phase_switched(optax.chain(optax.adam(0.05), PLATEAU), **SHORT),
    "never predicted": optax.chain(NEVER, PLATEAU),
}
LINE_OF_GRADIENTS = blind.phase_switched(optax.chain(optax.adam(0.05), PLATEAU), predicts="gradient", **SHORT)
CODED_BACKBONE = optax.partition(
    {
        "w": vsa_optax.phase_switched(
            optax.sgd(0.1),
            predictor=vsa_optax.Window(codec=vsa_optax.TritCodec(block_size=2)),
            phases=vsa_optax.Cycle(),
        ),
        "b": optax.sgd(0.1),
    },
    {"w": {"kernel": "w", "bias": "w"}, "b": "b"},
)
PARAMS = {"w": jnp.arange(1.0, 4.0), "b": jnp.float32(0.5)}
X = jnp.linspace(0.0, 1.0, 12).reshape(4, 3)


def loss(params, x, *, scale=1.0):
    return scale * jnp.mean((x @ params["w"] + params["b"]) ** 2)


_RECORDED = {}


def state_in(phase, opt=OPT, params=PARAMS):
    """A state after two recorded steps, its machine set to ``phase``."""
    key = opt, jax.tree.structure(params)
    if key not in _RECORDED:
        state, update = opt.init(params), jax.jit(opt.update)
        for value in (3.0, 2.5):
            _, state = update(jax.tree.map(np.ones_like, params), state, params, value=value)
        _RECORDED[key] = state
    state = _RECORDED[key]
    return state._replace(machine=state.machine._replace(phase=jnp.int32(phase)))


@functools.cache
def ours_and_jaxs(argnums):
    def both(params, x, state):
        ours = vsa_optax.value_and_grad_by_phase(loss, argnums)(params, x, scale=2.0, state=state)
        return ours, jax.value_and_grad(loss, argnums)(params, x, scale=2.0)

    return jax.jit(both)


@pytest.mark.parametrize("phase", [Phase.WARMUP, Phase.FULL, Phase.CORRECT])
@pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
def test_true_phases_equal_jax(phase, argnums):
    state = state_in(phase, params=(PARAMS, X))
    ours, jaxs = ours_and_jaxs(argnums)(PARAMS, X, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, jaxs)


def test_predict_gives_zeros_and_the_last_value():
    state = state_in(Phase.PREDICT, params=(PARAMS, X))
    value, grads = vsa_optax.value_and_grad_by_phase(loss, (0, 1))(PARAMS, X, state=state)
    assert value == 2.5
    jax.tree.map(lambda g, p: np.testing.assert_array_equal(g, np.zeros_like(p)), grads, (PARAMS, X))


def test_predict_before_any_value_gives_nan():
    state = OPT.init(PARAMS)
    state = state._replace(machine=state.machine._replace(phase=jnp.int32(Phase.PREDICT)))
    value, _ = vsa_optax.value_and_grad_by_phase(loss)(PARAMS, X, state=state)
    assert np.isnan(value)


def test_value_in_predict_runs_the_forward_pass():
    run = vsa_optax.value_and_grad_by_phase(loss, value_in_predict=True)
    value, grads = run(PARAMS, X, state=state_in(Phase.PREDICT))
    np.testing.assert_allclose(value, loss(PARAMS, X), rtol=1e-6)
    assert not np.asarray(grads["w"]).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_values_dtype_is_the_functions(dtype):
    run = jax.jit(vsa_optax.value_and_grad_by_phase(lambda p, x: loss(p, x).astype(dtype)))
    for phase in Phase:
        assert run(PARAMS, X, state=state_in(phase))[0].dtype == dtype


def counted_run(steps, **kwargs):
    """Trains, counting on the host the passes that really run."""
    counts = {"forward": 0, "backward": 0}

    def tick(name, _):
        counts[name] += 1

    @jax.custom_vjp
    def counted(params, x):
        jax.debug.callback(functools.partial(tick, "forward"), x[0, 0])
        return loss(params, x)

    def forward(params, x):
        jax.debug.callback(functools.partial(tick, "forward"), x[0, 0])
        return loss(params, x), (params, x)

    def backward(residuals, cotangent):
        jax.debug.callback(functools.partial(tick, "backward"), cotangent)
        return jax.vjp(loss, *residuals)[1](cotangent)

    counted.defvjp(forward, backward)

    @jax.jit
    def step(params, state):
        value, grads = vsa_optax.value_and_grad_by_phase(counted, **kwargs)(params, X, state=state)
        updates, state = OPT.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, OPT.init(PARAMS)
    for _ in range(steps):
        before = dict(counts)
        phase = Phase(int(state.machine.phase))
        params, state = jax.block_until_ready(step(params, state))
        jax.effects_barrier()
        assert counts["backward"] - before["backward"] == (phase != Phase.PREDICT)
    return counts, vsa_optax.phase_stats(state)


def test_the_passes_run_in_true_steps_only():
    counts, stats = counted_run(60)
    assert counts["backward"] == counts["forward"] == 60 - stats.predict_steps < 40


def test_value_in_predict_counts_a_forward_pass_each_step():
    counts, stats = counted_run(40, value_in_predict=True)
    assert counts["backward"] == 40 - stats.predict_steps
    assert counts["forward"] == 40


def loss_with_aux(params, x):
    prediction = x @ params["w"]
    return jnp.mean(prediction**2), {"mean": prediction.mean(), "n": jnp.int32(4)}


AUX = {"mean": jnp.float32(-7.0), "n": jnp.int32(9)}


def test_aux_in_predict():
    run = jax.jit(vsa_optax.value_and_grad_by_phase(loss_with_aux, has_aux=True))
    (_, aux), _ = run(PARAMS, X, state=state_in(Phase.PREDICT), aux_in_predict=AUX)
    assert (aux["mean"], aux["n"]) == (-7.0, 9)
    (_, aux), _ = run(PARAMS, X, state=state_in(Phase.FULL), aux_in_predict=AUX)
    assert (aux["mean"] > 0, aux["n"]) == (True, 4)


def test_aux_of_a_forward_pass():
    run = vsa_optax.value_and_grad_by_phase(loss_with_aux, has_aux=True, value_in_predict=True)
    (value, aux), _ = run(PARAMS, X, state=state_in(Phase.PREDICT))
    expected, expected_aux = loss_with_aux(PARAMS, X)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(aux["mean"], expected_aux["mean"], rtol=1e-6)


def test_aux_is_never_made_up():
    run = vsa_optax.value_and_grad_by_phase(loss_with_aux, has_aux=True)
    with pytest.raises(ValueError, match=r"value_in_predict=True, or aux_in_predict=.*got neither"):
        run(PARAMS, X, state=OPT.init(PARAMS))


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        ({"mean": jnp.float32(0)}, "structure of aux"),
        (
            {"mean": jnp.zeros(2), "n": jnp.int32(0)},
            r"aux_in_predict\['mean'\] must have shape \(\).*got shape \(2,\)",
        ),
        ({"mean": jnp.float32(0), "n": jnp.float32(0)}, r"aux_in_predict\['n'\].*int32.*float32"),
    ],
)
def test_aux_in_predict_must_match(aux, message):
    run = vsa_optax.value_and_grad_by_phase(loss_with_aux, has_aux=True)
    with pytest.raises(ValueError, match=message):
        run(PARAMS, X, state=OPT.init(PARAMS), aux_in_predict=aux)


def test_aux_that_is_no_array():
    run = vsa_optax.value_and_grad_by_phase(lambda p, x: (loss(p, x), {"name": "text"}), has_aux=True)
    with pytest.raises(TypeError, match=r"aux must be made of arrays.*\['name'\] is a str"):
        run(PARAMS, X, state=OPT.init(PARAMS), aux_in_predict={"name": 0})


def test_a_state_without_a_machine():
    with pytest.raises(ValueError, match="expected one phase machine"):
        vsa_optax.value_and_grad_by_phase(loss)(PARAMS, X, state=optax.adam(0.1).init(PARAMS))


def test_static_arguments_pass_through():
    run = vsa_optax.value_and_grad_by_phase(lambda p, x, power: jnp.sum(p["w"] ** len(power)))
    value, _ = run(PARAMS, X, "ab", state=OPT.init(PARAMS))
    assert value == 14.0


def test_vmap_runs_both_sides():
    states = jax.tree.map(lambda *x: np.stack(x), state_in(Phase.FULL), state_in(Phase.PREDICT))
    values, grads = jax.jit(jax.vmap(lambda s: vsa_optax.value_and_grad_by_phase(loss)(PARAMS, X, state=s)))(states)
    np.testing.assert_allclose(values, [loss(PARAMS, X), 2.5], rtol=1e-6)
    assert np.asarray(grads["w"][0]).any()
    assert not np.asarray(grads["w"][1]).any()
    emitted, _ = jax.jit(jax.vmap(lambda g, s: OPT.update(g, s, PARAMS, value=1.0)))(grads, states)
    update = jax.jit(OPT.update)
    for i, phase in enumerate((Phase.FULL, Phase.PREDICT)):
        alone, _ = update(jax.tree.map(lambda g, i=i: g[i], grads), state_in(phase), PARAMS)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), emitted, alone)


def test_a_forgotten_state_is_asked_for():
    run = vsa_optax.value_and_grad_by_phase(loss)
    with pytest.raises(TypeError, match=r"needs state=opt_state \(keyword only\).*there is none"):
        run(PARAMS, X)
    with pytest.raises(TypeError, match=r"needs state=opt_state \(keyword only\).*argument 2 holds it"):
        run(PARAMS, X, OPT.init(PARAMS))


def test_a_functions_own_argument_of_that_name():
    def stateful(params, x, state=0.0, *, aux_in_predict=None):
        return loss(params, x) + state

    opt_state = OPT.init(PARAMS)
    bound = functools.partial(stateful, aux_in_predict=())
    with pytest.raises(TypeError, match=r"fun has an argument 'state' of its own.*by position"):
        vsa_optax.value_and_grad_by_phase(bound)(PARAMS, X, state=opt_state)
    with pytest.raises(TypeError, match="fun has an argument 'aux_in_predict' of its own"):
        vsa_optax.value_and_grad_by_phase(stateful)(PARAMS, X, 1.0, state=opt_state)
    value, _ = vsa_optax.value_and_grad_by_phase(bound)(PARAMS, X, 1.0, state=opt_state)
    np.testing.assert_allclose(value, loss(PARAMS, X) + 1, rtol=1e-6)


@pytest.mark.parametrize("opt", [OPT, NEVER], ids=["predicts", "never predicts"])
def test_an_aux_without_arrays_needs_no_stand_in(opt):
    for aux in (None, {"empty": ()}):
        run = vsa_optax.value_and_grad_by_phase(lambda p, x, aux=aux: (loss(p, x), aux), has_aux=True)

        @jax.jit
        def auxes(state, run=run, aux=aux):
            given = run(PARAMS, X, state=state, aux_in_predict=aux)
            return run(PARAMS, X, state=state)[0][1], given[0][1]

        for phase in (Phase.FULL, Phase.PREDICT):
            state = opt.init(PARAMS)
            state = state._replace(machine=state.machine._replace(phase=jnp.int32(phase)))
            assert auxes(state) == (aux, aux)


def test_integer_leaves_by_allow_int():
    params = {"w": jnp.arange(1.0, 4.0), "n": jnp.arange(2)}

    def counted(params):
        return jnp.sum(params["w"] ** 2) * params["n"].sum()

    state = state_in(Phase.PREDICT, params={"w": params["w"]})
    ours = jax.jit(vsa_optax.value_and_grad_by_phase(counted, allow_int=True))(params, state=state)
    assert (ours[0], ours[1]["n"].dtype, ours[1]["w"].any()) == (2.5, jax.dtypes.float0, False)
    with pytest.raises(TypeError, match="int32"):
        vsa_optax.value_and_grad_by_phase(counted)(params, state=state)


def test_a_model_with_functions_among_its_leaves():
    """As Equinox's have: the message says how its users take the arrays alone."""
    model = {"w": PARAMS["w"], "activation": jnp.tanh}
    run = vsa_optax.value_and_grad_by_phase(lambda x, m: jnp.sum(m["w"] * x), 1)
    with pytest.raises(TypeError, match=r"argument 1, .*\['activation'\] is a .*eqx\.partition.*eqx\.combine"):
        run(2.0, model, state=OPT.init(PARAMS["w"]))
    run = vsa_optax.value_and_grad_by_phase(lambda x, m: jnp.sum(m["activation"](m["w"] * x)))
    assert np.isfinite(run(2.0, model, state=OPT.init(2.0))[0])


@pytest.mark.parametrize("name", FOLLOWING)
def test_what_follows_the_loss_needs_measured_ones(name):
    state = FOLLOWING[name].init(PARAMS)
    with pytest.raises(ValueError, match=r"follows the loss \((ReduceLROnPlateau|Momo)State\).*value_in_predict=True"):
        vsa_optax.value_and_grad_by_phase(loss)(PARAMS, X, state=state)
    jax.eval_shape(lambda: vsa_optax.value_and_grad_by_phase(loss, value_in_predict=True)(PARAMS, X, state=state))


@pytest.mark.parametrize("name", NOT_FOLLOWING)
def test_what_runs_in_true_steps_only_may_follow_the_loss(name):
    opt = NOT_FOLLOWING[name]

    def step(state):
        value, grads = vsa_optax.value_and_grad_by_phase(loss)(PARAMS, X, state=state)
        return opt.update(grads, state, PARAMS, value=value)

    jax.eval_shape(step, opt.init(PARAMS))


def test_what_a_line_feeds_with_gradients_must_not_follow_a_repeated_loss():
    """Which domain a line has is known to the update alone."""

    def step(state, value_in_predict):
        run = vsa_optax.value_and_grad_by_phase(loss, value_in_predict=value_in_predict)
        value, grads = run(PARAMS, X, state=state)
        return LINE_OF_GRADIENTS.update(grads, state, PARAMS, value=value)

    state = LINE_OF_GRADIENTS.init(PARAMS)
    jax.eval_shape(functools.partial(step, value_in_predict=True), state)
    with pytest.raises(ValueError, match="follows the loss"):
        jax.eval_shape(functools.partial(step, value_in_predict=False), state)


def test_a_scaled_loss_is_not_scaled_anew_in_each_predicted_step():
    """If the value is divided by the scale outside, as by a DynamicScale, PREDICT's value is wrong but constant."""
    state, values = state_in(Phase.PREDICT), []

    @jax.jit
    def step(state):
        value, grads = vsa_optax.value_and_grad_by_phase(lambda p, x: 8.0 * loss(p, x))(PARAMS, X, state=state)
        return value, OPT.update(grads, state, PARAMS, value=value / 8)[1]

    for _ in range(3):
        value, state = step(state)
        values.append(float(value) / 8)
        state = state._replace(machine=state.machine._replace(phase=jnp.int32(Phase.PREDICT)))
    assert values == [2.5 / 8] * 3


def test_a_coded_history_tells_how_many_leaves_it_covers():
    params = {"w": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "b": jnp.ones(4)}
    state = CODED_BACKBONE.init(params)

    def whole(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    with pytest.raises(ValueError, match=r"does not cover \(some leaves\)"):
        vsa_optax.value_and_grad_by_phase(whole)(params, state=state)
    jax.eval_shape(lambda: vsa_optax.value_and_grad_by_phase(whole)(params["w"], state=state))


def test_another_shape_on_the_way_to_the_machine_is_no_gap():
    state = optax.flatten(OPT).init(PARAMS)
    jax.eval_shape(lambda: vsa_optax.value_and_grad_by_phase(loss)(PARAMS, X, state=state))
