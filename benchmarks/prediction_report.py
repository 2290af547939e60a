"""Prints the results of `prediction.py` for each task."""

import numpy as np
from codec_tasks import print_row, verdict
from guard import MOST_WORSE, MOST_WORSE_SEED, geometric_mean, mean_and_half, passes_needed, spread
from prediction_methods import METHODS, PRESETS, RECIPE, WARMUP

LEAST_SKIPPED = {"without noise": (0.65, 0.8), "mini-batches": (0.4, 0.65)}


def print_case(name, case, plan, steps, best, best_at, found):
    """Both tables and the verdicts."""
    print(f"\n{name} ({kind_of(name)}): {case.task().description}")
    lengths, losses = sorted(best_at), []
    for length in lengths:
        losses.append(geometric_mean(found[(name, "plain", *best_at[length], length)][:, 0]))
        _, rate, betas = best_at[length]
        print(f"plain, {length} steps: {losses[-1]:.4g} at {rate:g} with betas {betas}")
    ratios = {}
    plain = found[(name, "plain", *best["plain"], steps)]
    seconds_a_pass = np.median(plain[:, 2]) / steps
    print(f"each at its best; n = {len(plan.seeds)} seeds")
    widths = [24, 34, 8, 22, 12, 8, 8]
    print_row(widths, ["", "loss", "passes", "rate, betas", "plain needs", "ratio", "time"])
    for method in plan.methods:
        variant, rate, betas = best[method]
        values = found[(name, method, variant, rate, betas, steps)]
        sign, needed = passes_needed(lengths, losses, geometric_mean(values[:, 0]))
        passes = values[:, 1].mean()
        ratios[method] = (sign, needed / passes)
        time_ratio = needed * seconds_a_pass / np.median(values[:, 2])
        cells = [
            method + ("" if len(METHODS[method].variants) == 1 else f", {variant + 1}"),
            spread(values[:, 0]),
            f"{passes:.1f}",
            f"{rate:g}, {betas}",
            f"{sign}{needed:.0f}",
            f"{sign}{ratios[method][1]:.2f}",
            f"{sign}{time_ratio:.2f}",
        ]
        print_row(widths, cells)
    _, rate, betas = best["plain"]
    print(f"at a recipe's rate, {RECIPE * rate:g} with betas {betas}")
    widths = [24, 34, 8, 9, 22, 9]
    print_row(widths, ["", "loss", "passes", "skipped", "log difference", "no worse"])
    plain = found[(name, "plain", best["plain"][0], RECIPE * rate, betas, steps)][:, 0]
    skipped = {}
    for method in plan.methods:
        values = found[(name, method, best[method][0], RECIPE * rate, betas, steps)]
        with np.errstate(invalid="ignore"):
            mean, half = mean_and_half(np.log(values[:, 0]) - np.log(plain))
        is_no_worse = (mean <= np.log(MOST_WORSE) or abs(mean) <= half) and (
            values[:, 0].max() <= MOST_WORSE_SEED * plain.max()
        )
        share = 1 - (values[:, 1].mean() - WARMUP) / (steps - WARMUP)
        if is_no_worse:
            skipped[method] = share
        cells = [
            method,
            spread(values[:, 0]),
            f"{values[:, 1].mean():.1f}",
            f"{share:.0%}",
            f"{mean:+.3f} ± {half:.3f}",
            verdict(is_no_worse),
        ]
        print_row(widths, cells)
    print_verdicts(case.least, LEAST_SKIPPED[kind_of(name)], ratios, skipped)


def kind_of(name):
    return "mini-batches" if "batch" in name and "full" not in name else "without noise"


def print_verdicts(least_ratios, least_skipped, ratios, skipped):
    ours = [method for method in PRESETS if method in ratios]
    if not ours:
        return
    best = max(ours, key=lambda method: ratios[method][1])
    sign, ratio = ratios[best]
    for least in least_ratios:
        print(
            f"ratio of the best preset ({best}): {sign}{ratio:.2f}; >= {least:g}: {verdict(round(ratio, 2) >= least)}"
        )
    share = max((skipped.get(method, 0.0) for method in ours), default=0.0)
    for least in least_skipped:
        print(f"skipped by a preset at this rate, no worse: {share:.0%}; >= {least:.0%}: {verdict(share >= least)}")
    print(flush=True)
