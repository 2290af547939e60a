"""Vector-symbolic algebra on arrays: bind, bundle, permute, compare and clean up hypervectors.

All are pure functions of real arrays. The last axis holds the d coordinates of a hypervector; the axes before it are
batch axes and broadcast. Results are computed and returned in f32 (f64 if an argument is f64), so integers and halves
become f32. Only `permute` and the vector of `cleanup` keep their dtype, since they only move coordinates. An argument
that is not an array of real numbers raises a ``TypeError`` that names it.

The models are MAP (Multiply, Add, Permute), with dense coordinates -1 and +1 ("bipolar"), and the same with coordinates
-1, 0 and +1 ("ternary"), whose inverses are incomplete.

References:
    Gayler (1998), Multiplicative Binding, Representation Operators & Analogy.
    Kanerva (2009), Hyperdimensional Computing, Cognitive Computation 1: 139-159.
    Frady, Kleyko & Sommer (2018), A Theory of Sequence Indexing and Working Memory in Recurrent Neural Networks, Neural
    Computation 30: 1449-1513.
    Kleyko, Rachkovskij, Osipov & Rahimi (2022), A Survey on Hyperdimensional Computing, ACM Computing Surveys 55: 130.
"""

from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from vsa_optax.core import checks
from vsa_optax.kernels import numerics, signs

_Model: TypeAlias = Literal["bipolar", "ternary"]
_Majority: TypeAlias = Literal["ternary", "bipolar"]


class Cleanup(NamedTuple):
    """The result of `cleanup` for every given hypervector.

    Attributes:
        vector: ``[..., d]`` in the memory's dtype, the nearest row.
        item: ``[...] int32``, the index of that row.
        similarity: ``[...]`` float, its cosine similarity.
    """

    vector: jax.Array
    item: jax.Array
    similarity: jax.Array


def random_hypervectors(
    key: jax.Array,
    num: int,
    dim: int,
    model: _Model = "bipolar",
    *,
    dtype: jax.typing.DTypeLike | None = jnp.float32,
) -> jax.Array:
    """Draws nearly orthogonal random hypervectors: cosines have deviation ``1 / sqrt(dim)`` around 0 (Kanerva 2009).

    Args:
        key: one PRNG key, from ``jax.random.key(seed)`` or the older ``jax.random.PRNGKey(seed)``.
        num: the number of hypervectors, static, ``>= 1``.
        dim: d, the number of coordinates of each, static, ``>= 1``.
        model: ``"bipolar"`` (-1 or +1, each with probability 1/2) or ``"ternary"`` (-1, 0 or +1, each with 1/3).
        dtype: float16, bfloat16, float32 or float64; None is float32.

    Returns:
        ``[num, dim]`` in ``dtype``. The same arguments give the same bits, but row i may change with ``num``.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> x = random_hypervectors(jax.random.key(0), 2, 10_000)
        >>> bool(abs(cosine_similarity(x[0], x[1])) < 0.04)
        True
    """
    shape = (checks.check_integer("num", num, 1), checks.check_integer("dim", dim, 1))
    checks.check_choice("model", model, get_args(_Model))
    leaving = checks.check_float_dtype("dtype", jnp.float32 if dtype is None else dtype)
    kind, rank = getattr(key, "dtype", None), getattr(key, "ndim", None)
    is_typed = kind is not None and rank == 0 and jnp.issubdtype(kind, jax.dtypes.prng_key)
    if not (is_typed or (kind == jnp.uint32 and rank == 1)):
        raise ValueError(f"key must be one PRNG key, as jax.random.key makes it, got {key!r}")
    if model == "ternary":
        return jax.random.randint(key, shape, -1, 2, jnp.int32).astype(leaving)
    return signs.flip(jnp.ones(shape, jnp.float32), signs.random_sign_bits(key, shape)).astype(leaving)


