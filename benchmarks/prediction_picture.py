"""Draws `prediction.png` from `prediction.log`: where six ways to train end, by backward passes.

Run `python benchmarks/prediction_picture.py`; nothing is trained. `prediction.py` made the log, which has more methods.
"""

import argparse
import itertools
import pathlib
import re
from typing import NamedTuple

HERE = pathlib.Path(__file__).parent
# Plain Adam is a line; the others are points, by their names in the log.
SHOWN = {
    "balanced, the default": ("balanced (default)", "D", "#0b5fa5"),
    "aggressive": ("aggressive", "^", "#1b7f3b"),
    "coast": ("coasting", "v", "#7a4fa3"),
    "repeat the last update": ("repeating the last update", "s", "#8c5a3c"),
    "vsa-optim-rs": ("vsa-optim-rs", "X", "#d1710a"),
}
PLAIN = "#333333"
# Where a label may be, by preference: its shift in points, and which of its sides is there.
PLACES = [
    ((7, 0), "left", "center"),
    ((0, -6), "center", "top"),
    ((0, 6), "center", "bottom"),
    ((5, 6), "left", "bottom"),
    ((5, -6), "left", "top"),
    ((-7, 0), "right", "center"),
    ((-5, 6), "right", "bottom"),
    ((-5, -6), "right", "top"),
    ((0, 18), "center", "bottom"),
    ((0, -18), "center", "top"),
]


class Task(NamedTuple):
    """One task of the log: plain Adam's loss at each number of passes, and where the methods end."""

    plain: dict[int, float]
    ends: dict[str, tuple[float, float]]


def read(log):
    """The tasks of a log, by name."""
    tasks = {}
    for section in re.split(r"\n+(?=.* \((?:without noise|mini-batches)\): )", log)[1:]:
        name = section.partition(" (")[0]
        best = section.partition("each at its best")[2].partition("at a recipe's rate")[0]
        plain = re.findall(r"^plain, (\d+) steps: (\S+) at", section, flags=re.MULTILINE)
        rows = re.findall(r"^(.*?)(?:, \d+)?  +(\S+) \[\S+, \S+\] +(\S+)  ", best, flags=re.MULTILINE)
        ends = {method: (float(passes), float(loss)) for method, loss, passes in rows}
        tasks[name] = Task({int(steps): float(loss) for steps, loss in plain}, ends)
    return tasks


def draw(tasks, path):
    """One panel a task, two a row, wide enough to be read at a page's width."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    rows = -(-len(tasks) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(9, 3.5 * rows), layout="constrained", squeeze=False)
    for axis, (name, task) in zip(axes.flat, tasks.items(), strict=False):
        axis.plot(list(task.plain), list(task.plain.values()), ".-", color=PLAIN)
        shown = {method: task.ends[method] for method in SHOWN if method in task.ends}
        for method, end in shown.items():
            axis.plot(*end, SHOWN[method][1], color=SHOWN[method][2], markersize=7)
        losses = [*task.plain.values(), *(loss for _, loss in shown.values())]
        if max(losses) > 2 * min(losses):
            axis.set_yscale("log")
            axis.set_ylim(min(losses) / 2, max(losses) * 4)
        else:
            axis.margins(y=0.15)
        axis.margins(x=0.2)
        axis.set_title(name, fontsize=11)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(6))
    for axis in axes[-1]:
        axis.set_xlabel("backward passes")
    for axis in axes[:, 0]:
        axis.set_ylabel("final loss")
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    figure.suptitle("Final loss by backward passes; plain Adam is tuned anew for each number of passes", fontsize=11)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # Labels are put where they fit now.
    for axis, task in zip(axes.flat, tasks.values(), strict=False):
        label(axis, task)
    figure.savefig(path, dpi=80)


def label(axis, task):
    """Names each point once, methods that end in the same place together, and the line at its upper end."""
    names, colours = {}, {}
    for method, (name, _, colour) in SHOWN.items():
        if method in task.ends:
            end = task.ends[method]
            place = next((other for other in names if _distance(axis, other, end) < 5), end)
            names.setdefault(place, []).append(name)
            colours.setdefault(place, colour)
    last = max(task.plain)
    names[(last, task.plain[last])] = ["plain Adam"]
    colours[(last, task.plain[last])] = PLAIN
    line = axis.transData.transform(list(task.plain.items()))
    # Boxes that a label should not cover, and how much worse that is than to cover a point of the line.
    taken = [(_around(point), 1) for a, b in itertools.pairwise(line) for point in _between(a, b)]
    taken += [(_around(axis.transData.transform(end), 6), 20) for method, end in task.ends.items() if method in SHOWN]
    for place, together in sorted(names.items(), key=lambda item: -len(item[1][0])):
        text = axis.annotate(
            ",\n".join(together), place, (0, 0), textcoords="offset points", fontsize=9, color=colours[place]
        )
        renderer = axis.figure.canvas.get_renderer()
        found = []
        for shift, horizontal, vertical in PLACES:
            text.set(position=shift, ha=horizontal, va=vertical)
            box = text.get_window_extent(renderer)
            inside = axis.bbox.contains(box.x0, box.y0) and axis.bbox.contains(box.x1, box.y1)
            found.append((sum(cost * box.overlaps(other) for other, cost in taken) + 1000 * (not inside), len(found)))
        shift, horizontal, vertical = PLACES[min(found)[1]]
        text.set(position=shift, ha=horizontal, va=vertical)
        taken.append((text.get_window_extent(renderer), 20))


def _distance(axis, one, other):
    """In dots."""
    first, second = axis.transData.transform([one, other])
    return float(((first - second) ** 2).sum() ** 0.5)


def _between(a, b):
    return [a + (b - a) * k / 20 for k in range(21)]


def _around(point, radius=1):
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(*(point - radius), *(point + radius))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=pathlib.Path, default=HERE / "prediction.log", help="what prediction.py printed")
    parser.add_argument("--plot", type=pathlib.Path, default=HERE / "prediction.png", help="the PNG to write")
    options = parser.parse_args()
    draw(read(options.log.read_text()), options.plot)


if __name__ == "__main__":
    main()
