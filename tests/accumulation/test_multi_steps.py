"""Accumulation in trits: the windows of optax.MultiSteps, a mean within its documented error, and what it holds."""

import functools

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import samples
from samples import CHEAP, LARGE, relative_error

import vsa_optax
from vsa_optax import accumulate_ternary, ternary_accumulator, ternary_multi_steps

P = jax.sharding.PartitionSpec
# Relative squared error of the mean of 2, 8 and 32 gradients of pure noise, as documented.
DOCUMENTED = {1: (0.095, 0.40, 0.70), 2: (0.014, 0.085, 0.29), 3: (0.00174, 0.0117, 0.049)}


accumulator = functools.cache(accumulate_ternary)
by_adam = functools.cache(lambda k: ternary_multi_steps(optax.adam(0.1), k))


@functools.cache
def noise(num, shape=(4096,), seed=0, dtype="float32"):
    """The first of eight or more, which are drawn by one program."""
    return np.asarray(samples.noise(max(num, 8), shape, seed, jnp.dtype(dtype)))[:num]


@functools.cache
def compiled(update):
    return jax.jit(update, **CHEAP)


def emitted(opt, gradients, state=None):
    """The emitted updates at each step, stacked, and the last state."""
    state = opt.init(jax.tree.map(lambda g: g[0], gradients)) if state is None else state
    all_updates = []
    for i in range(len(jax.tree.leaves(gradients)[0])):
        gradient = jax.tree.map(lambda g, i=i: g[i], gradients)
        updates, state = compiled(opt.update)(gradient, state, gradient)
        all_updates.append(updates)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *all_updates), state


@pytest.mark.parametrize("trits", [1, 2, 3])
def test_the_mean_is_within_the_documented_error(trits):
    lengths = (2, 8, 32)
    gradients = noise(sum(lengths), (LARGE,))
    updates, _ = emitted(accumulate_ternary(lambda step: jnp.array(lengths)[step], trits=trits), gradients)
    ends = np.cumsum(lengths)
    for k, end, documented in zip(lengths, ends, DOCUMENTED[trits], strict=True):
        error = relative_error(updates[end - 1], gradients[end - k : end].mean(axis=0))
        assert error == pytest.approx(documented, rel=0.04), k


def test_gradients_that_agree_lose_less():
    gradients = 3 * noise(1)[0] + noise(8, seed=1)
    updates, _ = emitted(accumulator(8), gradients)
    assert relative_error(updates[-1], gradients.mean(axis=0)) < 0.6 * DOCUMENTED[2][1]


def test_stochastic_rounding_is_worse_as_documented():
    gradients = noise(8, (3 * 5 * 1024,))
    for trits, worse in ((1, 27), (2, 6), (3, 4)):
        updates, _ = emitted(accumulate_ternary(8, trits=trits, rounding="stochastic"), gradients)
        error = relative_error(updates[-1], gradients.mean(axis=0))
        assert error == pytest.approx(worse * DOCUMENTED[trits][1], rel=0.15)


def test_between_emissions_exact_zeros_leave():
    gradients = {"w": noise(9, (40, 50)), "b": noise(9, (3,))}
    updates, state = emitted(accumulate_ternary(3), gradients)
    for leaf in jax.tree.leaves(updates):
        quiet = np.delete(leaf, [2, 5, 8], axis=0)
        assert not quiet.any()
        assert leaf[[2, 5, 8]].any(axis=tuple(range(1, leaf.ndim))).all()
    assert (int(state.mini_step), int(state.gradient_step), int(state.nonfinite_count)) == (0, 3, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_one_micro_batch_passes_through_exactly(dtype):
    gradients = {"w": noise(2, dtype=dtype), "b": noise(2, (3,), dtype=dtype), "s": noise(2, (), dtype=dtype)}
    updates, _ = emitted(accumulate_ternary(1), gradients)
    for name, gradient in gradients.items():
        assert updates[name].dtype == gradient.dtype
        np.testing.assert_array_equal(updates[name], gradient)


def test_the_sum_is_k_means():
    gradients = noise(4)
    mean, _ = emitted(accumulator(4), gradients)
    total, _ = emitted(accumulate_ternary(4, use_grad_mean=False), gradients)
    np.testing.assert_allclose(total, 4 * mean, rtol=1e-6)


def test_a_micro_batch_that_is_not_finite_is_left_out_and_counted():
    gradients = noise(5)
    opt = accumulator(4)
    spoiled = np.concatenate([gradients, gradients[1:2]])
    spoiled[1, 7], spoiled[3, 0] = np.nan, np.inf
    with_bad, state = emitted(opt, spoiled)
    without, _ = emitted(opt, gradients[[0, 2, 4, 1]])
    np.testing.assert_array_equal(with_bad[-1], without[-1])
    assert not with_bad[:-1].any()
    assert int(state.nonfinite_count) == 2
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(state))


