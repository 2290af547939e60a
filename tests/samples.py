"""Random numbers, trees and streams of gradients that several test files draw, and distances between them."""

import functools
import hashlib
import os
import re

import jax
import jax.numpy as jnp
import numpy as np

# For jax.jit, whatever XLA_FLAGS says. Programs that take long to compile, whose optimization is not what is tested:
CHEAP = {"compiler_options": {"xla_backend_optimization_level": 0}}
# Programs as users compile them, whatever XLA_FLAGS says:
_DEFAULTS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}
AS_USERS_DO = {
    "compiler_options": {name: value for name, value in _DEFAULTS.items() if name in os.environ.get("XLA_FLAGS", "")}
}
_COMPILED = {}


def _by_what_they_do(text):
    """A program's text, its private functions named by their texts: JAX numbers them, and may have several of one."""
    bodies = dict(re.findall(r"^  func\.func \w+ (@\w+)(.*?\n  }\n)", text, flags=re.DOTALL | re.MULTILINE))

    @functools.cache
    def renamed(name):
        return re.sub(r"@\w+", lambda found: digest(found[0]) if found[0] in bodies else found[0], bodies[name])

    def digest(name):
        return hashlib.sha256(renamed(name).encode()).hexdigest()

    return text[: text.index("  func.func")] + renamed("@main")


def compiled_once(lowered, **options):
    """The compiled program, one for all that have the same text."""
    key = _by_what_they_do(lowered.as_text()), str(options)
    if key not in _COMPILED:
        _COMPILED[key] = lowered.compile(**options)
    return _COMPILED[key]


SHAPES = {"b": (), "w": (3, 4), "empty": (0, 3), "deep": (1, 2, 1, 2, 1)}
SIZES = [int(np.prod(SHAPES[k])) for k in sorted(SHAPES)]
# A gradient of this size is summed in blocks of one width only, which compiles in half the time.
LARGE = 12 * 5 * 1024


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def noise(num, shape=(4096,), seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (num, *shape)).astype(dtype)


def tree_of(flat):
    pieces = np.split(np.asarray(flat, np.float32), np.cumsum(SIZES)[:-1])
    return {k: jnp.asarray(p.reshape(SHAPES[k])) for k, p in zip(sorted(SHAPES), pieces, strict=True)}


def flat_of(tree):
    return np.concatenate([np.ravel(np.asarray(tree[k])) for k in sorted(SHAPES)])


def gradient_stream(steps, seed=0, skip_rate=0.0):
    """A drifting, noisy gradient; where ``skip_rate`` says so, not finite, which varies the spacing of the records."""
    rng = np.random.default_rng(seed)
    d = sum(SIZES)
    drift = rng.normal(size=d) + 0.05 * np.arange(steps)[:, None] * rng.normal(size=d)
    stream = (drift + 0.1 * rng.normal(size=(steps, d))).astype(np.float32)
    stream[rng.random(steps) < skip_rate, 0] = np.nan
    return stream


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def relative_error(x, y):
    return float(jnp.sum((x - y) ** 2) / jnp.sum(y**2))


PARAMS = tree_of(np.zeros(sum(SIZES)))
