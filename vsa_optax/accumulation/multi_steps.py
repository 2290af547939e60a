"""Gradient accumulation that keeps the running sum in trits: 1.6, 3.2 or 4.8 bits a parameter instead of 32.

At every K-th micro-batch gradient the mean is emitted, and zeros before. The last gradient of a window is added to the
decoded sum and never quantised. State cost: 0.2 bytes a parameter for each trit; with the default of two trits, a tenth
of f32's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax.accumulation.inner_optimizer import RunInner
from vsa_optax.accumulation.ternary_sum import EveryK, Rounding, TernarySum, check_every_k, make_ternary_sum
from vsa_optax.core import checks, kinds, mesh
from vsa_optax.core.conditional import in_place_if, warn_of_command_buffers
from vsa_optax.core.kinds import StepKind
from vsa_optax.core.mesh import as_varying, varying_axes
from vsa_optax.core.trees import zeros_unless
from vsa_optax.core.types import Tree

# If windows have one micro-batch, a host with `vsa_optax.jit_by_phase` asks for K again after so many.
_WINDOWS_OF_ONE = 32


class AccumulateTernaryState(NamedTuple):
    """State of `accumulate_ternary`.

    Attributes:
        mini_step: ``[] int32``, the number of micro-batches in the present window.
        gradient_step: ``[] int32``, the number of means emitted so far.
        acc_grads: tree like the parameters, with a coded sum for each.
        nonfinite_count: ``[] int32``, the number of micro-batches left out because of a NaN or an infinity.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    acc_grads: Tree
    nonfinite_count: jax.Array

    def marks(self) -> kinds.Marks:
        """The arrays on which the kinds of the coming steps depend, for `core.kinds`."""
        return self.mini_step, self.gradient_step