def test_a_gradient_that_would_overflow_is_left_out():
    gradients = noise(3)
    opt = accumulator(3)
    too_large = gradients.copy()
    too_large[1, 7] = 3e38
    _, state = emitted(opt, too_large)
    assert (int(state.nonfinite_count), int(state.mini_step)) == (1, 2)
    updates, state = emitted(opt, np.float32(1e33) * gradients)
    assert (int(state.nonfinite_count), int(state.mini_step)) == (0, 0)
    assert relative_error(updates[-1] / 1e33, gradients.mean(axis=0)) < 0.05


def test_state_bytes_are_as_documented():
    for trits, bits in ((1, 1.62), (2, 3.22), (3, 4.82)):
        state = accumulate_ternary(3, trits=trits).init(jnp.zeros((1000, 1024)))
        assert sum(x.nbytes for x in jax.tree.leaves(state)) - 12 == pytest.approx(bits / 8 * 1.024e6, rel=0.003)
    small = accumulate_ternary(3).init(jnp.zeros(100, jnp.bfloat16))
    assert sum(x.nbytes for x in jax.tree.leaves(small)) == 400 + 12


def schedule(step):
    return jnp.where(step < 2, 2, 3)


SKIP = functools.partial(optax.skip_large_updates, max_squared_norm=30.0)


@pytest.mark.parametrize(
    ("k", "use_grad_mean", "skip"),
    [(1, True, SKIP), (3, True, None), (3, False, SKIP), (schedule, True, None), (schedule, False, SKIP)],
    ids=["one, skip large", "three", "sum of three, skip large", "changing", "sum of changing, skip large"],
)
def test_windows_are_those_of_multi_steps(k, use_grad_mean, skip):
    """With leaves smaller than a block nothing is coded, so the result is that of optax.MultiSteps."""
    gradients = {"w": noise(14, (3, 5)), "b": noise(14, (2,), seed=1)}
    gradients = jax.tree.map(np.array, gradients)
    for gradient in gradients.values():
        gradient[[3, 8]] *= 10
    params = jax.tree.map(lambda g: g[0].copy(), gradients)
    ours = ternary_multi_steps(optax.adamw(0.1), k, use_grad_mean, skip)
    theirs = optax.MultiSteps(optax.adamw(0.1), k, use_grad_mean, skip)
    state, their_state = ours.init(params), theirs.init(params)
    step, their_step = jax.jit(ours.update, **CHEAP), jax.jit(theirs.update, **CHEAP)
    for i in range(14):
        gradient = jax.tree.map(lambda g, i=i: g[i], gradients)
        updates, state = step(gradient, state, params)
        their_updates, their_state = their_step(gradient, their_state, params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), updates, their_updates)
        assert int(state.mini_step) == int(their_state.mini_step)
        assert int(state.gradient_step) == int(their_state.gradient_step)
        assert bool(ours.has_updated(state)) == bool(theirs.has_updated(their_state))
        assert jax.tree.map(float, state.skip_state) == jax.tree.map(float, their_state.skip_state)


