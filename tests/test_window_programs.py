"""The programs of `jit_by_phase` for windows of micro-batches beside the single one: bits, programs, waits."""

import functools
import re

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from samples import AS_USERS_DO, CHEAP, draw

import vsa_optax
from vsa_optax import accumulate_ternary, step_programs, ternary_multi_steps
from vsa_optax.core.kinds import StepKind

ACCUMULATED, UNDECIDED = StepKind.ACCUMULATED, StepKind.UNDECIDED
PARAMS = {"b": np.zeros(7, np.float32), "w": 0.3 * draw(1, 48, 64)}
GRADIENTS = [jax.tree.map(lambda x, i=i: draw(2 + i, *x.shape), PARAMS) for i in range(16)]
BROKEN = {2: np.nan, 9: np.inf}  # The first makes a window longer, and the second comes where one should end.
LARGE = {2: 10.0, 9: 10.0}
by_adam = functools.partial(ternary_multi_steps, optax.adam(0.1))


def lengths(gradient_step):
    return jnp.array([3, 2, 4, 1, 5])[gradient_step % 5]


SETTINGS = {
    "one trit": lambda: by_adam(4, trits=1),
    "skips large": lambda: by_adam(3, False, functools.partial(optax.skip_large_updates, max_squared_norm=1e5)),
    "of changing length": lambda: by_adam(lengths, rounding="stochastic"),
    "of one": lambda: by_adam(1),
    "in a chain": lambda: optax.chain(accumulate_ternary(4), optax.scale(-0.1)),
}


def step_of(opt):
    def step(params, state, gradient):
        updates, state = opt.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step


@functools.cache
def compiled(name, options="CHEAP"):
    """The transformation, its single program, and the one by kinds."""
    opt, options = SETTINGS[name](), {"CHEAP": CHEAP, "AS_USERS_DO": AS_USERS_DO}[options]
    return opt, jax.jit(step_of(opt), **options), vsa_optax.jit_by_phase(step_of(opt), **options)


def anew(by_phase):
    """The same programs, of a host that knows nothing yet."""
    other = vsa_optax.jit_by_phase(by_phase.__wrapped__)
    other.programs = by_phase.programs
    return other


def start(opt):
    params = jax.tree.map(jnp.array, PARAMS)
    return params, opt.init(params)


def run(step_at, opt, factors=(), steps=16, carry=None):
    """Parameters, state and updates after each step; ``step_at(count)`` takes it."""
    carry, seen = start(opt) if carry is None else carry, []
    for count in range(steps):
        factor = np.float32(dict(factors).get(count, 1))
        *carry, updates = step_at(count)(*carry, jax.tree.map(lambda g, f=factor: f * g, GRADIENTS[count % 16]))
        seen.append((*carry, updates))
    return seen


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


@functools.cache
def of_single(name, factors=()):
    opt, single, _ = compiled(name)
    return run(lambda count: single, opt, factors)


def note_kinds(by_phase, monkeypatch):
    """The kinds that the host chooses from now on."""
    kinds, choose = [], by_phase._next_kind
    monkeypatch.setattr(by_phase, "_next_kind", lambda: kinds.append(choose()) or kinds[-1])
    return kinds


@pytest.mark.parametrize("factors", [{}, BROKEN, LARGE], ids=["finite", "broken", "large"])
@pytest.mark.parametrize("name", SETTINGS)
def test_each_micro_batch_has_the_bits_of_the_single_program(name, factors, monkeypatch):
    opt, _, by_phase = compiled(name)
    by_phase = anew(by_phase)
    kinds = note_kinds(by_phase, monkeypatch)
    expected = of_single(name, tuple(factors.items()))
    assert_same_bits(run(lambda count: by_phase, opt, factors), expected)
    assert set(kinds) == ({UNDECIDED} if name == "of one" else {ACCUMULATED, UNDECIDED})
    emitted = [bool(np.any(updates["w"])) for _, _, updates in expected]
    assert not any(emits and kind is ACCUMULATED for emits, kind in zip(emitted, kinds, strict=True))
    assert {program._cache_size() for program in by_phase.programs.values()} == {0, 1}


def test_compiled_as_users_do_the_bits_are_the_same_too():
    opt, single, by_phase = compiled("one trit", "AS_USERS_DO")
    assert_same_bits(run(lambda count: by_phase, opt, BROKEN, 9), run(lambda count: single, opt, BROKEN, 9))


