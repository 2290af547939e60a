"""The programs of `jit_by_phase` beside the single one: phases, parameters, what is compiled, when the host waits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from samples import draw

import vsa_optax
from vsa_optax import AdaptiveCycle, Cycle, LegacyCycle, Momentum, QualityCycle, Recursive, Secants, TritCodec, Window
from vsa_optax import step_programs as module
from vsa_optax.core.kinds import StepKind
from vsa_optax.prediction import step as step_module
from vsa_optax.prediction.stats import find_machine

INPUTS, TARGETS = draw(0, 32, 6), np.sin(np.arange(32.0, dtype=np.float32))
PARAMS = {"b": np.zeros(8, np.float32), "v": 0.3 * draw(1, 8), "w": 0.3 * draw(2, 6, 8)}
STEPS, BROKEN = 80, (3, 20, 41)
WINDOW = Window(calibrate=False, residual_decay=0.9)
OF_MACHINES = StepKind.PLAIN, StepKind.RECORDED, StepKind.WATCHED, StepKind.PREDICTED


def loss(params):
    return jnp.mean((jnp.tanh(INPUTS @ params["w"] + params["b"][None]) @ params["v"] - TARGETS) ** 2)


def step_of(opt):
    def step(params, state, factor):
        value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
        grads = jax.tree.map(lambda g: factor * g, grads)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    return step


def switched(**settings):
    return vsa_optax.phase_switched(optax.adam(1.0), learning_rate=0.01, **settings)


def run(step, opt, steps=STEPS, broken=(), switch_every=None, other=None):
    """Phases, parameters and state; ``other`` takes the steps in between, if there is one."""
    params, phases = jax.tree.map(jnp.array, PARAMS), []
    state = opt.init(params)
    for count in range(steps):
        phases.append(int(find_machine(state).phase))
        taken = other if other is not None and count // switch_every % 2 else step
        params, state, _ = taken(params, state, jnp.float32(np.nan if count in broken else 1))
        if count in broken:
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
    return phases, params, state


def assert_close(actual, expected, atol=1e-4):
    """Leaf by leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, atol=atol)


SETTINGS = {
    "guarded window": {"predictor": Window()},
    "guarded secants": {"predictor": Secants(4)},
    "cycle": {"predictor": WINDOW, "phases": Cycle(correct_every=7)},
    "calibrated cycle": {"predictor": Window(), "phases": Cycle()},
    "adaptive": {"predictor": Recursive(), "phases": AdaptiveCycle()},
    "coded": {"predictor": Window(codec=TritCodec(3)), "phases": Cycle()},
    "legacy": {"predictor": Momentum(momentum=0.3, predicts="update"), "phases": LegacyCycle(full_steps=6)},
    "momentum of quality": {"predictor": Momentum(momentum=0.3), "phases": QualityCycle(most_error=0.1)},
    "guarded momentum": {"predictor": Momentum()},
    "none": {"phases": None},
}


@functools.cache
def compiled(name):
    """The transformation, its single program, and the one by kinds."""
    secants = name == "guarded secants"
    opt = vsa_optax.phase_switched(optax.adam(0.01), **SETTINGS[name]) if secants else switched(**SETTINGS[name])
    return opt, jax.jit(step_of(opt)), vsa_optax.jit_by_phase(step_of(opt))


def anew(by_phase):
    """The same programs, of a host that knows nothing yet."""
    other = vsa_optax.jit_by_phase(by_phase.__wrapped__)
    other.programs = by_phase.programs
    return other


@functools.cache
def run_of_single(name, steps=STEPS, broken=()):
    opt, single, _ = compiled(name)
    return run(single, opt, steps, broken)


