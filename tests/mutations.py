"""Breaks the package in one place at a time and shows that the tests notice.

``python tests/mutations.py`` copies the package, applies one `MUTANTS` entry after the other to the copy, runs the
tests named beside it, and prints a table. It fails if a mutant survives or no longer fits the source, or if the tests
fail without any change.

An entry names a function, wherever its module lies, and an edit inside it. Layout does not matter: both the function
and the edit are compared as Python prints them.
"""

import argparse
import ast
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vsa_optax"


class Mutant(NamedTuple):
    """One change.

    Attributes:
        place: ``module.function``, ``module.Class.method`` or ``module.CONSTANT``; no folder.
        old: code that occurs once in it.
        new: what it becomes.
        tests: words for pytest, in the order in which they should be tried: files below ``tests``, and ``-k``.
    """

    place: str
    old: str
    new: str
    tests: str


ELIMINATION = "kernels/gpu/test_elimination.py"
WLS = (
    "prediction/fits/test_line_fit.py prediction/predictors/test_line.py "
    "-k fewer_than or vanishing or sum_to_one or variance or twin_over"
)
NUMERICS = "kernels/test_numerics.py -k finite or saturating or relative"
TWIN = "prediction/predictors/test_line.py -k twin_over"
LINE = "prediction/predictors/test_line.py -k move_on_a_line"
MOMENTUM = "prediction/predictors/test_momentum.py -k no_leap or by_leaf or of_the_twin or twin_over"
LEGACY = "prediction/test_legacy.py -k trainers or lengths"
LOSSES = "test_loss_history.py -k same_loss or repeated or measured_in_predict or finite or ring or beside"
LOSS_STATISTICS = "test_loss_statistics.py"
PICTURES = "test_plots.py -k page or stretches"
MEMORY = "test_memory.py"
WALK = "prediction/test_machine.py -k short_cycles or prolong or walk_equals"
ADAPTIVE = "prediction/test_machine.py -k adaptive"
LOSS = "prediction/test_machine.py -k adaptive or nonfinite_values"
STEP = "prediction/test_update.py -k leave_no_trace or own_nan or rate_of_step or inner_state_rests"
BY_PHASE = "prediction/test_value_and_grad.py -k true_phases or in_predict or predict_ or dtype or aux"
VSA_BUNDLE = "test_vsa.py -k twin_in_any_order or weights or ties_are or nan_never"
VSA_SIMILARITY = "test_vsa.py -k similarities or magnitude or with_nothing or precision or not_finite or exceeds"
KERNEL_TWIN = "kernels/test_lloyd_max.py -k twin"
TRIT_TWIN = "codecs/test_trit.py -k twin"
HYPERVECTOR_TWIN = "codecs/test_hypervector.py -k twin"
CODED = "prediction/predictors/test_window.py -k decoded_records"
SUM = "accumulation/test_packed_rows.py -k twin or few_rows"
ROUNDING = "kernels/test_uniform.py -k rounding"
WINDOWS = "accumulation/test_multi_steps.py accumulation/test_microbatching.py -k windows_are or left_out or leaves_out"
OF_ERRORS = "prediction/test_phases.py prediction/predictors/test_factory.py"
AXIS_NAMES = "core/test_axis_names.py"
HIDDEN = "prediction/test_value_and_grad.py -k own_argument"
RATES = "prediction/test_learning_rate.py -k refused or welcome or no_rate"
COUNTED = "accumulation/test_microbatching.py -k that_came"
COLLECTIVE_WINDOWS = "test_collective_windows.py -k emissions"
COLLECTIVE_REFUSALS = "test_collective_windows.py -k refused"
COLLECTIVE_TWIN = "compression/test_pmean.py -k twin"
COLLECTIVE_BUNDLES = "compression/test_pmean.py -k summed"
ROWS = "compression/test_row_coding.py"
CODEC_OF_ONES_OWN = "compression/test_pmean.py -k hides"
COLLECTIVE_NAN = "compression/test_pmean.py -k nan"
COLLECTIVE_PHASES = "test_collective_phases.py -k any_phase or averaged_where"

CALIBRATION = "prediction/fits/test_calibration.py -k twin or products_kept or vanishes or ridge"
GUARD = "prediction/test_guard.py -k twin or bounds"
REST = "prediction/test_guard.py -k tells_rest"
DRIFT = "prediction/test_guard.py -k one_step_later"
SECANT = (
    "prediction/predictors/test_secant.py prediction/fits/test_secant_fit.py -k twin or products_kept or no_changes"
)
LEAP = "prediction/test_multisecant.py -k twin"
LEAP_FIT = "prediction/fits/test_multisecant_fit.py"
LEAPS = "prediction/test_multisecant.py"
PROBE = "test_probe.py"
SECANT_FLOAT16 = "prediction/predictors/test_secant.py -k float16 or twin"
BY_KIND = "test_step_programs.py"
BY_WINDOW = "test_window_programs.py"
FORECAST = "prediction/test_forecast.py"
SUMMED = "accumulation/test_ternary_sum.py"
GPU_SECANTS = "kernels/gpu/test_secant_kernels.py"
GPU_TRITS = "kernels/gpu/test_trit_kernels.py"
REPLACEMENT = "kernels/test_replacement.py -k all_are or in_batches"
GPU_REPLACEMENT = "kernels/gpu/test_replacement_kernel.py"
GPU_LEVELS = "kernels/gpu/test_levels.py"
GPU_TILES = "kernels/gpu/test_tiles.py"
WHOLE_ROWS = "kernels/test_trit_blocks.py -k rows"
LEAP_CONSTANT = f"{LEAP_FIT} {LEAPS} -k constants"