@pytest.mark.parametrize(
    ("name", "factors", "kinds"),
    [
        ("one trit", {}, "U AAU AAAU AAAU AAAU"),
        ("one trit", {2: np.nan}, "U AAU U AAAU AAAU AAA"),
        # The host knows of a longer window only from its end.
        ("one trit", {1: np.nan, 2: np.nan}, "U AAU AU AAAU AAAU AA"),
        ("skips large", LARGE, "U AU U AAU AAU U AAU AA"),
        ("in a chain", {}, "U AAU AAAU AAAU AAAU"),
        # Where a window has one micro-batch, the host asks for K again after 32.
        ("of changing length", {}, "U AU AU AAAU UUUUUUU"),
        ("of one", {}, "U UUUUUUUUUUUUUUU"),
    ],
)
def test_a_host_waits_once_in_a_window(name, factors, kinds, monkeypatch):
    """The host chooses the same if the device has done everything and if it is far behind; a space is a wait."""
    opt, _, by_phase = compiled(name)
    expected = of_single(name, tuple(factors.items()))
    for ready in (False, True):
        host = anew(by_phase)
        monkeypatch.setattr(step_programs, "_is_ready", lambda runs, ready=ready: ready)
        chosen = note_kinds(host, monkeypatch)
        assert_same_bits(run(lambda count, host=host: host, opt, factors), expected)
        assert "".join(kind.name[0] for kind in chosen) == kinds.replace(" ", "")
        assert host.num_waits == (0 if ready else kinds.count(" "))


def test_where_windows_have_one_micro_batch_the_length_is_asked_for_again(monkeypatch):
    opt = by_adam(lambda gradient_step: jnp.where(gradient_step < 3, 1, 4))
    by_phase = vsa_optax.jit_by_phase(step_of(opt), **CHEAP)
    monkeypatch.setattr(step_programs, "_is_ready", lambda runs: False)
    chosen = note_kinds(by_phase, monkeypatch)
    run(lambda count: by_phase, opt, steps=48)
    assert chosen[:33] == [UNDECIDED] * 33
    assert chosen[33:].count(ACCUMULATED) >= 9
    assert by_phase.num_waits <= 6


@pytest.mark.parametrize("name", ["one trit", "in a chain"])
def test_a_program_without_a_condition_never_emits(name):
    """If a host chose it by mistake, the micro-batch would be left out, and the window would stay open."""
    _, _, by_phase = compiled(name)
    params, state, _ = of_single(name)[2]
    (_, after, updates), _ = by_phase.programs[ACCUMULATED](params, state, GRADIENTS[3])
    assert_same_bits(after, state)
    assert not np.any(updates["w"])


@functools.cache
def text_of(name, kind):
    """The program for a CPU, compiled with donation."""
    by_phase = vsa_optax.jit_by_phase(step_of(SETTINGS[name]()), donate_argnums=(0, 1), **AS_USERS_DO)
    params, state = jax.eval_shape(lambda: start(SETTINGS[name]()))
    program = by_phase.programs[kind].lower(params, state, params).compile()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state)))
    assert program.memory_analysis().alias_size_in_bytes >= 0.9 * size
    return program.as_text()


@pytest.mark.parametrize("name", ["one trit", "in a chain"])
def test_a_micro_batch_that_is_not_the_last_adds_nothing_to_the_parameters(name):
    """Donated memory is used again, and the emitted zeros are not added."""
    added = re.compile(r"f32\[48,64\]\S* add\(")
    # This program also returns its updates, which are constants.
    assert added.search(text_of(name, UNDECIDED))
    assert not added.search(text_of(name, ACCUMULATED))
    assert " conditional(" not in text_of(name, ACCUMULATED)


