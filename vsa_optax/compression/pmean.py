"""The mean of gradients over devices, sent in a codec's bits; used inside ``jax.shard_map``.

State cost: 8 bytes; with error feedback 4 bytes a parameter more on each device.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from vsa_optax.codecs import codec as codecs
from vsa_optax.compression import averaging
from vsa_optax.compression.gradients import check_feedback
from vsa_optax.core import checks
from vsa_optax.core.mesh import (
    MeshAxes,
    OfEachDevice,
    all_devices_agree,
    as_varying,
    follows_window,
    is_checked,
    is_mapped,
    of_this_device,
    varying_axes,
)
from vsa_optax.core.trees import tree_where
from vsa_optax.core.types import Tree

Found = TypeVar("Found")


class CompressedPmeanState(NamedTuple):
    """State of `compressed_pmean`.

    Attributes:
        step: ``[] int32``, updates so far; it chooses the codec's random keys.
        nonfinite_count: ``[] int32``, how many of them held a NaN or an infinity on some device.
        residual: tree of ``[1, *shape]`` in float32 or complex64, what a device has not sent yet, its own on each; None
            without error feedback. The other fields are the same on all devices.
        axes: static, the mesh axes.
    """

    step: jax.Array
    nonfinite_count: jax.Array
    residual: Tree
    axes: MeshAxes

    def fields_of_each_device(self) -> tuple[str, ...]:
        """As `core.mesh.OfEachDevice` asks for."""
        return ("residual",)


def compressed_pmean(
    axis_name: str | tuple[str, ...],
    codec: codecs.Codec,
    *,
    error_feedback: bool = False,
    bucket_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Averages gradients over devices, as ``jax.lax.pmean`` does, but what it sends is a codec's payloads.

    To be used inside ``jax.shard_map``, whose replication check may stay on, at the head of an ``optax.chain``:
    gradients of each device enter, their mean leaves, the same bits on all devices. On n devices:

        own mean of row r:  m_r = (g_{r,r} + sum_{i != r} decode(encode(g_{i,r}))) / n
        what leaves:        decode(encode(m_r)), r = 0 ... n - 1

    where ``g_{i,r}`` is the r-th of n parts of device i's gradient; device r averages it. Leaves are put into one flat
    vector first, the bucket. It is coded as a whole, and payloads go by two collectives of bytes, an ``all_to_all`` and
    an ``all_gather`` (two of these on two devices), whatever the number of leaves. Each device and each stage has keys
    of its own, so that errors average out: with vNMSE for the squared relative error of an unbiased codec (see
    `TritCodec`) the mean's is

        E ||m - mean||^2 = (n - 1) / n^2 * vNMSE * mean ||g_i||^2
        E ||sent - mean||^2 = E ||m - mean||^2 + vNMSE * E ||m||^2

    with the norm of m as it is: a codec that loses least shrinks what it codes. On independent gradients that is what
    eight devices have, to a thousandth: 0.0405 of ``mean ||g_i||^2`` with one trit, 0.0064 with two.

    With `HypervectorCodec` the hypervector itself is summed, by one ``psum``, and errors do not average out.

    **Bytes.** Each device sends ``2 * (n - 1) / n`` payloads of its gradient: of what ``pmean`` sends in float32, 5.1 %
    with one trit and 10.1 % with two. All leaves are coded, those of fewer than a block included. To leave some out,
    average them by ``jax.lax.pmean`` and keep them from this with ``optax.masked``. Only a whole tree so small that its
    rows would take more bytes in trits is sent as it is.

    **Neighbours.** Coordinates of one block share a scale. Leaves of 16 blocks or more come first, in the order of the
    tree; of their coordinates at most an eighth is in blocks that they share. Smaller leaves follow, the largest first.
    Among them a leaf whose gradient is small beside that of its neighbours drowns in their noise.

    **Buckets.** With ``bucket_bytes`` there are several buckets of at most that size, each with two collectives and
    random keys of its own. A bucket's exchange can then begin as soon as the gradients in it are known, beside the rest
    of the backward pass and the coding of other buckets, if XLA schedules it so. A bucket is a copy of the gradient, 4
    bytes a parameter while it lives, and so are its rows and its decoded mean. Only those of one bucket need
    to live at once, but XLA decides that. Each bucket takes time to compile and to launch: choose tens of MiB.

    **Error feedback.** With ``error_feedback=True`` what a device's code lost is added to its next gradient; what the
    second code of an average lost, to the next one of the device that averages. At any time, up to rounding,

        sum over steps of what left + mean over devices of the residuals = sum over steps of the mean gradient

    Errors of fresh rotations average out without it. In front of Adam it did harm where that was measured: one trit's
    final loss was 2 % higher with it (``benchmarks/collectives.log``).

    **Not finite.** One device's NaN or infinity skips the step on all devices: it is counted by each, residuals stay,
    and zeros leave. None waits for another, since all go through the same collectives whatever they hold.

    **Gradients of each device.** Inside ``shard_map`` JAX sums up, in full, gradients of parameters that are the same
    on all devices. Make the parameters vary first (see the example); gradients that do not vary are refused.

    **With phases**, ``phase_switched(optax.chain(compressed_pmean(...), optax.adamw(1.0)), learning_rate=...,
    predictor=Window())`` communicates in true steps only.

    **With micro-batches**, each device sums its own, and one mean of a window is sent instead of K:
    ``ternary_multi_steps(optax.chain(compressed_pmean(...), opt), k)``. Gradients of a window that does not know which
    devices share it, as that of `accumulate_ternary` before this in a chain, are refused.

    **State on many devices.** Residuals differ by device. Let `state_specs` say how ``shard_map`` lays out a state, and
    make it by ``jax.shard_map(opt.init, mesh=mesh, in_specs=P(), out_specs=specs)``.

    **Another number of devices.** Only the residuals' mean over devices matters, so each device may start with it. With
    ``fresh``, the state made on the new devices, a checkpoint of eight devices goes on by::

        of_8 = jax.tree.map(lambda e: np.zeros((8, *e.shape[1:]), e.dtype), fresh.residual)
        step, saved = checkpoint.restore(folder, fresh._replace(residual=of_8))
        means = jax.tree.map(lambda e, new: np.broadcast_to(e.mean(0), new.shape), saved.residual, fresh.residual)
        layouts = jax.tree.map(lambda new: new.sharding, fresh.residual)
        state = saved._replace(residual=jax.device_put(means, layouts))

    **Before JAX 0.10.0**, whose ``all_gather`` cannot promise that its result is the same everywhere, the second stage
    takes twice the bytes unless ``shard_map`` is told not to check replication.

    Arithmetic is f32. One device sends nothing, so it encodes nothing, and gradients leave as they came, to f32.

    **A tree's order matters.** Random keys belong to places in a bucket: other leaves, or another ``bucket_bytes``, are
    other keys, hence other errors of the same size. Residuals do not depend on buckets.

    Args:
        axis_name: of the mesh axis to average over, or a tuple of names.
        codec: `TritCodec`, `HypervectorCodec`, or an object with their methods; small arrays are those below its
            ``block_size``, if it has one.
        error_feedback: whether to carry over what was lost. It needs a codec that loses less than there was:
            ``HypervectorCodec(shrink=False)`` is refused.
        bucket_bytes: of a bucket, at most, counted in f32, ``>= 4 * block_size * n``; with `HypervectorCodec`
            each bucket becomes a hypervector of its own. None puts all leaves into one bucket.

    Returns:
        A transformation whose updates have the dtypes that came in. It ignores parameters and extra arguments.

    State cost:
        8 bytes; with error feedback 4 bytes a parameter more on each device (8 if complex). During an update a bucket
        is in memory several times: 20 bytes a parameter of it on eight devices of a CPU, less on a GPU.

    Raises:
        ValueError: an argument outside its range; at ``update``, outside ``shard_map`` over ``axis_name``, gradients
            that are already the same on all devices, that come out of a window of micro-batches, or whose structure or
            shapes are not those given to ``init``, if there is a residual to compare them with; a residual of another
            number of devices; buckets without a block for each device.
        TypeError: a leaf that is neither floating point nor complex.

    Example:
        In a training step, ``shard_map`` with ``in_specs=(P(), specs, P("data"))`` and ``out_specs=(P(), specs)``::

            def train_step(params, opt_state, batch):
                own = jax.lax.pcast(params, "data", to="varying")
                updates, opt_state = opt.update(jax.grad(loss)(own, batch), opt_state, params)
                return optax.apply_updates(params, updates), opt_state

        Eight devices in the place of which there is ``jax.vmap``:

        >>> import jax, jax.numpy as jnp, vsa_optax
        >>> opt = vsa_optax.compressed_pmean("data", vsa_optax.TritCodec(trits=2))
        >>> grads = jax.random.normal(jax.random.key(0), (8, 10_000))
        >>> state = jax.vmap(opt.init)(grads)
        >>> sent, state = jax.jit(jax.vmap(opt.update, axis_name="data"))(grads, state)
        >>> error = jnp.sum((sent[0] - grads.mean(axis=0)) ** 2) / jnp.sum(grads**2) * 8
        >>> bool(jnp.all(sent == sent[0])), bool(error < 0.03 / 4)
        (True, True)

    References:
        Two-stage compressed averaging with error feedback in each: Tang et al., "DoubleSqueeze" (arXiv 1905.05957);
        as a reduce-scatter and an all-gather: Tang et al., "1-bit Adam" (arXiv 2102.02888), section 5. Independent
        rotations: Vargaftik et al., "EDEN" (arXiv 2108.08842).
    """
    axes = _check_axis_name(axis_name)
    check_feedback(codec, error_feedback)
    if bucket_bytes is not None:
        checks.check_integer("bucket_bytes", bucket_bytes, 4)

    def init_fn(params: optax.Params) -> CompressedPmeanState:
        checks.check_inexact_leaves(params)
        residual = jax.tree.map(_no_residual, params) if error_feedback else None
        # Else a loop inside shard_map could not carry it.
        if is_mapped(axes) and is_checked(frozenset(axes)):
            residual = jax.tree.map(lambda e: as_varying(e, frozenset(axes)), residual)
        # Two arrays: one buffer cannot be donated twice.
        return CompressedPmeanState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), residual, MeshAxes(axes))

    def update_fn(
        updates: optax.Updates, state: CompressedPmeanState, params: optax.Params | None = None, **extra_args: object
    ) -> tuple[optax.Updates, CompressedPmeanState]:
        del params, extra_args
        checks.check_inexact_leaves(updates)
        if error_feedback:
            checks.check_same_tree(state.residual, updates, what="gradients", leading_axes=1)
        leaves, treedef = jax.tree.flatten(updates)
        _check_of_each_device(updates, axes, update_fn)
        specs = [codecs.spec_of(leaf) for leaf in leaves]
        pending = [codecs.as_reals(leaf) for leaf in leaves]
        if error_feedback:
            kept = [codecs.as_reals(e) for e in jax.tree.leaves(of_this_device("residual", state.residual))]
            pending = [x + e for x, e in zip(pending, kept, strict=True)]

        means, unsent, is_finite, num_buckets = averaging.averaged(
            axes, codec, pending, specs, state.step, bucket_bytes, keeps_unsent=error_feedback
        )
        # What varies over other axes, too, may be finite on some devices along them only.
        more_axes = varying_axes(is_finite) - varying_axes(state.step)
        is_finite = all_devices_agree(is_finite, more_axes)
        sent = [codecs.as_decoded(codecs.from_reals(x, spec), spec) for x, spec in zip(means, specs, strict=True)]
        if num_buckets > 1 or more_axes:  # One bucket is zeros already.
            sent = [jnp.where(is_finite, leaf, jnp.zeros_like(leaf)) for leaf in sent]
        residual = state.residual
        if error_feedback:
            lost = [codecs.from_reals(x, spec)[None] for x, spec in zip(unsent, specs, strict=True)]
            residual = tree_where(is_finite, jax.tree.unflatten(treedef, lost), residual)
        return jax.tree.unflatten(treedef, sent), CompressedPmeanState(
            optax.safe_increment(state.step),
            jnp.where(is_finite, state.nonfinite_count, optax.safe_increment(state.nonfinite_count)),
            residual,
            state.axes,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def state_specs(opt_state: Tree, axis_name: str | tuple[str, ...]) -> Tree:
    """For each array of an optimizer's state, how ``shard_map`` has to lay it out.

    What a device keeps for itself has the axis in front, ``PartitionSpec(axis_name)``: the residuals of
    `compressed_pmean`, and the sum of a `ternary_multi_steps` around it. Everything else is the same on all devices,
    ``PartitionSpec()``.

    Args:
        opt_state: the state's shapes, as ``jax.eval_shape(opt.init, params)`` gives them, or a state that was made
            inside ``shard_map``.
        axis_name: as given to `compressed_pmean`.

    Returns:
        A tree of the state's structure, for ``in_specs`` and ``out_specs``.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> compressed = vsa_optax.compressed_pmean("data", vsa_optax.TritCodec(), error_feedback=True)
        >>> opt = optax.chain(compressed, optax.sgd(0.1))
        >>> specs = vsa_optax.state_specs(jax.eval_shape(opt.init, jnp.zeros(3)), "data")
        >>> specs[0].residual == jax.sharding.PartitionSpec("data"), specs[0].step == jax.sharding.PartitionSpec()
        (True, True)

    Raises:
        ValueError: an ``axis_name`` that is not the one a `compressed_pmean` in the state was made with; on several
            devices, a state that was made outside ``shard_map`` and has but one device's residuals or sum.
    """
    axes = _check_axis_name(axis_name)

    def specs_of(node: Tree) -> Tree:
        if not _is_of_each_device(node):
            return PartitionSpec()
        if isinstance(node, CompressedPmeanState) and node.axes.names != axes:
            made_with = ", ".join(map(repr, node.axes.names))
            raise ValueError(f"axis_name must be {made_with}, with which the state was made, got {axis_name!r}")
        own = node.fields_of_each_device()
        specs = {
            name: jax.tree.map(specs_of, part, is_leaf=_is_of_each_device)
            for name, part in node._asdict().items()
            if name not in own
        }
        for name in own:
            _check_made_inside(name, getattr(node, name), axes)
            specs[name] = jax.tree.map(lambda _: PartitionSpec(axis_name), getattr(node, name))
        return node._replace(**specs)

    return jax.tree.map(specs_of, opt_state, is_leaf=_is_of_each_device)


def _is_of_each_device(node: object) -> bool:
    return isinstance(node, OfEachDevice)


def _check_made_inside(name: str, part: Tree, axes: tuple[str, ...]) -> None:
    """``ValueError`` if there is one device's array where each of several devices has to have one.

    Shapes, as ``jax.eval_shape`` gives them, do not tell; nor is there a difference if there is but one device.
    """
    for leaf in jax.tree.leaves(part):
        is_known = isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, jax.core.Tracer)
        if is_known and leaf.shape[0] == 1 and not _is_laid_out_on_one(leaf, axes) and jax.device_count() > 1:
            raise ValueError(
                f"opt_state must be made inside jax.shard_map, where each device gets {name} of its own; here is that "
                "of one device. Write specs = state_specs(jax.eval_shape(opt.init, params), "
                f"{(axes[0] if len(axes) == 1 else axes)!r}) and "
                "opt_state = jax.jit(jax.shard_map(opt.init, mesh=mesh, in_specs=PartitionSpec(), out_specs=specs))"
                "(params)"
            )