def test_the_inner_optimizer_gets_the_mean_and_runs_on_emissions_only():
    gradients = noise(6)
    means, _ = emitted(accumulator(3), gradients)
    updates, state = emitted(by_adam(3), gradients)
    opt, inner = optax.adam(0.1), optax.adam(0.1).init(gradients[0])
    for step in (2, 5):
        expected, inner = compiled(opt.update)(means[step], inner)
        np.testing.assert_allclose(updates[step], expected, rtol=1e-5, atol=1e-7)
    assert int(state.inner_opt_state[0].count) == 2
    assert not updates[[0, 1, 3, 4]].any()


def test_extra_arguments_reach_the_inner_optimizer():
    inner = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros([]), lambda u, s, p=None, *, value, note=None: (u, s + value + (note == "static"))
    )
    opt = ternary_multi_steps(inner, 2)
    state, update = opt.init(jnp.zeros(3)), jax.jit(functools.partial(opt.update, note="static"), **CHEAP)
    for value in (5.0, 7.0, 100.0):
        _, state = update(jnp.ones(3), state, value=jnp.float32(value))
    assert float(state.inner_opt_state) == 8.0


def test_phases_inside_skip_all_micro_batches_of_a_predicted_step():
    phases = blind.phase_switched(
        optax.sgd(0.1), warmup_steps=2, full_steps=1, predict_steps=2, correct_every=2, length=2
    )
    opt = ternary_multi_steps(phases, 2)
    params = jnp.full(2048, 1.0)

    @functools.partial(jax.jit, **CHEAP)
    def step(params, state):
        needs = vsa_optax.needs_backward(state)
        updates, state = opt.update(jnp.where(needs, params, 0), state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state, needs

    state, needs = opt.init(params), []
    for _ in range(14):
        params, state, needed = step(params, state)
        needs.append(bool(needed))
    stats = vsa_optax.phase_stats(state)
    assert int(stats.total_steps) == 7
    # WARMUP, WARMUP, FULL, PREDICT, PREDICT, CORRECT, FULL, of two micro-batches each.
    assert needs == [True] * 6 + [False] * 4 + [True] * 4
    assert int(stats.predict_steps) == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_state_types_do_not_change(dtype):
    params = {"w": jnp.ones(2000, dtype), "s": jnp.ones([], dtype), "e": jnp.ones((0, 3), dtype)}
    opt = ternary_multi_steps(optax.sgd(0.1, momentum=0.9), 2)

    def step(state):
        return jax.lax.cond(state.mini_step == 0, lambda s: opt.update(params, s, params)[1], lambda s: s, state)

    state = opt.init(params)
    after = jax.eval_shape(step, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    updates, _ = jax.eval_shape(opt.update, params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_float64_is_summed_in_float64_where_it_is_not_coded():
    with jax.enable_x64(True):
        gradients = {"small": noise(3, (5,)).astype(jnp.float64) / 3, "large": noise(3, (2048,)).astype(jnp.float64)}
        opt = ternary_multi_steps(optax.sgd(1.0), 3)
        updates, state = emitted(opt, gradients)
        assert state.acc_grads["small"].values.dtype == jnp.float64
        np.testing.assert_allclose(updates["small"][-1], -gradients["small"].mean(axis=0), rtol=1e-14)
        assert updates["large"].dtype == jnp.float64
        assert relative_error(updates["large"][-1], -gradients["large"].mean(axis=0)) < 0.1


@pytest.mark.parametrize(("param_dtype", "gradient_dtype"), [("bfloat16", "float32"), ("float32", "float64")])
@pytest.mark.parametrize("inner", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)], ids=["adam", "momentum"])
def test_gradients_may_be_wider_than_parameters(param_dtype, gradient_dtype, inner):
    """In a scan, too, as with optax.MultiSteps: the optimizer's state keeps its dtypes."""
    with jax.enable_x64(gradient_dtype == "float64"):
        params, gradients = jnp.ones(5, param_dtype), noise(4, (5,)).astype(gradient_dtype)

        def train(opt):
            def step(state, gradient):
                updates, state = opt.update(gradient, state, params)
                return state, updates

            return jax.jit(lambda state: jax.lax.scan(step, state, gradients), **CHEAP)(opt.init(params))

        ours, theirs = train(ternary_multi_steps(inner, 2)), train(optax.MultiSteps(inner, 2))
        assert ours[1].dtype == theirs[1].dtype
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-2 if param_dtype == "bfloat16" else 1e-5)
        assert [x.dtype for x in jax.tree.leaves(ours[0].inner_opt_state)] == [
            x.dtype for x in jax.tree.leaves(theirs[0].inner_opt_state)
        ]