MUTANTS = [
    Mutant("calibration.measure", "forget * sums.products + products", "sums.products + products", CALIBRATION),
    Mutant("calibration.solve", "rest = rest - rows[i][j]", "rest = rest + rows[i][j]", CALIBRATION),
    Mutant("calibration.coefficients", "+ RIDGE * scale * prior", "- RIDGE * scale * prior", CALIBRATION),
    Mutant(
        "window.WindowHistory.products",
        ".at[:, slot].set(squared_norms)",
        ".at[:, slot].set(-squared_norms)",
        CALIBRATION,
    ),
    Mutant("window.WindowHistory.scalars", "set(horizon - age)", "set(horizon)", CALIBRATION),
    Mutant("guard._judged", "_MOST_ERROR) / distance ** 4", "_MOST_ERROR) / distance ** 2", GUARD),
    Mutant("guard._judged", "settings.tolerance ** 2", "settings.tolerance", GUARD),
    Mutant("guard._judged", "_FORGET * state.constant", "0 * state.constant", GUARD),
    Mutant("guard._judged", "jnp.minimum(reach, _GROWTH * distance)", "reach", GUARD),
    Mutant("guard._judged", "constant < _START * tolerated", "constant < tolerated", GUARD),
    Mutant("guard.after", "jnp.where(is_measured, j, u)", "j", "prediction/test_guard.py -k not_finite"),
    Mutant("guard.after", "is_measured &= ~_rests", "is_measured &= _rests", GUARD),
    Mutant("guard.after", "is_recorded, 0, state.way)", "is_recorded, state.way, state.way)", GUARD),
    Mutant("guard.after", "jnp.where(is_far, 0, length)", "length", GUARD),
    Mutant("guard.after", "(state.length > 0) & ~is_far", "state.length > 0", GUARD),
    Mutant("guard._rests", "moved.distance == 0", "moved.distance < 0", REST),
    Mutant("guard._rests", "state.way == 0", "state.way < 0", REST),
    Mutant("guard._is_far", "_SLACK * steps", "2 * _SLACK * steps", GUARD),
    Mutant("guard._is_far", "(state.pace > 0) &", "(state.pace >= 0) &", "prediction/test_guard.py -k tells_rest"),
    Mutant("guard._is_far", "(state.drift > 0) &", "(state.drift >= 0) &", "prediction/test_guard.py -k tells_rest"),
    Mutant("guard._is_far", "is_recorded, 0, moved.distance)", "is_recorded, moved.distance, moved.distance)", GUARD),
    Mutant("guard._judged", "state.way / jnp.maximum(moved.horizon, 1)", "state.way", GUARD),
    Mutant("guard._judged", "else moved.distance / jnp.maximum(moved.horizon, 1)", "else moved.distance", GUARD),
    Mutant(
        "update.switched",
        "moved._replace(emitted=norm(new_updates))",
        "moved",
        "prediction/test_guard.py -k before_the_parameters_move",
    ),
    Mutant("secant.SecantScalars.distance", "jnp.sqrt(self.squared_norm)", "self.squared_norm", DRIFT),
    Mutant("guard._judged", "_WORTH * state.leap", "state.leap", GUARD),
    Mutant("guard._judged", "jnp.minimum(state.hopeless, 0)", "0", GUARD),
    Mutant("guard._judged", "(hopeless <= 0)", "(hopeless >= -999)", GUARD),
    Mutant("guard._judged", "(length == 0)", "(length >= 0)", "prediction/test_guard.py -k where_a_leap_begins"),
    Mutant("guard._judged", "error > _HOPELESS_ERROR, 2, 1", "error > _HOPELESS_ERROR, 2, 0", GUARD),
    Mutant("guard.watched_for_certain", "jnp.ceil", "1 + jnp.ceil", FORECAST),
    Mutant("guard.watched_for_certain", "state.hopeless + 1) // 2", "state.hopeless)", FORECAST),
    Mutant("guard._judged", "jnp.minimum(2 * sleep, _LONGEST_SLEEP)", "sleep", "prediction/test_guard.py -k sleeps"),
    Mutant("guard.after", "asleep=state.asleep - 1", "asleep=state.asleep - 2", "prediction/test_guard.py -k sleep"),
    Mutant("step.PhaseStep.__call__", "guard.asleep == 0", "guard.asleep >= 0", "prediction/test_guard.py -k asleep"),
    Mutant("secant_fit.coefficients", "(1 + ridges) * unit", "(1 - ridges) * unit", SECANT),
    Mutant("secant_fit.errors", "- 2 * linear + quadratic", "- linear + quadratic", SECANT),
    Mutant("secant_fit.best", "jnp.argmin(scores", "jnp.argmax(scores", SECANT),
    Mutant("secant_fit.coefficients", "products * inverse, 0), (ridges", "products, 0), (ridges", SECANT),
    Mutant("secant_fit.scored", "forget * average + (1 - forget)", "forget * average + forget", SECANT),
    Mutant(
        "secant.SecantHistory.record",
        "at[slot].set(scalars.squared_norm)",
        "at[slot].set(-scalars.squared_norm)",
        SECANT,
    ),
    Mutant("secant._scale", "exponent - _HALF_RANGE", "exponent - 60", SECANT_FLOAT16),
    Mutant("secant._products", "* scale for", "+ 0 * scale for", SECANT_FLOAT16),
    Mutant("secant.SecantPredictor.predict", "weights * history.scales[1][leaf]", "weights", SECANT_FLOAT16),
    Mutant("secant.SecantHistory.record", "_difference(n, o), 0", "_difference(o, n), 0", SECANT),
    Mutant(
        "secant.SecantPredictor.scalars",
        "jnp.where(is_known, products, 0)",
        "products",
        "prediction/predictors/test_secant.py -k far_from",
    ),
    Mutant("secant.SecantPredictor.compare", "at[:, slot].set(missed)", "at[:, slot].set(-missed)", SECANT),
    Mutant("secant.SecantPredictor.compare", "tree.map(_difference, target", "tree.map(jnp.add, target", SECANT),
    Mutant("multisecant_fit.RIDGE", "1e-05", "0.0001", LEAP_CONSTANT),
    Mutant("multisecant_fit._LEAST_EIGENVALUE", "1e-06", "1e-05", LEAP_CONSTANT),
    Mutant("multisecant_fit.solve", "_LEAST_EIGENVALUE * jnp", "0 * jnp", f"{LEAP_FIT} -k no_length"),
    Mutant("multisecant_fit.solve", "jnp.abs(curvatures)", "curvatures", f"{LEAP_FIT} -k negative"),
    Mutant("multisecant_fit.solve", "own_step) - _matmul", "own_step) + _matmul", f"{LEAP_FIT} -k twin"),
    Mutant("multisecant_fit.solve", "weight = damping * curvature", "weight = damping", f"{LEAP_FIT} -k twin"),
    Mutant("multisecant_fit.solve", "roots / (eigenvalues + RIDGE)", "roots / eigenvalues", f"{LEAP_FIT} -k twin"),
    Mutant("multisecant_fit.solve", "own_gradient + _matmul", "own_gradient - _matmul", f"{LEAP_FIT} -k twin"),
    Mutant("multisecant_fit.solve", "jnp.isinf(damping)", "jnp.isnan(damping)", f"{LEAP_FIT} -k newtons"),
    Mutant(
        "multisecant_fit.solve", "(is_finite, x * inverse, 0)", "(True, x * inverse, 0)", f"{LEAP_FIT} -k not_finite"
    ),
    Mutant(
        "multisecant_fit.solve", "inverse[:, None] * inverse[None]", "inverse[None] ** 2", f"{LEAP_FIT} -k scale_of"
    ),
    Mutant("multisecant_fit._product", "inverse > 0", "inverse >= 0", f"{LEAP_FIT} -k not_finite"),
    Mutant("multisecant_fit._hessian", "2 * RIDGE * curvature", "RIDGE * curvature", f"{LEAP_FIT} -k least_squares"),
    Mutant("multisecant_fit._hessian", "weighted + weighted.T", "2 * weighted", f"{LEAP_FIT} -k least_squares"),
    Mutant("multisecant_fit._hessian", "roots[None] / roots[:, None]", "1", f"{LEAP_FIT} -k least_squares"),
    Mutant("multisecant_fit._hessian", "[None] + 2 * RIDGE", "[None]", f"{LEAP_FIT} -k least_squares"),
    Mutant("inner_products.inner_of_all_records", "conj()", "real", "kernels/test_inner_products.py -k all_records"),
    Mutant("forecast._of_guard", "done + 1 >= leap_length", "done + 2 >= leap_length", FORECAST),
    Mutant("forecast._of_guard", "phases.warmup_steps - done", "phases.warmup_steps", FORECAST),
    Mutant("forecast._of_guard", "(StepKind.PLAIN, asleep)", "(StepKind.PLAIN, asleep + 1)", FORECAST),
    Mutant("forecast._of_cycle", "state.calibration is None", "True", FORECAST),
    Mutant("forecast._of_cycle", "done % phases.correct_every\n", "done\n", FORECAST),
    Mutant("forecast._of_cycle", "(done + num) % phases.correct_every == 0", "True", FORECAST),
    Mutant("forecast._of_cycle", "done + 1 >= leap", "done >= leap", FORECAST),
    Mutant("forecast._of_cycle", "jnp.maximum(full - done, 1)", "jnp.maximum(full, 1)", FORECAST),
    Mutant("kinds.assumption_for", "not are_same(assumption.marks, marks)", "False", f"{BY_KIND} -k decided_on"),
    Mutant("step_programs._without", "steps -= taken", "steps -= 0", f"{BY_KIND} -k what_is_left"),
    Mutant("step_programs._without", "min(num, steps)", "0", f"{BY_KIND} -k waits_only"),
    Mutant(
        "step_programs._Last.is_in",
        "are_same(_marks_of(_find_owner((args, kwargs))), marks)",
        "True",
        f"{BY_KIND} -k turns",
    ),
    Mutant(
        "step_programs._traced_for",
        "are_same(_marks_of(o), after)",
        "True",
        f"{BY_KIND} -k anew",
    ),
    Mutant(
        "step_programs._leads_to_owner",
        "isinstance(tree, tuple) and any(map(_leads_to_owner, tree))",
        "bool(_owners_in(tree))",
        f"{BY_KIND} -k in_place",
    ),
    Mutant("step_programs.JitByPhase.__call__", "self._last = None", "pass", f"{BY_KIND} -k fails"),
    Mutant("step_programs._coming", "StepKind.UNDECIDED", "StepKind.ACCUMULATED", f"{BY_WINDOW} -k waits_once"),
    Mutant(
        "step_programs.JitByPhase.__init__",
        '(jit_options["out_shardings"], None)',
        'jit_options["out_shardings"]',
        f"{BY_WINDOW} -k shardings",
    ),
    Mutant("step_programs.JitByPhase._keep", "([], 1)", "(self._forecasts, 1)", f"{BY_WINDOW} -k waits_once"),
    Mutant("step_programs._Last.__init__", "(result, *result)", "result", f"{BY_WINDOW} -k without_a_search"),
    Mutant("kinds.are_same", "all(", "any(", f"{BY_WINDOW} -k begins_again"),
    Mutant("step_programs._owners_in", "isinstance(owner, PhaseMachineState)", "False", f"{BY_WINDOW} -k beside"),
    Mutant("step_programs._traced_for", "== (kind in", "!= (kind in", f"{BY_WINDOW} -k another_owner"),
    Mutant("step_programs._coming", "(shape := first.shape)", "(shape := ())", f"{BY_WINDOW} -k several_runs"),
    Mutant("step_programs._owners_in", "isinstance(node, _OWNERS))", "False)", f"{BY_WINDOW} -k waits_once"),
    Mutant("multi_steps._Window.forecast", "k - 1 - after.mini_step", "k - after.mini_step", f"{BY_WINDOW} -k bits"),
    Mutant("multi_steps._Window.forecast", "after.gradient_step", "before.gradient_step", f"{BY_WINDOW} -k bits"),
    Mutant("multi_steps._Window.forecast", "_WINDOWS_OF_ONE, 1", "1, 1", f"{BY_WINDOW} -k waits_once"),
    Mutant("multi_steps._Window.forecast", "_WINDOWS_OF_ONE, 1", "2**30, 1", f"{BY_WINDOW} -k asked_for_again"),
    Mutant(
        "multi_steps.ternary_multi_steps",
        "jnp.array(False), _zeros(outcome.updates)",
        "emits, _zeros(outcome.updates)",
        f"{BY_WINDOW} -k never_emits",
    ),
    Mutant(
        "multi_steps.accumulate_ternary",
        "_zeros(updates)",
        "zeros_unless(taken.is_last, updates)",
        f"{BY_WINDOW} -k adds_nothing",
    ),
    Mutant(
        "multi_steps.ternary_multi_steps",
        "_zeros(outcome.updates)",
        "zeros_unless(taken.is_last, updates)",
        f"{BY_WINDOW} -k adds_nothing",
    ),
    Mutant("step_programs._coming", "(StepKind.PLAIN, asleep)", "(StepKind.WATCHED, asleep)", f"{BY_KIND} -k asleep"),
    Mutant(
        "step.PhaseStep.straight",
        "tree_where(is_finite, new_state, inner_state)",
        "new_state",
        f"{BY_KIND} -k parameters_are",
    ),
    Mutant(
        "step.PhaseStep.straight",
        "tree_where(emitted.is_finite, compared, comparison)",
        "compared",
        f"{BY_KIND} -k parameters_are",
    ),
    Mutant(
        "step.PhaseStep.straight",
        "has_gradient & all_finite(target)",
        "all_finite(target) | True",
        f"{BY_KIND} -k parameters_are",
    ),
    Mutant("leap.NUM_LOSSES", "8", "1", LEAP_CONSTANT),
    Mutant("leap.(LEAST_DAMPING, FIRST_DAMPING, MOST_DAMPING)", "1e-06", "1e-05", LEAP_CONSTANT),
    Mutant("leap.(LEAST_DAMPING, FIRST_DAMPING, MOST_DAMPING)", "1.0", "2.0", LEAP_CONSTANT),
    Mutant("leap.(LEAST_DAMPING, FIRST_DAMPING, MOST_DAMPING)", "100.0", "50.0", LEAP_CONSTANT),
    Mutant("leap.(LESS, MORE, MUCH_MORE)", "0.5", "0.7", LEAP_CONSTANT),
    Mutant("leap.(LESS, MORE, MUCH_MORE)", "1.5", "1.2", LEAP_CONSTANT),
    Mutant("leap.(LESS, MORE, MUCH_MORE)", "4.0", "3.0", LEAP_CONSTANT),
    Mutant("leap.(WORST_ERROR, WORST_IF_IT_ROSE)", "1.0", "2.0", LEAP_CONSTANT),
    Mutant("leap.(WORST_ERROR, WORST_IF_IT_ROSE)", "0.3", "0.5", LEAP_CONSTANT),
    Mutant("leap.METRIC_DECAY", "0.98", "0.9", LEAP_CONSTANT),
    Mutant("secants.EPSILON", "1e-08", "1e-06", LEAP_CONSTANT),
    Mutant("leap.CURVATURE_SHARE", "0.3", "1.0", LEAP_CONSTANT),
    Mutant("leap.CURVATURE_DECAY", "0.5", "0.9", LEAP_CONSTANT),
    Mutant("leap.LEAST_OUTSIDE", "1e-06", "0.01", LEAP_CONSTANT),
    Mutant("leap._leap", "LEAST_OUTSIDE * squared_inside", "0", f"{LEAPS} -k few_dimensions"),
    Mutant("leap.judged", "(state.leap.squared_outside > 0) & ", "", LEAP),
    Mutant("leap.MOST_LOGARITHM", "80.0", "800.0", LEAP_CONSTANT),
    Mutant("leap.judged", "jnp.max(state.losses)", "jnp.min(state.losses)", f"{LEAPS} -k last_accepted"),
    Mutant("leap.judged", "value <= jnp.max", "value < jnp.max", f"{LEAPS} -k last_accepted"),
    Mutant("leap.judged", "num_accepted % NUM_LOSSES", "num_accepted % 2", f"{LEAPS} -k last_accepted"),
    Mutant("leap.judged", "is_first | is_bound |", "is_first |", f"{LEAPS} -k bound_of_damping"),
    Mutant("leap.judged", "fell, 1, MORE)", "fell, 1, MUCH_MORE)", LEAP),
    Mutant("leap.judged", "MORE)), MUCH_MORE)", "MORE)), MORE)", f"{LEAPS} -k gone_back"),
    Mutant("leap.judged", "is_foreseen, LESS", "is_foreseen, MORE", LEAP),
    Mutant("leap.judged", "value <= state.loss", "value > state.loss", f"{LEAPS} -k falls"),
    Mutant("leap.judged", "fell, WORST_ERROR, WORST_IF_IT_ROSE", "fell, 1, 1", f"{LEAPS} -k falls"),
    Mutant("leap.judged", "is_foreseen = squared_error <", "is_foreseen = 0 <", LEAP),
    Mutant("multisecant.multisecant", "number(NUM_LOSSES) - jnp.inf", "number(NUM_LOSSES) + jnp.inf", LEAP),
    Mutant("multisecant._check_agreement", "if axes", "if axes and what == 'gradients'", f"{LEAPS} -k shard_map"),
    Mutant("leap.judged", "factor.astype(state.damping.dtype), LEAST", "1, LEAST", LEAP),
    Mutant("leap.judged", "LEAST_DAMPING, MOST_DAMPING)", "0, MOST_DAMPING)", f"{LEAPS} -k its_bounds"),
    Mutant("leap.judged", "LEAST_DAMPING, MOST_DAMPING)", "LEAST_DAMPING, 1000)", f"{LEAPS} -k its_bounds"),
    Mutant("leap.judged", "jnp.where(is_first | is_resting, state.damping, damping)", "damping", LEAP),
    Mutant("leap.judged", "CURVATURE_SHARE * jnp", "1.0 * jnp", LEAP),
    Mutant("leap.judged", "0, CURVATURE_DECAY", "0, 0.9", LEAP),
    Mutant("leap.judged", "log_curvature == 0, 0,", "log_curvature == 0, 0.5,", LEAP),
    Mutant("leap.judged", "num_secants % state", "num_evaluations % state", f"{LEAPS} -k gone_back"),
    Mutant("leap.judged", "(1 - forgotten), 1)", "(1 - forgotten), 2)", f"{LEAPS} -k root_mean_square"),
    Mutant("leap.judged", "/ (1 - forgotten)", "/ 1", f"{LEAPS} -k root_mean_square"),
    Mutant("leap.judged", "tree_where(is_accepted, params", "tree_where(is_finite, params", LEAP),
    Mutant("leap.judged", "tree_where(is_accepted, map", "tree_where(is_finite, map", LEAP),
    Mutant("leap.judged", "jnp.isfinite(value) & all", "all", f"{LEAPS} -k no_trace"),
    Mutant("leap.judged", " & all_finite(gradient)", "", f"{LEAPS} -k no_trace"),
    Mutant("leap.judged", "_count_if(~is_finite", "_count_if(is_finite", f"{LEAPS} -k no_trace"),
    Mutant("leap.MOST_REST", "64", "32", LEAP_CONSTANT),
    Mutant("leap.judged", "is_resting = state.rest > 0", "is_resting = state.rest > 1", f"{LEAPS} -k rests"),
    Mutant("leap.judged", "is_bound & ~is_resting & (damping", "is_bound & (damping", f"{LEAPS} -k rests"),
    Mutant("leap.judged", "is_bound & ~is_resting & (damping", "~is_resting & (damping", f"{LEAPS} -k rests"),
    Mutant("leap.judged", "2 * state.rest_length, 1", "2 * state.rest_length, 2", f"{LEAPS} -k rests"),
    Mutant("leap.judged", "state.rest_length, 0))", "state.rest_length, state.rest_length))", f"{LEAPS} -k rests"),
    Mutant("leap.judged", "is_leap & ~is_resting, jnp", "is_leap, jnp", f"{LEAPS} -k rests"),
    Mutant("leap.leap", "state.rest > 0", "state.rest > 1", f"{LEAPS} -k rests"),
    Mutant("leap._unless", "cpu=decided", "cpu=selected", f"{LEAPS} -k reuses"),
    Mutant("leap._unless", "default=selected", "default=decided", f"{LEAPS} -k control_flow"),
    Mutant("leap._leap", "(state.damping >= MOST_DAMPING) | ", "", f"{LEAPS} -k bound_of_damping"),
    Mutant("leap._leap", "damping / (1 + damping)", "1 / (1 + damping)", LEAP),
    Mutant("leap._leap", "1 / (curvature * (1 + damping))", "1 / (1 + damping)", LEAP),
    Mutant("leap._leap", "jnp.exp(state.log_curvature)", "jnp.exp(-state.log_curvature)", LEAP),
    Mutant("secants._suits_gpu", "rms.size >= _LEAST_SIZE", "rms.size > 0", "kernels/test_secants.py -k kernel_is"),
    Mutant(
        "secants._suits_gpu",
        "x.dtype == jnp.bfloat16",
        "True",
        "kernels/test_secants.py -k kernel_is",
    ),
    Mutant("secants._products_in_one_pass", "rest is None", "True", "kernels/test_secants.py -k one_pass"),
    Mutant("secants._step_in_one_pass", "squared + squared_of_rest", "squared", "kernels/test_secants.py -k one_pass"),
    Mutant(
        "secants._missed_in_one_pass", "found + _missed(rest, change)", "found", "kernels/test_secants.py -k one_pass"
    ),
    Mutant(
        "tiles.transformed",
        "left.astype(jnp.bfloat16), matrices[1]",
        "left.astype(jnp.bfloat16), matrices[0]",
        GPU_TILES,
    ),
    Mutant("tiles.sign_bits", "words[turn,", "words[0,", GPU_TILES),
    Mutant("levels.nearest_levels", "gain * power", "gain", GPU_LEVELS),
    Mutant("levels.values_of", "square = numbers * numbers", "square = numbers", GPU_LEVELS),
    Mutant("levels._divided", "+ 0.5", "+ 0.0", GPU_LEVELS),
    Mutant("levels._by_table", "eighths > cut", "eighths < cut", GPU_LEVELS),
    Mutant("levels._by_comparisons", "magnitude > float(cut) * rms", "magnitude > float(cut)", GPU_LEVELS),
    Mutant("levels._with_sign_of", "& _SIGN", "& 0", GPU_LEVELS),
    Mutant("levels.random_levels", "+ odds", "+ 0.5", GPU_TRITS + " -k stochastic"),
    Mutant("trit_kernels._encode_kernel", "3 * power", "power", GPU_TRITS + " -k encode_and_decode"),
    Mutant("trit_kernels._decode_sum_kernel", "of_block + shares", "of_block - shares", GPU_TRITS + " -k weighted"),
    Mutant("trit_kernels._add_kernel", "grown += rows.rotated", "grown -= rows.rotated", GPU_TRITS + " -k grows"),
    Mutant("trit_kernels._add_kernel", "first_word[0]", "0", GPU_TRITS + " -k xla_reads"),
    Mutant("trit_kernels._finish_kernel", "first_word[0]", "0", GPU_TRITS + " -k xla_reads"),
    Mutant("trit_kernels._vector", "which[0]", "0", GPU_TRITS + " -k among_others"),
    Mutant("trit_kernels._finish_kernel", "+ rows.coordinates(x", "- rows.coordinates(x", GPU_TRITS + " -k grows"),
    Mutant("rows.rotated_back", "reversed(range(words.shape[0]))", "range(words.shape[0])", GPU_TRITS),
    Mutant("random_words._threefry", "keys[(i + 1) % 3]", "keys[i % 3]", "kernels/gpu/test_random_words.py"),
    Mutant("platforms.is_of_one_device", "mesh.are_all_axes_manual", "True", "test_lowering.py -k some_axes"),
    Mutant(
        "platforms.on_each_gpu_or_anywhere", "is_of_one_device()", "is_on_one_device()", "kernels/test_platforms.py"
    ),
    Mutant("platforms._has_bfloat16", ">= _AMPERE", "> _AMPERE", "kernels/test_platforms.py -k bfloat16"),
    Mutant("blocks.fills_rows", "25 * BLOCKS_IN_ROW", "24 * BLOCKS_IN_ROW", WHOLE_ROWS),
    Mutant("trit_blocks._row", "blocks.fills_rows(size, block_size)", "False", WHOLE_ROWS),
    Mutant("trit_blocks.suits_gpu", "block_size == _BLOCK_ON_GPU", "True", "test_lowering.py -k codec_has"),
    Mutant(
        "packed_rows.rows_of",
        "blocks.fills_rows(size, block_size)",
        "False",
        "accumulation/test_packed_rows.py -k whole_rows",
    ),
    Mutant("secant_kernels._missed_kernel", "error -= change", "error += change", GPU_SECANTS),
    Mutant("secant_kernels._missed_kernel", "error / (rms", "error * (rms", GPU_SECANTS),
    Mutant("platforms.is_on_one_device", "jax.device_count() == 1 and", "", "kernels/test_platforms.py"),
    Mutant(
        "platforms.is_on_one_device",
        " and (not jax.sharding.get_abstract_mesh().manual_axes)",
        "",
        "kernels/test_platforms.py",
    ),
    Mutant("platforms.on_gpu_or_anywhere", "cuda=on_gpu", "cuda=anywhere", "kernels/test_platforms.py"),
    Mutant("secant_kernels._products_kernel", "jnp.sqrt(d)", "d", GPU_SECANTS),
    Mutant("secant_kernels._products_kernel", "astype(jnp.float32) * d)", "astype(jnp.float32))", GPU_SECANTS),
    Mutant("secant_kernels._products_kernel", "_dot(s, y)", "_dot(y, s)", GPU_SECANTS),
    Mutant("secant_kernels._products_kernel", "program + i * programs", "i + program * programs", GPU_SECANTS),
    Mutant(
        "secant_kernels._products_kernel", "num_blocks - program + programs - 1", "num_blocks - program", GPU_SECANTS
    ),
    Mutant("secant_kernels.products", "vectors[:, 0] + vectors[:, 1]", "vectors[:, 0]", GPU_SECANTS),
    Mutant("secant_kernels._step_kernel", "coefficients[1, i] * y", "coefficients[1, i] * s", GPU_SECANTS),
    Mutant("secant_kernels._step_kernel", "changed / d", "changed * d", GPU_SECANTS),
    Mutant("secant_kernels._step_kernel", "numbers[2] > 0", "numbers[2] < 0", GPU_SECANTS),
    Mutant("secant_kernels._step_kernel", "outside * outside * d", "outside * outside", GPU_SECANTS),
    Mutant("secants._step", "changed / metric", "changed * metric", LEAP),
    Mutant("secants._step", "squared * metric", "squared / metric", LEAP),
    Mutant("secants._step", "base - sum_of", "base + sum_of", LEAP),
    Mutant("secants._missed", "- combined", "+ combined", LEAP),
    Mutant("leap._recorded", "(is_recorded, records", "(is_recorded | True, records", f"{LEAPS} -k no_trace"),
    Mutant("leap._as_kept", "new.dtype == old.dtype", "True", f"{LEAPS} -k beyond"),
    Mutant("leap._averaged", "of_old * rms", "rms", f"{LEAPS} -k root_mean_square"),
    Mutant("secants.squared_norm", "squared / metric", "squared * metric", LEAP),
    Mutant("secants.metric", " + EPSILON", "", f"{LEAPS} -k without_a_gradient"),
    Mutant(
        "multisecant.multisecant",
        "tree_where(has_point, inner_state",
        "tree_where(True, inner_state",
        f"{LEAPS} -k given",
    ),
    Mutant("multisecant.multisecant", "jnp.where(has_point, update", "jnp.where(True, update", f"{LEAPS} -k given"),
    Mutant("multisecant.multisecant", "= state.loss", "= value", f"{LEAPS} -k given"),
    Mutant("multisecant.multisecant", "learning_rate(count)", "learning_rate(count + 1)", f"{LEAPS} -k schedules"),
    Mutant("multisecant.multisecant", "(step.dtype) - given", "(step.dtype) + given", LEAP),
    Mutant("multisecant.multisecant_stats", "evaluations - state", "evaluations + state", f"{LEAPS} -k first_finite"),
    Mutant("numerics.is_finite", "x - x for x", "x - 0 for x", NUMERICS),
    Mutant("numerics.is_finite", "jnp.isfinite(jnp.sum(", "jnp.isfinite(jnp.max(", NUMERICS),
    Mutant("numerics.saturating_cast", "nan=0.0", "nan=1.0", NUMERICS),
    Mutant("numerics.relative_distance", "x * scale - y * scale", "x * scale + y * scale", NUMERICS),
    Mutant("numerics.relative_distance", "-power_of_two(largest)", "power_of_two(largest)", NUMERICS),
    Mutant("numerics.relative_distance", "is_defined = of_x > 0", "is_defined = of_x >= 0", NUMERICS),
    Mutant("numerics.power_of_two", "maxexp - 8", "maxexp + 8", "kernels/test_numerics.py -k relative"),
    Mutant("vsa.random_hypervectors", "-1, 2, jnp.int32", "-1, 1, jnp.int32", "test_vsa.py -k random"),
    Mutant("vsa._product", "jnp.multiply(*", "jnp.add(*", "test_vsa.py -k bind or broadcast"),
    Mutant("vsa.unbind", 'key=_inverse(_real("key", key))', 'key=_real("key", key)', "test_vsa.py -k inverse_of_any"),
    Mutant(
        "vsa._inverse",
        "jnp.where(vanishes, 0, 1 /",
        "jnp.where(vanishes, 1, 1 /",
        "test_vsa.py -k inverse_of_any or unbind",
    ),
    Mutant("vsa.bundle", "1 - 2 * (jnp.arange", "2 * (jnp.arange", VSA_BUNDLE),
    Mutant("vsa.bundle", "jnp.where(total == 0, ties", "jnp.where(total <= 0, ties", VSA_BUNDLE),
    Mutant("vsa.bundle", "jnp.sign(total))", "jnp.where(total > 0, 1.0, -1.0))", VSA_BUNDLE),
    Mutant("vsa.permute", "jnp.roll(array, wide %", "jnp.roll(array, -wide %", "test_vsa.py -k permute"),
    Mutant("vsa._cosine", "jnp.clip(_dot(x, y) / norms, -1, 1)", "_dot(x, y) / norms", VSA_SIMILARITY),
    Mutant("vsa._scaled", "-numerics.power_of_two", "numerics.power_of_two", VSA_SIMILARITY),
    Mutant("vsa.cleanup", "jnp.argmax(similarity", "jnp.argmin(similarity", "test_vsa.py -k cleanup"),
    Mutant("rotation.hadamard_matrix", "[matrix, -matrix]", "[matrix, matrix]", "kernels/test_rotation.py -k hadamard"),
    Mutant(
        "rotation.walsh_hadamard",
        "np.float32(math.sqrt(factor))",
        "np.float32(factor)",
        "kernels/test_rotation.py -k hadamard",
    ),
    Mutant("rotation.walsh_hadamard", "-1, 1)", "-1, -1)", "kernels/test_rotation.py -k hadamard"),
    Mutant(
        "signs.sign_bits", "words[..., None] << jnp", "words[..., None] >> jnp", "kernels/test_signs.py -k neighbours"
    ),
    Mutant("lloyd_max._POSITIVE_LEVELS", "0.443639", "0.443939", "kernels/test_lloyd_max.py -k lloyds"),
    Mutant("lloyd_max.quantize", "alignment / jnp.mean(chosen ** 2, axis=-1)", "alignment", KERNEL_TWIN),
    Mutant("lloyd_max.quantize", "1.0 / alignment if", "1.0 / jnp.mean(chosen ** 2, axis=-1) if", KERNEL_TWIN),
    Mutant("lloyd_max.quantize", "(table[1:] + table[:-1]) / 2", "table[:-1]", KERNEL_TWIN),
    Mutant(
        "lloyd_max.round_stochastically",
        "random_bits >> 16",
        "random_bits >> 17",
        "kernels/test_lloyd_max.py -k rounding",
    ),
    Mutant(
        "lloyd_max.quantize",
        "jnp.where(is_usable, scales, jnp.nan)",
        "jnp.where(is_usable, scales, 0.0)",
        "kernels/test_lloyd_max.py -k not_finite",
    ),
    Mutant(
        "lloyd_max.quantize",
        "numerics.power_of_two(peak)",
        "0 * numerics.power_of_two(peak)",
        "kernels/test_lloyd_max.py -k twin or powers",
    ),
    Mutant(
        "packing.digits_of", "quotients * 171 >> 9", "quotients * 170 >> 9", "kernels/test_packing.py -k every_number"
    ),
    Mutant(
        "packing.pack_digits", "[3 ** j for j in range(DIG", "[2 ** j for j in range(DIG", "test_trits.py -k inverts"
    ),
    Mutant(
        "blocks.SMALLEST_BLOCK",
        "SMALLEST_BLOCK = 32",
        "SMALLEST_BLOCK = 16",
        "kernels/test_blocks.py -k are_cut or least_cost",
    ),
    Mutant("blocks._tail", "return min(whole,", "return max(whole,", "kernels/test_blocks.py -k least_cost"),
    Mutant("blocks._bits", "8 * width // 5 + 16", "8 * width // 5", "kernels/test_blocks.py -k least_cost"),
    Mutant("blocks.cut", "start += num * width", "start += width", "kernels/test_blocks.py -k inverts_cut"),
    Mutant(
        "rotation.rotate_back",
        "for of_round in reversed(words)",
        "for of_round in words[::1]",
        "kernels/test_rotation.py -k rotations",
    ),
    Mutant(
        "trit_blocks.decode_anywhere",
        "total + shares[i]",
        "total - shares[i]",
        "codecs/test_trit.py -k sum_of_payloads",
    ),
    Mutant("trit_blocks.decode_anywhere", "return largest * rotation", "return rotation", TRIT_TWIN),
    Mutant(
        "trit_blocks.random_words",
        "fold_in(key, 2 * i + turn)",
        "fold_in(key, turn)",
        "kernels/test_trit_blocks.py -k words_of_its_own",
    ),
    Mutant(
        "trit_blocks.rounded_scales",
        "lloyd_max.round_stochastically(scales, random_bits)",
        "scales.astype(jnp.bfloat16)",
        TRIT_TWIN,
    ),
    Mutant(
        "trit.TritCodec._is_small",
        "spec.num_reals < self.block_size",
        "spec.num_reals <= self.block_size",
        TRIT_TWIN,
    ),
    Mutant("trit.TritCodec.decode_sum", "payloads.step[0], i)", "payloads.step[0], 0)", TRIT_TWIN),
    Mutant(
        "codec.as_reals",
        "jnp.stack([array.real, array.imag])",
        "jnp.stack([array.imag, array.real])",
        "codecs/test_trit.py -k structure",
    ),
    Mutant("codec.as_decoded", "jnp.clip(leaf, -largest, largest)", "leaf", "codecs/test_trit.py -k range_of_a_half"),
    Mutant(
        "codec._on_every_device",
        "jax.lax.with_sharding_constraint(array, PartitionSpec())",
        "array",
        "test_sharding.py -k coded_is_whole and steps-split",
    ),
    Mutant("ternary_sum.TernarySum.add", "<= limit", "< jnp.inf", f"{SUMMED} -k largest_scale"),
    Mutant("ternary_sum.TernarySum.add", "is_finite(sums)", "is_finite(new)", f"{SUMMED} -k largest_scale"),
    Mutant("ternary_sum._joined", "words[m.first_word:m", "words[0:m", f"{SUMMED} -k together"),
    Mutant("ternary_sum.TernarySum._sorted", "if fills_a_row else", "if True else", f"{SUMMED} -k together"),
    Mutant("ternary_sum.TernarySum.settle", "jnp.where(adds, b, a)", "b", f"{SUMMED} -k settling"),
    Mutant(
        "ternary_sum.TernarySum.settle",
        "large[i] = (becomes, was)",
        "large[i] = (was, becomes)",
        f"{SUMMED} -k settling",
    ),
    Mutant("ternary_sum.TernarySum.settle", "was + jnp.asarray", "jnp.asarray", f"{SUMMED} -k settling"),
    Mutant("replacement._anywhere", "jnp.where(replaces, b, a)", "b", REPLACEMENT),
    Mutant("replacement._on_gpu", "zip(batch, of_batch", "zip(sorted(batch, reverse=True), of_batch", REPLACEMENT),
    Mutant("replacement._on_gpu", "most=_MOST_AT_ONCE", "most=1", REPLACEMENT),
    Mutant("alike.numbers_of_alike", "tuple(map(jax.typeof, row))", "jax.typeof(row[0])", "kernels/test_alike.py"),
    Mutant("alike._parts", "-(-len(numbers) // most)", "len(numbers) // most + 1", "kernels/test_alike.py"),
    Mutant("replacement_kernel.replace_if", "replaces[0] & inside", "inside", GPU_REPLACEMENT),
    Mutant("replacement_kernel.replace_if", "replaces[0] & inside", "inside & ~inside", GPU_REPLACEMENT),
    Mutant("replacement_kernel.replace_if", "{1 + num + i: i", "{1 + i: i", GPU_REPLACEMENT),
    Mutant("replacement_kernel._part", "pl.cdiv(size, programs)", "size // programs", GPU_REPLACEMENT),
    Mutant("replacement_kernel._part", "pl.program_id(0) * width", "0", GPU_REPLACEMENT),
    Mutant("hypervector.HypervectorCodec._bundle", "jnp.roll(flat, -begin)", "jnp.roll(flat, begin)", HYPERVECTOR_TWIN),
    Mutant(
        "hypervector.HypervectorCodec._unbind", "bundle / jnp.maximum(num_met, 1)", "bundle / chunks", HYPERVECTOR_TWIN
    ),
    Mutant(
        "hypervector.HypervectorCodec._unbind",
        "jnp.maximum(num_met, 1)",
        "num_met",
        "codecs/test_hypervector.py -k without_coordinates",
    ),
    Mutant(
        "hypervector.HypervectorCodec._dimension",
        "* size, 6)",
        "* size, 15)",
        "codecs/test_hypervector.py -k noise_in_its_digits",
    ),
    Mutant(
        "hypervector.HypervectorCodec._keys",
        "0, max(size, 1))",
        "0, 1)",
        "codecs/test_hypervector.py -k table or follow",
    ),
    Mutant(
        "hypervector.HypervectorCodec._dimension",
        "math.ceil(share)",
        "math.floor(share)",
        "codecs/test_hypervector.py -k ratio_sets",
    ),
    Mutant(
        "hypervector.HypervectorCodec._unbind",
        "jnp.where(jnp.all(jnp.isfinite(bundle)), bundle, jnp.nan)",
        "bundle",
        "codecs/test_hypervector.py -k everything",
    ),
    Mutant(
        "hypervector.HypervectorPayload.__sub__",
        "self + -other",
        "self + other",
        "codecs/test_hypervector.py -k vectors",
    ),
    Mutant(
        "gradients.compress_gradients",
        "x - s.astype(x.dtype)",
        "x + s.astype(x.dtype)",
        "compression/test_gradients.py -k stays_behind",
    ),
    Mutant(
        "gradients.compress_gradients",
        "jnp.asarray(g, e.dtype) + e",
        "jnp.asarray(g, e.dtype)",
        "compression/test_gradients.py -k stays_behind",
    ),
    Mutant(
        "gradients.compress_gradients",
        "tree_where(is_finite, lost, state.residual)",
        "lost",
        "compression/test_gradients.py -k not_finite",
    ),
    Mutant(
        "gradients.compress_gradients",
        "encode(pending, state.step)",
        "encode(pending, 0)",
        "compression/test_gradients.py -k without_feedback",
    ),
    Mutant(
        "gradients.compress_gradients",
        "jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32),",
        "*[jnp.zeros([], jnp.int32)] * 2,",
        "compression/test_gradients.py -k donation",
    ),
    Mutant("exchange.row_width", "return block if", "return 2 * block if", "compression/test_pmean.py -k padded"),
    Mutant(
        "buckets.Buckets.of_size", "-sizes[i] if is_small[i]", "sizes[i] if is_small[i]", "compression/test_buckets.py"
    ),
    Mutant("buckets.Buckets.of_size", "(is_small[i], ", "(", "compression/test_buckets.py"),
    Mutant("buckets.Buckets.of_size", "limit // unit * unit", "limit", "compression/test_buckets.py"),
    Mutant("buckets.Buckets.unpack", "begin += stop - start", "begin += stop", "compression/test_buckets.py"),
    Mutant("averaging.averaged", "num_buckets * step + next(numbers)", "step", COLLECTIVE_TWIN),
    Mutant("averaging.averaged", "is_finite &= found[-1].is_finite", "is_finite = found[-1].is_finite", COLLECTIVE_NAN),
    Mutant(
        "exchange._mean_of_payloads",
        "num * step + jnp.arange(num, dtype=jnp.int32)",
        "num * step + jnp.zeros(num, jnp.int32)",
        COLLECTIVE_TWIN,
    ),
    Mutant("exchange._mean_of_payloads", "own_step + 1", "own_step", COLLECTIVE_TWIN),
    Mutant("row_coding.TritRows.average", "decoded / num", "decoded", ROWS),
    Mutant("row_coding.TritRows._with_other", "take(steps, other)", "take(steps, own)", ROWS),
    Mutant("row_coding.TritRows._wire", "self._sizes()[0]", "self._sizes()[1]", ROWS),
    Mutant("row_coding.TritRows.decode", "<= largest", "< jnp.inf", ROWS),
    Mutant("row_coding.TritRows.decode", "jnp.where(is_finite, scales, jnp.zeros_like(scales))", "scales", ROWS),
    Mutant("row_coding.PayloadRows.average", "decoded / len(rows)", "decoded", ROWS),
    Mutant("row_coding.PayloadRows.average", "jnp.where(is_finite, average, jnp.nan)", "average", CODEC_OF_ONES_OWN),
    Mutant("row_coding.PayloadRows.encode", "all_finite(row) & ", "", CODEC_OF_ONES_OWN),
    Mutant("row_coding.PayloadRows.encode", "if is_last", "if False", ROWS),
    Mutant("row_coding.PayloadRows.decode", "jnp.where(is_finite, x, jnp.zeros_like(x))", "x", ROWS),
    Mutant("row_coding.coding_of", "type(codec) is TritCodec", "isinstance(codec, TritCodec)", ROWS),
    Mutant("row_coding.from_bytes", "start += size * width", "start += size", ROWS),
    Mutant("trit_blocks.largest_scale", "math.sqrt(block_size)", "1", "kernels/test_trit_blocks.py -k largest"),
    Mutant("trit_averages.average_of_two", "+ decoded / 2", "+ decoded", "kernels/test_trit_averages.py"),
    Mutant("trit_averages.relay", "average, new_key", "average, key", "kernels/test_trit_averages.py"),
    Mutant("relay_kernel._relay_kernel", "places[1]", "places[0]", GPU_TRITS + " -k relay or again"),
    Mutant("relay_kernel._relay_kernel", "whole * 0.5", "whole", GPU_TRITS + " -k relay or again"),
    Mutant(
        "exchange._mean_of_payloads",
        "row_coding.rows_at(jnp.pad(sent, ((0, 1), (0, 0))), place_of)",
        "jnp.pad(sent, ((0, 1), (0, 0)))",
        COLLECTIVE_TWIN,
    ),
    Mutant("exchange._mean_of_payloads", "row_coding.rows_at(lost, place_of)", "lost", COLLECTIVE_TWIN),
    Mutant("exchange._mean_of_payloads", "num * (average - row_coding", "(average - row_coding", COLLECTIVE_TWIN),
    Mutant("exchange._exchanged", "jnp.where(is_finite, mean, jnp.zeros_like(mean))", "mean", COLLECTIVE_NAN),
    Mutant("pmean.compressed_pmean", "num_buckets > 1", "num_buckets > 9", COLLECTIVE_NAN),
    Mutant("exchange._mean_of_bundles", "payload.bundle / axis_size(axes)", "payload.bundle", COLLECTIVE_BUNDLES),
    Mutant(
        "exchange._mean_of_bundles",
        "vector - codec.decode(payload)",
        "vector + codec.decode(payload)",
        COLLECTIVE_BUNDLES,
    ),
    Mutant("exchange._mean_of_bundles", "+ (decoded - mean)", "", COLLECTIVE_BUNDLES),
    Mutant("pmean.compressed_pmean", "[x + e for", "[x for", COLLECTIVE_TWIN),
    Mutant(
        "pmean.compressed_pmean",
        "tree_where(is_finite, jax.tree.unflatten(treedef, lost), residual)",
        "jax.tree.unflatten(treedef, lost)",
        COLLECTIVE_NAN,
    ),
    Mutant(
        "averaging._alike",
        "varying_axes(vector) - set(axes)",
        "frozenset()",
        "compression/test_pmean.py -k another_mesh_axis",
    ),
    Mutant("pmean.state_specs", "PartitionSpec(axis_name), getattr", "PartitionSpec(), getattr", COLLECTIVE_TWIN),
    Mutant("mesh.all_devices_agree", "lax.pmin(flag", "lax.pmax(flag", COLLECTIVE_PHASES),
    Mutant("mesh.mean_over", "lax.pmean(x,", "lax.psum(x,", COLLECTIVE_PHASES),
    Mutant(
        "update._agreed_value", "machine.phase == Phase.PREDICT", "machine.phase != Phase.PREDICT", COLLECTIVE_PHASES
    ),
    Mutant("learning_rate.check_one_rate", "not None and own.is_rate", "not None", RATES),
    Mutant("learning_rate.check_one_rate", "if rests and learning_rate", "if learning_rate", RATES),
    Mutant("learning_rate._own_factors", "yield from _own_factors(node.inner_state)", "yield from ()", RATES),
    Mutant("update._check_domain", "axes and (not predicts_updates)", "axes and predicts_updates", COLLECTIVE_PHASES),
    Mutant(
        "step._check_same_everywhere",
        "varying_axes(target) & axes",
        "varying_axes(target) - axes",
        "test_collective_phases.py -k refused",
    ),
    Mutant("window.CodedWindowHistory.terms", "coefficients[:self.length]", "coefficients[-self.length:]", CODED),
    Mutant(
        "window.CodedWindowHistory.record",
        "self.codec.encode(kept), params",
        "self.codec.encode(kept, step), params",
        CODED,
    ),
    Mutant(
        "window.CodedWindowHistory.record",
        "numerics.saturating_cast(x, s.dtype)",
        "x",
        "prediction/predictors/test_window.py -k half",
    ),
    Mutant(
        "line.LinePredictor.predict",
        "[*terms, self._decoded(residual)]",
        "[*terms, jax.tree.map(jnp.zeros_like, self._decoded(residual))]",
        CODED,
    ),
    Mutant(
        "line.LinePredictor._compare_with",
        "numerics.saturating_cast(x, x.dtype), residual",
        "x, residual",
        "prediction/predictors/test_window.py -k stays_finite",
    ),
    Mutant("trits._LLOYD_MAX_CUT", ") / 2", ") / 1.8", "test_trits.py -k twin"),
    Mutant("trits.quantize_deterministic", "mean * peak", "mean", "test_trits.py -k twin"),
    Mutant("trits.quantize_stochastic", "drawn < odds", "drawn > odds", "test_trits.py -k right_on_average"),
    Mutant("trits._magnitude", "jnp.where(is_finite, peak, jnp.nan)", "peak", "test_trits.py -k not_finite"),
    Mutant("line_fit.line_weights", "share * (ages - mean) ** 2", "share * (ages + mean) ** 2", WLS),
    Mutant("window.WindowHistory.scalars", "mean + (horizon - age)", "mean + (horizon + age)", WLS),
    Mutant("line_fit.line_weights", "share * (ages - mean) / jnp", "share * (mean - ages) / jnp", WLS),
    Mutant("line_fit.line_weights", "has_slope = spread > 0", "has_slope = spread >= 0", WLS),
    Mutant("line_fit.line_weights", "newest.dtype) == newest)", "newest.dtype) != newest)", WLS),
    Mutant(
        "line_fit.line_weights", "& (weights > 0)", "& (weights >= 0)", "prediction/fits/test_line_fit.py -k no_records"
    ),
    Mutant("numerics.linear_combination", "total + coefficient.astype", "total - coefficient.astype", WLS),
    Mutant("line_fit.forget_and_add", "kept + 1.0", "kept - 1.0", WLS),
    Mutant("line_fit.forget_and_add", "lag + elapsed", "lag - elapsed", WLS),
    Mutant("line_fit.forget_and_add", "kept_spread + new_lag", "kept_spread - new_lag", WLS),
    Mutant("line_fit.forget_and_add", "distance if mean_first else", "distance if not mean_first else", WLS),
    Mutant(
        "window.WindowHistory.scalars", "(state.num_records - 1) % self.length", "state.num_records % self.length", WLS
    ),
    Mutant("window.WindowHistory.scalars", "rank < state.num_records", "rank <= state.num_records", WLS),
    Mutant(
        "recursive.RecursiveHistory.record",
        "[keep, velocity_gain, -velocity_gain]",
        "[keep, velocity_gain, velocity_gain]",
        WLS,
    ),
    Mutant(
        "recursive.RecursiveHistory.scalars",
        "stack([one, horizon + state.lag]), features",
        "stack([one, horizon - state.lag]), features",
        WLS,
    ),
    Mutant(
        "recursive.RecursiveHistory._mean_first",
        "self.decay >= 0.5",
        "self.decay >= 0.0",
        "prediction/fits/test_line_fit.py -k vanishing or lstsq_at",
    ),
    Mutant("momentum.MomentumPredictor.scalars", "1 + momentum", "1 - momentum", MOMENTUM),
    Mutant("momentum.MomentumPredictor.scalars", "(num - 1) % 2", "num % 2", MOMENTUM),
    Mutant("momentum.MomentumPredictor.scalars", "num > 1, 1 + momentum", "num > 2, 1 + momentum", MOMENTUM),
    Mutant("momentum.MomentumHistory.record", "state.num_records % 2", "0", MOMENTUM),
    Mutant("momentum.MomentumPredictor.corrected", "1 + weight", "1 - weight", MOMENTUM),
    Mutant(
        "momentum.MomentumPredictor.corrected",
        "-weight * scalars.coefficients[0]",
        "weight * scalars.coefficients[0]",
        MOMENTUM,
    ),
    Mutant("momentum.MomentumPredictor.compare", "scalars.num_records > 1", "scalars.num_records > 0", MOMENTUM),
    Mutant("momentum.MomentumPredictor.compare", "* state.weight + 1", "* state.weight + 2", MOMENTUM),
    Mutant("momentum.MomentumCalibrationState.exceeds", ">= _NUM_ERRORS", "> _NUM_ERRORS", MOMENTUM),
    Mutant("trees.zeros_unless", "jnp.where(condition, x,", "jnp.where(~condition, x,", "core/test_trees.py -k zeros"),
    Mutant("elimination._kernel", "factors[:, None] * of_row[None]", "factors[:, None] + of_row[None]", ELIMINATION),
    Mutant("elimination._kernel", "values - factors * value", "values + factors * value", ELIMINATION),
    Mutant("elimination.solve", ">= size", "> size", ELIMINATION),
    Mutant(
        "machine_state.PhaseMachineState.unpacked", "astype(bool)", "astype(float)", "prediction/test_machine_state.py"
    ),
    Mutant("machine_state.Machine._scalars", "nodes[part] is not None", "True", "prediction/test_machine_state.py"),
    Mutant("checkpoint_upgrade._packed", "part not in absent", "True", "test_checkpoint_upgrade.py"),
    Mutant("checkpoint_upgrade._packed", "del entries[path_of(part)]", "pass", "test_checkpoint_upgrade.py"),
    Mutant("checkpoint_upgrade._packed", "{'key': None}", "{'key': ''}", "test_checkpoint_upgrade.py"),
    Mutant("machine.ends_leap", "state.phase == Phase.CORRECT", "state.phase == Phase.PREDICT", MOMENTUM),
    Mutant("machine.ends_leap", "state.steps_in_phase == 0", "state.steps_in_phase >= 0", MOMENTUM),
    Mutant("machine.ends_leap", "state.cycles > 0", "state.cycles > 1", MOMENTUM),
    Mutant("step._is_corrected", "& (scalars.horizon > 1)", "", MOMENTUM),
    Mutant(
        "step.PhaseStep._read",
        "is_recorded &= horizon >= 0",
        "pass",
        "prediction/predictors/test_momentum.py -k in_place",
    ),
    Mutant("step._is_corrected", "is_recorded & is_behind_leap &", "is_recorded &", MOMENTUM),
    Mutant("machine.init", "phases.warmup_steps > 0", "phases.warmup_steps >= 0", LEGACY),
    Mutant("machine.advance", "jnp.where(is_poor", "jnp.where(~is_poor", MOMENTUM),
    Mutant("phases.LegacyCycle.moved", "full + 5", "full + 4", LEGACY),
    Mutant("phases.LegacyCycle.moved", "predict - 10, 10", "predict - 10, 11", LEGACY),
    Mutant("phases.LegacyCycle.moved", "predict + 5, 100", "predict + 5, 99", LEGACY),
    Mutant("phases.LegacyCycle.moved", "is_worse, longer", "is_better, longer", LEGACY),
    Mutant(
        "forecast._of_cycle",
        "runs((true, 1), (true, 0))",
        "runs((true, 1), (true, 2))",
        "prediction/test_forecast.py -k certain",
    ),
    Mutant(
        "machine.shortest_full",
        "phases.shortest_full",
        "phases.shortest_full + 5",
        "prediction/test_forecast.py -k certain",
    ),
    Mutant("loss_history._is_repeated", "loss == last", "loss != last", LOSSES),
    Mutant("loss_history._is_repeated", "is_predict & (", "(", LOSSES),
    Mutant("loss_history.track_loss", "is_measured = is_finite & ~is_repeated", "is_measured = ~is_repeated", LOSSES),
    Mutant("loss_history.track_loss", "loss < state.best_value", "loss > state.best_value", LOSSES),
    Mutant("loss_history.track_loss", "state.num_measured % num", "state.total_steps % num", LOSSES),
    Mutant("loss_history._error_of_step", "> before.errors.num_measured", ">= before.errors.num_measured", LOSSES),
    Mutant("loss_statistics._change", "values[-2 * num:-num]", "values[-2 * num:]", LOSS_STATISTICS),
    Mutant("loss_statistics._spikes", "values[:-1]", "values[1:]", LOSS_STATISTICS),
    Mutant("loss_statistics._trend", "steps[-num:] - np.mean(steps[-num:])", "steps[-num:]", LOSS_STATISTICS),
    Mutant("loss_statistics.loss_report", "np.arange(max(num - size, 0), num)", "np.arange(num)", LOSS_STATISTICS),
    Mutant("loss_statistics.loss_report", "divergence_threshold) - 1", "divergence_threshold)", LOSS_STATISTICS),
    Mutant("plots.shade_phases", "first_step + a - 0.5", "first_step + a", PICTURES),
    Mutant("plots._every_step", "int(Phase.PREDICT)", "int(Phase.FULL)", PICTURES),
    Mutant("machine.advance", "is_finite | (phase != Phase.WARMUP)", "is_finite | (phase == Phase.WARMUP)", WALK),
    Mutant("machine._following", "% phases.correct_every == 0", "% phases.correct_every != 0", WALK),
    Mutant("machine._following", "& (phase != Phase.CORRECT)", "& (phase == Phase.CORRECT)", WALK),
    Mutant("machine._following", "done >= predict_length", "done > predict_length", WALK),
    Mutant("machine._following", "done >= full_length", "done > full_length", WALK),
    Mutant("machine.advance", "_count_if(was_leap", "-_count_if(was_leap", "prediction/test_machine.py -k cycle"),
    Mutant(
        "machine.advance", "was_leap & starts_full", "was_leap | starts_full", "prediction/test_machine.py -k cycle"
    ),
    Mutant("machine.advance", "_count_if(~is_finite", "_count_if(is_finite", WALK),
    Mutant("machine._adapt", "last - first > phases", "last + first > phases", ADAPTIVE),
    Mutant("machine._adapt", "first - last > _BETTER", "first - last > -_BETTER", ADAPTIVE),
    Mutant(
        "machine.advance", "jnp.where(is_measured, loss, last_value)", "jnp.where(is_measured, last_value, loss)", LOSS
    ),
    Mutant("machine._learn", "(error - state.errors.mean)", "(error + state.errors.mean)", TWIN),
    Mutant("line.LinePredictor._compare_with", "[decay, 1 - decay, decay - 1]", "[decay, 1 - decay, 1 - decay]", TWIN),
    Mutant("line.LinePredictor.scalars", "** scalars.horizon", "** -scalars.horizon", TWIN),
    Mutant("conditional.in_place_if", "return loop[0]", "return ~loop[0]", LINE),
    Mutant("conditional.run_if", "fun, _unchanged", "_unchanged, fun", f"{BY_KIND} -k branches_do"),
    Mutant("step.PhaseStep._consulted_and_recorded", "cond(is_awake,", "cond(~is_awake,", f"{BY_KIND} -k branches_do"),
    Mutant(
        "step.PhaseStep._consulted_and_recorded",
        "record(history, *record, consulted.is_recorded)",
        "record(history, *record, ~consulted.is_recorded)",
        f"{BY_KIND} -k branches_do",
    ),
    Mutant(
        "step.PhaseStep._consulted_and_recorded",
        "history.encodes:",
        "history.encodes or True:",
        f"{BY_KIND} -k branches_do",
    ),
    Mutant("trees.all_finite", "finite &= numerics", "finite |= numerics", STEP),
    Mutant("trees.tree_where", "jnp.where(condition, n, o)", "jnp.where(condition, o, n)", STEP),
    Mutant("step._behind", "~jnp.any(jnp.isnan(leaf))", "True", "test_step_programs.py -k copies_no_record"),
    Mutant("step.PhaseStep._read", "_behind(~is_predict & is_finite", "_behind(is_predict & is_finite", LINE),
    Mutant("step.PhaseStep._read", "is_due = is_compared & is_finite", "is_due = is_compared | is_finite", TWIN),
    Mutant("step.PhaseStep.__call__", "(~is_predict & has_gradient", "(~is_predict | has_gradient", LINE),
    Mutant("step.PhaseStep.__call__", "= machine.phase == Phase.CORRECT", "= machine.phase != Phase.CORRECT", TWIN),
    Mutant("step._looked_over", "is_predict | all_finite", "all_finite", "prediction/test_stats.py -k ignored"),
    Mutant("step._looked_over", "is_predict & any_nonzero", "any_nonzero", "prediction/test_stats.py -k ignored"),
    Mutant("conditional.warn_of_command_buffers", "commands[-1]", "commands[0]", "core/test_conditional.py -k buffers"),
    Mutant("guard.after", "was_asleep, state.way", "False, state.way", "prediction/test_guard.py -k sleeps"),
    Mutant("guard._judged", "has_slept, state.pace", "False, state.pace", "prediction/test_guard.py -k sleeps"),
    Mutant("trees.both_finite", "numerics.is_finite(x, y)", "numerics.is_finite(x)", f"{BY_KIND} -k parameters_are"),
    Mutant("update.switched", "jnp.asarray(rate, u.dtype) * u", "-jnp.asarray(rate, u.dtype) * u", STEP),
    Mutant("packed_rows.add", "[of_blocks]) + _decode(", "[of_blocks]) - _decode(", SUM),
    Mutant("packed_rows.finish", "+ piece.x) / divisor", "- piece.x) / divisor", SUM),
    Mutant("packed_rows._in_turns", "first + jnp.arange(few.num) >= i", "first + jnp.arange(few.num) >= 0 * i", SUM),
    Mutant("packed_rows._on_last", "words[whole.num_words:]", "words[:last.num_words]", SUM),
    Mutant("uniform._round_up", "bits + 65535 >> 16 << 16", "bits >> 16 << 16", ROUNDING),
    Mutant("multi_steps._Window.take", "mini_step >= k - 1", "mini_step >= k", WINDOWS),
    Mutant("multi_steps.ternary_multi_steps", "is_accepted & ~taken.is_last", "~taken.is_last", WINDOWS),
    Mutant("multi_steps.ternary_multi_steps", "taken.is_finite & ~should_skip", "taken.is_finite", WINDOWS),
    Mutant("multi_steps._counted", "jnp.where(emits, 0, state", "jnp.where(emits, 1, state", WINDOWS),
    Mutant("microbatching.ternary_accumulator", "carry.num_seen - carry.nonfinite_count", "carry.num_seen", WINDOWS),
    Mutant("microbatching.ternary_accumulator", "left = carry.num_seen", "left = num", COUNTED),
    Mutant(
        "inner_optimizer._in_dtypes_of", "array.astype(o.dtype)", "array", "accumulation/test_multi_steps.py -k wider"
    ),
    Mutant("multi_steps.ternary_multi_steps", "[is_finite, is_accepted]", "[is_finite, is_finite]", COLLECTIVE_WINDOWS),
    Mutant("multi_steps.ternary_multi_steps", "mesh.note_window(updates)", "None", COLLECTIVE_REFUSALS),
    Mutant("mesh.follows_window", "== (place, link)", "!= (place, link)", COLLECTIVE_REFUSALS),
    Mutant(
        "mesh.follows_window", "_noted.first = (place, link)", "pass", "test_collective_windows.py -k before_a_window"
    ),
    Mutant("pmean._check_made_inside", "leaf.shape[0] == 1", "leaf.shape[0] > 1", COLLECTIVE_REFUSALS),
    Mutant("memory._parts_of", "value, of_field", "value, part", MEMORY),
    Mutant("memory._parts_of", "type(node) in _PARTS", "False", MEMORY),
    Mutant("memory._bytes_of", "per_device and sharding", "sharding", MEMORY),
    Mutant("memory._bytes_of", "int(leaf.dtype.itemsize)", "4", MEMORY),
    Mutant("memory.in_units", "size >= unit", "size > unit", MEMORY),
    Mutant("stats.phase_stats", "total - machine.predict_steps", "total + machine.predict_steps", WALK),
    Mutant("stats.needs_backward", "opt_state).phase != Phase", "opt_state).phase == Phase", LINE),
    Mutant(
        "stats.find_machine_state",
        "len(found) != 1",
        "len(found) > 1",
        "prediction/test_value_and_grad.py test_nesting.py -k machine",
    ),
    Mutant(
        "value_and_grad.value_and_grad_by_phase",
        "is_predict = machine.phase == Phase",
        "is_predict = machine.phase != Phase",
        BY_PHASE,
    ),
    Mutant("machine.last_value", "jax_debug_nans else jnp.nan", "jax_debug_nans else 0.0", BY_PHASE),
    Mutant("machine.advance", "=_count_if(is_ignored", "=-_count_if(is_ignored", "prediction/test_stats.py -k ignored"),
    Mutant(
        "machine.advance",
        "is_known & (phase != Phase.PREDICT)",
        "is_known | (phase != Phase.PREDICT)",
        "prediction/test_value_and_grad.py -k scaled_loss",
    ),
    Mutant("coverage._others_are_frozen", "bool(others) and", "bool(others) or", "test_nesting.py -k starved"),
    Mutant("coverage.check_covers", "or num == 1", "or num > 1", "prediction/test_value_and_grad.py -k coded_history"),
    Mutant("machine.repeats_loss", "is state.phase", "is not state.phase", "prediction/test_unmeasured.py"),
    Mutant("step._telling_leaves", "leaf.size <= _L", "leaf.size < _L", "prediction/test_stats.py -k look_at"),
    Mutant(
        "value_and_grad.value_and_grad_by_phase",
        "if has_aux and (not value_in_predict):",
        "if not value_in_predict:",
        BY_PHASE,
    ),
    Mutant(
        "checks._check_same_leaf",
        "startswith('complex') != wanted",
        "startswith('complex') and wanted",
        "accumulation/test_ternary_sum.py -k unlike",
    ),
    Mutant(
        "checks.check_same_leaves",
        "len(leaves) == len(named)",
        "not leaves",
        "accumulation/test_ternary_sum.py -k unlike",
    ),
    Mutant("phases.Guarded.__post_init__", "self.longest, 1)", "self.longest, 0)", OF_ERRORS),
    Mutant("phases.Cycle.__post_init__", "('predict_steps', 0)", "('predict_steps', -1)", OF_ERRORS),
    Mutant("phases.AdaptiveCycle.__post_init__", "super().__post_init__()", "pass", OF_ERRORS),
    Mutant("factory._check_line", "if line.calibrate:", "if not line.calibrate:", OF_ERRORS),
    Mutant(
        "factory.make_predictor",
        "if codec is not None:",
        "if codec is None:",
        "prediction/predictors/test_factory.py -k predictor_of_its_own",
    ),
    Mutant("axis_names._one_more", "else (None, *names)", "else names", AXIS_NAMES),
    Mutant(
        "axis_names._one_more", "update(spec=PartitionSpec(None, *names.spec))", "update(spec=names.spec)", AXIS_NAMES
    ),
    Mutant("axis_names._renamed", "return of_box(node)", "return node", AXIS_NAMES),
    Mutant("axis_names._renamed", "variable.set_metadata(name, of_names(names))", "pass", AXIS_NAMES),
    Mutant("axis_names.without_names", "lambda names: None", "lambda names: names", AXIS_NAMES),
    Mutant(
        "unmeasured._levels_to_the_caller",
        "(level + 1, frame.f_back)",
        "(level, frame.f_back)",
        "prediction/test_unmeasured.py",
    ),
    Mutant("loss_history.TrackLossState", "@LossReader.register", "", "test_loss_history.py -k cannot_see"),
    Mutant("unmeasured.is_reader", "and (not contains_machine(node))", "", LOSSES),
    Mutant(
        "unmeasured.contains_reader",
        "bool(_readers(state))",
        "False",
        "test_collective_phases.py -k what_follows_the_loss",
    ),
    Mutant("coverage._uncovered", "shapes[shape] -= 1", "shapes[shape] -= 0", "prediction/test_coverage.py"),
    Mutant("coverage.check_covers", "<= sum(map(", "< sum(map(", "prediction/test_coverage.py"),
    Mutant(
        "inner_optimizer.RunInner.__call__",
        "if varying_axes(last) - varying_axes(emitted):",
        "if varying_axes(emitted) - varying_axes(last):",
        COLLECTIVE_WINDOWS,
    ),
    Mutant(
        "inner_optimizer.RunInner.look",
        "| mesh.axes_communicated_over(program)",
        "",
        "test_collective_windows.py -k users_own",
    ),
    Mutant("function_checks.refuse_hidden_arguments", "and name not in filled", "", HIDDEN),
    Mutant("function_checks.refuse_hidden_arguments", "and (name not in bound)", "", HIDDEN),
    Mutant("probe_report.choose", "MOST_OF_PLAINS_TIME * limit", "limit", f"{PROBE} -k least_time"),
    Mutant("probe_report.choose", "ahead >= -slack", "ahead > slack", f"{PROBE} -k least_time"),
    Mutant("probe_report.choose", "_ROUNDING * abs(first_loss)", "0", f"{PROBE} -k by_rounding"),
    Mutant("probe_report._gradients_to_plain", "run.steps_to_plain == steps", "False", f"{PROBE} -k least_time"),
    Mutant("probe_runs._distance", "(x_norm + y_norm) / 2", "(x_norm + y_norm)", f"{PROBE} -k neighbours"),
    Mutant("probe_runs.fastest", "min(seconds[name])", "sum(seconds[name])", f"{PROBE} -k rounds"),
    Mutant(
        "probe_runs.run", "_own_copy((task.params, trial.init()))", "(task.params, trial.init())", f"{PROBE} -k left_as"
    ),
    Mutant("probe_runs.switched_step", "needs_backward(state)", "jnp.array(True)", f"{PROBE} -k guard_skips"),
    Mutant("probe._compared", "int(below[0]) + 1", "int(below[0])", f"{PROBE} -k equal_numbers"),
    Mutant("probe._as_long", "np.min(losses)", "losses[0]", f"{PROBE} -k time_of_multisecant"),
    Mutant(
        "probe._are_several", "isinstance(batches, list)", "isinstance(batches, tuple)", f"{PROBE} -k one_or_several"
    ),
    Mutant("probe._refuse_ours", "contains_machine(state) or", "", f"{PROBE} -k fit_is_refused"),
    Mutant("probe.probe", "noise <= LEAST_NOISE", "noise <= 9", f"{PROBE} -k mini_batches_nothing"),
    Mutant("checks.check_real", "number > low if low_open", "number >= low if low_open", OF_ERRORS),
    Mutant("checks.check_integer", "not minimum <= number", "not minimum < number", "prediction/test_api.py -k bounds"),
]