class TernaryMultiStepsState(NamedTuple):
    """State of `ternary_multi_steps`.

    Attributes:
        mini_step: ``[] int32``, the number of micro-batches in the present window.
        gradient_step: ``[] int32``, the number of updates of the inner optimizer so far.
        inner_opt_state: the inner optimizer's state.
        acc_grads: tree like the parameters, with a coded sum for each.
        skip_state: the last state that ``should_skip_update_fn`` returned.
        nonfinite_count: ``[] int32``, the number of micro-batches left out because of a NaN or an infinity.

    With `vsa_optax.compressed_pmean` inside, each device has its own ``acc_grads`` and ``skip_state``, whose arrays
    have a leading axis for the devices; the other fields are the same on all devices.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: Tree
    acc_grads: Tree
    skip_state: Tree
    nonfinite_count: jax.Array

    def marks(self) -> kinds.Marks:
        """The arrays on which the kinds of the coming steps depend, for `core.kinds`."""
        return self.mini_step, self.gradient_step

    def fields_of_each_device(self) -> tuple[str, ...]:
        """The names of the fields that differ between devices, for `core.mesh.OfEachDevice`."""
        return ("acc_grads", "skip_state") if mesh.axes_in(self.inner_opt_state) else ()


class _Taken(NamedTuple):
    """The result of adding a micro-batch, before it is known whether it is accepted.

    Attributes:
        grown: the sum including the micro-batch.
        is_finite: ``[] bool``, whether it may be added.
        is_last: ``[] bool``, whether it completes the window.
        divisor: ``[] int32``, the divisor of the complete sum.
    """

    grown: Tree
    is_finite: jax.Array
    is_last: jax.Array
    divisor: jax.Array


class _Window:
    """Takes one micro-batch after the other, and returns their mean.

    A micro-batch is added before it is known to be finite. The new sum is kept beside the old one until then, so no
    condition comes before the end, at which a GPU would wait for the host. The last micro-batch of a window is also
    added, without use: the mean is computed from the old sum and the unquantised gradient.

    In a program of `vsa_optax.jit_by_phase` for micro-batches that are not the last, there is no condition at all.
    """

    def __init__(self, total: TernarySum, every_k: EveryK, use_mean: bool) -> None:
        self._total = total
        self._every_k = every_k
        self._use_mean = use_mean
        self._add = jax.jit(total.add)  # This is for steps that are not compiled.

    def take(self, updates: optax.Updates, acc_grads: Tree, gradient_step: jax.Array, mini_step: jax.Array) -> _Taken:
        """Adds a micro-batch to the sum."""
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

    def forecast(self, before: Tree, after: Tree) -> None:
        """Forecasts the coming micro-batches in a program of `vsa_optax.jit_by_phase`, from the states of a step."""
        if assumption := kinds.assumption_for(before.marks()):
            k = jnp.asarray(self._every_k(after.gradient_step), jnp.int32)
            num_before_last = jnp.maximum(k - 1 - after.mini_step, 0)
            num_undecided = jnp.where(k == 1, _WINDOWS_OF_ONE, 1)
            assumption.marks_after = after.marks()
            assumption.forecast = kinds.runs(
                (StepKind.ACCUMULATED, num_before_last), (StepKind.UNDECIDED, num_undecided)
            )


def _counted(state: Tree, is_finite: jax.Array, emits: jax.Array, adds: jax.Array) -> dict[str, jax.Array]:
    """The counters of a state after a micro-batch."""
    return {
        "mini_step": jnp.where(emits, 0, state.mini_step + adds.astype(jnp.int32)),
        "gradient_step": _count_if(emits, state.gradient_step),
        "nonfinite_count": _count_if(~is_finite, state.nonfinite_count),
    }


class TernaryMultiSteps(optax.GradientTransformationExtraArgs):  # type: ignore[misc] # Optax ships no types.
    """The transformation that `ternary_multi_steps` returns; `has_updated` shows whether it has just updated."""

    @staticmethod
    def has_updated(state: Tree) -> jax.Array:
        """``[] bool``: whether the last update was that of the inner optimizer instead of zeros."""
        if not isinstance(state, TernaryMultiStepsState):
            raise ValueError(f"state must be of type TernaryMultiStepsState, got {type(state).__name__}")
        return (state.mini_step == 0) & (state.gradient_step > 0)

    def gradient_transformation(self) -> "TernaryMultiSteps":
        """Returns itself, for programs written for ``optax.MultiSteps``, which is not itself a transformation."""
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

    The following links of the chain run at every step, on zeros between emissions. This is right for optimizers that
    zeros do not change, such as plain SGD. To run Adam on emissions only, wrap it in `vsa_optax.ternary_multi_steps`,
    which has the same arguments and errors.

    **Error.** The table has the relative squared error of the mean of K gradients, the last of which is not quantised,
    for the worst case: independent gradients of pure noise. In parentheses is ``v (K - 1) / 2``, which the error
    follows while it is small; v is the error of one quantisation:

    ==========  ======  ======  ===================  ===================  ===================
    ``trits``   bits    v       K = 2                K = 8                K = 32
    ==========  ======  ======  ===================  ===================  ===================
    1           1.62    0.190   0.095 (0.095)        0.40 (0.67)          0.70 (2.9)
    2           3.22    0.0278  0.014 (0.014)        0.085 (0.097)        0.29 (0.43)
    3           4.82    0.0035  0.0017 (0.0017)      0.0117 (0.012)       0.049 (0.054)
    ==========  ======  ======  ===================  ===================  ===================

    The error is relative to the sum of the gradients, so it is smaller if the gradients agree. The default is the
    smallest number of trits with which a network and a transformer reached float32's loss within a standard deviation
    over seeds. It is two trits at K = 8 and three at K = 32, where two trits lost 2.8 and 4.4 standard deviations on
    the transformer, in two runs.

    **On a GPU**, custom kernels sum large leaves, as in `vsa_optax.TritCodec`. A GPU stops in each step to ask whether
    the window is complete, unless the step is compiled by `vsa_optax.jit_by_phase`.

    **Non-finite values.** A micro-batch with a NaN or an infinity, or one that would give a coded block a scale beyond
    5e33, is left out and counted. Zeros are emitted, the mean is that of K other micro-batches, and no non-finite value
    enters the state. The old sum is kept beside the new one until the latter is known to be finite.

    **Many devices.** The sum is replicated, even if parameters are sharded. Each micro-batch's gradient is then
    gathered, as in `vsa_optax.TritCodec`. With two trits and more than ten devices, ``optax.MultiSteps`` takes less
    memory. Inside ``jax.shard_map`` each device can sum its own shard. If devices share the state, average gradients
    over them first, or use `vsa_optax.ternary_multi_steps`, which can average means of windows instead.

    Args:
        every_k_schedule: K, an integer ``>= 1``, or a function of the gradient step that returns one, as in
            ``optax.MultiSteps``.
        trits: the number of trits per coordinate, 1, 2 or 3; None takes two for K up to 8, and three for more or for a
            function.
        rounding: ``"nearest"``, or ``"stochastic"``, which is unbiased over seeds and has 27, 6 and 4 times the squared
            error at K = 8 with 1, 2 and 3 trits.
        block_size: the number of coordinates that share a scale, a power of two from 2 to 65536. Leaves with fewer
            coordinates are summed in f32.
        use_grad_mean: whether to emit the mean instead of the sum.
        seed: the seed of the random rotations, one per window, ``>= 0``.

    Returns:
        A transformation whose updates keep the dtypes of the gradients.

    State cost:
        ``(1.6 * trits + 16 / block_size) / 8`` bytes a coordinate of leaves of at least a block, 4 bytes of smaller
        ones, and 12 bytes. The remainder of a leaf after whole groups of five blocks is padded to at most twice as many
        coordinates. In a leaf of at least 131,072 coordinates and 125 blocks, it is padded to one more group of five,
        at most 4 % of the leaf.

    Raises:
        ValueError: if an argument is outside its range; at ``update``, if structure or shapes of the gradients differ
            from those given to ``init`` (another shape of the same size is detected only if ``params`` are given); if
            gradients differ between devices that share the state; if the state has another type.
        TypeError: if a leaf is neither floating point nor complex; at ``update`` with ``params``, if the gradient of a
            real parameter is complex, or the reverse.

    Warns:
        UserWarning: if ``every_k_schedule`` is a number, and it is more than 32 micro-batches in one trit.

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
        ``optax.MultiSteps``: the semantics of windows. The references of `vsa_optax.TritCodec`: rotation and levels.
    """
    every_k = check_every_k(every_k_schedule)
    total = make_ternary_sum(every_k_schedule, trits=trits, rounding=rounding, block_size=block_size, seed=seed)
    window = _Window(total, every_k, checks.check_bool("use_grad_mean", use_grad_mean))
    finish_if = in_place_if(window.finish)

    def init_fn(params: optax.Params) -> AccumulateTernaryState:
        warn_of_command_buffers()
        checks.check_inexact_leaves(params)
        # If the parameters are shards, each device has its own sum.
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
        if kinds.kind_of(state.marks()) is StepKind.ACCUMULATED:
            emits, held, new_updates = jnp.array(False), updates, _zeros(updates)
        else:
            held, acc_grads = finish_if(emits, (updates, acc_grads), state.gradient_step, taken.divisor)
            new_updates = zeros_unless(emits, held)
        acc_grads = total.settle(acc_grads, taken.grown, held, adds)
        after = AccumulateTernaryState(acc_grads=acc_grads, **_counted(state, is_finite, emits, adds))
        window.forecast(state, after)
        return new_updates, after

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

    Between emissions, zeros are emitted and ``opt`` does not run, while ``MultiSteps`` runs it at every micro-batch and
    discards the result. `vsa_optax.accumulate_ternary` tabulates the error of the mean. A non-finite micro-batch is
    left out and counted, whatever ``should_skip_update_fn`` returns for it.

    With `vsa_optax.phase_switched` inside, its steps are emissions: all micro-batches of a PREDICT step are skipped.

    **On a GPU**, compile the training step by `vsa_optax.jit_by_phase`: micro-batches that do not complete their window
    then run without a conditional.

    **Many devices.** In data-parallel training each device sums its own micro-batches, and only the mean of a window is
    sent, inside ``jax.shard_map`` or ``jax.pmap``, by an optimizer that averages::

        opt = ternary_multi_steps(optax.chain(compressed_pmean("data", TritCodec()), optax.adam(1e-3)), 8)

    All devices reach the end of a window at the same micro-batch. If a micro-batch is non-finite on some device, or
    ``should_skip_update_fn`` skips it there, all devices leave it out and count it. Otherwise some devices would wait
    forever in the collectives of ``opt`` for those whose window is not complete. This agreement costs one number sent
    per micro-batch. If ``shard_map`` checks replication, devices agree over the axes over which gradients vary. Without
    the check, they agree over those over which ``opt`` communicates, as its state or its program shows.
    ``jax.lax.pmean`` of the gradients before ``update`` needs no agreement, but sends each gradient.

    With `vsa_optax.compressed_pmean` inside, the sum and the state of ``should_skip_update_fn`` differ between devices
    and have a leading axis for them. `vsa_optax.state_specs` returns the ``shard_map`` specs of the state; create the
    state inside ``shard_map``. A sum cannot be restored on another number of devices. There, take ``mini_step``,
    ``acc_grads`` and ``skip_state`` from a fresh state, which restarts the window. `vsa_optax.compressed_pmean` shows
    how to restore the residuals.

    Args:
        opt: the optimizer to wrap.
        every_k_schedule: K, an integer ``>= 1``, or a function of the gradient step that returns one, as in
            ``optax.MultiSteps``.
        use_grad_mean: whether ``opt`` receives the mean instead of the sum.
        should_skip_update_fn: ``(updates, gradient_step, params) -> (should_skip, skip_state)``, as in ``MultiSteps``.
            If ``should_skip`` is true, the micro-batch does not count.
        trits: the number of trits per coordinate, 1, 2 or 3; None takes two for K up to 8, and three for more or for a
            function.
        rounding: ``"nearest"``, or ``"stochastic"``, which is unbiased over seeds but has a larger error.
        block_size: the number of coordinates that share a scale, a power of two from 2 to 65536. Leaves with fewer
            coordinates are summed in f32.
        seed: the seed of the random rotations, one per window, ``>= 0``.

    Returns:
        A transformation that forwards extra arguments to ``opt`` and has a function ``has_updated(state)``. Like
        ``MultiSteps``, it has ``gradient_transformation()``, which returns itself. Its state has the fields of
        ``MultiStepsState`` and ``nonfinite_count``. The state of ``opt`` keeps its dtypes if gradients are wider than
        parameters.

    State cost:
        that of `vsa_optax.accumulate_ternary`, and the state of ``opt``.

    Raises:
        ValueError: if an argument is outside its range, or ``opt`` is not a gradient transformation; if
            ``should_skip_update_fn`` does not return a bool; at ``update``, if structure or shapes of the gradients
            differ from those given to ``init``, or if the state was made by ``optax.MultiSteps`` or for another number
            of devices.
        TypeError: if a leaf is neither floating point nor complex; at ``update`` with ``params``, if the gradient of a
            real parameter is complex, or the reverse.

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
            # Without this, a loop inside shard_map could not carry the state.
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
        if kinds.kind_of(state.marks()) is StepKind.ACCUMULATED:
            emits, new_updates, inner_opt_state = jnp.array(False), _zeros(outcome.updates), state.inner_opt_state
        else:
            window_of = state.gradient_step, taken.divisor
            new_updates, updates, acc_grads, inner_opt_state = run_inner(
                emits, updates, acc_grads, window_of, state.inner_opt_state, params, extra_args, outcome
            )
        own = total.settle(acc_grads, taken.grown, updates, adds), skip_state
        if is_of_each_device:
            own = mesh.varying_like(mesh.with_axis_in_front(own), (state.acc_grads, state.skip_state))
        after = TernaryMultiStepsState(
            inner_opt_state=inner_opt_state,
            acc_grads=own[0],
            skip_state=own[1],
            **_counted(state, is_finite, emits, adds),
        )
        window.forecast(state, after)
        return new_updates, after

    return TernaryMultiSteps(init_fn, update_fn)


