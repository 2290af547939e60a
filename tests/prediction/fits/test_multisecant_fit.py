"""The leap inside of the span: the twin in float64, the Hessian by brute force, and where there is little to know."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from vsa_optax.prediction.fits import multisecant_fit
from vsa_optax.prediction.fits.multisecant_fit import Leap, Products

SIZE, WINDOW = 30, 5
solve = jax.jit(multisecant_fit.solve)


@pytest.fixture(autouse=True)
def in_double_precision():
    with jax.enable_x64(True):
        yield


def test_the_constants_are_those_that_were_tried():
    assert (multisecant_fit.RIDGE, multisecant_fit._LEAST_EIGENVALUE) == (1e-5, 1e-6)


@functools.cache
def drawn(seed=0):
    """Moves, changes of a gradient that is nearly linear, a gradient, a step and a metric; flat."""
    rng = np.random.default_rng(seed)
    half, moves = (
        rng.normal(size=(SIZE, SIZE)),
        rng.normal(size=(WINDOW, SIZE)) * 10.0 ** rng.uniform(-3, 1, (WINDOW, 1)),
    )
    changes = moves @ (half + half.T) + 0.1 * rng.normal(size=moves.shape) * abs(moves)
    return moves, changes, rng.normal(size=SIZE), 0.1 * rng.normal(size=SIZE), 10.0 ** rng.uniform(-2, 2, SIZE)


def products_of(moves, changes, gradient, step, metric):
    weighted = moves * metric
    found = Products(weighted @ moves.T, moves @ changes.T, moves @ gradient, weighted @ step)
    return jax.tree.map(jnp.asarray, found)


def solved(moves, changes, gradient, step, metric, *, curvature=3.0, damping=0.7):
    return jax.device_get(solve(products_of(moves, changes, gradient, step, metric), curvature, damping))


def assert_as_wanted(actual, wanted):
    assert np.linalg.norm(actual - wanted) < 1e-9 * np.linalg.norm(wanted)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.7, 50.0, np.inf])
def test_the_leap_is_that_of_the_twin(damping):
    moves, changes, *_ = drawn()
    found = solved(*drawn(), damping=damping)
    twin = reference.Leap(
        *drawn(), curvature=3.0, damping=damping, ridge=multisecant_fit.RIDGE, least=multisecant_fit._LEAST_EIGENVALUE
    )
    assert found.dimension == twin.dimension == WINDOW
    assert_as_wanted(found.inside @ moves, twin.inside)
    assert_as_wanted(found.change @ changes, twin.change)
    assert_as_wanted(found.gradient @ moves, twin.gradient)
    assert_as_wanted(found.step @ moves, twin.base)


@pytest.mark.parametrize("curvature", [0.0, 2.0])
def test_the_hessian_is_the_least_squares_fit_of_a_symmetric_matrix(curvature):
    """Where eigenvalues are as small as the ridge, too."""
    rng = np.random.default_rng(1)
    changes, eigenvalues = rng.normal(size=(4, 4)), np.array([1e-6, multisecant_fit.RIDGE, 0.1, 2.0])
    found = multisecant_fit._hessian(jnp.asarray(np.sqrt(eigenvalues)[:, None] * changes), eigenvalues, curvature)
    wanted = reference.symmetric_fit(changes, eigenvalues, multisecant_fit.RIDGE, curvature)
    np.testing.assert_allclose(found, wanted, rtol=1e-8)


def test_secants_of_no_length_and_secants_again_add_nothing():
    moves, changes, *others = drawn()
    three = solved(moves[:3], changes[:3], *others)
    among = np.array([0, 3, 1, 4, 2])
    nothing = np.zeros((2, SIZE))
    found = solved(np.concatenate([moves[:3], nothing])[among], np.concatenate([changes[:3], nothing])[among], *others)
    for with_zeros, without in zip(found[:4], three[:4], strict=True):
        np.testing.assert_array_equal(with_zeros[[1, 3]], 0)
        np.testing.assert_allclose(with_zeros[[0, 2, 4]], without, rtol=1e-9)
    # A secant twice weighs more against the ridge, and is one direction.
    twice = solved(moves[[0, 1, 2, 2, 0]], changes[[0, 1, 2, 2, 0]], *others)
    assert found.dimension == twice.dimension == three.dimension == 3
    error = twice.inside @ moves[[0, 1, 2, 2, 0]] - three.inside @ moves[:3]
    assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(three.inside @ moves[:3])
    none = solved(np.zeros((WINDOW, SIZE)), np.zeros((WINDOW, SIZE)), *others)
    assert none.dimension == 0
    assert not any(x.any() for x in none)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_of_products_that_are_not_finite_comes_nothing(number):
    products = products_of(*drawn())
    for name in ("cross", "gradient", "step"):
        x = getattr(products, name)
        found = solve(products._replace(**{name: x.at[(1,) * x.ndim].set(number)}), 3.0, 0.7)
        assert not any(np.any(x) for x in found), name
    # A secant whose own length is not a number is left out.
    gram = products.gram.at[1].set(number).at[:, 1].set(number)
    found = solve(products._replace(gram=gram), 3.0, 0.7)
    rest = solve(
        jax.tree.map(lambda x: x.at[1].set(0).at[:, 1].set(0) if x.ndim == 2 else x.at[1].set(0), products), 3, 0.7
    )
    for one, other in zip(found, rest, strict=True):
        np.testing.assert_array_equal(one, other)
    assert found.dimension == WINDOW - 1


def test_damping_leads_from_newtons_step_to_the_optimizers():
    """On a quadratic whose every direction is known, up to the ridge."""
    rng = np.random.default_rng(2)
    moves = np.eye(WINDOW) + 0.2 * rng.normal(size=(WINDOW, WINDOW))
    gradient, step = rng.normal(size=WINDOW), rng.normal(size=WINDOW)
    half = rng.normal(size=(WINDOW, WINDOW))
    hessian = half @ half.T + np.eye(WINDOW)
    given = moves, moves @ hessian, gradient, step, np.ones(WINDOW)
    by_damping = [solved(*given, damping=damping).inside @ moves for damping in (0.0, 1e9, np.inf)]
    newton = -np.linalg.solve(hessian, gradient)
    np.testing.assert_allclose(by_damping[0], newton, rtol=0, atol=100 * multisecant_fit.RIDGE)
    np.testing.assert_allclose(by_damping[1], step, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(by_damping[2], step, rtol=1e-9)
    change = solved(*given, damping=0.0).change @ given[1]
    np.testing.assert_allclose(change, -gradient, rtol=0, atol=100 * multisecant_fit.RIDGE)


def test_a_direction_of_negative_curvature_is_left_downhill():
    """As far as if the curvature were positive."""
    hessian, gradient = np.diag([2.0, -2.0]), np.array([1.0, 1.0])
    moves = np.eye(2)
    found = solved(moves, moves @ hessian, gradient, np.zeros(2), np.ones(2), damping=0.0)
    np.testing.assert_allclose(found.inside, [-0.5, -0.5], rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_neither_the_scale_of_the_metric_nor_that_of_secants_matters(scale):
    """The curvature outside of the span is in units of the metric."""
    moves, changes, gradient, step, metric = drawn()
    wanted = solved(*drawn(), curvature=3.0)
    found = solved(moves, changes, gradient, step, metric / scale, curvature=3.0 * scale)
    for name in Leap._fields:
        np.testing.assert_allclose(
            getattr(found, name), getattr(wanted, name) * (scale if name == "gradient" else 1), rtol=1e-9
        )
    lengths = np.geomspace(scale, 1, WINDOW)[:, None]
    found = solved(moves * lengths, changes * lengths, gradient, step, metric)
    for one, other in zip(found[:4], wanted[:4], strict=True):
        np.testing.assert_allclose(one * lengths[:, 0], other, rtol=1e-9)


def test_types_are_those_of_the_products():
    products = jax.tree.map(lambda x: x.astype(jnp.float32), products_of(*drawn()))
    found = jax.eval_shape(multisecant_fit.solve, products, jnp.float32(1), jnp.float32(1))
    assert [x.dtype for x in found] == [jnp.float32] * 4 + [jnp.int32]
