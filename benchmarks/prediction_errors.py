"""The out-of-sample accuracy of predicted gradients and updates, compared with four predictions that cost nothing.

Run `python benchmarks/prediction_errors.py | tee benchmarks/prediction_errors.log`; it starts one process per core. On
a machine with a GPU, prefix `JAX_PLATFORMS=cpu`. `--task` selects from the tasks.

Gradients, and the updates of Adam at rate 1, are recorded in runs of plain Adam. Each is predicted from records that
end some steps before: by lines in time and, for gradients, by secants. The predictions are the library's own, computed
from the inner products of all records.
"""

import argparse
import time

import codec_tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
from codec_tasks import print_row, verdict
from prediction_tasks import CASES, chosen

from vsa_optax.prediction.fits import calibration, secant_fit
from vsa_optax.prediction.predictors.window import WindowHistory, WindowHistoryState

WINDOW, DECAY, FORGET = 8, 0.95, 0.95  # The library's defaults, and the next two for secants.
CHANGES, FORGET_SCORES = 16, 0.9
HORIZONS = (1, 2, 4, 9)
SETTLING = 20
MOST_ERROR, MOST_ERROR_STRETCH = 1.05, 0.95
BETAS = (0.9, 0.999)
PREDICTIONS = ("zero", "last", "mean", "line", "calibrated")


def trajectory(task, rate, steps):
    """Gradients, updates of Adam at rate 1, and parameters of plain Adam with seed 0: trees of ``[T, *shape]``."""
    directions = optax.adam(1.0)
    schedule = optax.cosine_decay_schedule(rate, steps)

    def step(carry, indexed):
        params, state = carry
        batch, number = indexed
        gradient = jax.grad(task.loss)(params, batch)
        update, state = directions.update(gradient, state)
        moved = jax.tree.map(lambda p, u: p + schedule(number) * u, params, update)
        return (moved, state), (gradient, update, params)

    @jax.jit
    def run(params, batches):
        return jax.lax.scan(step, (params, directions.init(params)), (batches, jnp.arange(steps)))[1]

    return run(task.init(0), jnp.asarray(task.batches(0, steps)))


def gram_matrices(tree):
    """``[L, T, T]`` float64: the products of all records of a leaf with each other."""
    leaves = [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)]
    return np.stack([leaf @ leaf.T for leaf in leaves])


@jax.jit
def calibrated(gram, products, energy):
    """``[n, L, K]``: the library's coefficients after each of n measurements."""

    def step(sums, measured):
        sums, _ = calibration.measure(sums, calibration.coefficients(sums), *measured, FORGET)
        return sums, calibration.coefficients(sums)

    start = calibration.zeros(*products.shape[1:])
    return jax.lax.scan(step, start, (gram, products, energy))[1]


def prediction_weights(horizon):
    """``[W]`` for each prediction without calibration, and ``[K, W]`` for the library's features of the one with it."""
    filled = WindowHistoryState(None, jnp.arange(WINDOW, dtype=jnp.int32), jnp.int32(WINDOW))
    scalars = WindowHistory(WINDOW, DECAY, None).scalars(filled, jnp.int32(WINDOW - 1 + horizon))
    line, features, reach = (np.asarray(x, np.float64) for x in (scalars.coefficients, scalars.features, scalars.reach))
    last = np.eye(WINDOW)[-1]
    fixed = {"zero": 0 * last, "last": last, "mean": np.full(WINDOW, 1 / WINDOW), "line": line}
    return fixed, features * reach[:, None]


def relative_errors(grams, horizon):
    """For each of the `PREDICTIONS` the mean over the steps of ``||y - y'||^2 / ||y||^2`` of the whole tree."""
    targets = np.arange(WINDOW - 1 + horizon, grams.shape[1])
    records = targets[:, None] - horizon - np.arange(WINDOW)[::-1]
    windows = np.moveaxis(grams[:, records[:, :, None], records[:, None, :]], 0, 1)  # [n, L, W, W]
    with_target = np.moveaxis(grams[:, targets[:, None], records], 0, 1)  # [n, L, W]
    energy = grams[:, targets, targets].T  # [n, L]
    fixed, features = prediction_weights(horizon)
    gram, products = features @ windows @ features.T, with_target @ features.T

    def seen(measured):
        """The measurements known when a target is predicted: those of targets as old as the newest record."""
        delayed = np.concatenate([np.zeros_like(measured[:horizon]), measured[:-horizon]])
        return jnp.asarray(delayed, jnp.float32)

    theta = np.asarray(calibrated(seen(gram), seen(products), seen(energy)), np.float64)
    weights = {name: np.broadcast_to(w, with_target.shape) for name, w in fixed.items()}
    weights["calibrated"] = theta @ features
    is_counted = targets >= WINDOW + 2 * horizon + SETTLING
    means = []
    for name in PREDICTIONS:
        w = weights[name]
        squared = energy - 2 * np.sum(w * with_target, -1) + np.einsum("nli,nlij,nlj->nl", w, windows, w)
        means.append(np.mean((squared.sum(axis=1) / energy.sum(axis=1))[is_counted]))
    return means


