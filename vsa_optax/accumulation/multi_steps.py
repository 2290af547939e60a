"""Gradient accumulation that keeps the running sum in trits: 1.6, 3.2 or 4.8 bits a parameter instead of 32.

Micro-batch gradients enter; zeros leave, and at every K-th the mean. The last of a window is added to the decoded sum
and never quantised. State cost: 0.2 bytes a trit and parameter, with the default of two a tenth of f32's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax.accumulation.inner_optimizer import RunInner
from vsa_optax.accumulation.ternary_sum import EveryK, Rounding, TernarySum, check_every_k, make_ternary_sum
from vsa_optax.core import checks, mesh
from vsa_optax.core.conditional import in_place_if, warn_of_command_buffers
from vsa_optax.core.mesh import as_varying, varying_axes
from vsa_optax.core.types import Tree


class AccumulateTernaryState(NamedTuple):
    """State of `accumulate_ternary`.

    Attributes:
        mini_step: ``[] int32``, micro-batches in the present window.
        gradient_step: ``[] int32``, means emitted so far.
        acc_grads: tree like the parameters, with a coded sum for each.
        nonfinite_count: ``[] int32``, micro-batches left out for a NaN or an infinity.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    acc_grads: Tree
    nonfinite_count: jax.Array


class TernaryMultiStepsState(NamedTuple):
    """State of `ternary_multi_steps`.

    Attributes:
        mini_step: ``[] int32``, micro-batches in the present window.
        gradient_step: ``[] int32``, updates of the inner optimizer so far.
        inner_opt_state: the inner optimizer's state.
        acc_grads: tree like the parameters, with a coded sum for each.
        skip_state: what ``should_skip_update_fn`` said last.
        nonfinite_count: ``[] int32``, micro-batches left out for a NaN or an infinity.

    With `vsa_optax.compressed_pmean` inside, each device has its own ``acc_grads`` and ``skip_state``, whose arrays
    have an axis of one device in front; the other fields are the same on all devices.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: Tree
    acc_grads: Tree
    skip_state: Tree
    nonfinite_count: jax.Array

    def fields_of_each_device(self) -> tuple[str, ...]:
        """As `core.mesh.OfEachDevice` asks for."""
        return ("acc_grads", "skip_state") if mesh.axes_in(self.inner_opt_state) else ()


class _Taken(NamedTuple):
    """What a micro-batch comes to, before it is known whether it is accepted.

    Attributes:
        grown: the sum with it.
        is_finite: ``[] bool``, whether it may be added.
        is_last: ``[] bool``, whether the window is complete with it.
        divisor: ``[] int32``, of the sum then.
    """

    grown: Tree
    is_finite: jax.Array
    is_last: jax.Array
    divisor: jax.Array


class _Window:
    """Takes one micro-batch after the other, and gives back their mean.

    A micro-batch is added before it is known to be finite, and to a sum beside the old one, of which one is kept: no
    condition comes before the end, at which a GPU would wait for the host. Also the last one of a window is added, in
    vain; its mean is made of the old sum and the gradient as it came.
    """

    def __init__(self, total: TernarySum, every_k: EveryK, use_mean: bool) -> None:
        self._total = total
        self._every_k = every_k
        self._use_mean = use_mean
        self._add = jax.jit(total.add)  # For those who do not compile their step.

    def take(self, updates: optax.Updates, acc_grads: Tree, gradient_step: jax.Array, mini_step: jax.Array) -> _Taken:
        """A micro-batch, added to the sum."""
        k = jnp.asarray(self._every_k(gradient_step), jnp.int32)
        grown, is_finite = self._add(acc_grads, updates, gradient_step, mini_step)
        return _Taken(grown, is_finite, mini_step >= k - 1, k if self._use_mean else jnp.ones_like(k))

    def finish(
        self, carry: tuple[optax.Updates, Tree], gradient_step: jax.Array, divisor: jax.Array
    ) -> tuple[optax.Updates, Tree]:
        """The mean of a window's last micro-batch and the sum of the others, and an empty sum."""
        last, acc_grads = carry
        mean = self._total.finish(last, acc_grads, gradient_step, divisor)
        # Zeros that vary over the devices of a shard_map if the sum does.
        return mean, jax.tree.map(lambda x: jnp.where(True, jnp.zeros_like(x), x), acc_grads)


