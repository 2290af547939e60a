"""Prints the results of `noiseless.py` for each task, and draws the plot of all tasks."""

from typing import NamedTuple

import numpy as np
from codec_tasks import print_row
from guard import geometric_mean, passes_needed, spread
from noiseless_rivals import Setting, rate_of
from noiseless_search import BASELINE, Job, all_budgets, chosen, loss_at

LEGEND = (
    "evaluations: of loss and gradient together, line searches' and rejected ones included; used: mean of those made",
    "loss: the lowest of so many evaluations, geometric mean [smallest, largest]; never below the floor",
    "Adam needs: evaluations for the mean loss, log-interpolated between its best budgets; ratio: over those used",
    "seconds: median of whole runs, without compiling; time ratio: Adam's seconds for that many evaluations, over them",
    "compile: the longest, in seconds, or reading the program if another process had compiled it",
)
WIDTHS = [54, 56, 34, 7, 11, 8, 9, 11, 8]


class Row(NamedTuple):
    """The results of a method at a budget: setting, losses by seed, mean evaluations, median seconds, whole results."""

    setting: Setting
    losses: np.ndarray
    used: float
    seconds: float
    results: list


def results_of(found, name, method_name, setting, run, seeds):
    return [found[job] for seed in seeds if (job := Job(name, method_name, setting, run, seed)) in found]


def rows(task, name, methods, found, tuning_seeds, seeds):
    """``{(method, budget): Row}``; a method that has not been run has none."""
    table = {}
    for method_name, method in methods.items():
        if not method.suits(task):
            continue
        for budget in all_budgets(task) if method_name == BASELINE else task.budgets:
            for label, cost in method.costs(task).items():
                count = budget // cost
                try:
                    setting, run = chosen(task, found, name, method_name, method, budget, tuning_seeds)
                except ValueError:  # Nothing to choose from.
                    continue
                results = results_of(found, name, method_name, setting, run, seeds)
                if len(results) < len(seeds) or not count:
                    continue
                losses = np.array([loss_at(result, count, task.floor) for result in results])
                share = [min(1.0, count / max(result["used"], 1)) for result in results]
                seconds = np.median([result["seconds"] * part for result, part in zip(results, share, strict=True)])
                shown = f"{method_name}, {label}" if label else method_name
                used = np.mean([cost * min(result["used"], count) for result in results])
                table[shown, budget] = Row(setting, losses, used, seconds, results)
    return table


def print_task(task, name, methods, found, tuning_seeds, seeds):
    """The table, at each budget every method; returns what the picture shows."""
    table = rows(task, name, methods, found, tuning_seeds, seeds)
    print(f"\n{name}: {task.description}; floor {task.floor:g}; n = {len(seeds)} seeds")
    adam = {budget: values for (method, budget), values in table.items() if method == BASELINE}
    if not adam:
        print("no runs of Adam")
        return {}
    lengths = sorted(adam)
    means = [geometric_mean(adam[length].losses) for length in lengths]
    seconds_each = np.median([adam[length].seconds / length for length in lengths])
    for length, mean in zip(lengths, means, strict=True):
        if length not in task.budgets:
            print(f"Adam, {length} evaluations: {mean:.4g}; {described(adam[length].setting, methods[BASELINE])}")
    print_row(WIDTHS, ["", "setting", "loss", "used", "Adam needs", "ratio", "seconds", "time ratio", "compile"])
    for budget in task.budgets:
        print(f"{budget} evaluations")
        for (method, at), row in table.items():
            if at != budget:
                continue
            sign, needed = passes_needed(lengths, means, geometric_mean(row.losses))
            cells = [
                f"  {method}",
                described(row.setting, methods[method.split(",")[0]]),
                spread(row.losses),
                f"{row.used:.0f}",
                f"{sign}{needed:.0f}",
                f"{sign}{needed / row.used:.2f}",
                f"{row.seconds:.3g}",
                f"{sign}{needed * seconds_each / row.seconds:.2f}",
                f"{max(result['compile_seconds'] for result in row.results):.1f}",
            ]
            print_row(WIDTHS, cells)
    return curves(task, table)


def described(setting, method):
    rate = f"{rate_of(setting):.3g}, {setting.betas}" if method.has_rate else ""
    return ", ".join(part for part in (rate, str(setting)) if part)


def curves(task, table):
    """``{method: (evaluations, losses)}``: Adam's best at each budget, and the others' longest runs."""
    adam = [(budget, geometric_mean(row.losses)) for (method, budget), row in table.items() if method == BASELINE]
    shown = {"Adam, re-tuned for each": tuple(zip(*sorted(adam), strict=True))}
    for (method, budget), row in table.items():
        if method != BASELINE and budget == max(task.budgets) and ", its passes" not in method:
            counts = row.results[0]["counts"]
            means = [geometric_mean([loss_at(result, count, task.floor) for result in row.results]) for count in counts]
            shown[method] = (counts, means)
    return shown


def draw(pictures, path):
    """Loss against evaluations, both logarithmic."""
    import matplotlib.pyplot as plt

    labels = dict.fromkeys(label for shown in pictures.values() for label in shown)
    colors = dict(zip(labels, ["k", *plt.cm.tab10.colors], strict=False))
    figure, axes = plt.subplots(2, -(-len(pictures) // 2), figsize=(14, 8), squeeze=False)
    for axis, (name, shown) in zip(axes.flat, pictures.items(), strict=False):
        for label, (counts, losses) in shown.items():
            style = "o-" if label.startswith(BASELINE) else "-"
            axis.plot(counts, losses, style, color=colors[label], markersize=4, label=label)
        axis.set(title=name, xlabel="evaluations of loss and gradient", xscale="log", yscale="log")
    for axis in axes.flat[len(pictures) :]:
        axis.set_axis_off()
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=4, fontsize="small")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=80)
