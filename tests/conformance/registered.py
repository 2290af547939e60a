"""Our transformations as Optax's tests expect optimizers: functions of a learning rate, with prediction on.

Each is a plain function whose one argument has Optax's annotation. Optax's tests trace every numeric argument of a
factory, and read the annotation to decide whether to try a schedule.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import blind
import jax
import jax.numpy as jnp
import optax

import vsa_optax
from vsa_optax import AdaptiveCycle, Guarded, Momentum, Recursive, Secants, Window

Factory = Callable[..., optax.GradientTransformationExtraArgs]

# Short phases, so that a cycle takes five steps, of which two are predicted: after two of WARMUP,
# FULL, FULL, PREDICT, PREDICT, CORRECT.
SETTINGS = {"warmup_steps": 2, "full_steps": 2, "predict_steps": 3, "correct_every": 2, "length": 3}
# SGD with momentum: FULL, FULL, PREDICT, CORRECT. It oscillates in Rosenbrock's valley, and extrapolated by
# two steps it does so with growing amplitude.
ONE_STEP_AHEAD = {"predict_steps": 2, "correct_every": 1}
STEPS_BEFORE_PREDICT = SETTINGS["warmup_steps"] + SETTINGS["full_steps"]


class Variant(NamedTuple):
    """A transformation of ours as a row in a table of Optax's.

    Attributes:
        factory: takes ``learning_rate``.
        learning_rate: one with which Optax's test problems are solved within the steps that the tests allow.
        optimizes: whether it takes the tests that optimize until convergence, 10000 or 30000 steps.
        suites: where it takes the tests of a few steps.
        is_started: whether its first step is of PREDICT.
        predicts: whether it has a phase machine at all.
    """

    factory: Factory
    learning_rate: float
    optimizes: bool = True
    suites: frozenset[str] = frozenset({"contrib", "alias", "float64", "sharding"})
    is_started: bool = False
    predicts: bool = True


# The tests of a few steps are a matter of domain and history, whatever the optimizer: two rows have each of both once,
# and the rows that are started have the other two pairs. The tests in "alias" repeat those in "contrib", except for
# complex parameters.
_NOT_REPEATED = frozenset({"contrib", "float64"})
_EACH_ONCE = {"adam_update_window", "adam_gradient_recursive"}


def switched(optimizer: Callable[[float], optax.GradientTransformation], **settings: Any) -> Factory:
    """`phase_switched` round ``optimizer`` at rate 1."""

    def factory(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
        return blind.phase_switched(optimizer(1.0), learning_rate=learning_rate, **settings)

    return factory


def rate_inside(**settings: Any) -> Factory:
    """`phase_switched` round Adam, which has the learning rate itself and runs at every step."""

    def factory(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
        return blind.phase_switched(optax.adam(learning_rate), predicts="gradient", **settings)

    return factory


def head_of_chain(**settings: Any) -> Factory:
    """`predict_gradients` before Adam."""

    def factory(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
        return optax.chain(blind.predict_gradients(**settings), optax.adam(learning_rate))

    return factory


def compressed(codec: Any, **settings: Any) -> Factory:
    """`compress_gradients` before Adam."""

    def factory(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
        return optax.chain(vsa_optax.compress_gradients(codec, **settings), optax.adam(learning_rate))

    return factory


def accumulated(**settings: Any) -> Factory:
    """`ternary_multi_steps` of two micro-batches round Adam."""

    def factory(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
        return vsa_optax.ternary_multi_steps(optax.adam(learning_rate), 2, **settings)

    return factory


def leaping(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """`multisecant` round Adam, which has the learning rate itself."""
    return vsa_optax.multisecant(optax.adam(learning_rate), history_window=2)


def about_to_predict(inner: Factory) -> Factory:
    """The same, but ``init`` takes the steps before the first of PREDICT: many of Optax's tests take only one."""

    def factory(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
        opt = inner(learning_rate)

        def started(params: optax.Params) -> optax.OptState:
            def true_step(k: jax.Array, state: optax.OptState) -> optax.OptState:
                gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, k + 1), params)
                return opt.update(gradients, state, params)[1]

            return jax.lax.fori_loop(0, STEPS_BEFORE_PREDICT, true_step, opt.init(params))

        def init_fn(params: optax.Params) -> optax.OptState:
            return jax.jit(started)(jax.tree.map(jnp.zeros_like, params))

        return optax.GradientTransformationExtraArgs(init_fn, opt.update)

    return factory