@functools.cache
def file_of(place: str) -> pathlib.Path:
    """The one module of that name, below ``vsa_optax``."""
    found = sorted(PACKAGE.rglob(place.partition(".")[0] + ".py"))
    if len(found) != 1:
        raise ValueError(f"{place}: there are {len(found)} modules of that name")
    return found[0].relative_to(PACKAGE)


def mutated(mutant: Mutant) -> str:
    """The module's text with the change made; ``ValueError`` if the old code is not there exactly once."""
    text = (PACKAGE / file_of(mutant.place)).read_text()
    node = _find(ast.parse(text), mutant.place.split(".")[1:])
    if node is None:
        raise ValueError(f"{mutant.place} does not exist")
    printed = ast.unparse(_without_docstring(node))
    old = mutant.old.replace('"', "'")  # As ast prints strings.
    if (count := printed.count(old)) != 1:
        raise ValueError(f"{mutant.place}: {mutant.old!r} occurs {count} times in\n{printed}")
    lines = text.splitlines(keepends=True)
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    indent = " " * node.col_offset
    changed = "".join(f"{indent}{line}\n" for line in printed.replace(old, mutant.new).splitlines())
    return "".join([*lines[: first - 1], changed, *lines[node.end_lineno :]])


def _find(node: ast.AST, names: Sequence[str]) -> ast.stmt | None:
    for child in ast.iter_child_nodes(node):
        targets = [getattr(child, "name", "")]
        if isinstance(child, ast.Assign):
            targets = [ast.unparse(target) for target in child.targets]
        elif isinstance(child, ast.AnnAssign):
            targets = [ast.unparse(child.target)]
        if isinstance(child, ast.stmt) and names[0] in targets:
            return child if len(names) == 1 else _find(child, names[1:])
    return None