@pytest.mark.parametrize("broken", [(), BROKEN], ids=["finite", "broken"])
@pytest.mark.parametrize("name", SETTINGS)
def test_phases_and_parameters_are_those_of_the_single_program(name, broken):
    opt, _, by_phase = compiled(name)
    if name == "none":  # Nothing stands between the optimizer and what it is given.
        broken = ()
    steps = 60 if name == "guarded secants" else STEPS  # Rounding grows after 60 steps.
    expected, phases = run_of_single(name, steps, broken), run(by_phase, opt, steps, broken)
    assert phases[0] == expected[0]
    assert_close(phases[1], expected[1], atol=2e-3)
    stats, wanted = vsa_optax.phase_stats(phases[2]), vsa_optax.phase_stats(expected[2])
    assert (stats.nonfinite_count, stats.predict_steps) == (wanted.nonfinite_count, wanted.predict_steps)
    assert stats.nonfinite_count == len([count for count in broken if phases[0][count] != vsa_optax.Phase.PREDICT])
    assert (stats.predict_steps > 0) == (name != "none")
    # Each kind of step that came is compiled once.
    assert {program._cache_size() for program in by_phase.programs.values()} <= {0, 1}
    assert by_phase.programs[StepKind.PREDICTED]._cache_size() == (name != "none")


@pytest.mark.parametrize(
    ("name", "cheap"), [("guarded window", 1 << 26), ("guarded secants", 0), ("coded", 0), ("legacy", 0)]
)
def test_branches_do_what_loops_do(name, cheap, monkeypatch):
    """On a GPU the single program has conditionals, and writes records of large histories outside them."""
    steps = 60 if name == "guarded secants" else STEPS
    expected = run_of_single(name, steps, BROKEN)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(step_module, "_CHEAP_TO_COPY", cheap)
    opt = compiled(name)[0]
    single = jax.jit(step_of(opt), donate_argnums=(0, 1))
    phases, params, state = run(single, opt, steps, BROKEN)
    assert phases == expected[0]
    assert_close(params, expected[1], atol=2e-3)
    assert_close(vsa_optax.phase_stats(state), vsa_optax.phase_stats(expected[2]), atol=2e-2)
    if name == "guarded secants":
        text = single.lower(params, state, jnp.float32(1)).compile().as_text()
        loops = re.findall(r' while\(.*op_name="([^"]*)"', text)
        assert all("solve" in loop for loop in loops), loops
        results = re.findall(r"= (.*) conditional\(", text)
        assert results
        assert "[4,6,8]" not in "".join(results)  # A conditional that returned the records would copy them.


@pytest.mark.parametrize("name", ["guarded window", "cycle"])
def test_a_state_goes_back_and_forth_between_both(name):
    opt, single, by_phase = compiled(name)
    expected = run_of_single(name)
    for every in (1, 7):
        phases, params, _ = run(by_phase, opt, switch_every=every, other=single)
        assert phases == expected[0]
        assert_close(params, expected[1])


def test_two_runs_take_turns():
    """A step is chosen by the state that it is given."""
    opt, _, by_phase = compiled("cycle")
    params = jax.tree.map(jnp.array, PARAMS)
    carries = [(params, opt.init(params)), (params, opt.init(params))]
    for count in range(60):
        which = int(count % 3 == 1)
        carries[which] = by_phase(*carries[which], jnp.float32(1))[:2]
    for (params, state), steps in zip(carries, (40, 20), strict=True):
        _, expected, after = run_of_single("cycle", steps)
        assert_close((params, state.history), (expected, after.history))


@pytest.mark.parametrize("name", ["guarded window", "guarded secants", "cycle", "coded", "legacy"])
def test_a_program_decides_nothing_and_copies_no_record(name):
    """The only loops are those of a product or of a small solve; donated memory is reused."""
    opt, _, _ = compiled(name)
    by_phase = vsa_optax.jit_by_phase(step_of(opt), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, PARAMS)
    state = opt.init(params)
    for kind in OF_MACHINES:
        if name == "guarded secants" and kind is StepKind.RECORDED:
            continue
        program = by_phase.programs[kind].lower(params, state, jnp.float32(1)).compile()
        text = program.as_text()
        assert " conditional(" not in text
        loops = re.findall(r' while\(.*op_name="([^"]*)"', text)
        assert all("solve" in loop or "codec" in loop or "scan" in loop for loop in loops), loops
        if name != "legacy":  # Its correction is formed where it is used, after the record is written.
            copied = re.findall(r"= \w+\[(\d+),6,8\]\S* copy\(", text)
            assert not [records for records in map(int, copied) if records > 1]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
        assert program.memory_analysis().alias_size_in_bytes >= 0.9 * size