def test_the_swap_of_one_line_works_for_a_chain():
    """optax.MultiSteps is no transformation, and has to be made one."""
    ours, theirs = (
        optax.chain(steps(optax.sgd(0.1), 2).gradient_transformation())
        for steps in (ternary_multi_steps, optax.MultiSteps)
    )
    params = jnp.ones(3)
    mine, other = ours.init(params), theirs.init(params)
    for _ in range(2):
        (updates, mine), (wanted, other) = ours.update(params, mine, params), theirs.update(params, other, params)
        np.testing.assert_allclose(updates, wanted)
    assert ternary_multi_steps(optax.sgd(0.1), 2).gradient_transformation().has_updated(mine[0])


def test_updates_leave_in_the_dtype_that_the_inner_optimizer_emits():
    params = jnp.ones(2048, jnp.float32)
    opt = ternary_multi_steps(optax.adamw(0.1), 2)
    plain, state = optax.adamw(0.1), opt.init(params)
    gradient = params.astype(jnp.bfloat16)
    for _ in range(2):
        updates, state = compiled(opt.update)(gradient, state, params)
    expected, _ = plain.update(gradient, plain.init(params), params)
    assert updates.dtype == expected.dtype
    np.testing.assert_allclose(updates, expected, rtol=0.05)


def test_the_middle_of_a_window_survives_a_checkpoint(tmp_path):
    checkpoint = pytest.importorskip("vsa_optax.checkpoint")
    gradients = noise(6)
    opt = by_adam(3)
    whole, _ = emitted(opt, gradients)
    _, state = emitted(opt, gradients[:4])
    checkpoint.save(tmp_path / "run", 4, state)
    _, restored = checkpoint.restore(tmp_path / "run", template=opt.init(gradients[0]))
    rest, _ = emitted(opt, gradients[4:], restored)
    np.testing.assert_array_equal(rest, whole[4:])


BY_MOMENTUM = ternary_multi_steps(optax.sgd(0.1, momentum=0.9), 2)


@pytest.mark.parametrize("averaged", [True, False], ids=["replicated", "a sum on each device"])
def test_under_shard_map_with_replication_checked(averaged):
    num = 4
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:num]), ("data",))
    opt = BY_MOMENTUM
    gradients = noise(num, (2048,))
    layout = P() if averaged else P("data")

    def step(state, gradient):
        mine = jax.lax.pmean(gradient[0], "data") if averaged else gradient[0]
        state = state if averaged else jax.tree.map(lambda x: x[0], state)
        out = opt.update(mine, state, mine)
        return out if averaged else jax.tree.map(lambda x: x[None], out)

    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(layout, P("data")), out_specs=(layout, layout)), **CHEAP)
    alone = [gradients.mean(axis=0)] if averaged else list(gradients)
    theirs = [opt.init(gradient) for gradient in alone]
    state = theirs[0] if averaged else jax.tree.map(lambda *x: jnp.stack(x), *theirs)
    step_alone = compiled(opt.update)
    for _ in range(2):
        updates, state = run(state, gradients)
        both = [step_alone(gradient, s, gradient) for gradient, s in zip(alone, theirs, strict=True)]
        theirs = [s for _, s in both]
    expected = both[0][0] if averaged else jnp.stack([u for u, _ in both])
    np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-4)
    assert np.all(np.asarray(state.gradient_step) == 1)


