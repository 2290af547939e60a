"""Full-waveform inversion: the speed of sound in a square, from recordings of several shots by receivers around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from noiseless_task import FullBatch, num_params

SIDE, SPONGE = 100, 10  # Cells with a parameter each, and cells beyond on every side in which waves die out.
TIME_STEP, FREQUENCY = 0.5, 0.06  # In units of the cells' crossing time; a wave is 17 cells long.
MOST_CHANGE = 0.35  # Of the speed, relative: keeps the scheme stable, 0.5 * 1.35 being below 1 / sqrt(2).
SEGMENT = 16  # Steps between two stored states; those in between are computed again.


def ring(num, inset):
    """``[num, 2]`` cells of the whole grid on a circle inside the square."""
    angles = 2 * np.pi * (np.arange(num) + 0.5) / num
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.round(SPONGE + (SIDE - 1) / 2 + ((SIDE - 1) / 2 - inset) * circle).astype(int)


def true_field(seed, num=6):
    """``[SIDE, SIDE]`` relative changes of the speed: smooth inclusions at places drawn by the seed."""
    rng, axis = np.random.default_rng(seed), np.linspace(-1, 1, SIDE)
    field = np.zeros((SIDE, SIDE))
    for _ in range(num):
        (y, x), width = rng.uniform(-0.55, 0.55, 2), rng.uniform(0.1, 0.25)
        bump = np.exp(-((axis[:, None] - y) ** 2 + (axis - x) ** 2) / (2 * width**2))
        field += rng.choice([-1, 1]) * rng.uniform(0.05, 0.12) * bump
    return np.clip(field, -0.25, 0.25)


@functools.cache
def wave(num_shots=4, num_receivers=64, num_steps=256):
    """The acoustic wave equation ``p_tt = c² Δp + source``, second order, each shot at a place of its own."""
    whole = SIDE + 2 * SPONGE
    sources, receivers = ring(num_shots, 3), ring(num_receivers, 3)
    depth = np.maximum(SPONGE - np.minimum(np.arange(whole), np.arange(whole)[::-1]), 0) / SPONGE
    taper = jnp.asarray(np.exp(-0.25 * (depth[:, None] ** 2 + depth**2)), jnp.float32)
    phase = (np.pi * FREQUENCY * (TIME_STEP * np.arange(num_steps) - 1.5 / FREQUENCY)) ** 2
    wavelet = jnp.asarray(((1 - 2 * phase) * np.exp(-phase)).reshape(-1, SEGMENT), jnp.float32)
    # Fields instead of places: on a CPU these are several times faster than adding at a place.
    at_sources = np.zeros((num_shots, whole, whole), np.float32)
    at_sources[np.arange(num_shots), sources[:, 0], sources[:, 1]] = 1
    receivers = receivers @ np.array([whole, 1])

    def traces(params):
        """``[steps, shots, receivers]`` pressures."""
        speed = 1 + MOST_CHANGE * jnp.tanh(jnp.pad(params, SPONGE, mode="edge"))
        factor = (TIME_STEP * speed) ** 2

        def step(carry, amplitude):
            before, now = carry
            inner = now[:, 1:-1, 1:-1]
            around = now[:, 2:, 1:-1] + now[:, :-2, 1:-1] + now[:, 1:-1, 2:] + now[:, 1:-1, :-2]
            laplacian = jnp.pad(around - 4 * inner, ((0, 0), (1, 1), (1, 1)))
            after = taper * (2 * now - taper * before + factor * laplacian) + amplitude * at_sources
            return (taper * now, after), after.reshape(num_shots, -1)[:, receivers]

        @jax.checkpoint
        def segment(carry, amplitudes):
            return jax.lax.scan(step, carry, amplitudes)

        rest = jnp.zeros((num_shots, whole, whole))
        recorded = jax.lax.scan(segment, (rest, rest), wavelet)[1]
        return recorded.reshape(num_steps, num_shots, num_receivers)

    through_nothing = jax.jit(traces)

    def init(seed):
        del seed
        return jnp.zeros((SIDE, SIDE))

    def data(seed):
        """The observations, and the energy of their part that the even field does not explain."""
        observed = through_nothing(jnp.arctanh(jnp.asarray(true_field(seed), jnp.float32) / MOST_CHANGE))
        return observed, jnp.sum((observed - through_nothing(init(seed))) ** 2)

    def loss(params, data):
        observed, energy = data
        return jnp.sum((traces(params) - observed) ** 2) / energy

    return FullBatch(
        f"wave inversion: {num_params(init):,} parameters, {num_shots} shots, {num_receivers} receivers, {num_steps} "
        f"time steps on {whole} x {whole} cells; loss relative to the even field's; a field for each seed",
        init=init,
        loss=loss,
        budgets=(50, 100, 200),
        rates=(-2, 0, 2, 4, 6),
        floor=1e-9,
        data=data,
        further=(2, 4),
    )


CASES = {"wave inversion": wave}