def test_donated_arrays_are_used_again():
    opt, _, _ = compiled("cycle")
    by_phase = vsa_optax.jit_by_phase(step_of(opt), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, PARAMS)
    state = opt.init(params)
    for _ in range(30):
        given = jax.tree.leaves((params, state))
        params, state, _ = by_phase(params, state, jnp.float32(1))
        assert all(leaf.is_deleted() for leaf in given)


@pytest.mark.parametrize("lag", [1, 5])
@pytest.mark.parametrize(
    ("name", "most"), [("cycle", 20), ("calibrated cycle", 25), ("guarded window", 60), ("none", 0)]
)
def test_the_host_waits_only_where_the_coming_kind_is_open(name, most, lag, monkeypatch):
    """On a device that has not done the last few steps, unless it is waited for."""
    opt, _, by_phase = compiled(name)
    by_phase = anew(by_phase)

    def is_ready(forecast):
        return all(forecast is not late for late, _ in by_phase._forecasts[-lag:])

    monkeypatch.setattr(module, "_is_ready", is_ready)
    expected, found = run_of_single(name), run(by_phase, opt)
    assert by_phase.num_waits <= most
    assert found[0] == expected[0]
    assert_close(found[1], expected[1])


def test_asleep_it_does_not_wait(monkeypatch):
    opt, _, by_phase = compiled("guarded window")
    by_phase = anew(by_phase)
    monkeypatch.setattr(module, "_is_ready", lambda x: False)
    params = jax.tree.map(jnp.array, PARAMS)
    state = opt.init(params)
    machine = state.machine.unpacked()
    machine = machine._replace(
        phase=jnp.int32(vsa_optax.Phase.FULL), guard=machine.guard._replace(asleep=jnp.int32(50))
    )
    state = state._replace(machine=machine.packed())
    for _ in range(51):
        params, state, _ = by_phase(params, state, jnp.float32(1))
    assert by_phase.num_waits == 0
    assert by_phase.programs[StepKind.PLAIN]._cache_size() == by_phase.programs[StepKind.WATCHED]._cache_size() == 1
    assert state.machine.unpacked().guard.asleep == 0


def test_a_second_update_in_one_step_is_decided_on_the_device():
    """The known kind of the first step does not apply to the next."""
    opt, _, _ = compiled("cycle")

    def two(params, state, factor):
        for _ in range(2):
            params, state, value = step_of(opt)(params, state, factor)
        return params, state, value

    by_phase = vsa_optax.jit_by_phase(two)
    params = jax.tree.map(jnp.array, PARAMS)
    state = opt.init(params)
    for _ in range(STEPS // 2):
        params, state, _ = by_phase(params, state, jnp.float32(1))
    assert_close(params, run_of_single("cycle")[1])


def test_inside_shard_map_and_loops_it_is_decided_on_the_device():
    opt, _, _ = compiled("cycle")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(step_of(opt), mesh=mesh, in_specs=P(), out_specs=P())

    def scanned(params, state, factor):
        def body(carry, _):
            params, state, value = step_of(opt)(*carry, factor)
            return (params, state), value

        carry, values = jax.lax.scan(body, (params, state), None, length=1)
        return *carry, values[0]

    expected = run_of_single("cycle", 40)
    for step in (mapped, scanned):
        found = run(vsa_optax.jit_by_phase(step), opt, 40)
        assert found[0] == expected[0]
        assert_close(found[1], expected[1])


def test_containers_and_keywords_may_hold_the_state():
    opt, _, _ = compiled("cycle")

    @vsa_optax.jit_by_phase
    def step(*, carry):
        params, state, _ = step_of(opt)(carry["params"], carry["state"], jnp.float32(1))
        return {"params": params, "state": state}

    params = jax.tree.map(jnp.array, PARAMS)
    carry = {"params": params, "state": opt.init(params)}
    for _ in range(40):
        carry = step(carry=carry)
    assert_close(carry["params"], run_of_single("cycle", 40)[1])


def test_an_optimizer_of_flax_may_hold_the_state():
    """Its arrays are wrapped."""
    opt = switched(**SETTINGS["cycle"])
    graph, params = nnx.split(nnx.Linear(6, 1, rngs=nnx.Rngs(0)))

    def step(optimizer, params):
        def loss(params):
            return jnp.mean((nnx.merge(graph, params)(INPUTS)[:, 0] - TARGETS) ** 2)

        value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=optimizer.opt_state)
        model = nnx.merge(graph, params, copy=True)
        optimizer.update(model, grads, value=value)
        return optimizer, nnx.state(model, nnx.Param)

    phases = []
    for jit in (jax.jit, vsa_optax.jit_by_phase):
        carry, seen = (nnx.Optimizer(nnx.merge(graph, params), opt, wrt=nnx.Param), params), []
        compiled_step = jit(step)
        for _ in range(30):
            seen.append(int(vsa_optax.phase_stats(carry[0].opt_state).phase))
            carry = compiled_step(*carry)
        phases.append(seen)
    assert phases[0] == phases[1]
    text = compiled_step.programs[StepKind.PREDICTED].lower(*carry).compile().as_text()
    assert not re.search(r" (while|conditional)\(", text)