def _counted(state: Tree, is_finite: jax.Array, emits: jax.Array, adds: jax.Array) -> dict[str, jax.Array]:
    """The counters of a state after a micro-batch."""
    return {
        "mini_step": jnp.where(emits, 0, state.mini_step + adds.astype(jnp.int32)),
        "gradient_step": _count_if(emits, state.gradient_step),
        "nonfinite_count": _count_if(~is_finite, state.nonfinite_count),
    }


class TernaryMultiSteps(optax.GradientTransformationExtraArgs):  # type: ignore[misc] # Optax ships no types.
    """What `ternary_multi_steps` returns: a transformation that can also be asked whether it has just updated."""

    @staticmethod
    def has_updated(state: Tree) -> jax.Array:
        """``[] bool``: whether the last update was that of the inner optimizer and not zeros."""
        if not isinstance(state, TernaryMultiStepsState):
            raise ValueError(f"state must be of type TernaryMultiStepsState, got {type(state).__name__}")
        return (state.mini_step == 0) & (state.gradient_step > 0)

    def gradient_transformation(self) -> "TernaryMultiSteps":
        """Itself, for programs that were written for ``optax.MultiSteps``, which is no transformation."""
        return self


def accumulate_ternary(
    every_k_schedule: int | EveryK,
    *,
    trits: checks.NumTrits | None = None,
    rounding: Rounding = "nearest",
    block_size: int = 1024,
    use_grad_mean: bool = True,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Emits the mean of K gradients at every K-th step, and zeros between; the running sum is kept in trits.

    What follows in the chain runs at every step, on zeros between: right for what zeros leave alone, such as plain SGD.
    To run Adam on emissions only, wrap it in `ternary_multi_steps`, which has the same arguments and errors.

    **Error.** The relative squared error of the mean of K gradients, whose last is not quantised, for gradients that
    are pure noise (each independent of the others, the worst case) and, beside it, ``v (K - 1) / 2``, which it follows
    while it is small, v being the error of quantising once:

    ==========  ======  ======  ===================  ===================  ===================
    ``trits``   bits    v       K = 2                K = 8                K = 32
    ==========  ======  ======  ===================  ===================  ===================
    1           1.62    0.190   0.095 (0.095)        0.40 (0.67)          0.70 (2.9)
    2           3.22    0.0278  0.014 (0.014)        0.085 (0.097)        0.29 (0.43)
    3           4.82    0.0035  0.0017 (0.0017)      0.0117 (0.012)       0.049 (0.054)
    ==========  ======  ======  ===================  ===================  ===================

    The more the gradients agree, the less: the error is relative to their sum. The default is the fewest that
    trained a network and a transformer to float32's loss within a standard deviation over seeds: two trits at K = 8,
    three at K = 32 (where two lost 2.8 and 4.4 standard deviations on the transformer, in two runs).

    **On a GPU** sums of large leaves are kernels of their own, as `TritCodec`'s.

    **Not finite.** A micro-batch with a NaN or an infinity, or one that would give a coded block a scale beyond 5e33,
    is left out and counted, as if it had not happened: the mean is that of K others, zeros leave, and nothing that is
    not finite enters the state. It is added before that is known: the old sum is kept beside the new one until then.

    **Many devices.** With parameters replicated, so is the sum. With parameters sharded it lies whole on every device
    all the same, and each micro-batch's gradient is gathered for it (see `TritCodec`): in two trits, over more than
    ten devices, ``optax.MultiSteps`` takes less. Inside ``jax.shard_map`` each device can sum its own shard. Gradients
    that differ between devices which share the state are to be averaged before; to average means of windows instead,
    take `ternary_multi_steps`.

    Args:
        every_k_schedule: K, an integer ``>= 1``, or a function of the gradient step that returns one, as in
            ``optax.MultiSteps``.
        trits: a coordinate, 1, 2 or 3; None takes two for K up to 8, and three for more or for a function.
        rounding: ``"nearest"``, or ``"stochastic"``, which is right on average over seeds and has 27, 6 and 4 times the
            squared error at K = 8 with 1, 2 and 3 trits.
        block_size: coordinates that share a scale, a power of two from 2 to 65536. Leaves with fewer are summed in f32.
        use_grad_mean: whether to emit the mean or the sum.
        seed: of the random rotations, one a window, ``>= 0``.

    Returns:
        A transformation whose updates have the dtypes that came in.

    State cost:
        ``(1.6 * trits + 16 / block_size) / 8`` bytes a coordinate of leaves of at least a block, 4 of smaller ones, and
        12 bytes. What is left of a leaf behind whole fives of blocks is padded to at most twice as many coordinates; of
        a leaf of at least 131,072 coordinates, and 125 blocks, to one more five, at most 4 % of the leaf.

    Raises:
        ValueError: an argument outside its range; at ``update``, gradients whose structure or shapes are not those
            given to ``init`` (another shape of the same size is seen only where ``params`` are given), or that differ
            between devices which share the state; a state that was made otherwise.
        TypeError: a leaf that is neither floating point nor complex; at ``update``, where ``params`` are given, a
            complex gradient of a real parameter, or the reverse.

    Warns:
        UserWarning: more than 32 micro-batches in one trit, if ``every_k_schedule`` is a number.

    Example:
        >>> import jax, jax.numpy as jnp, optax, vsa_optax
        >>> opt = optax.chain(vsa_optax.accumulate_ternary(4), optax.sgd(1.0))
        >>> gradients = jax.random.normal(jax.random.key(0), (4, 4096)) + 1.0
        >>> state = opt.init(gradients[0])
        >>> for gradient in gradients:
        ...     updates, state = opt.update(gradient, state)
        >>> mean = jnp.mean(gradients, axis=0)
        >>> bool(jnp.sum((updates + mean) ** 2) < 0.05 * jnp.sum(mean**2))
        True

    References:
        ``optax.MultiSteps``, whose semantics of windows these are. The rotation and the levels: see `TritCodec`.
    """
    every_k = check_every_k(every_k_schedule)
    total = make_ternary_sum(every_k_schedule, trits=trits, rounding=rounding, block_size=block_size, seed=seed)
    window = _Window(total, every_k, checks.check_bool("use_grad_mean", use_grad_mean))
    finish_if = in_place_if(window.finish)

    def init_fn(params: optax.Params) -> AccumulateTernaryState:
        warn_of_command_buffers()
        checks.check_inexact_leaves(params)
        # Of parameters that are shards, each device has its own sum.
        return AccumulateTernaryState(_zero(), _zero(), mesh.varying_like(total.zeros(params), params), _zero())

    def update_fn(
        updates: optax.Updates, state: AccumulateTernaryState, params: optax.Params | None = None, **extra_args: object
    ) -> tuple[optax.Updates, AccumulateTernaryState]:
        del extra_args
        _check_state(state, AccumulateTernaryState)
        checks.check_same_leaves(params, updates, what="gradients")
        total.check_same(state.acc_grads, updates)
        updates, acc_grads = _on_each_device(updates, state.acc_grads, state.mini_step)
        mesh.note_window(updates)
        taken = window.take(updates, acc_grads, state.gradient_step, state.mini_step)
        is_finite = mesh.all_devices_agree(taken.is_finite, _axes_to_agree_over(updates, state.mini_step))
        emits, adds = is_finite & taken.is_last, is_finite & ~taken.is_last
        held, acc_grads = finish_if(emits, (updates, acc_grads), state.gradient_step, taken.divisor)
        acc_grads = total.settle(acc_grads, taken.grown, held, adds)
        mean = jax.tree.map(lambda x: jnp.where(emits, x, jnp.zeros_like(x)), held)
        return mean, AccumulateTernaryState(acc_grads=acc_grads, **_counted(state, is_finite, emits, adds))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ternary_multi_steps(
    opt: optax.GradientTransformation,
    every_k_schedule: int | EveryK,
    use_grad_mean: bool = True,
    should_skip_update_fn: optax.ShouldSkipUpdateFunction | None = None,
    *,
    trits: checks.NumTrits | None = None,
    rounding: Rounding = "nearest",
    block_size: int = 1024,
    seed: int = 0,
) -> TernaryMultiSteps:
    """``optax.MultiSteps`` that keeps the accumulated gradient in trits, and runs ``opt`` on emitting steps only.

    Between emissions zeros leave and ``opt`` does not run, where ``MultiSteps`` runs it at every micro-batch and throws
    the result away. What the accumulated mean loses is in `accumulate_ternary`'s table. A micro-batch that is not
    finite is left out as there, whatever ``should_skip_update_fn`` says of it.

    With `vsa_optax.phase_switched` inside, its steps are emissions: all micro-batches of a PREDICT step are skipped.

    **Many devices.** In data-parallel training each device sums its own micro-batches, and only the mean of a window is
    sent, inside ``jax.shard_map`` or ``jax.pmap``, by an optimizer that averages::

        opt = ternary_multi_steps(optax.chain(compressed_pmean("data", TritCodec()), optax.adam(1e-3)), 8)

    All devices come to the end of a window at the same micro-batch: one that is not finite on some device, or that
    ``should_skip_update_fn`` wants skipped there, is left out on all, and counted by all. Otherwise some devices would
    wait in ``opt``'s collectives, for ever, for those whose window is not complete. To agree costs one number sent a
    micro-batch. The axes to agree over are those over which gradients vary, if ``shard_map`` checks replication;
    without the check, those over which ``opt`` communicates, as its state or its program says. ``jax.lax.pmean`` of the
    gradients before ``update`` needs no agreement, but sends each of them.

    With `compressed_pmean` inside, each device's sum, and what ``should_skip_update_fn`` keeps, has an axis of the
    devices in front: let `state_specs` say how ``shard_map`` lays out the state, and make it inside. A sum cannot go to
    another number of devices: there, take ``mini_step``, ``acc_grads`` and ``skip_state`` from a fresh state, which
    begins the window anew (for the residuals see `compressed_pmean`).

    Args:
        opt: the optimizer.
        every_k_schedule: see `accumulate_ternary`.
        use_grad_mean: see `accumulate_ternary`.
        should_skip_update_fn: ``(updates, gradient_step, params) -> (should_skip, skip_state)``, as in ``MultiSteps``:
            a micro-batch for which it says so counts as if it had not happened.
        trits: see `accumulate_ternary`.
        rounding: see `accumulate_ternary`.
        block_size: see `accumulate_ternary`.
        seed: see `accumulate_ternary`.

    Returns:
        A transformation that hands extra arguments to ``opt`` and has a function ``has_updated(state)``, and
        ``gradient_transformation()``, as ``MultiSteps`` has, which returns itself. Its state has the fields of
        ``MultiStepsState`` and ``nonfinite_count``. ``opt``'s state keeps its dtypes where gradients are wider than
        parameters.

    State cost:
        that of `accumulate_ternary` and ``opt``'s own.

    Raises:
        ValueError: as `accumulate_ternary`; an ``opt`` that is not a gradient transformation; a
            ``should_skip_update_fn`` that does not return a bool; at ``update``, a state that was made by
            ``optax.MultiSteps``, or for another number of devices.
        TypeError: as `accumulate_ternary`.

    Example:
        >>> import jax.numpy as jnp, optax, vsa_optax
        >>> opt = vsa_optax.ternary_multi_steps(optax.adam(0.1), 2)  # Was optax.MultiSteps(optax.adam(0.1), 2).
        >>> params = jnp.ones(3)
        >>> state = opt.init(params)
        >>> updates, state = opt.update(params, state, params)
        >>> updates.tolist(), bool(opt.has_updated(state))
        ([0.0, 0.0, 0.0], False)
        >>> updates, state = opt.update(params, state, params)
        >>> bool(jnp.all(updates < 0)), bool(opt.has_updated(state))
        (True, True)
    """
    if not (hasattr(opt, "init") and hasattr(opt, "update")):
        raise ValueError(f"opt must be an optax.GradientTransformation, got {opt!r}")
    every_k = check_every_k(every_k_schedule)
    total = make_ternary_sum(every_k_schedule, trits=trits, rounding=rounding, block_size=block_size, seed=seed)
    window = _Window(total, every_k, checks.check_bool("use_grad_mean", use_grad_mean))
    run_inner = RunInner(optax.with_extra_args_support(opt), window.finish)

    def init_fn(params: optax.Params) -> TernaryMultiStepsState:
        warn_of_command_buffers()
        checks.check_inexact_leaves(params)
        zeros = optax.tree.zeros_like(params)
        skip_state = _ask(should_skip_update_fn, zeros, jnp.zeros([], jnp.int32), params)[1]
        inner_opt_state = opt.init(params)
        own = mesh.varying_like(total.zeros(params), params), skip_state
        if axes := mesh.axes_in(inner_opt_state):
            own = mesh.with_axis_in_front(own)
            # Else a loop inside shard_map could not carry it.
            if mesh.is_mapped(tuple(axes)) and mesh.is_checked(axes):
                own = jax.tree.map(lambda x: as_varying(x, axes), own)
        return TernaryMultiStepsState(_zero(), _zero(), inner_opt_state, *own, _zero())

    def update_fn(
        updates: optax.Updates, state: TernaryMultiStepsState, params: optax.Params | None = None, **extra_args: object
    ) -> tuple[optax.Updates, TernaryMultiStepsState]:
        _check_state(state, TernaryMultiStepsState)
        acc_grads, is_of_each_device = state.acc_grads, bool(state.fields_of_each_device())
        if is_of_each_device:
            acc_grads = mesh.of_this_device("acc_grads", acc_grads)
        checks.check_same_leaves(params, updates, what="gradients")
        should_skip, skip_state = _ask(should_skip_update_fn, updates, state.gradient_step, params)
        total.check_same(acc_grads, updates)
        updates, acc_grads = _on_each_device(updates, acc_grads, state.mini_step)
        outcome = run_inner.look(updates, state.inner_opt_state, params, extra_args)
        taken = window.take(updates, acc_grads, state.gradient_step, state.mini_step)
        is_finite, is_accepted = taken.is_finite, taken.is_finite & ~should_skip
        if axes := _axes_to_agree_over((updates, is_accepted), state.mini_step, outcome.axes):
            is_finite, is_accepted = mesh.all_devices_agree(jnp.stack([is_finite, is_accepted]), axes)
        else:
            mesh.note_window(updates)
        emits, adds = is_accepted & taken.is_last, is_accepted & ~taken.is_last
        window_of = state.gradient_step, taken.divisor
        new_updates, updates, acc_grads, inner_opt_state = run_inner(
            emits, updates, acc_grads, window_of, state.inner_opt_state, params, extra_args, outcome
        )
        own = total.settle(acc_grads, taken.grown, updates, adds), skip_state
        if is_of_each_device:
            own = mesh.varying_like(mesh.with_axis_in_front(own), (state.acc_grads, state.skip_state))
        return new_updates, TernaryMultiStepsState(
            inner_opt_state=inner_opt_state,
            acc_grads=own[0],
            skip_state=own[1],
            **_counted(state, is_finite, emits, adds),
        )

    return TernaryMultiSteps(init_fn, update_fn)


def _check_state(state: object, kind: type) -> None:
    if isinstance(state, kind):
        return
    is_theirs = isinstance(state, optax.MultiStepsState)
    found = "one that was made by optax.MultiSteps" if is_theirs else type(state).__name__
    raise ValueError(f"state must be of type {kind.__name__}, got {found}: start from opt.init(params)")


def _on_each_device(updates: optax.Updates, acc_grads: Tree, mini_step: jax.Array) -> tuple[optax.Updates, Tree]:
    """Both, varying over the same axes; ``ValueError`` if gradients vary over more than the sum."""

    def varying(gradient: jax.Array, part: Tree) -> jax.Array:
        if differing := varying_axes(gradient) - varying_axes(part) - varying_axes(mini_step):
            raise ValueError(
                f"gradients differ between the devices along {sorted(differing)}, but the state has one sum for all. "
                "Average them before update (jax.lax.pmean), or only once a window is complete: "
                "ternary_multi_steps(optax.chain(compressed_pmean(...), opt), k), with a state made inside shard_map "
                "and laid out by state_specs, which has a sum for each device"
            )
        return as_varying(gradient, varying_axes(part))

    if not varying_axes((updates, acc_grads)):
        return updates, acc_grads
    updates = jax.tree.map(varying, updates, acc_grads)
    return updates, mesh.varying_like(acc_grads, updates)


def _axes_to_agree_over(tree: Tree, mini_step: jax.Array, communicated: frozenset[str] = frozenset()) -> frozenset[str]:
    """The mesh axes along which a window has to be one, but ``tree`` may differ.

    These are the axes along which devices share the window, and those along which they communicate when it is complete:
    without a check of replication nothing else is known.
    """
    shared = varying_axes(tree) - varying_axes(mini_step)
    return shared | (communicated & varying_axes((tree, mini_step)) if mesh.is_checked(communicated) else communicated)


def _ask(
    fun: optax.ShouldSkipUpdateFunction | None,
    updates: optax.Updates,
    gradient_step: jax.Array,
    params: optax.Params | None,
) -> tuple[jax.Array, Tree]:
    """What ``should_skip_update_fn`` says: ``[] bool``, and a tree to keep."""
    if fun is None:
        return jnp.array(False), ()
    should_skip, skip_state = fun(updates, gradient_step, params)
    should_skip = jnp.asarray(should_skip)
    if should_skip.shape != () or should_skip.dtype != jnp.bool_:
        raise ValueError(
            "should_skip_update_fn must return one bool first, got an array of shape "
            f"{should_skip.shape} and dtype {should_skip.dtype}"
        )
    return should_skip, skip_state


def _zero() -> jax.Array:
    # A new one for each counter: one buffer cannot be donated twice.
    return jnp.zeros([], jnp.int32)


def _count_if(pred: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(pred, optax.safe_increment(count), count)