def _is_laid_out_on_one(leaf: ArrayLike, axes: tuple[str, ...]) -> bool:
    """Whether the array lies on a mesh that has one device along ``axes``."""
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and all(sharding.mesh.shape.get(name) == 1 for name in axes)


def _no_residual(leaf: ArrayLike) -> jax.Array:
    dtype = jnp.complex64 if jnp.iscomplexobj(leaf) else jnp.float32
    return jnp.zeros_like(leaf, dtype=dtype)[None]


def _check_axis_name(axis_name: str | tuple[str, ...]) -> tuple[str, ...]:
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"axis_name must be the name of a mesh axis, or a tuple of different names, got {axis_name!r}")
    return names


def _check_of_each_device(updates: optax.Updates, axes: tuple[str, ...], link: object) -> None:
    """``ValueError`` if gradients are the same on all devices already, or are not of the same steps on all."""
    is_known = is_checked(frozenset(axes))
    if follows_window(updates, link):
        raise ValueError(
            "gradients must be those of the same micro-batches on all devices, got those of accumulate_ternary or "
            "ternary_multi_steps, which do not know which devices share their window: it is complete later on one that "
            "leaves out a NaN. Average inside, where they know: "
            "ternary_multi_steps(optax.chain(compressed_pmean(...), opt), k)"
        )
    # JAX has summed them, in full.
    leaves = jax.tree.leaves(updates)
    summed = set(axes) - varying_axes(leaves)
    if is_known and summed and leaves:
        raise ValueError(
            f"gradients must be those of each device, got some that are the same along {sorted(summed)}. JAX sums up "
            "the gradients of parameters that are: make those vary before differentiating, with jax.lax.pcast(params, "
            "axis_name, to='varying'); or remove the jax.lax.pmean before update, if there is one"
        )