def _without_docstring(node: ast.stmt) -> ast.stmt:
    """A statement without its docstring, whose lines are not to be indented anew."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
        node.body = node.body[1:] or [ast.Pass()]
    return node


def first_failure(tests: str, folder: pathlib.Path) -> str:
    """The first of ``tests`` that fails on the copy in ``folder``, or nothing."""
    files, _, chosen = tests.partition(" -k ")
    words = [str(folder / "tests" / name) for name in files.split()] + (["-k", chosen] if chosen else [])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode not in (0, 1):  # Nothing selected, or pytest itself at fault: no verdict.
        raise RuntimeError(f"pytest ended with {done.returncode} for {tests}:\n{done.stdout}\n{done.stderr}")
    failed = re.search(r"^(?:FAILED|ERROR) (?:\S*/)?(\S+?\.py\S*)", done.stdout, re.MULTILINE)
    return "" if done.returncode == 0 else failed[1] if failed else "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if a mutant survives, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only mutants whose place and texts contain this")
    options = parser.parse_args(argv)
    chosen = [mutant for mutant in MUTANTS if options.only in " ".join(mutant)]
    if not chosen:
        parser.error(f"argument --only: no mutant contains {options.only!r}")
    for mutant in chosen:
        mutated(mutant)
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for part in ("vsa_optax", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            if failure := first_failure(tests, folder):
                print(f"fails without any change: {failure}")
                return 1
        for number, mutant in enumerate(chosen):
            target = folder / "vsa_optax" / file_of(mutant.place)
            whole, begin = target.read_text(), time.perf_counter()
            target.write_text(mutated(mutant))
            failure = first_failure(mutant.tests, folder)
            target.write_text(whole)
            survivors += not failure
            print(
                f"{number:3} {'killed  ' if failure else 'SURVIVED'} {time.perf_counter() - begin:6.1f} s  "
                f"{mutant.place}: {mutant.old!r} -> {mutant.new!r}  {failure}",
                flush=True,
            )
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