def bind(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Binds two hypervectors into one that resembles neither: ``x_i * y_i`` (Gayler 1998).

    Binding is commutative and associative, and distributes over `bundle` without majority.

    Args:
        x: ``[..., d]`` real.
        y: ``[..., d]`` real; the shapes broadcast.

    Returns:
        ``[..., d]`` f32.

    Raises:
        ValueError: if the shapes do not broadcast.

    Example:
        >>> bind(jnp.array([1, -1, -1]), jnp.array([-1, -1, 1])).tolist()
        [-1.0, 1.0, -1.0]
    """
    return _product(x=_real("x", x), y=_real("y", y))


def inverse(x: ArrayLike) -> jax.Array:
    """The inverse under binding: ``1 / x_i``, and 0 where ``x_i`` is 0 or subnormal (Gayler 1998: ``x`` itself).

    Args:
        x: ``[..., d]`` real.

    Returns:
        ``[..., d]`` f32, finite unless ``x`` is NaN. Bipolar and ternary hypervectors are their own inverses.

    Example:
        >>> inverse(jnp.array([-1, 0, 4])).tolist()
        [-1.0, 0.0, 0.25]
    """
    return _inverse(_real("x", x))


def unbind(bound: ArrayLike, key: ArrayLike) -> jax.Array:
    """Recovers the hypervector that was bound to ``key``: ``bind(bound, inverse(key))`` (Gayler 1998).

    It is exact for bipolar keys. A ternary key is zero at a third of the coordinates; there the result is 0. From a
    bundle of pairs, the result is the key's partner with noise from the other pairs, which `cleanup` removes.

    Args:
        bound: ``[..., d]`` real.
        key: ``[..., d]`` real; the shapes broadcast.

    Returns:
        ``[..., d]`` f32.

    Raises:
        ValueError: if the shapes do not broadcast.

    Example:
        >>> key = jnp.array([1, -1, 0])
        >>> unbind(bind(jnp.array([5, 6, 7]), key), key).tolist()
        [5.0, 6.0, 0.0]
    """
    return _product(bound=_real("bound", bound), key=_inverse(_real("key", key)))


def bundle(
    hypervectors: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    majority: _Majority | None = None,
    axis: int = -2,
) -> jax.Array:
    """Superposes n hypervectors into one that resembles each: ``s_i = sum_k w_k x_ki``, or its sign (Kanerva 2009).

    A sum of 0 is a tie. Its sign is 0 with ``majority="ternary"``. With ``"bipolar"`` it is +1 at even coordinates and
    -1 at odd ones, which is balanced and does not depend on the order of the items (other libraries draw ties at
    random). All bundles share this pattern: unrelated bundles have cosine ``p^2``, where p is the fraction of ties
    (p^2 = 1/4 for two bipolar items, 1/16 for ten, 0 for an odd number). Weights tie exactly only if their sums are
    exact in f32.

    Args:
        hypervectors: ``[..., n, d]`` real.
        weights: ``[n]``, or ``[..., n]`` that broadcasts with the batch axes, real; None is 1 for each.
        majority: None (the sum itself, which is linear), ``"ternary"`` or ``"bipolar"``.
        axis: the axis of the items, static; any axis but the last.

    Returns:
        ``[..., d]`` f32. NaN stays NaN, with a majority and even with weight 0.

    Raises:
        ValueError: if an argument is outside its range, or if the shape of the weights does not fit.

    Example:
        >>> x = jnp.array([[1, 1, -1, -1], [1, 1, 1, 1]])
        >>> [bundle(x, majority=majority).tolist() for majority in (None, "ternary", "bipolar")]
        [[2.0, 2.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, -1.0]]
    """
    if majority is not None:
        checks.check_choice("majority", majority, get_args(_Majority))
    x = _real("hypervectors", hypervectors)
    if x.ndim < 2:
        raise ValueError(f"hypervectors must have shape [..., n, d], got {x.shape}")
    at = checks.check_integer("axis", axis, -x.ndim)
    if at >= x.ndim - 1 or at == -1:
        raise ValueError(f"axis must be one of hypervectors' axes but not the last, got {axis} for shape {x.shape}")
    x = jnp.moveaxis(x, at, -2)
    w = jnp.ones(x.shape[-2:-1], x.dtype) if weights is None else _real("weights", weights)
    if w.shape[-1:] != x.shape[-2:-1] or not _do_broadcast(w.shape[:-1], x.shape[:-2]):
        raise ValueError(f"weights must have shape {x.shape[-2:-1]} or {x.shape[:-1]}, got {w.shape}")
    total = jnp.einsum("...n,...nd->...d", w, x, precision=lax.Precision.HIGHEST)
    if majority is None:
        return total
    ties = 1 - 2 * (jnp.arange(x.shape[-1]) % 2) if majority == "bipolar" else jnp.zeros([])
    return jnp.where(total == 0, ties.astype(total.dtype), jnp.sign(total))


def permute(x: ArrayLike, shifts: int | jax.Array = 1) -> jax.Array:
    """Marks a hypervector's place in a sequence: ``y_i = x_{i - shifts}``, cyclically (Gayler 1998; Kanerva 2009).

    A permutation by ``-shifts`` undoes it. Permuting both arguments does not change their `dot_similarity`.

    Args:
        x: ``[..., d]`` real.
        shifts: the number of positions, an integer of at most 32 bits or a ``[]`` integer array, which may be traced.

    Returns:
        ``[..., d]`` in the dtype of ``x``.

    Raises:
        ValueError: if ``shifts`` is not one integer, or if ``x`` has no axis.

    Example:
        >>> permute(jnp.array([1, 2, 3])).tolist(), permute(permute(jnp.array([1, 2, 3])), -1).tolist()
        ([3, 1, 2], [1, 2, 3])
    """
    array = _vectors("x", _array("x", x))
    if isinstance(shifts, jax.Array) and shifts.ndim == 0 and jnp.issubdtype(shifts.dtype, jnp.integer):
        wide = shifts.astype(jnp.int32) if shifts.dtype.itemsize < 4 else shifts  # d may not fit into fewer bits, and
        return jnp.roll(array, wide % max(array.shape[-1], 1), axis=-1)  # a traced uint32 is treated as an int32.
    return jnp.roll(array, checks.check_integer("shifts", shifts, -(2**31)), axis=-1)


def dot_similarity(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """The inner product of two hypervectors, ``sum_i x_i y_i`` (Kleyko 2022).

    For bipolar hypervectors it is the number of equal coordinates minus the number of different ones.

    Args:
        x: ``[..., d]`` real.
        y: ``[d]``, or ``[n, d]`` to compare with each of n rows; real.

    Returns:
        ``[...]``, or ``[..., n]``; f32. It overflows if products exceed 3e38.

    Raises:
        ValueError: if the shapes are not these.

    Example:
        >>> dot_similarity(jnp.array([1, 1, -1]), jnp.array([[1, 1, -1], [1, -1, 1]])).tolist()
        [3.0, -1.0]
    """
    return _dot(*_pair("x", x, "y", y))


def cosine_similarity(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """The cosine of the angle between two hypervectors, ``<x, y> / (||x|| ||y||)``; 0 if one is zero (Kleyko 2022).

    Each vector is scaled by a power of two before it is squared, so magnitudes of 1e-30 and 1e30 do no harm.

    Args:
        x: ``[..., d]`` real.
        y: ``[d]``, or ``[n, d]`` to compare with each of n rows; real.

    Returns:
        ``[...]``, or ``[..., n]``, in [-1, 1]; f32. NaN if a vector holds a NaN or an infinity.

    Raises:
        ValueError: if the shapes are not these.

    Example:
        >>> cosine_similarity(jnp.full(4, 2.0**100), jnp.array([[1, 0, 0, 0], [0, 0, 0, 0]])).tolist()
        [0.5, 0.0]
    """
    return _cosine(*_pair("x", x, "y", y))


def cleanup(x: ArrayLike, memory: ArrayLike) -> Cleanup:
    """Replaces a noisy hypervector with the most similar row of a memory: ``argmax_j cos(x, m_j)``.

    Let K bipolar pairs be bundled into d coordinates. The probability of finding a partner among n candidates is about
    that of a standard normal number plus ``sqrt(d / K)`` exceeding n - 1 others (Frady, Kleyko & Sommer 2018). For
    small K it is higher.

    Args:
        x: ``[..., d]`` real.
        memory: ``[n, d]`` real, ``n >= 1``.

    Returns:
        `Cleanup`: vector, item and similarity. Among equally similar rows, the first is returned. If ``x`` is zero, the
        item is 0 with similarity 0. If ``x`` or any row is not finite, the similarity is NaN and the item is
        meaningless.

    Raises:
        ValueError: if the shapes are not these.

    Example:
        >>> memory = random_hypervectors(jax.random.key(0), 100, 1000)
        >>> int(cleanup(bundle(memory[3:6], weights=jnp.array([1, 2, 1])), memory).item)
        4
    """
    vectors, rows = _pair("x", x, "memory", memory)
    if rows.ndim != 2 or not rows.shape[0]:
        raise ValueError(f"memory must have shape [n, d] with n >= 1, got {rows.shape}")
    similarity = _cosine(vectors, rows)
    item = jnp.argmax(similarity, axis=-1).astype(jnp.int32)
    return Cleanup(jnp.asarray(memory)[item], item, jnp.max(similarity, axis=-1))


def _inverse(x: jax.Array) -> jax.Array:
    vanishes = jnp.abs(x) < jnp.finfo(x.dtype).tiny
    return jnp.where(vanishes, 0, 1 / jnp.where(vanishes, 1, x))


def _product(**factors: jax.Array) -> jax.Array:
    (first, x), (second, y) = factors.items()
    if not _do_broadcast(x.shape, y.shape):
        raise ValueError(f"{first} and {second} must have shapes that broadcast, got {x.shape} and {y.shape}")
    return jnp.multiply(*_broadcast(x, y))


def _broadcast(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both arrays with the same number of axes and dtype, since JAX may be set to refuse implicit promotion."""
    dtype = numerics.promoted(x.dtype, y.dtype)
    num = max(x.ndim, y.ndim)
    same = [z.reshape(*[1] * (num - z.ndim), *z.shape).astype(dtype) for z in (x, y)]
    return same[0], same[1]


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum("...d,nd->...n" if y.ndim == 2 else "...d,d->...", x, y, precision=lax.Precision.HIGHEST)


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    (x, of_x), (y, of_y) = _scaled(x), _scaled(y)
    norms = jnp.multiply(*_broadcast(of_x[..., None] if y.ndim == 2 else of_x, of_y))
    return jnp.clip(_dot(x, y) / norms, -1, 1)


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each vector times a power of two that makes its largest coordinate about 1, and its new norm (1 if it is 0)."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
    x = x * jnp.ldexp(jnp.ones([], x.dtype), -numerics.power_of_two(largest))
    square = jnp.sum(x * x, axis=-1)
    return x, jnp.sqrt(jnp.where(square > 0, square, 1))


def _pair(first: str, x: ArrayLike, second: str, y: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Both operands of a similarity, checked to have shapes ``[..., d]`` and ``[d]`` or ``[n, d]``."""
    a, b = _vectors(first, _real(first, x)), _vectors(second, _real(second, y))
    if b.ndim > 2 or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"{second} must have shape [d] or [n, d] with d = {a.shape[-1]} as {first}, got {b.shape}")
    return a, b


def _vectors(name: str, x: jax.Array) -> jax.Array:
    if not x.ndim:
        raise ValueError(f"{name} must have at least one axis, got the scalar {x}")
    return x


def _real(name: str, x: ArrayLike) -> jax.Array:
    array = _array(name, x)
    return array.astype(numerics.promoted(array.dtype, jnp.float32))


def _array(name: str, x: ArrayLike) -> jax.Array:
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be an array of real numbers, got {x!r}") from None
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}")
    return array


def _do_broadcast(x: tuple[int, ...], y: tuple[int, ...]) -> bool:
    return all(a == b or 1 in (a, b) for a, b in zip(x[::-1], y[::-1], strict=False))