def _check_state(state: object, kind: type) -> None:
    if isinstance(state, kind):
        return
    is_theirs = isinstance(state, optax.MultiStepsState)
    found = "one that was made by optax.MultiSteps" if is_theirs else type(state).__name__
    raise ValueError(f"state must be of type {kind.__name__}, got {found}: start from opt.init(params)")


def _on_each_device(updates: optax.Updates, acc_grads: Tree, mini_step: jax.Array) -> tuple[optax.Updates, Tree]:
    """Both trees, varying over the same axes; ``ValueError`` if gradients vary over more axes than the sum."""

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
    """The mesh axes along which devices must share a window although ``tree`` may differ.

    These are the axes along which devices share the window. Without a replication check they are unknown, and those
    along which devices communicate when it is complete are used.
    """
    shared = varying_axes(tree) - varying_axes(mini_step)
    return shared | (communicated & varying_axes((tree, mini_step)) if mesh.is_checked(communicated) else communicated)


def _ask(
    fun: optax.ShouldSkipUpdateFunction | None,
    updates: optax.Updates,
    gradient_step: jax.Array,
    params: optax.Params | None,
) -> tuple[jax.Array, Tree]:
    """The result of ``should_skip_update_fn``: ``[] bool``, and a tree to keep."""
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


def _zeros(like: Tree) -> Tree:
    """Zeros that are constants to XLA, so that it removes their addition to the parameters.

    It then keeps no array for them. Where the addition stays, it would: see `zeros_unless`.
    """
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=x.dtype), like)


def _zero() -> jax.Array:
    # Each counter gets its own array, since one buffer cannot be donated twice.
    return jnp.zeros([], jnp.int32)


def _count_if(pred: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(pred, optax.safe_increment(count), count)