def test_a_state_that_is_changed_or_does_not_come_back_is_read_anew():
    """The forecast is not of a state with another phase."""
    opt, single, _ = compiled("cycle")
    params = jax.tree.map(jnp.array, PARAMS)
    state = opt.init(params)
    only_params = vsa_optax.jit_by_phase(lambda *args: step_of(opt)(*args)[0])
    for _ in range(3):
        assert_close(only_params(params, state, jnp.float32(1)), single(params, state, jnp.float32(1))[0])

    def restarted(params, state, factor):
        params, after, value = step_of(opt)(params, state, factor)
        machine = after.machine.unpacked()
        is_predict = machine.phase == vsa_optax.Phase.PREDICT
        phase = jnp.where(is_predict & (machine.steps_in_phase == 3), vsa_optax.Phase.FULL, machine.phase)
        return params, after._replace(machine=machine._replace(phase=phase).packed()), value

    expected, found = (run(jit(restarted), opt, 60) for jit in (jax.jit, vsa_optax.jit_by_phase))
    assert found[0] == expected[0] != run_of_single("cycle", 60)[0]
    assert_close(found[1], expected[1])


def test_a_container_that_is_changed_in_place_is_looked_into():
    opt, _, _ = compiled("cycle")

    @vsa_optax.jit_by_phase
    def step(carry):
        params, state, _ = step_of(opt)(carry["params"], carry["state"], jnp.float32(1))
        return {"params": params, "state": state}

    params = jax.tree.map(jnp.array, PARAMS)
    carry = {"params": params, "state": opt.init(params)}
    for count in range(47):
        if count == 17:  # In PREDICT.
            carry |= {"params": params, "state": opt.init(params)}
        carry = step(carry)
    assert_close(carry["params"], run_of_single("cycle", 30)[1])


def test_a_step_that_fails_can_be_taken_again():
    opt, _, _ = compiled("cycle")

    def step(params, state, factor, fails):
        if fails:
            raise RuntimeError
        return step_of(opt)(params, state, factor)

    by_phase = vsa_optax.jit_by_phase(step, static_argnums=3)
    params = jax.tree.map(jnp.array, PARAMS)
    state = opt.init(params)
    for _ in range(40):
        with pytest.raises(RuntimeError):
            by_phase(params, state, jnp.float32(1), True)
        params, state, _ = by_phase(params, state, jnp.float32(1), False)
    assert_close(params, run_of_single("cycle", 40)[1])


def test_without_a_machine_it_is_refused():
    with pytest.raises(ValueError, match="expected one phase machine"):
        vsa_optax.jit_by_phase(lambda x: x)(jnp.ones(3))


def test_it_is_named_as_its_function():
    def train_step(params, state):
        """Does it."""

    by_phase = vsa_optax.jit_by_phase(train_step, donate_argnames="state")
    assert (by_phase.__name__, by_phase.__doc__) == ("train_step", "Does it.")


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        (0, [(StepKind.RECORDED, 3), (StepKind.PREDICTED, 4)]),
        (2, [(StepKind.RECORDED, 1), (StepKind.PREDICTED, 4)]),
        (3, [(StepKind.PREDICTED, 4)]),
        (5, [(StepKind.PREDICTED, 2)]),
        (7, []),
        (9, []),
    ],
)
def test_what_is_left_of_a_forecast(steps, left):
    runs = jnp.array([[StepKind.RECORDED, 3], [StepKind.PREDICTED, 4]])
    assert module._without(runs, steps) == left
