"""The same hypervectors through torchhd's MAP model, in an environment that has it: ``pytest -m torchhd``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsa_optax import vsa

pytestmark = pytest.mark.torchhd

KEY = jax.random.key(11)
MEMORY = (21, 1001)  # An odd number of items: no coordinate of their sum is tied.


@pytest.fixture(scope="module")
def theirs():
    """torchhd, and a function that turns an array into its MAP hypervectors."""
    import torch
    import torchhd

    return torchhd, lambda x: torch.tensor(np.array(x)).as_subclass(torchhd.MAPTensor)


@pytest.fixture(scope="module")
def memory():
    return vsa.random_hypervectors(KEY, *MEMORY)


def equal(actual, expected):
    np.testing.assert_array_equal(actual, expected.numpy())


def test_bind_and_inverse(theirs, memory):
    torchhd, made = theirs
    x, y = memory[:10], memory[10:20]
    equal(vsa.bind(x, y), torchhd.bind(made(x), made(y)))
    equal(vsa.bind(x, y[0]), torchhd.bind(made(x), made(y[0])))
    equal(vsa.inverse(x), torchhd.inverse(made(x)))
    bound = torchhd.bind(made(x), made(y))
    equal(vsa.unbind(vsa.bind(x, y), y), torchhd.bind(bound, torchhd.inverse(made(y))))


def test_bundle(theirs, memory):
    torchhd, made = theirs
    equal(vsa.bundle(memory), torchhd.multibundle(made(memory)))
    equal(vsa.bundle(memory[:2]), torchhd.bundle(made(memory[0]), made(memory[1])))
    batch = memory[:20].reshape(4, 5, -1)
    equal(vsa.bundle(batch), torchhd.multibundle(made(batch)))


@pytest.mark.filterwarnings("ignore:torchhd.hard_quantize is deprecated:DeprecationWarning")
def test_majority(theirs, memory):
    """Where nothing is tied; ties are -1 there, +1 or -1 by parity here."""
    torchhd, made = theirs
    for majority in ("bipolar", "ternary"):
        actual = vsa.bundle(memory, majority=majority)
        total = torchhd.multibundle(made(memory))
        equal(actual, torchhd.hard_quantize(total))
        equal(actual, torchhd.normalize(total))
    total = torchhd.multibundle(made(memory[:20]))
    is_tied = total.numpy() == 0
    assert is_tied.any()
    actual, quantized = np.asarray(vsa.bundle(memory[:20], majority="bipolar")), torchhd.normalize(total).numpy()
    np.testing.assert_array_equal(actual[~is_tied], quantized[~is_tied])
    np.testing.assert_array_equal(actual[is_tied], np.where(np.arange(MEMORY[1]) % 2, -1, 1)[is_tied])


@pytest.mark.parametrize("shifts", [-1002, -3, 0, 1, 7, 1001])
def test_permute(theirs, memory, shifts):
    torchhd, made = theirs
    equal(vsa.permute(memory, shifts), torchhd.permute(made(memory), shifts=shifts))


def test_similarities(theirs, memory):
    torchhd, made = theirs
    x = vsa.bundle(memory[:12].reshape(4, 3, -1))
    equal(vsa.dot_similarity(x, memory), torchhd.dot_similarity(made(x), made(memory)))
    equal(vsa.dot_similarity(x[0], memory[0]), torchhd.dot_similarity(made(x[0]), made(memory[0])))
    for a, b in ((x, memory), (x[0], memory), (x[0], memory[0])):
        expected = torchhd.cosine_similarity(made(a), made(b)).numpy()
        np.testing.assert_allclose(vsa.cosine_similarity(a, b), expected, rtol=1e-5, atol=1e-6)


def test_cleanup(theirs, memory):
    """Theirs takes one hypervector at a time."""
    torchhd, made = theirs
    noise = jnp.where(jax.random.uniform(KEY, MEMORY) < 0.3, -1.0, 1.0)
    found = vsa.cleanup(memory * noise, memory)
    for vector, noisy in zip(found.vector, memory * noise, strict=True):
        equal(vector, torchhd.cleanup(made(noisy), made(memory))[0])


def test_a_record_of_three_pairs(theirs, memory):
    """Everything at once: bound, permuted, bundled, quantised, and a value found again."""
    torchhd, made = theirs
    keys, values = memory[:3], memory[3:6]
    record = vsa.bundle(vsa.permute(vsa.bind(keys, values), 2), majority="bipolar")
    pairs = torchhd.bind(made(keys), made(values))
    expected = torchhd.normalize(torchhd.multibundle(torchhd.permute(pairs, shifts=2)))
    equal(record, expected)
    found = vsa.cleanup(vsa.unbind(vsa.permute(record, -2), keys), memory)
    assert found.item.tolist() == [3, 4, 5]
    back = torchhd.bind(torchhd.permute(expected, shifts=-2), made(keys[1]))
    equal(found.vector[1], torchhd.cleanup(back, made(memory))[0])
