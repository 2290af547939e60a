"""Chooses the settings of a method to run next.

The search starts with a coarse grid at the middle budget, then varies the rate by half octaves, until the best has
neighbours on all sides. Other budgets start from the best setting of the next budget.
"""

import itertools
from typing import NamedTuple

import numpy as np
from guard import geometric_mean
from noiseless_rivals import Setting

BASELINE = "Adam"
MOST_HALF_OCTAVES = 20


class Job(NamedTuple):
    """One run."""

    task: str
    method: str
    setting: Setting
    budget: int
    seed: int


def scaled(task, scale):
    """The task with other budgets, for a trial."""
    return task._replace(budgets=tuple(max(2, round(scale * budget)) for budget in task.budgets))


def middle(budgets):
    return budgets[len(budgets) // 2]


def all_budgets(task):
    return sorted({*task.budgets, *(factor * middle(task.budgets) for factor in task.further)})


def run_budgets(task, name, method):
    """The budgets of a method's runs: one run covers all budgets unless there is a schedule."""
    if name == BASELINE:
        return all_budgets(task)
    if method.has_rate:
        return [*task.budgets]
    return [min(method.most or np.inf, max(task.budgets))]


def own_settings(method):
    names = [name for name, _ in method.own]
    return [tuple(zip(names, values, strict=True)) for values in itertools.product(*(v for _, v in method.own))]


def coarse(task, method):
    """Rates and betas, with the first of the method's own settings, where `moves` go on; all where there is no rate."""
    if not method.has_rate:
        return [Setting(own=own) for own in own_settings(method)]
    own = own_settings(method)[:1]
    return [Setting(*parts) for parts in itertools.product(task.rates, method.betas, own, method.stretches[:1])]


def moves(method, setting):
    """Settings that differ in one thing, in the rate by a factor of the square root of 2."""
    if not method.has_rate:
        return []
    rates = [setting.rate + move for move in (-1, 1) if abs(setting.rate + move) <= MOST_HALF_OCTAVES]
    return [
        *(setting._replace(rate=rate) for rate in rates),
        *(setting._replace(betas=betas) for betas in method.betas if betas != setting.betas),
        *(setting._replace(own=own) for own in own_settings(method) if own != setting.own),
        *(setting._replace(stretch=stretch) for stretch in method.stretches if stretch != setting.stretch),
    ]


def loss_at(result, count, floor=0.0):
    """The lowest loss of the first ``count`` evaluations in a run's stored result."""
    at = np.searchsorted(result["counts"], count, side="right") - 1
    return max(result["losses"][at], floor) if at >= 0 else np.inf


def scores(task, found, name, method_name, budget, at, seeds):
    """``{setting: geometric mean}`` of those that were run with all seeds, at so many of the budget's evaluations."""
    losses = {}
    for job, result in found.items():
        if (job.task, job.method, job.budget) == (name, method_name, budget) and job.seed in seeds:
            losses.setdefault(job.setting, []).append(loss_at(result, at, task.floor))
    return {setting: geometric_mean(values) for setting, values in losses.items() if len(values) == len(seeds)}


def missing_jobs(found, task, name, method_name, method, seeds):
    """The next runs of the search for a method's settings; none once it is over."""
    if not method.suits(task):
        return []
    budgets = run_budgets(task, method_name, method)
    start = middle(task.budgets) if method.has_rate else budgets[0]
    jobs, best = [], {}
    # From the middle outwards, so that the one before is known.
    for budget in sorted(budgets, key=lambda budget: abs(np.log(budget / start))):
        known = scores(task, found, name, method_name, budget, budget, seeds)
        if budget == start:
            settings = coarse(task, method)
        else:
            nearer = [b for b in best if abs(np.log(b / start)) < abs(np.log(budget / start))]
            settings = [best[min(nearer, key=lambda b: abs(np.log(b / budget)))]] if nearer else []
        left = [setting for setting in settings if setting not in known]
        if settings and not left:
            best[budget] = min(known, key=known.get)
            left = [setting for setting in moves(method, best[budget]) if setting not in known]
        jobs += [Job(name, method_name, setting, budget, seed) for setting in left for seed in seeds]
    return [job for job in jobs if job not in found]


def chosen(task, found, name, method_name, method, budget, seeds):
    """The best setting at a budget, and the budget of its run."""
    run = budget if method.has_rate else run_budgets(task, method_name, method)[0]
    known = scores(task, found, name, method_name, run, budget, seeds)
    return min(known, key=known.get), run


def comparison_jobs(found, task, name, method_name, method, tuning_seeds, seeds):
    if not method.suits(task):
        return []
    budgets = all_budgets(task) if method_name == BASELINE else task.budgets
    best = [chosen(task, found, name, method_name, method, budget, tuning_seeds) for budget in budgets]
    jobs = [Job(name, method_name, setting, run, seed) for setting, run in dict.fromkeys(best) for seed in seeds]
    return [job for job in jobs if job not in found]