@pytest.mark.parametrize("name", ["one trit", "skips large", "in a chain"])
def test_it_has_no_control_flow_on_a_gpu(name, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    opt = SETTINGS[name]()
    params = {"w": jax.ShapeDtypeStruct((512, 300), jnp.float32), "b": jax.ShapeDtypeStruct((30,), jnp.float32)}
    state, by_phase = jax.eval_shape(opt.init, params), vsa_optax.jit_by_phase(step_of(opt))
    found = {}
    for kind in (ACCUMULATED, UNDECIDED):
        lowered = by_phase.programs[kind].trace(params, state, params).lower(lowering_platforms=("cuda",))
        text = lowered.as_text()
        assert '"trit_add"' in text
        found[kind] = text.count("stablehlo.while")  # The cases are on the platform, which is a constant.
    assert found == {ACCUMULATED: 0, UNDECIDED: 1}


def test_donated_arrays_are_used_again():
    opt, _, _ = compiled("one trit")
    by_phase, carry = vsa_optax.jit_by_phase(step_of(opt), donate_argnums=(0, 1), **CHEAP), start(opt)
    for count in range(9):
        given = jax.tree.leaves(carry)
        *carry, _ = by_phase(*carry, GRADIENTS[count])
        assert all(leaf.is_deleted() for leaf in given)
    assert_same_bits(tuple(carry), of_single("one trit")[8][:2])


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_state_goes_back_and_forth_between_both(every):
    opt, single, by_phase = compiled("one trit")
    both = anew(by_phase), single
    assert_same_bits(run(lambda count: both[count // every % 2], opt), of_single("one trit"))


def test_a_state_that_is_changed_outside_is_asked_anew():
    """The next micro-batch would not complete its window, but another state is given."""
    opt, single, by_phase = compiled("one trit")
    by_phase, carry = anew(by_phase), of_single("one trit")[2][:2]  # One micro-batch before the end.
    run(lambda count: by_phase, opt, steps=2)
    (*_, updates) = by_phase(*carry, GRADIENTS[3])
    assert_same_bits(updates, of_single("one trit")[3][2])
    assert np.any(updates["w"])
    # In the same containers, too.
    *carry, _ = run(lambda count: by_phase, opt, steps=2)[-1]
    restarted = carry[1]._replace(mini_step=jnp.int32(3))
    assert_same_bits(by_phase(carry[0], restarted, GRADIENTS[2]), single(carry[0], restarted, GRADIENTS[2]))


def test_a_carry_that_is_one_tuple_is_recognized_without_a_search(monkeypatch):
    opt, _, _ = compiled("one trit")

    def step(carry, gradient):
        return step_of(opt)(*carry, gradient)[:2]

    by_phase, carry = vsa_optax.jit_by_phase(step, **CHEAP), start(opt)
    for count in range(8):
        if count == 5:  # All programs are compiled.
            monkeypatch.setattr(step_programs, "_find_owner", None)
        carry = by_phase(carry, GRADIENTS[count])
    assert_same_bits(carry, of_single("one trit")[7][:2])


def test_a_machine_inside_a_window_is_decided_on_the_device():
    """Its steps are emissions, and the window owns the kind."""
    phases = blind.phase_switched(
        optax.sgd(0.1), warmup_steps=2, full_steps=1, predict_steps=2, correct_every=2, length=2
    )
    opt = ternary_multi_steps(phases, 2)

    def step(params, state):
        needs = vsa_optax.needs_backward(state)
        value, grads = vsa_optax.value_and_grad_by_phase(lambda p: jnp.sum(p["w"] ** 2))(params, state=state)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, needs

    by_phase = vsa_optax.jit_by_phase(step, **CHEAP)
    found = []
    for compiled_step in (jax.jit(step, **CHEAP), by_phase):
        params, state = start(opt)
        needs = []
        for _ in range(14):
            params, state, needed = compiled_step(params, state)
            needs.append(bool(needed))
        found.append((params, vsa_optax.phase_stats(state)._replace(quality=None), jnp.array(needs)))
    assert_same_bits(*found)
    assert needs == [True] * 6 + [False] * 4 + [True] * 4
    used = {kind for kind, program in by_phase.programs.items() if program._cache_size()}
    assert used == {ACCUMULATED, UNDECIDED}


def test_inside_shard_map_it_is_decided_on_the_device():
    opt, _, _ = compiled("one trit")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    by_phase = vsa_optax.jit_by_phase(jax.shard_map(step_of(opt), mesh=mesh, in_specs=P(), out_specs=P()), **CHEAP)
    found = run(lambda count: by_phase, opt, steps=5)
    for (_, state, updates), (_, expected, wanted) in zip(found, of_single("one trit"), strict=False):
        assert (int(state.mini_step), int(state.gradient_step)) == (expected.mini_step, expected.gradient_step)
        np.testing.assert_allclose(updates["w"], wanted["w"], atol=1e-3)
    assert by_phase.programs[ACCUMULATED]._cache_size() == 0


def test_shardings_of_results_are_those_of_the_function():
    opt, _, _ = compiled("in a chain")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    same, divided = (jax.sharding.NamedSharding(mesh, spec) for spec in (P(), P("x")))
    shardings = {"b": same, "w": divided}, same, same
    by_phase = vsa_optax.jit_by_phase(step_of(opt), out_shardings=shardings, **CHEAP)
    carry = jax.device_put(start(opt), same)
    for gradient in GRADIENTS[:2]:
        *carry, _ = by_phase(*carry, gradient)
        assert carry[0]["w"].sharding == divided
        assert carry[1][0].mini_step.sharding == same


def test_an_optimizer_of_flax_may_hold_the_window():
    """Its arrays are wrapped."""
    graph, params = nnx.split(nnx.Linear(64, 48, rngs=nnx.Rngs(0)))

    def step(optimizer, gradients):
        optimizer.update(nnx.merge(graph, gradients, copy=True), gradients)
        return optimizer

    by_phase = vsa_optax.jit_by_phase(step)
    optimizer = nnx.Optimizer(nnx.merge(graph, params), by_adam(4), wrt=nnx.Param)
    loops = [by_phase.programs[k].lower(optimizer, params).as_text().count("stablehlo.while") for k in (4, 5)]
    assert loops[0] < loops[1]
    _, forecast = jax.eval_shape(by_phase.programs[UNDECIDED], optimizer, params)
    assert forecast.shape == (2, 2)


SWITCHED = blind.phase_switched(optax.sgd(0.1))


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_schedule_that_begins_again_is_seen(where):
    """K depends on the number of means, too: a forecast for longer windows must not be used for shorter ones."""
    opt = ternary_multi_steps(optax.sgd(0.1), lambda gradient_step: jnp.where(gradient_step < 1, 2, 6))

    def step(params, state, gradient):
        params, state, _ = step_of(opt)(params, state, gradient)
        if where == "inside":
            state = state._replace(gradient_step=jnp.minimum(state.gradient_step, 0))
        return params, state

    found = []
    for compiled_step in (jax.jit(step, **CHEAP), vsa_optax.jit_by_phase(step, **CHEAP)):
        carry, numbers = start(opt), []
        for count in range(8):
            if where == "outside" and count == 3:
                carry = carry[0], carry[1]._replace(gradient_step=jnp.int32(0))
            carry = compiled_step(*carry, GRADIENTS[count])
            numbers.append(int(carry[1].mini_step))
        found.append((carry, jnp.array(numbers)))
    assert_same_bits(*found)


def test_a_machine_beside_a_window_owns_the_kind():
    opt = optax.chain(SWITCHED, by_adam(2))
    by_phase = vsa_optax.jit_by_phase(step_of(opt), **CHEAP)
    carry = start(opt)
    for gradient in GRADIENTS[:4]:
        *carry, _ = by_phase(*carry, gradient)
    assert {kind for kind, program in by_phase.programs.items() if program._cache_size()} <= set(list(StepKind)[:4])
    assert int(carry[1][1].gradient_step) == 2


def test_a_program_of_another_owner_and_a_state_of_several_runs_are_refused():
    machine, window = SWITCHED, by_adam(2)
    for opt, kind in ((machine, ACCUMULATED), (window, StepKind.PLAIN)):
        with pytest.raises(ValueError, match=rf"programs\[StepKind.{kind.name}\] must not get the state"):
            vsa_optax.jit_by_phase(step_of(opt)).programs[kind](*start(opt), PARAMS)
        several = jax.tree.map(lambda x: jnp.stack([x, x]), (*start(opt), PARAMS))
        with pytest.raises(ValueError, match=r"leading axes \(2,\): under"):
            vsa_optax.jit_by_phase(jax.vmap(step_of(opt)))(*several)


@pytest.mark.parametrize(
    ("opt", "found"),
    [
        (optax.sgd(0.1), "found none"),
        (optax.MultiSteps(optax.sgd(0.1), 2), "found none"),
        (
            optax.chain(accumulate_ternary(2), by_adam(2)),
            r"found \['AccumulateTernaryState', 'TernaryMultiStepsState'\]",
        ),
        (optax.chain(accumulate_ternary(2), SWITCHED, SWITCHED), r"found \['PhaseMachineState', 'PhaseMachineState'\]"),
        (optax.partition({"b": by_adam(2), "w": by_adam(3)}, {"b": "b", "w": "w"}), "wrap one around all of them"),
    ],
    ids=["none", "theirs", "two windows", "two machines", "two groups"],
)
def test_other_than_one_owner_is_refused(opt, found):
    with pytest.raises(ValueError, match=f"expected one phase machine or one window.*{found}"):
        vsa_optax.jit_by_phase(step_of(opt))(*start(opt), PARAMS)
