"""Breaks the package in one place at a time and shows that the tests notice.

``python tests/mutations.py`` copies the package, applies one `MUTANTS` entry after the other to the copy, runs the
tests named beside it, and prints a table. It fails if a mutant survives or no longer fits the source, or if the tests
fail without any change.
"""

import argparse
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


class Mutant(NamedTuple):
    """One change.

    Attributes:
        file: below ``vsa_optax``.
        old: text that occurs once in it.
        new: what it becomes.
        tests: words for pytest, in the order in which they should be tried: files below ``tests``, and ``-k``.
    """

    file: str
    old: str
    new: str
    tests: str


WLS = "test_wls.py test_predict.py -k fewer_than or vanishing or sum_to_one or variance or twin_over"
NUMERICS = "test_wls.py -k finite or saturating or relative"
TWIN = "test_predict.py -k twin_over"
LINE = "test_predict.py -k move_on_a_line"
WALK = "test_phases.py -k short_cycles or prolong or walk_equals"
ADAPTIVE = "test_phases.py -k adaptive"
LOSS = "test_phases.py -k adaptive or nonfinite_values"
STEP = "test_predict.py -k leave_no_trace or own_nan or rate_of_step or inner_state_rests"
BY_PHASE = "test_value_and_grad.py -k true_phases or predict or dtype or aux"
VSA_BUNDLE = "test_vsa.py -k twin_in_any_order or weights or ties_are or nan_never"
VSA_SIMILARITY = "test_vsa.py -k similarities or magnitude or with_nothing or precision or not_finite or exceeds"
KERNEL_TWIN = "test_codec_kernels.py -k twin"
TRIT_TWIN = "test_trit_codec.py -k twin"
HYPERVECTOR_TWIN = "test_hypervector_codec.py -k twin"
CODED = "test_coded_history.py -k decoded_records"
SUM = "test_trit_sums.py -k twin or few_rows"
ROUNDING = "test_trit_sums.py -k rounding"
WINDOWS = "test_accumulate.py -k windows_are or left_out or leaves_out"
OF_ERRORS = "test_errors.py"
COLLECTIVE_TWIN = "test_collectives.py -k twin"
COLLECTIVE_BUNDLES = "test_collectives.py -k summed"
COLLECTIVE_NAN = "test_collectives.py -k nan"
COLLECTIVE_PHASES = "test_collective_phases.py -k any_phase or averaged_where"

CALIBRATION = "test_calibration.py -k twin or products_kept or vanishes or ridge"
GUARD = "test_guard.py -k twin or bounds"
SECANT = "test_secant.py -k twin or products_kept or no_changes"