def test_windows_have_rotations_of_their_own():
    gradients = np.tile(noise(2), (2, 1))
    opt = accumulator(2)
    updates, _ = emitted(opt, gradients)
    assert relative_error(updates[1], updates[3]) > 0.001
    again, _ = emitted(opt, gradients)
    np.testing.assert_array_equal(updates, again)
    other, _ = emitted(accumulate_ternary(2, seed=1), gradients)
    assert relative_error(updates[1], other[1]) > 0.001


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"every_k_schedule": 0}, "every_k_schedule must be an integer >= 1"),
        ({"trits": 4}, "trits must be 1, 2 or 3, got 4"),
        ({"rounding": "up"}, "rounding must be one of 'nearest', 'stochastic'"),
        ({"block_size": 100}, "block_size must be a power of two from 2 to 65536, got 100"),
        ({"use_grad_mean": 1}, "use_grad_mean must be True or False"),
        ({"seed": -1}, "seed must be an integer >= 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        accumulate_ternary(**({"every_k_schedule": 2} | arguments))
    with pytest.raises(ValueError, match=words):
        ternary_multi_steps(optax.sgd(0.1), **({"every_k_schedule": 2} | arguments))
    renamed = {"num_microbatches" if name == "every_k_schedule" else name: v for name, v in arguments.items()}
    with pytest.raises(ValueError, match=words.replace("every_k_schedule", "num_microbatches")):
        ternary_accumulator(**({"num_microbatches": 2} | renamed))


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match=r"opt must be an optax\.GradientTransformation"):
        ternary_multi_steps(3, 2)
    opt = ternary_multi_steps(optax.sgd(0.1), 2, should_skip_update_fn=lambda u, s, p: (jnp.zeros(2, bool), ()))
    with pytest.raises(ValueError, match="should_skip_update_fn must return one bool"):
        opt.init(jnp.ones(3))
    opt = ternary_multi_steps(optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match=r"leaf .* has shape"):
        opt.update(jnp.ones(4), opt.init(jnp.ones(3)))
    with pytest.raises(ValueError, match=r"is missing"):
        opt.update({"a": jnp.ones(2000)}, opt.init({"a": jnp.ones(2000), "b": jnp.ones(2000)}))
    with pytest.raises(ValueError, match="TernaryMultiStepsState"):
        opt.has_updated(())
    with pytest.raises(TypeError, match="int32"):
        accumulate_ternary(2).init(jnp.ones(3, jnp.int32))
    theirs = optax.MultiSteps(optax.sgd(0.1), 2).init(jnp.ones(3))
    for ours in (opt, accumulate_ternary(2)):
        with pytest.raises(ValueError, match=r"made by optax\.MultiSteps: start from opt\.init\(params\)"):
            ours.update(jnp.ones(3), theirs)
        with pytest.raises(ValueError, match=r"state must be of type .*State, got EmptyState: start from"):
            ours.update(jnp.ones(3), optax.EmptyState())


def test_what_cannot_be_injected_is_named():
    params, words = (
        jnp.ones(3),
        r"must be Python's own integer, .* inject only what opt takes: inject_hyperparams\(lambda",
    )
    for opt in (
        optax.inject_hyperparams(ternary_multi_steps)(optax.sgd(0.1), 2),
        optax.inject_hyperparams(accumulate_ternary)(2),
    ):
        with pytest.raises(ValueError, match=f"block_size {words}"):
            opt.init(params)
        with pytest.raises(ValueError, match=f"every_k_schedule {words}"):
            jax.eval_shape(opt.init, params)
    opt = optax.inject_hyperparams(lambda learning_rate: ternary_multi_steps(optax.sgd(learning_rate), 1))(0.5)
    np.testing.assert_allclose(opt.update(params, opt.init(params), params)[0], -0.5)
