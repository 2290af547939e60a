"""Keeps the last losses of a run on the device: `track_loss`, whose state `vsa_optax.loss_report` reads.

Each update receives a loss as ``value=``; the updates are those of the wrapped optimizer. A step costs a few writes to
ring buffers.

Axes: N losses.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsa_optax.core import checks
from vsa_optax.core.mesh import mean_over, varying_axes
from vsa_optax.core.types import Tree
from vsa_optax.prediction import machine as machines
from vsa_optax.prediction import stats
from vsa_optax.prediction.machine import Phase
from vsa_optax.prediction.machine_state import Machine
from vsa_optax.prediction.unmeasured import LossReader


class TrackLossSettings(NamedTuple):
    """The settings of `loss_report`, as given to `track_loss`.

    Attributes:
        rolling_window: ``[] int32``, a number of losses.
        spike_threshold: ``[] float32``, a number of standard deviations.
        divergence_threshold: ``[] float32``, a ratio.
        convergence_window: ``[] int32``, a number of losses.
        convergence_threshold: ``[] float32``, a relative change.
    """

    rolling_window: jax.Array
    spike_threshold: jax.Array
    divergence_threshold: jax.Array
    convergence_window: jax.Array
    convergence_threshold: jax.Array


@LossReader.register
class TrackLossState(NamedTuple):
    """State of `track_loss`.

    Attributes:
        values: ``[N] float32``, the last measured losses, in a ring.
        steps: ``[N] int32``, the step of each loss, from 0.
        phases: ``[N] int32``, the `Phase` of each loss; None if the optimizer holds no phase machine.
        errors: ``[N] float32``, the error of the prediction that was compared at that step, or -1 if none was; None
            without a phase machine, or if it never predicts.
        num_measured: ``[] int32``, the number of losses so far; the next goes to slot ``num_measured % N``.
        total_steps: ``[] int32``, the number of updates so far.
        num_repeated: ``[] int32``, the number of PREDICT steps that repeated the last loss.
        num_nonfinite: ``[] int32``, the number of steps whose loss was a NaN or an infinity.
        best_value: ``[] float32``, the smallest loss so far; infinite before the first.
        best_step: ``[] int32``, the step at which it was first measured.
        settings: `TrackLossSettings`.
        inner_state: the wrapped optimizer's state.
    """

    values: jax.Array
    steps: jax.Array
    phases: jax.Array | None
    errors: jax.Array | None
    num_measured: jax.Array
    total_steps: jax.Array
    num_repeated: jax.Array
    num_nonfinite: jax.Array
    best_value: jax.Array
    best_step: jax.Array
    settings: TrackLossSettings
    inner_state: Tree


def track_loss(
    opt: optax.GradientTransformation,
    *,
    max_history: int = 1000,
    rolling_window: int = 20,
    spike_threshold: float = 3.0,
    divergence_threshold: float = 1.2,
    convergence_window: int = 50,
    convergence_threshold: float = 0.01,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its state keeps the last losses; the updates do not change.

    Only measured losses are kept. If ``opt`` contains a phase machine, a PREDICT step repeats the last loss unless a
    forward pass ran. A repeated loss is counted but not kept, and so is a NaN or an infinity.

    Wrap it around `vsa_optax.phase_switched`. Inside, it could not recognize repeated losses, so
    `vsa_optax.value_and_grad_by_phase` refuses that. It only observes; to act on a plateau, chain
    ``optax.contrib.reduce_on_plateau``.

    Args:
        opt: any optimizer, or ``optax.identity()`` as a link of an ``optax.chain``.
        max_history: N, the number of losses kept, ``>= 1``.
        rolling_window: n, the number of losses that count as recent, ``>= 2``.
        spike_threshold: a loss is a spike if it is this many standard deviations above the mean of the n losses before
            it, ``> 0``.
        divergence_threshold: a run diverges if the mean of the last n losses is this many times the mean of the n
            losses before them, ``>= 1``.
        convergence_window: m, the number of losses that decide convergence, plateau and trend, ``>= 4``.
        convergence_threshold: a relative change from the first to the second half of the last m losses, ``>= 0``. A
            larger fall is convergence; a smaller change in either direction is a plateau.

    Returns:
        A transformation that needs the loss as ``value=`` at every update and forwards it, like every other extra
        argument, to ``opt``. The loss is one real number. Inside ``jax.shard_map`` it is averaged over devices that
        share the state.

    State cost:
        the state of ``opt``, ``8 * max_history`` bytes and 44 bytes; with a phase machine inside, ``8 * max_history``
        bytes more.

    Raises:
        ValueError: if an argument is outside its range; at ``update``, if ``value`` is missing, or if the state was
            made with another ``max_history``.

    Example:
        >>> import jax.numpy as jnp, optax, vsa_optax
        >>> opt = vsa_optax.track_loss(optax.sgd(0.1))
        >>> params = jnp.ones(3)
        >>> state = opt.init(params)
        >>> for _ in range(30):
        ...     updates, state = opt.update(params, state, params, value=jnp.sum(params**2))
        ...     params = optax.apply_updates(params, updates)
        >>> report = vsa_optax.loss_report(state)
        >>> report.best_step, report.statistics.num, report.is_diverging
        (29, 30, False)
    """
    if not (hasattr(opt, "init") and hasattr(opt, "update")):
        raise ValueError(f"opt must be an optax.GradientTransformation, got {opt!r}")
    num = checks.check_integer("max_history", max_history, 1)
    given = (
        checks.check_integer("rolling_window", rolling_window, 2),
        checks.check_real("spike_threshold", spike_threshold, low=0.0, high=float("inf"), low_open=True),
        checks.check_real("divergence_threshold", divergence_threshold, low=1.0, high=float("inf")),
        checks.check_integer("convergence_window", convergence_window, 4),
        checks.check_real("convergence_threshold", convergence_threshold, low=0.0, high=float("inf")),
    )
    inner = optax.with_extra_args_support(opt)

    def settings() -> TrackLossSettings:
        arrays = (jnp.asarray(value, jnp.int32 if isinstance(value, int) else jnp.float32) for value in given)
        return TrackLossSettings(*arrays)

    def init_fn(params: optax.Params) -> TrackLossState:
        inner_state = inner.init(params)
        machine = _machine_in(inner_state)

        def zero() -> jax.Array:
            return jnp.zeros([], jnp.int32)

        return TrackLossState(
            values=jnp.zeros([num], jnp.float32),
            steps=jnp.zeros([num], jnp.int32),
            phases=None if machine is None else jnp.zeros([num], jnp.int32),
            errors=None if machine is None or machine.errors is None else jnp.full([num], -1.0, jnp.float32),
            num_measured=zero(),
            total_steps=zero(),
            num_repeated=zero(),
            num_nonfinite=zero(),
            best_value=jnp.asarray(jnp.inf, jnp.float32),
            best_step=zero(),
            settings=settings(),
            inner_state=inner_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: TrackLossState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, TrackLossState]:
        if extra_args.get("value") is None:
            raise ValueError("track_loss needs the loss at every step: update(..., value=loss), got value=None")
        if not isinstance(state, TrackLossState):
            raise ValueError(f"state must be what init returned, a TrackLossState, got {type(state).__name__}")
        if state.values.shape != (num,):
            raise ValueError(f"state was made with other settings: max_history is {state.values.shape[0]}, here {num}")
        loss = checks.check_scalar("value", extra_args["value"]).astype(jnp.float32)
        axes = varying_axes(loss) - varying_axes(state.num_measured)
        if axes:
            loss = mean_over(loss, axes)
        before = _machine_in(state.inner_state)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        is_repeated = jnp.array(False) if before is None else _is_repeated(before, loss)
        is_finite = jnp.isfinite(loss)
        is_measured = is_finite & ~is_repeated
        slot = state.num_measured % num

        def kept(ring: jax.Array, new: jax.Array) -> jax.Array:
            return ring.at[slot].set(jnp.where(is_measured, new, ring[slot]).astype(ring.dtype))

        is_best = is_measured & (loss < state.best_value)
        phases, errors = state.phases, state.errors
        if before is not None and phases is not None:
            phases = kept(phases, before.phase)
        if before is not None and errors is not None:
            errors = kept(errors, _error_of_step(before, _machine_in(inner_state)))
        return updates, TrackLossState(
            values=kept(state.values, loss),
            steps=kept(state.steps, state.total_steps),
            phases=phases,
            errors=errors,
            num_measured=_count_if(is_measured, state.num_measured),
            total_steps=optax.safe_increment(state.total_steps),
            num_repeated=_count_if(is_repeated, state.num_repeated),
            num_nonfinite=_count_if(~is_finite & ~is_repeated, state.num_nonfinite),
            best_value=jnp.where(is_best, loss, state.best_value),
            best_step=jnp.where(is_best, state.total_steps, state.best_step),
            settings=settings(),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _machine_in(state: Tree) -> Machine | None:
    """The phase machine in an optimizer's state, if there is one."""
    return stats.find_machine(state) if stats.contains_machine(state) else None


def _is_repeated(machine: Machine, loss: jax.Array) -> jax.Array:
    """``[] bool``: whether the step is a PREDICT step whose loss repeats the last one.

    If tracing does not show that no forward pass ran, a loss with the same bits counts as repeated.
    """
    is_predict = machine.phase == Phase.PREDICT
    if machines.repeats_loss(machine):
        return is_predict
    last = machines.last_value(machine)
    return is_predict & ((loss == last) | (jnp.isnan(loss) & jnp.isnan(last)))


def _error_of_step(before: Machine, after: Machine | None) -> jax.Array:
    """``[] float32``: the prediction error that the step measured; -1 if it measured none."""
    assert after is not None
    assert before.errors is not None
    assert after.errors is not None
    return jnp.where(after.errors.num_measured > before.errors.num_measured, after.errors.last, -1.0)


def _count_if(pred: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(pred, optax.safe_increment(count), count)
