"""A window of payloads against the window of what they decode to."""

import functools

import blind
import histories
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from samples import CHEAP

import vsa_optax
from vsa_optax import HypervectorCodec, Phase, TritCodec, checkpoint
from vsa_optax.prediction.predictors.window import CodedWindowHistory, WindowHistory

# A leaf of 128 coordinates, and one that `TritCodec` leaves alone.
CODECS = {"trits": TritCodec(3, block_size=64), "hypervector": HypervectorCodec(0.5)}
every_codec = pytest.mark.parametrize("name", CODECS)
SHORT = dict(warmup_steps=3, full_steps=2, predict_steps=4, correct_every=2, length=5, residual_decay=0.3)
PARAMS = {"w": jnp.zeros(128), "b": jnp.zeros(3)}
STEPS = 30


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def flat_of(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def tree_of(flat):
    return {"b": flat[:3].astype(np.float32), "w": flat[3:].astype(np.float32)}


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def gradient_stream(steps=STEPS, noise=0.1):
    rng = np.random.default_rng(0)
    drift = rng.normal(size=131) + 0.05 * np.arange(steps)[:, None] * rng.normal(size=131)
    return (drift + noise * rng.normal(size=(steps, 131))).astype(np.float32)


@functools.cache
def compiled(name):
    """An optimizer and its update, compiled; the name of a codec, or None."""
    opt = blind.predict_gradients(codec=CODECS.get(name), **SHORT)
    return opt, jax.jit(opt.update, **CHEAP)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


@functools.cache
def round_trip(codec):
    return jax.jit(lambda tree: codec.decode(codec.encode(tree)), **CHEAP)


HISTORIES = CodedWindowHistory(5, 0.9, None, CODECS["trits"]), WindowHistory(5, 0.9, None)


class CodedPredictor(reference.Predictor):
    """The twin, whose memory passes through a codec."""

    def __init__(self, codec, **kwargs):
        super().__init__(**kwargs)
        self.codec = codec

    def coded(self, flat):
        return flat_of(round_trip(self.codec)(tree_of(flat)))

    def record(self, step, gradient):
        super().record(step, self.coded(gradient))

    def correct(self, step, gradient):
        super().correct(step, gradient)
        self.residual = self.coded(self.residual)


@every_codec
def test_predictions_equal_those_of_decoded_records(name):
    """With the residual, over many phases; the updates of true phases do not change."""
    opt, update = compiled(name)
    twin = CodedPredictor(CODECS[name], window=5, residual_decay=0.3)
    state = opt.init(PARAMS)
    for step, gradient in enumerate(gradient_stream()):
        phase = Phase(int(state.machine.phase))
        emitted, state = update(tree_of(gradient), state)
        if phase == Phase.PREDICT:
            assert relative(flat_of(emitted), twin.predict(step)) < 2e-5
        else:
            np.testing.assert_array_equal(flat_of(emitted), gradient)
            if phase == Phase.CORRECT:
                twin.correct(step, gradient)
            twin.record(step, gradient)
    stats = vsa_optax.phase_stats(state)
    assert stats.predict_steps > 8
    np.testing.assert_allclose(stats.mean_prediction_error, np.mean(twin.errors), rtol=1e-4)
    assert relative(flat_of(CODECS[name].decode(state.residual)), twin.residual) < 1e-3


@pytest.mark.parametrize("num", [0, 1, 3, 7])
def test_the_window_is_that_of_decoded_records(num):
    """The histories alone: empty, with one record, not yet full, and after it has come round."""
    codec, stream = CODECS["trits"], gradient_stream()
    states = [history.init(PARAMS) for history in HISTORIES]
    for step in range(num):
        record = tree_of(stream[step])
        decoded = round_trip(codec)(record)
        for i, (history, tree) in enumerate(zip(HISTORIES, (record, decoded), strict=True)):
            write, _ = histories.compiled(history)
            states[i] = write(states[i], tree, np.int32(step + step // 2))
    predictions = []
    for history, state in zip(HISTORIES, states, strict=True):
        _, predict = histories.compiled(history)
        predictions.append(flat_of(predict(state, np.int32(20))))
    np.testing.assert_allclose(*predictions, atol=2e-6 * max(1, abs(predictions[1]).max()))
    assert states[0].steps.tolist() == states[1].steps.tolist()
    assert states[0].num_records == num


@every_codec
def test_phases_and_counts_are_those_without_a_codec(name):
    runs = []
    for which in (name, None):
        opt, update = compiled(which)
        state, phases = opt.init(PARAMS), []
        for gradient in gradient_stream():
            phases.append(int(state.machine.phase))
            state = update(tree_of(gradient), state)[1]
        runs.append((phases, vsa_optax.phase_stats(state)))
    (coded_phases, coded), (plain_phases, plain) = runs
    assert coded_phases == plain_phases
    np.testing.assert_array_equal(coded[:8], plain[:8])
    assert coded.nonfinite_count == plain.nonfinite_count == 0


def test_three_trits_predict_almost_as_well():
    errors = {}
    for name in ("trits", None):
        opt, update = compiled(name)
        state = opt.init(PARAMS)
        for gradient in gradient_stream():
            state = update(tree_of(gradient), state)[1]
        errors[name] = float(vsa_optax.phase_stats(state).mean_prediction_error)
    assert errors[None] > 0.05
    assert errors["trits"] < 1.1 * errors[None] + 0.06  # The square root of the codec's own error.


@every_codec
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "none"])
def test_state_bytes_are_those_documented(name, residual):
    """W payloads, their steps and their number; one more payload for the residual; no record as it was."""
    codec = CODECS[name]
    params = {"w": jnp.zeros((100, 64)), "b": jnp.zeros(3, jnp.bfloat16), "none": None}
    settings = SHORT if residual else SHORT | {"residual_decay": None}
    state = blind.predict_gradients(codec=codec, **settings).init(params)
    assert nbytes(state.history) == 5 * codec.nbytes(params) + 5 * 4 + 4
    assert nbytes(state.residual) == residual * codec.nbytes(params)
    assert nbytes(state.machine) < 100
    assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(state.history.records))
    off = blind.predict_gradients(codec=codec, predict_steps=0).init(params)
    assert (off.history, off.residual) == (None, None)


