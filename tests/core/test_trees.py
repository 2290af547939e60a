import jax.numpy as jnp
import numpy as np
import pytest
from samples import draw, gradient_stream, tree_of

from vsa_optax.core import trees


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_makes_a_tree_not_finite(bad):
    tree = tree_of(gradient_stream(1)[0])
    assert trees.all_finite(tree)
    assert trees.all_finite({})
    for name, leaf in tree.items():
        if leaf.size:
            assert not trees.all_finite(tree | {name: leaf.at[(-1,) * leaf.ndim].set(bad)}), name


@pytest.mark.parametrize("number", [1e-30, -2.0, np.nan, -np.inf])
def test_one_number_makes_a_tree_nonzero(number):
    tree = tree_of(np.zeros_like(gradient_stream(1)[0]))
    assert not trees.any_nonzero(tree)
    assert not trees.any_nonzero({})
    for name, leaf in tree.items():
        if leaf.size:
            assert trees.any_nonzero(tree | {name: leaf.at[(-1,) * leaf.ndim].set(number)}), name
    assert trees.any_nonzero([jnp.zeros(3), jnp.array([0, 1j]), jnp.zeros(2, jnp.float16)])


@pytest.mark.parametrize("condition", [True, False])
def test_of_two_trees_one_is_kept_in_the_dtypes_of_the_old_one(condition):
    new = {"half": jnp.full(3, 1.5), "float": jnp.full(2, 7, jnp.int32)}
    old = {"half": jnp.full(3, jnp.nan, jnp.bfloat16), "float": jnp.full(2, 0.25)}
    kept = trees.tree_where(jnp.array(condition), new, old)
    for name, leaf in kept.items():
        assert leaf.dtype == old[name].dtype
        np.testing.assert_array_equal(leaf.astype(jnp.float32), (new if condition else old)[name].astype(jnp.float32))


@pytest.mark.parametrize("condition", [True, False])
def test_zeros_replace_a_tree_of_any_numbers(condition):
    tree = {"a": jnp.array([1.5, jnp.nan, -jnp.inf], jnp.bfloat16), "b": jnp.array([[2 - 1j]]), "c": jnp.ones([0, 2])}
    kept = trees.zeros_unless(jnp.array(condition), tree)
    for name, leaf in kept.items():
        assert leaf.dtype == tree[name].dtype
        expected = tree[name] if condition else np.zeros(leaf.shape)
        np.testing.assert_array_equal(leaf.astype(complex), expected.astype(complex))


def test_sums_and_products_are_those_of_numpy():
    """Leaf by leaf, with weights for each."""
    vectors = draw(0, 4, 9)
    cut = [[vector[:5], vector[5:].reshape(2, 2)] for vector in vectors]
    weights = draw(1, 2, 3)
    combined = trees.combine_trees(jnp.asarray(weights), cut[:3])
    gram, products = trees.products_of_trees(cut[:3], cut[3])
    for i, of_leaf in enumerate([vectors[:, :5], vectors[:, 5:]]):
        np.testing.assert_allclose(np.ravel(combined[i]), weights[i] @ of_leaf[:3], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gram[i], of_leaf[:3] @ of_leaf[:3].T, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(products[i], of_leaf[:3] @ of_leaf[3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(trees.squared_norms(cut[0]), [np.sum(np.square(x)) for x in cut[0]], rtol=1e-6)