MUTANTS = [
    Mutant("kernels/calibration.py", "forget * sums.products + products", "sums.products + products", CALIBRATION),
    Mutant("kernels/calibration.py", "rest = rest - rows[i][j]", "rest = rest + rows[i][j]", CALIBRATION),
    Mutant("kernels/calibration.py", "+ RIDGE * scale * prior", "- RIDGE * scale * prior", CALIBRATION),
    Mutant("transforms/window_history.py", ".at[:, slot].set(energy)", ".at[:, slot].set(-energy)", CALIBRATION),
    Mutant("transforms/window_history.py", "set(horizon - age)", "set(horizon)", CALIBRATION),
    Mutant("transforms/guard.py", "_MOST_ERROR) / distance**4", "_MOST_ERROR) / distance**2", GUARD),
    Mutant("transforms/guard.py", "_FORGET * state.constant", "0 * state.constant", GUARD),
    Mutant("transforms/guard.py", "jnp.minimum(reach, _GROWTH * distance)", "reach", GUARD),
    Mutant("transforms/guard.py", "constant < TOLERANCE / 4", "constant < TOLERANCE", GUARD),
    Mutant("transforms/guard.py", "jnp.where(is_measured, j, u)", "j", "test_guard.py -k not_finite"),
    Mutant("transforms/guard.py", "jnp.minimum(2 * sleep, _LONGEST_SLEEP)", "sleep", "test_guard.py -k sleeps"),
    Mutant("transforms/guard.py", "asleep=state.asleep - 1", "asleep=state.asleep - 2", "test_guard.py -k sleep"),
    Mutant("transforms/switched.py", "is_recorded &= watches", "is_recorded |= watches", "test_guard.py -k asleep"),
    Mutant("kernels/secant.py", "(1 + ridges) * unit", "(1 - ridges) * unit", SECANT),
    Mutant("kernels/secant.py", "- 2 * linear + quadratic", "- linear + quadratic", SECANT),
    Mutant("kernels/secant.py", "jnp.argmin(scores", "jnp.argmax(scores", SECANT),
    Mutant("kernels/secant.py", "products * inverse, 0)[:, None]", "products, 0)[:, None]", SECANT),
    Mutant("kernels/secant.py", "forget * average + (1 - forget)", "forget * average + forget", SECANT),
    Mutant("transforms/secant_history.py", "at[slot].set(scalars.energy)", "at[slot].set(-scalars.energy)", SECANT),
    Mutant("transforms/secant_history.py", "difference(new, old), 0", "difference(old, new), 0", SECANT),
    Mutant(
        "transforms/secant_history.py", "jnp.where(is_known, products, 0)", "products", "test_secant.py -k far_from"
    ),
    Mutant("transforms/secant_predictor.py", "at[:, slot].set(missed)", "at[:, slot].set(-missed)", SECANT),
    Mutant("transforms/secant_predictor.py", "tree.map(difference, target", "tree.map(jnp.add, target", SECANT),
    Mutant("kernels/numerics.py", "jnp.isfinite(jnp.sum(x - x))", "jnp.isfinite(jnp.max(x))", NUMERICS),
    Mutant("kernels/numerics.py", "jnp.isfinite(jnp.sum(x - x))", "~jnp.any(jnp.isnan(x))", NUMERICS),
    Mutant("kernels/numerics.py", "nan=0.0", "nan=1.0", NUMERICS),
    Mutant("kernels/numerics.py", "x * scale - y * scale", "x * scale + y * scale", NUMERICS),
    Mutant("kernels/numerics.py", "-power_of_two(largest)", "power_of_two(largest)", NUMERICS),
    Mutant("kernels/numerics.py", "is_defined = of_x > 0", "is_defined = of_x >= 0", NUMERICS),
    Mutant("kernels/numerics.py", "maxexp - 8", "maxexp + 8", "test_kernel_edges.py -k relative"),
    Mutant("vsa.py", "-1, 2, jnp.int32", "-1, 1, jnp.int32", "test_vsa.py -k random"),
    Mutant("vsa.py", "    return x * y", "    return x + y", "test_vsa.py -k bind or broadcast"),
    Mutant("vsa.py", 'key=_inverse(_real("key", key))', 'key=_real("key", key)', "test_vsa.py -k inverse_of_any"),
    Mutant(
        "vsa.py", "jnp.where(vanishes, 0, 1 /", "jnp.where(vanishes, 1, 1 /", "test_vsa.py -k inverse_of_any or unbind"
    ),
    Mutant("vsa.py", "1 - 2 * (jnp.arange", "2 * (jnp.arange", VSA_BUNDLE),
    Mutant("vsa.py", "jnp.where(total == 0, ties", "jnp.where(total <= 0, ties", VSA_BUNDLE),
    Mutant("vsa.py", "jnp.sign(total))", "jnp.where(total > 0, 1.0, -1.0))", VSA_BUNDLE),
    Mutant("vsa.py", "jnp.roll(array, wide %", "jnp.roll(array, -wide %", "test_vsa.py -k permute"),
    Mutant("vsa.py", "jnp.clip(_dot(x, y) / norms, -1, 1)", "_dot(x, y) / norms", VSA_SIMILARITY),
    Mutant("vsa.py", "-numerics.power_of_two", "numerics.power_of_two", VSA_SIMILARITY),
    Mutant("vsa.py", "jnp.argmax(similarity", "jnp.argmin(similarity", "test_vsa.py -k cleanup"),
    Mutant("kernels/hadamard.py", "[matrix, -matrix]", "[matrix, matrix]", "test_codec_kernels.py -k hadamard"),
    Mutant(
        "kernels/hadamard.py",
        "np.float32(math.sqrt(factor))",
        "np.float32(factor)",
        "test_codec_kernels.py -k hadamard",
    ),
    Mutant("kernels/hadamard.py", "-1, 1)", "-1, -1)", "test_codec_kernels.py -k hadamard"),
    Mutant(
        "kernels/signs.py", "words[..., None] << jnp", "words[..., None] >> jnp", "test_codec_kernels.py -k neighbours"
    ),
    Mutant("kernels/lloyd_max.py", "0.443639", "0.443939", "test_codec_kernels.py -k lloyds"),
    Mutant("kernels/lloyd_max.py", "alignment / jnp.mean(chosen**2, axis=-1)", "alignment", KERNEL_TWIN),
    Mutant("kernels/lloyd_max.py", "1.0 / alignment if", "1.0 / jnp.mean(chosen**2, axis=-1) if", KERNEL_TWIN),
    Mutant("kernels/lloyd_max.py", "(table[1:] + table[:-1]) / 2", "table[:-1]", KERNEL_TWIN),
    Mutant("kernels/lloyd_max.py", "random_bits >> 16", "random_bits >> 17", "test_codec_kernels.py -k rounding"),
    Mutant(
        "kernels/lloyd_max.py",
        "jnp.where(is_usable, scales, jnp.nan)",
        "jnp.where(is_usable, scales, 0.0)",
        "test_codec_kernels.py -k not_finite",
    ),
    Mutant(
        "kernels/lloyd_max.py",
        "numerics.power_of_two(peak)",
        "0 * numerics.power_of_two(peak)",
        "test_codec_kernels.py -k twin or powers",
    ),
    Mutant("kernels/packing.py", "(quotients * 171) >> 9", "(quotients * 170) >> 9", "test_trits.py -k every_byte"),
    Mutant("kernels/packing.py", "[3**j for j in range(DIG", "[2**j for j in range(DIG", "test_trits.py -k inverts"),
    Mutant(
        "kernels/blocks.py",
        "SMALLEST_BLOCK = 32",
        "SMALLEST_BLOCK = 16",
        "test_codec_kernels.py -k are_cut or least_cost",
    ),
    Mutant("kernels/blocks.py", "return min(whole,", "return max(whole,", "test_codec_kernels.py -k least_cost"),
    Mutant("kernels/blocks.py", "8 * width // 5 + 16", "8 * width // 5", "test_codec_kernels.py -k least_cost"),
    Mutant("kernels/blocks.py", "start += num * width", "start += width", "test_codec_kernels.py -k inverts_cut"),
    Mutant(
        "kernels/rotation.py",
        "for of_round in reversed(words)",
        "for of_round in words[::1]",
        "test_codec_kernels.py -k rotations",
    ),
    Mutant("kernels/trit_blocks.py", "total + shares[i]", "total - shares[i]", "test_trit_codec.py -k sum_of_payloads"),
    Mutant("kernels/trit_blocks.py", "return largest * rotation", "return rotation", TRIT_TWIN),
    Mutant(
        "kernels/trit_blocks.py",
        "fold_in(key, 2 * i + turn)",
        "fold_in(key, turn)",
        "test_codec_kernels.py -k words_of_its_own",
    ),
    Mutant(
        "kernels/trit_blocks.py",
        "lloyd_max.round_stochastically(scale, random_bits)",
        "scale.astype(jnp.bfloat16)",
        TRIT_TWIN,
    ),
    Mutant("codecs/trit.py", "spec.num_reals < self.block_size", "spec.num_reals <= self.block_size", TRIT_TWIN),
    Mutant("codecs/trit.py", "payloads.step[0], i)", "payloads.step[0], 0)", TRIT_TWIN),
    Mutant(
        "codecs/codec.py",
        "jnp.stack([array.real, array.imag])",
        "jnp.stack([array.imag, array.real])",
        "test_trit_codec.py -k structure",
    ),
    Mutant("codecs/codec.py", "jnp.clip(leaf, -largest, largest)", "leaf", "test_trit_codec.py -k range_of_a_half"),
    Mutant("codecs/hypervector.py", "jnp.roll(flat, -begin)", "jnp.roll(flat, begin)", HYPERVECTOR_TWIN),
    Mutant("codecs/hypervector.py", "bundle / jnp.maximum(num_met, 1)", "bundle / chunks", HYPERVECTOR_TWIN),
    Mutant(
        "codecs/hypervector.py",
        "jnp.maximum(num_met, 1)",
        "num_met",
        "test_hypervector_codec.py -k without_coordinates",
    ),
    Mutant("codecs/hypervector.py", "* size, 6)", "* size, 15)", "test_hypervector_codec.py -k noise_in_its_digits"),
    Mutant("codecs/hypervector.py", "0, max(size, 1))", "0, 1)", "test_hypervector_codec.py -k table or follow"),
    Mutant("codecs/hypervector.py", "math.ceil(share)", "math.floor(share)", "test_hypervector_codec.py -k ratio_sets"),
    Mutant(
        "codecs/hypervector.py",
        "jnp.where(jnp.all(jnp.isfinite(bundle)), bundle, jnp.nan)",
        "bundle",
        "test_hypervector_codec.py -k everything",
    ),
    Mutant("codecs/hypervector.py", "self + -other", "self + other", "test_hypervector_codec.py -k vectors"),
    Mutant(
        "transforms/compress.py", "x - s.astype(x.dtype)", "x + s.astype(x.dtype)", "test_compress.py -k stays_behind"
    ),
    Mutant(
        "transforms/compress.py",
        "jnp.asarray(g, e.dtype) + e",
        "jnp.asarray(g, e.dtype)",
        "test_compress.py -k stays_behind",
    ),
    Mutant(
        "transforms/compress.py", "select(is_finite, lost, state.residual)", "lost", "test_compress.py -k not_finite"
    ),
    Mutant(
        "transforms/compress.py",
        "encode(pending, state.step)",
        "encode(pending, 0)",
        "test_compress.py -k without_feedback",
    ),
    Mutant(
        "transforms/compress.py",
        "jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32),",
        "*[jnp.zeros([], jnp.int32)] * 2,",
        "test_compress.py -k donation",
    ),
    Mutant("kernels/byte_rows.py", "start += size * width", "start += size", COLLECTIVE_TWIN),
    Mutant("kernels/shard_rows.py", "start += self.sizes[i]", "start += 1", COLLECTIVE_TWIN),
    Mutant("kernels/shard_rows.py", "key=lambda i: -self.sizes[i]", "key=lambda i: self.sizes[i]", COLLECTIVE_TWIN),
    Mutant("kernels/shard_rows.py", "return self.block if", "return 2 * self.block if", COLLECTIVE_TWIN),
    Mutant("transforms/exchange.py", "2 * (num * step + own)", "2 * num * step", COLLECTIVE_TWIN),
    Mutant("transforms/exchange.py", "codec.encode(average, first_step + 1)", "codec.encode(average)", COLLECTIVE_TWIN),
    Mutant("transforms/exchange.py", "of_devices / num", "of_devices", COLLECTIVE_TWIN),
    Mutant("transforms/exchange.py", "[_put(d, own, _take(x, own)) for", "[d for", COLLECTIVE_TWIN),
    Mutant("transforms/exchange.py", "[_put(x, own, e) for", "[x for", COLLECTIVE_TWIN),
    Mutant("transforms/exchange.py", "[num * (a - _take(m, own))", "[a - _take(m, own)", COLLECTIVE_TWIN),
    Mutant("transforms/exchange.py", "jnp.all(flags > 0) & all_finite(mean)", "all_finite(mean)", COLLECTIVE_NAN),
    Mutant("transforms/exchange.py", "payload.bundle / axis_size(axes)", "payload.bundle", COLLECTIVE_BUNDLES),
    Mutant(
        "transforms/exchange.py", "x - d for x, d in zip(vectors", "x + d for x, d in zip(vectors", COLLECTIVE_BUNDLES
    ),
    Mutant("transforms/exchange.py", "x + (d - m)", "x", COLLECTIVE_BUNDLES),
    Mutant("transforms/collectives.py", "[x + e for", "[x for", COLLECTIVE_TWIN),
    Mutant("transforms/collectives.py", "jnp.where(is_finite, leaf, jnp.zeros_like(leaf))", "leaf", COLLECTIVE_NAN),
    Mutant(
        "transforms/collectives.py",
        "select(is_finite, jax.tree.unflatten(treedef, lost), residual)",
        "jax.tree.unflatten(treedef, lost)",
        COLLECTIVE_NAN,
    ),
    Mutant(
        "transforms/collectives.py",
        "varying_axes(leaf) - set(axes)",
        "frozenset()",
        "test_collectives.py -k another_mesh_axis",
    ),
    Mutant("transforms/collectives.py", "PartitionSpec(axis_name), node", "PartitionSpec(), node", COLLECTIVE_TWIN),
    Mutant("transforms/replicated.py", "lax.pmin(flag", "lax.pmax(flag", COLLECTIVE_PHASES),
    Mutant("transforms/replicated.py", "lax.pmean(x,", "lax.psum(x,", COLLECTIVE_PHASES),
    Mutant("transforms/switched.py", "lambda value, last: last,", "lambda value, last: 0 * last,", COLLECTIVE_PHASES),
    Mutant("transforms/switched.py", "if axes and not predicts_up", "if axes and predicts_up", COLLECTIVE_PHASES),
    Mutant(
        "transforms/phase_step.py",
        "varying_axes(target) & axes",
        "varying_axes(target) - axes",
        "test_collective_phases.py -k refused",
    ),
    Mutant(
        "transforms/coded_history.py",
        "coefficients[: self.window.length]",
        "coefficients[-self.window.length :]",
        CODED,
    ),
    Mutant(
        "transforms/coded_history.py", "self.codec.encode(kept), step", "self.codec.encode(kept, step), step", CODED
    ),
    Mutant("transforms/coded_history.py", "numerics.saturating_cast(x, s.dtype)", "x", "test_coded_history.py -k half"),
    Mutant(
        "transforms/line_predictor.py",
        "[*trees, self._decoded(residual)]",
        "[*trees, jax.tree.map(jnp.zeros_like, self._decoded(residual))]",
        CODED,
    ),
    Mutant(
        "transforms/line_predictor.py",
        "lambda x: numerics.saturating_cast(x, x.dtype), coded",
        "lambda x: x, coded",
        "test_coded_history.py -k stays_finite",
    ),
    Mutant("trits.py", "_LLOYD_MAX_CUT = 0.612003", "_LLOYD_MAX_CUT = 0.712003", "test_trits.py -k twin"),
    Mutant("trits.py", "mean * peak", "mean", "test_trits.py -k twin"),
    Mutant("trits.py", "jnp.shape(x)) < odds", "jnp.shape(x)) > odds", "test_trits.py -k right_on_average"),
    Mutant("trits.py", "jnp.where(is_finite, peak, jnp.nan)", "peak", "test_trits.py -k not_finite"),
    Mutant("kernels/wls.py", "share * (ages - mean) ** 2", "share * (ages + mean) ** 2", WLS),
    Mutant("transforms/window_history.py", "mean + (horizon - age)", "mean + (horizon + age)", WLS),
    Mutant("kernels/wls.py", "share * (ages - mean) / jnp", "share * (mean - ages) / jnp", WLS),
    Mutant("kernels/wls.py", "has_slope = spread > 0", "has_slope = spread >= 0", WLS),
    Mutant("kernels/wls.py", "(jnp.arange(ages.size) == newest)", "(jnp.arange(ages.size) != newest)", WLS),
    Mutant("kernels/wls.py", "& (weights > 0)", "& (weights >= 0)", "test_kernel_edges.py -k no_records"),
    Mutant("kernels/wls.py", "total + coefficient.astype", "total - coefficient.astype", WLS),
    Mutant("kernels/wls.py", "kept + 1.0", "kept - 1.0", WLS),
    Mutant("kernels/wls.py", "lag + elapsed", "lag - elapsed", WLS),
    Mutant("kernels/wls.py", "kept_spread + new_lag", "kept_spread - new_lag", WLS),
    Mutant("kernels/wls.py", "distance if mean_first else", "distance if not mean_first else", WLS),
    Mutant(
        "transforms/window_history.py", "(state.num_records - 1) % self.length", "state.num_records % self.length", WLS
    ),
    Mutant("transforms/window_history.py", "rank < state.num_records", "rank <= state.num_records", WLS),
    Mutant(
        "transforms/recursive_history.py",
        "[keep, velocity_gain, -velocity_gain]",
        "[keep, velocity_gain, velocity_gain]",
        WLS,
    ),
    Mutant(
        "transforms/recursive_history.py",
        "stack([one, horizon + state.lag]),\n            features",
        "stack([one, horizon - state.lag]),\n            features",
        WLS,
    ),
    Mutant(
        "transforms/recursive_history.py",
        "self.decay >= 0.5",
        "self.decay >= 0.0",
        "test_wls.py -k vanishing or lstsq_at",
    ),
    Mutant("transforms/phases.py", "is_finite | (phase != Phase.WARMUP)", "is_finite | (phase == Phase.WARMUP)", WALK),
    Mutant("transforms/phases.py", "% schedule.correct_every == 0", "% schedule.correct_every != 0", WALK),
    Mutant("transforms/phases.py", "& (phase != Phase.CORRECT)", "& (phase == Phase.CORRECT)", WALK),
    Mutant("transforms/phases.py", "done >= predict_length", "done > predict_length", WALK),
    Mutant("transforms/phases.py", "done >= full_length", "done > full_length", WALK),
    Mutant(
        "transforms/phases.py", "state.cycles + (was_leap", "state.cycles - (was_leap", "test_kernel_edges.py -k cycle"
    ),
    Mutant("transforms/phases.py", "was_leap & starts_full", "was_leap | starts_full", "test_kernel_edges.py -k cycle"),
    Mutant("transforms/phases.py", "state.nonfinite_count + ~is_finite", "state.nonfinite_count + is_finite", WALK),
    Mutant("transforms/phases.py", "last - first > schedule", "last + first > schedule", ADAPTIVE),
    Mutant("transforms/phases.py", "first - last > 0.05", "first - last > -0.05", ADAPTIVE),
    Mutant(
        "transforms/phases.py", "jnp.where(is_known, loss, last_value)", "jnp.where(is_known, last_value, loss)", LOSS
    ),
    Mutant("transforms/phases.py", "(error - state.errors.mean)", "(error + state.errors.mean)", TWIN),
    Mutant("transforms/line_predictor.py", "[decay, 1 - decay, decay - 1]", "[decay, 1 - decay, 1 - decay]", TWIN),
    Mutant("transforms/line_predictor.py", "** scalars.horizon", "** -scalars.horizon", TWIN),
    Mutant("transforms/conditional.py", "return loop[0]", "return ~loop[0]", LINE),
    Mutant("transforms/finite.py", "finite &= numerics", "finite |= numerics", STEP),
    Mutant("transforms/finite.py", "jnp.where(take_new, n, o)", "jnp.where(take_new, o, n)", STEP),
    Mutant(
        "transforms/switched.py",
        "is_recorded = ~is_predict & result",
        "is_recorded = is_predict & result",
        LINE,
    ),
    Mutant(
        "transforms/phase_step.py",
        "runs = ~is_predict & has_gradient",
        "runs = ~is_predict | has_gradient",
        LINE,
    ),
    Mutant("transforms/phase_step.py", "lax.cond(is_predict, _true", "lax.cond(~is_predict, _true", LINE),
    Mutant("transforms/phase_step.py", "else phase == Phase.CORRECT", "else phase != Phase.CORRECT", TWIN),
    Mutant("transforms/switched.py", "jnp.asarray(rate, u.dtype) * u", "-jnp.asarray(rate, u.dtype) * u", STEP),
    Mutant("kernels/trit_sums.py", "[of_blocks]) + _decode(", "[of_blocks]) - _decode(", SUM),
    Mutant("kernels/trit_sums.py", "+ piece.x) / divisor", "- piece.x) / divisor", SUM),
    Mutant("kernels/trit_rows.py", "first + jnp.arange(few.num) >= i", "first + jnp.arange(few.num) >= 0 * i", SUM),
    Mutant("kernels/trit_rows.py", "words[whole.num_words :]", "words[: last.num_words]", SUM),
    Mutant(
        "kernels/uniform.py", "((bits + 0xFFFF) >> 16) << 16", "(bits >> 16) << 16", "test_trit_sums.py -k rounding"
    ),
    Mutant("transforms/accumulate.py", "state.mini_step >= k - 1", "state.mini_step >= k", WINDOWS),
    Mutant("transforms/accumulate.py", "adds = is_accepted & ~emits", "adds = ~emits", WINDOWS),
    Mutant("transforms/accumulate.py", "is_finite & ~should_skip", "is_finite", WINDOWS),
    Mutant("transforms/accumulate.py", "jnp.where(emits, 0, state", "jnp.where(emits, 1, state", WINDOWS),
    Mutant("transforms/ternary_accumulator.py", "num - carry.nonfinite_count", "num", WINDOWS),
    Mutant("transforms/queries.py", "total - machine.predict_steps", "total + machine.predict_steps", WALK),
    Mutant("transforms/queries.py", "opt_state).phase != Phase", "opt_state).phase == Phase", LINE),
    Mutant(
        "transforms/queries.py",
        "len(found) != 1",
        "len(found) > 1",
        "test_value_and_grad.py test_nesting.py -k machine",
    ),
    Mutant("value_and_grad.py", "is_predict = machine.phase == Phase", "is_predict = machine.phase != Phase", BY_PHASE),
    Mutant("value_and_grad.py", "machine.value, jnp.nan", "machine.value, 0.0", BY_PHASE),
    Mutant("value_and_grad.py", "if has_aux and not value_in_predict:", "if not value_in_predict:", BY_PHASE),
    Mutant("checks.py", "number > low if low_open", "number >= low if low_open", OF_ERRORS),
    Mutant("checks.py", "not minimum <= number", "not minimum < number", OF_ERRORS + " -k bounds"),
]


def mutated(mutant: Mutant) -> str:
    """The file's text with the change made; ``ValueError`` if the old text is not there exactly once."""
    text = (ROOT / "vsa_optax" / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} occurs {count} times")
    return text.replace(mutant.old, mutant.new)


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
    parser.add_argument("--only", default="", help="only mutants whose file and texts contain this")
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
            target = folder / "vsa_optax" / mutant.file
            whole, begin = target.read_text(), time.perf_counter()
            target.write_text(mutated(mutant))
            failure = first_failure(mutant.tests, folder)
            target.write_text(whole)
            survivors += not failure
            print(
                f"{number:3} {'killed  ' if failure else 'SURVIVED'} {time.perf_counter() - begin:6.1f} s  "
                f"{mutant.file}: {mutant.old!r} -> {mutant.new!r}  {failure}",
                flush=True,
            )
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