@every_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_gradients_leave_no_trace(name, bad):
    opt, update = compiled(name)
    state = opt.init(PARAMS)
    for gradient in gradient_stream(14):
        if bool(vsa_optax.needs_backward(state)):
            broken = tree_of(gradient)
            broken["w"][70] = bad
            emitted, after = update(broken, state)
            assert not flat_of(emitted).any()
            assert_same_bits(after.history, state.history)
            assert_same_bits(after.residual, state.residual)
            assert after.machine.unpacked().nonfinite_count == state.machine.unpacked().nonfinite_count + 1
        state = update(tree_of(gradient), state)[1]
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(state))


@every_codec
def test_a_state_stays_finite_under_the_largest_gradients(name):
    """A rotation overflows where they do not; what it cannot hold is predicted as zero, not as NaN."""
    opt, update = compiled(name)
    state = opt.init(PARAMS)
    for step in range(20):
        size = 3.4e38 if step in (7, 9) else 1.0
        emitted, state = update(tree_of(np.full(131, size, np.float32)), state)
        for leaf in jax.tree.leaves((emitted, state)):
            assert np.isfinite(np.asarray(leaf, np.float32)).all()


@every_codec
def test_a_checkpoint_continues_with_the_same_bits(name, tmp_path):
    opt, update = compiled(name)
    fresh = opt.init(PARAMS)
    stream = gradient_stream(20)
    state, emitted = fresh, []
    for step, gradient in enumerate(stream):
        if step in (2, 9):
            checkpoint.save(tmp_path, step, state, config=SHORT)
        update_, state = update(tree_of(gradient), state)
        emitted.append(update_)
    for saved in (2, 9):
        _, resumed = checkpoint.restore(tmp_path, fresh, step=saved, config=SHORT)
        for step in range(saved, 20):
            update_, resumed = update(tree_of(stream[step]), resumed)
            assert_same_bits(update_, emitted[step])
        assert_same_bits(resumed, state)