@jax.jit
def secant_choices(squared, energy):
    """``[n]``: the ridge that the library would predict with after each of n measurements."""

    def step(scores, measured):
        scores = secant_fit.scored(scores, *measured, FORGET_SCORES)
        return scores, secant_fit.best(scores)

    return jax.lax.scan(step, secant_fit.no_scores(energy.shape[1]), (squared, energy))[1]


@jax.jit
@jax.vmap
def secant_errors(moves, products, changes, with_missed, missed):
    """``[n, R, L]``: what each ridge misses."""
    return secant_fit.errors(secant_fit.coefficients(moves, products), changes, with_missed, missed)


def relative_secant_error(points, gradients, horizon):
    """As `relative_errors`, for the library's secants, from the products of parameters and of gradients."""
    moves = np.diff(np.diff(points.sum(axis=0), axis=0), axis=1)
    changes = np.diff(np.diff(gradients, axis=1), axis=2)
    targets = np.arange(CHANGES + horizon, gradients.shape[1])
    rows = targets[:, None] - horizon - 1 - np.arange(CHANGES)  # Change i leads to record i + 1.
    ahead = targets[:, None] - 1 - np.arange(horizon)

    def pick(gram, a, b):
        return np.moveaxis(gram[..., a[:, :, None], b[:, None, :]], -3, 0)

    energy = gradients[:, targets, targets].T
    squared = secant_errors(
        *(
            jnp.asarray(x, jnp.float32)
            for x in (
                pick(moves, rows, rows),
                pick(moves, rows, ahead).sum(axis=-1),
                pick(changes, rows, rows),
                pick(changes, rows, ahead).sum(axis=-1),
                pick(changes, ahead, ahead).sum(axis=(-2, -1)),
            )
        )
    )
    choices = secant_choices(squared, jnp.asarray(energy, jnp.float32))
    # When a target is predicted, measurements of targets as old as the newest record are known.
    known = np.concatenate([np.zeros(horizon, int), np.asarray(choices)[:-horizon]])
    missed = np.asarray(squared, np.float64)[np.arange(len(targets)), known].sum(axis=1)
    is_counted = targets >= CHANGES + 2 * horizon + SETTLING
    return np.mean((missed / energy.sum(axis=1))[is_counted])


def prediction_errors(name, steps):
    """Of gradients and of updates, for each horizon: the errors of the `PREDICTIONS`, and that of secants or NaN."""
    task = CASES[name].task()
    gradients, updates, points = map(gram_matrices, trajectory(task, task.rates[1], steps))
    return [
        [[*relative_errors(gradients, h), relative_secant_error(points, gradients, h)] for h in HORIZONS],
        [[*relative_errors(updates, h), np.nan] for h in HORIZONS],
    ]


def prediction(options):
    names = chosen(options.task)
    codec_tasks.print_header(
        "Mean over the steps of ||y - y'||^2 / ||y||^2 over the whole tree",
        f"y' from records that end h steps before y: lines {WINDOW} of decay {DECAY}, secants {CHANGES} changes",
        f"along plain Adam with a cosine schedule, betas {BETAS}, seed 0",
        "line: weighted least squares as it is; calibrated: with coefficients from targets up to h steps before y;",
        "secants: with the ridge that served such targets best; / best: of zero, last, mean and line",
        *(CASES[name].task().description for name in names),
    )
    lengths = [options.steps or CASES[name].recorded for name in names]
    widths = [10, 4, *[11] * (len(PREDICTIONS) + 1), 18, 11, 11, 15]
    titles = ["calibrated / best", f"<= {MOST_ERROR}", f"<= {MOST_ERROR_STRETCH}", "secants / best"]
    found = codec_tasks.in_processes(prediction_errors, zip(names, lengths, strict=True))
    for name, steps, of_domains in zip(names, lengths, found, strict=True):
        print(f"{name}: {steps} steps at rate {CASES[name].task().rates[1]:g}")
        print_row(widths, ["of", "h", *PREDICTIONS, "secants", *titles])
        for domain, of_horizons in zip(("gradients", "updates"), of_domains, strict=True):
            for horizon, (*errors, of_secants) in zip(HORIZONS, of_horizons, strict=True):
                ratio, of_secants_ratio = (x / min(errors[:-1]) for x in (errors[-1], of_secants))
                verdicts = [verdict(ratio <= most) for most in (MOST_ERROR, MOST_ERROR_STRETCH)]
                cells = [f"{x:.4g}" for x in (*errors, of_secants)]
                print_row(widths, [domain, horizon, *cells, f"{ratio:.3f}", *verdicts, f"{of_secants_ratio:.3f}"])
        print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="", help='only what contains this: "PINN"')
    parser.add_argument("--steps", type=int, help="instead of each task's own, for a trial")
    began = time.perf_counter()
    prediction(parser.parse_args())
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