_momentum = functools.partial(optax.sgd, momentum=0.9)
_SWITCHED = {
    "adam": (optax.adam, 3e-3, SETTINGS),
    "adamw": (optax.adamw, 3e-3, SETTINGS),
    "momentum": (_momentum, 2e-4, SETTINGS | ONE_STEP_AHEAD),
}
_CASES = [
    ("adam", "update", "window"),
    ("adam", "update", "recursive"),
    ("adam", "gradient", "window"),
    ("adam", "gradient", "recursive"),
    ("adamw", "update", "window"),
    ("adamw", "gradient", "recursive"),
    ("momentum", "update", "recursive"),
    ("momentum", "gradient", "window"),
]

_LINES = {"window": Window, "recursive": Recursive}
VARIANTS: dict[str, Variant] = {}
for _name, _domain, _history in _CASES:
    _optimizer, _rate, _settings = _SWITCHED[_name]
    _factory = switched(_optimizer, predicts=_domain, line=_LINES[_history], **_settings)
    _variant = Variant(_factory, _rate)
    _name = f"{_name}_{_domain}_{_history}"
    VARIANTS[_name] = _variant if _name in _EACH_ONCE else _variant._replace(suites=frozenset({"float64"}))
VARIANTS["head_window"] = Variant(head_of_chain(**SETTINGS), 3e-3)
VARIANTS["rate_inside"] = Variant(rate_inside(**SETTINGS), 3e-3, optimizes=False, suites=_NOT_REPEATED)
# Blocks of two, so that even the two parameters of Optax's test problems are coded.
_TRITS = vsa_optax.TritCodec(trits=3, block_size=2)
_UNBIASED = vsa_optax.TritCodec(trits=2, block_size=2, unbiased=True)
_SKETCH = vsa_optax.HypervectorCodec(compression_ratio=0.5)
_FEW = frozenset({"float64", "sharding"})
VARIANTS["head_recursive"] = Variant(head_of_chain(line=Recursive, **SETTINGS), 3e-3, suites=_FEW)
VARIANTS["last_difference"] = Variant(
    switched(optax.adam, line=Momentum, predicts="gradient", **SETTINGS), 3e-3, suites=_FEW
)
_LEAN = switched(optax.adam, dtype="bfloat16", residual_decay=None, **SETTINGS)
VARIANTS["lean"] = Variant(_LEAN, 3e-3, suites=_FEW)
VARIANTS["coded_history"] = Variant(switched(optax.adam, codec=_TRITS, **SETTINGS), 3e-3, suites=_FEW)
VARIANTS["compressed"] = Variant(compressed(_TRITS), 3e-3, suites=_FEW, predicts=False)
VARIANTS["compressed_unbiased"] = Variant(compressed(_UNBIASED, error_feedback=True), 3e-3, suites=_FEW, predicts=False)
VARIANTS["compressed_sketch"] = Variant(compressed(_SKETCH, error_feedback=True), 3e-3, suites=_FEW, predicts=False)
VARIANTS["accumulated"] = Variant(accumulated(trits=3, block_size=2), 1e-2, suites=_FEW, predicts=False)
VARIANTS["defaults"] = Variant(switched(optax.adam, line=Secants, when=Guarded), 1e-2, suites=_FEW)
VARIANTS["default_lengths"] = Variant(switched(optax.adam), 1e-2, suites=frozenset())
for _name, _suites in (
    ("adam_update_recursive", _NOT_REPEATED | {"sharding"}),
    ("momentum_gradient_window", _NOT_REPEATED),
):
    _factory = about_to_predict(VARIANTS[_name].factory)
    VARIANTS[f"started_{_name}"] = Variant(_factory, VARIANTS[_name].learning_rate, False, _suites, is_started=True)

# They need the loss at every step, which Optax's tests give only to optimizers of certain names: of `optax.contrib`.
NEED_THE_LOSS = {
    "momo": Variant(switched(optax.adam, when=AdaptiveCycle, **SETTINGS), 3e-3),
    # The tests of a few steps pass, too: half a minute of compilation, of what `test_multisecant.py` and others have.
    "momo_adam": Variant(leaping, 1e-2, suites=frozenset(), predicts=False),
}

# Transformations that are no optimizers by themselves.
BARE: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    f"predict_gradients_{history}": functools.partial(blind.predict_gradients, line=line, **SETTINGS)
    for history, line in {**_LINES, "momentum": Momentum}.items()
}
BARE_CODECS: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "compress_gradients": functools.partial(vsa_optax.compress_gradients, _TRITS),
    "accumulate_ternary": functools.partial(vsa_optax.accumulate_ternary, 2, trits=3, block_size=2),
    "compress_gradients_feedback": functools.partial(vsa_optax.compress_gradients, _SKETCH, error_feedback=True),
}