def test_one_compilation_and_scan():
    opt, update = compiled("trits")
    stream = gradient_stream(20)
    state = opt.init(PARAMS)
    for gradient in stream:
        emitted, state = update(tree_of(gradient), state)
    assert update._cache_size() == 1
    run = jax.jit(lambda grads: jax.lax.scan(lambda s, g: opt.update(g, s)[::-1], opt.init(PARAMS), grads), **CHEAP)
    scanned, of_steps = run({"b": stream[:, :3], "w": stream[:, 3:]})
    np.testing.assert_array_equal(vsa_optax.phase_stats(scanned)[:7], vsa_optax.phase_stats(state)[:7])
    np.testing.assert_allclose(flat_of(jax.tree.map(lambda x: x[-1], of_steps)), flat_of(emitted), atol=1e-4)


def test_half_parameters_with_wider_updates_and_donation():
    """Records have the parameters' dtype, updates have the optimizer's, and each buffer is reused."""
    widen = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u.astype(jnp.float32), updates))
    params = {"w": jnp.zeros(128, jnp.bfloat16), "b": jnp.zeros(3, jnp.bfloat16)}
    opt = blind.phase_switched(widen, codec=CODECS["trits"], **SHORT)
    update = jax.jit(opt.update, donate_argnums=1, **CHEAP)
    state = opt.init(params)
    specs = CODECS["trits"].specs(state.history.records)
    assert {spec.dtype for spec in specs.values()} == {jnp.dtype(jnp.bfloat16)}
    line = np.random.default_rng(1).normal(size=(2, 131))
    for step in range(20):
        target = line[0] + 0.01 * step * line[1]
        is_predicted = not bool(vsa_optax.needs_backward(state))
        grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree_of(target))
        given = jax.tree.leaves((state.history, state.residual))
        emitted, state = update(grads, state, params)
        assert all(leaf.is_deleted() for leaf in given)
        assert {leaf.dtype for leaf in jax.tree.leaves(emitted)} == {jnp.dtype(jnp.float32)}
        if is_predicted:
            assert relative(flat_of(emitted), target) < 0.12
    assert vsa_optax.phase_stats(state).predict_steps > 4


@pytest.mark.parametrize("value", ["trits", TritCodec, 3, object()], ids=["str", "type", "int", "object"])
def test_what_is_no_codec_is_refused(value):
    with pytest.raises(ValueError, match="codec must be a codec, such as TritCodec") as error:
        vsa_optax.Window(codec=value)
    assert f"got {value!r}" in str(error.value)


OTHERS = {
    "another length": (TritCodec(3), TritCodec(2)),
    "another seed": (TritCodec(3), TritCodec(3, seed=1)),
    "trits for a hypervector": (HypervectorCodec(0.5), TritCodec(3)),
    "a hypervector for trits": (TritCodec(3), HypervectorCodec(0.5)),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("is_jitted", [False, True], ids=["eager", "jit"])
def test_the_state_of_another_codec_is_refused(case, is_jitted):
    theirs, ours = OTHERS[case]
    state = blind.predict_gradients(codec=theirs).init(PARAMS)
    update = blind.predict_gradients(codec=ours).update
    with pytest.raises(ValueError, match="payload") as error:
        (jax.jit(update) if is_jitted else update)(PARAMS, state)
    if type(theirs) is type(ours):
        assert f"encoded by {theirs}, not by {ours}" in str(error.value)
    else:
        assert f"{type(ours).__name__.removesuffix('Codec')}Payload" in str(error.value)


@pytest.mark.parametrize("given", ["coded", "plain"])
def test_coded_and_plain_states_are_told_apart(given):
    coded, plain = (blind.predict_gradients(codec=codec) for codec in (TritCodec(3), None))
    theirs, ours = (coded, plain) if given == "coded" else (plain, coded)
    descriptions = {"coded": r"Window\(codec=...\)", "plain": "Window"}
    other = descriptions["plain" if given == "coded" else "coded"]
    with pytest.raises(ValueError, match=f"predictor is {descriptions[given]}, here {other}"):
        ours.update(PARAMS, theirs.init(PARAMS))


def test_gradients_unlike_the_parameters_name_the_leaf():
    opt = blind.predict_gradients(codec=CODECS["trits"])
    with pytest.raises(ValueError, match=r"leaf \['w'\] has shape \(7,\).*\(128,\)"):
        opt.update(PARAMS | {"w": jnp.zeros(7)}, opt.init(PARAMS))
