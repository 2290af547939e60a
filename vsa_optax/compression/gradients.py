"""A codec as a link of an ``optax.chain``, which emits the decoded gradient that a receiver would get.

State cost: 8 bytes; error feedback adds 4 bytes per parameter (8 for float64 and complex64, 16 for complex128).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax.codecs import codec as codecs
from vsa_optax.codecs.hypervector import HypervectorCodec
from vsa_optax.core import checks
from vsa_optax.core.trees import all_finite, tree_where
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics


class CompressState(NamedTuple):
    """State of `compress_gradients`.

    Attributes:
        step: ``[] int32``, the number of updates so far, which selects the codec's random key.
        nonfinite_count: ``[] int32``, the number of updates that held a NaN or an infinity.
        residual: tree of ``[*shape]`` in at least float32, the part not sent yet; None without error feedback.
    """

    step: jax.Array
    nonfinite_count: jax.Array
    residual: Tree


def compress_gradients(codec: codecs.Codec, *, error_feedback: bool = False) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients with their encoded and decoded values.

    Without error feedback it emits ``decode(encode(g, t))``. With error feedback, the coding error is added to the next
    gradient:

        x_t = g_t + e_t,    sent_t = decode(encode(x_t, t)),    e_{t+1} = x_t - sent_t

    Everything is then sent eventually: at any time ``sum sent + e = sum g``, up to rounding. In front of Adam at the
    best learning rate, error feedback did not help with `vsa_optax.TritCodec` and did harm with
    `vsa_optax.HypervectorCodec`.

    Nothing is communicated. The transformation has the numerical effect of a codec, so that its effect on training can
    be tested.

    A gradient with a NaN or an infinity is counted and not added to the residual. It is emitted as the codec decodes
    it: as NaN in its whole block (`vsa_optax.TritCodec`) or in the whole tree (`vsa_optax.HypervectorCodec`).

    Args:
        codec: `vsa_optax.TritCodec`, `vsa_optax.HypervectorCodec`, or an object with their methods.
        error_feedback: whether to add the coding error to the next gradient. The error must be smaller than the
            gradient, so ``HypervectorCodec(shrink=False)`` is not allowed.

    Returns:
        A transformation whose updates keep the dtypes of the gradients. It ignores parameters and extra arguments.

    State cost:
        8 bytes; error feedback adds 4 bytes per parameter (8 for float64 and complex64, 16 for complex128).

    Raises:
        ValueError: if ``codec`` is not a codec, if ``error_feedback`` is not a bool, or if the codec does not allow
            error feedback; with error feedback at ``update``, if structure or shapes of the gradients differ from those
            given to ``init``.
        TypeError: if a leaf is neither floating point nor complex.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> codec = vsa_optax.TritCodec(trits=1)
        >>> opt = optax.chain(vsa_optax.compress_gradients(codec, error_feedback=True), optax.sgd(0.1))
        >>> params = jax.random.normal(jax.random.key(0), (4096,))
        >>> state = opt.init(params)
        >>> for _ in range(60):
        ...     updates, state = opt.update(params, state)  # The gradient of |params|^2 / 2.
        ...     params = optax.apply_updates(params, updates)
        >>> bool(jnp.max(jnp.abs(params)) < 0.05)
        True

    References:
        Seide et al., "1-bit stochastic gradient descent" (2014): error feedback. Karimireddy et al., "Error feedback
        fixes SignSGD" (arXiv 1901.09847), algorithm 2: here, it is applied to the gradient without the learning rate.
    """
    check_feedback(codec, error_feedback)

    def init_fn(params: optax.Params) -> CompressState:
        checks.check_inexact_leaves(params)
        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=_wide(leaf)), params)
        # Two separate arrays, since one buffer cannot be donated twice.
        return CompressState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), zeros if error_feedback else None)

    def update_fn(
        updates: optax.Updates, state: CompressState, params: optax.Params | None = None, **extra_args: object
    ) -> tuple[optax.Updates, CompressState]:
        del params, extra_args
        pending = updates
        if error_feedback:
            checks.check_same_tree(state.residual, updates, what="gradients")
            pending = jax.tree.map(lambda g, e: jnp.asarray(g, e.dtype) + e, updates, state.residual)
        decoded = codec.decode(codec.encode(pending, state.step))
        sent = jax.tree.map(lambda d, g: codecs.as_decoded(d, codecs.spec_of(g)), decoded, updates)
        lost = jax.tree.map(lambda x, s: x - s.astype(x.dtype), pending, sent) if error_feedback else None
        is_finite = all_finite(lost if error_feedback else updates)
        residual = tree_where(is_finite, lost, state.residual) if error_feedback else None
        return sent, CompressState(
            optax.safe_increment(state.step),
            jnp.where(is_finite, state.nonfinite_count, optax.safe_increment(state.nonfinite_count)),
            residual,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_feedback(codec: codecs.Codec, error_feedback: bool) -> None:
    """``ValueError`` unless ``codec`` is a codec that allows the requested error feedback."""
    codecs.check_codec("codec", codec)
    checks.check_bool("error_feedback", error_feedback)
    if error_feedback and isinstance(codec, HypervectorCodec) and not codec.shrink:
        raise ValueError(
            "error_feedback must be False with HypervectorCodec(shrink=False), whose error exceeds the gradient: the "
            "residual would grow without bound"
        )


def _wide(leaf: jax.typing.ArrayLike) -> jnp.dtype:
    return numerics.promoted(jnp.result_type(leaf), jnp.float32)
