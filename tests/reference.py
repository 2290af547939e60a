"""Slow, obvious twins in NumPy, written from the equations and not from the code they check."""

import numpy as np


def lstsq_prediction(steps, records, step, decay):
    """The weighted line through ``records`` (float64 ``[n, d]``, oldest first), read at ``step``."""
    steps = np.asarray(steps, np.float64)
    records = np.asarray(records, np.float64)
    if len(set(steps)) < 2:
        return records[-1]
    root = np.sqrt(float(decay) ** np.arange(len(steps))[::-1])
    design = np.stack([np.ones_like(steps), steps - steps[-1]], axis=1)
    (baseline, velocity), *_ = np.linalg.lstsq(design * root[:, None], records * root[:, None], rcond=None)
    return baseline + velocity * (step - steps[-1])


class Predictor:
    """History, residual and error of one flat gradient; ``window=None`` keeps every record."""

    def __init__(self, *, window=8, decay=0.95, residual_decay=0.95, has_residual=True):
        self.window, self.decay = window, decay
        self.residual_decay, self.has_residual = residual_decay, has_residual
        self.steps, self.records, self.residual, self.errors = [], [], 0.0, []

    def predict(self, step):
        kept = slice(None) if self.window is None else slice(-self.window, None)
        prediction = lstsq_prediction(self.steps[kept], self.records[kept], step, self.decay)
        if self.has_residual:
            prediction = prediction + self.residual_decay ** (step - self.steps[-1]) * self.residual
        return prediction

    def correct(self, step, gradient):
        error = gradient - self.predict(step)
        self.errors.append(np.linalg.norm(error) / np.linalg.norm(gradient))
        self.residual = self.residual_decay * self.residual + (1 - self.residual_decay) * error

    def record(self, step, gradient):
        self.steps.append(step)
        self.records.append(np.asarray(gradient, np.float64))


def walk_phases(steps, *, warmup_steps=10, full_steps=5, predict_steps=20, correct_every=5, skipped=()):
    """The phases of ``steps`` steps as a string, each PREDICT phase written out whole before it is walked.

    ``skipped`` holds the numbers of steps whose gradient is not finite.
    """
    leap, position, previous = [], 0, ""
    while predict_steps and not (position >= predict_steps and (position % correct_every or previous == "C")):
        previous = "C" if position and position % correct_every == 0 and previous != "C" else "P"
        leap.append(previous)
        position += 1
    out, recorded = "", 0
    while len(out) < steps and recorded < warmup_steps:
        recorded += len(out) not in skipped
        out += "W"
    while len(out) < steps:
        out += "F" * full_steps + "".join(leap)
    return out[:steps]


def sylvester(order):
    """The Hadamard matrix of ±1 as a Kronecker power; ``order`` is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.kron(matrix, [[1.0, 1.0], [1.0, -1.0]])
    return matrix


def signs_of(words, size):
    """``[size]`` of ±1: coordinate i is negative if bit ``31 - i % 32`` of word ``i // 32`` is set."""
    return np.array([1.0 - 2.0 * ((int(words[i // 32]) >> (31 - i % 32)) & 1) for i in range(size)])


def rotate(x, words):
    """``H (s * x) / sqrt(B)``, one such round after the other, in float64."""
    for of_round in words:
        x = sylvester(len(x)) @ (signs_of(of_round, len(x)) * x) / np.sqrt(len(x))
    return x


def rotate_back(y, words):
    for of_round in reversed(words):
        y = signs_of(of_round, len(y)) * (sylvester(len(y)) @ y / np.sqrt(len(y)))
    return y


def quantize(y, levels, unbiased):
    """Numbers of the nearest levels once y has rms 1, and the scale: ``<y, y> / <y, q>`` or ``<y, q> / <q, q>``."""
    y = np.asarray(y, np.float64)
    if not y.any():
        return np.full(len(y), len(levels) // 2), 0.0
    numbers = np.argmin(abs(y[:, None] / np.sqrt(np.mean(y**2)) - levels), axis=1)
    q = levels[numbers]
    return numbers, (y @ y) / (y @ q) if unbiased else (y @ q) / (q @ q)


def pack_digits(digits):
    """Digits 0, 1, 2 in planes: byte i holds digits i, m + i, 2m + i, ... of m bytes, the first counting 1."""
    m = -(-len(digits) // 5)
    return [sum(3**j * int(digits[j * m + i]) for j in range(5) if j * m + i < len(digits)) for i in range(m)]


def unpack_digits(packed, size):
    return np.array([int(packed[i % len(packed)]) // 3 ** (i // len(packed)) % 3 for i in range(size)])


def encode_trits(x, widths, words, levels, unbiased):
    """Numbers of all blocks together and the scale of each, for blocks of these widths with these words."""
    padded = np.concatenate([np.asarray(x, np.float64), np.zeros(sum(widths) - len(x))])
    pieces = np.split(padded, np.cumsum(widths)[:-1])
    coded = [quantize(rotate(piece, w), levels, unbiased) for piece, w in zip(pieces, words, strict=True)]
    return np.concatenate([numbers for numbers, _ in coded]), np.array([scale for _, scale in coded])


def decode_trits(numbers, scales, size, widths, words, levels):
    pieces = np.split(levels[numbers], np.cumsum(widths)[:-1])
    decoded = [s * rotate_back(q, w) for s, q, w in zip(scales, pieces, words, strict=True)]
    return np.concatenate(decoded)[:size]


def bundle(x, signs, begin):
    """``[D]``: chunks of ``x``, the first of which begins at ``begin``, times ``[chunks, D]`` signs, summed."""
    total = np.zeros(signs.shape[1])
    for i in range(len(x)):
        total[i % len(total)] += signs.flat[i] * x[(begin + i) % len(x)]
    return total


def unbundle(total, size, signs, begin, shrink):
    """The chunks again, each divided by the number of coordinates that met where it was, if ``shrink``."""
    met = np.bincount(np.arange(size) % len(total), minlength=len(total))
    x = np.zeros(size)
    for i in range(size):
        at = i % len(total)
        x[(begin + i) % size] = signs.flat[i] * total[at] / (met[at] if shrink else 1)
    return x


def quantize_trits(x, cut):
    """Trits where ``|x| > cut``, and the mean magnitude of those."""
    x = np.asarray(x, np.float64)
    kept = abs(x) > cut
    return np.where(kept, np.sign(x), 0), abs(x[kept]).mean() if kept.any() else 0.0


class SecantPredictor:
    """The gradient from the last changes of flat parameters and gradients, by the ridge that served best so far."""

    def __init__(self, *, window, ridges, forget):
        self.window, self.ridges, self.forget = window, ridges, forget
        self.points, self.gradients, self.scores = [], [], np.zeros(len(ridges))

    @property
    def best(self):
        return int(np.argmin(self.scores))

    def predictions(self, point):
        points, gradients = (np.asarray(x[-self.window - 1 :], np.float64) for x in (self.points, self.gradients))
        moves, changes = np.diff(points, axis=0), np.diff(gradients, axis=0)
        way, found = np.asarray(point, np.float64) - points[-1], []
        for ridge in self.ridges:
            if not len(moves) or np.isinf(ridge):
                found.append(gradients[-1])
                continue
            lengths = np.linalg.norm(moves, axis=1)
            design = np.concatenate([(moves / lengths[:, None]).T, np.sqrt(ridge) * np.eye(len(moves))])
            wanted = np.concatenate([way, np.zeros(len(moves))])
            shares = np.linalg.lstsq(design, wanted, rcond=None)[0] / lengths
            found.append(gradients[-1] + shares @ changes)
        return np.stack(found)

    def predict(self, point):
        return self.predictions(point)[self.best]

    def record(self, point, gradient):
        if self.points:
            errors = np.sum((self.predictions(point) - gradient) ** 2, axis=1) / np.sum(
                np.square(gradient, dtype=np.float64)
            )
            self.scores = self.forget * self.scores + (1 - self.forget) * np.minimum(errors, 4.0)
        self.points.append(point)
        self.gradients.append(gradient)


def symmetric_fit(changes, eigenvalues, ridge, curvature):
    """The symmetric B of least ``sum_j ||B_j √e_j - c_j||² + ridge ||B - curvature I||²``, ``c_j`` its columns."""
    size = len(eigenvalues)
    if not size:
        return np.zeros((0, 0))
    pairs = [(i, j) for i in range(size) for j in range(i + 1)]
    rows, wanted = [], []
    for i in range(size):
        for j in range(size):
            element = np.array([float({i, j} == {k, m}) for k, m in pairs])
            rows += [np.sqrt(eigenvalues[j]) * element, np.sqrt(ridge) * element]
            wanted += [changes[i, j], np.sqrt(ridge) * curvature * (i == j)]
    found, hessian = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0], np.zeros((size, size))
    for (i, j), element in zip(pairs, found, strict=True):
        hessian[i, j] = hessian[j, i] = element
    return hessian


class Leap:
    """The step that minimises ``g's + s'Hs / 2 + damping * curvature * ||s - b||² / 2``, of flat arrays.

    ``||s||²`` is ``sum(metric * s²)``. ``inside`` and ``outside`` are the step's parts in the span of the moves and
    outside; ``change`` is that of the gradient by the first. ``base`` and ``gradient`` are the parts in the span of b
    and of D times the changed gradient; ``dimension`` is that of the span.
    """

    def __init__(self, moves, changes, gradient, base, metric, *, curvature, damping, ridge, least):
        lengths = np.sqrt(np.sum(metric * moves**2, axis=1))
        used = lengths > 0
        moves, changes = moves[used] / lengths[used, None], changes[used] / lengths[used, None]
        eigenvalues, vectors = np.linalg.eigh(moves * metric @ moves.T)
        known = eigenvalues > least * max([0.5, *eigenvalues])
        eigenvalues, vectors = eigenvalues[known], vectors[:, known]
        basis = vectors.T @ moves / np.sqrt(eigenvalues)[:, None]  # Rows of length 1, at right angles.
        hessian = symmetric_fit(basis @ (vectors.T @ changes).T, eigenvalues, ridge, curvature)
        curvatures, axes = np.linalg.eigh(hessian)
        sizes = (axes * abs(curvatures)) @ axes.T

        own_gradient, own_base = basis @ gradient, basis @ (metric * base)
        if np.isinf(damping):
            own, of_base, of_gradient = own_base, 1, 0
        else:
            weight = damping * curvature
            own = np.linalg.solve(sizes + weight * np.eye(len(sizes)), weight * own_base - own_gradient)
            of_base, of_gradient = damping / (1 + damping), 1 / (1 + damping)
        self.inside, self.base = own @ basis, own_base @ basis
        self.change = (own * np.sqrt(eigenvalues) / (eigenvalues + ridge)) @ (vectors.T @ changes)
        self.gradient = (basis @ (gradient + self.change)) @ basis
        gradient_outside = (gradient + self.change) / metric - self.gradient
        self.outside = of_base * (base - self.base) - of_gradient * gradient_outside / curvature
        self.dimension = len(eigenvalues)


class Multisecant:
    """Leaps from flat arrays; ``base(gradient)`` is the optimizer's step, ``of`` and ``fit`` have the constants."""

    def __init__(self, base, size, *, window, of, fit):
        self.base, self.window, self.of, self.fit = base, window, of, fit
        self.point = self.gradient = self.mean_square = np.zeros(size)
        self.moves = np.zeros((0, size))
        self.changes = np.zeros((0, size))
        self.losses, self.loss, self.damping, self.curvature = [], np.inf, of.FIRST_DAMPING, None
        self.num_evaluations = self.num_accepted = self.error = self.rest = self.rest_length = 0
        self.leap, self.is_accepted = None, None

    def judge(self, point, gradient, value):
        of, is_first = self.of, self.num_accepted == 0
        self.num_evaluations += 1
        is_finite, is_resting = np.isfinite(value) and np.isfinite(gradient).all(), self.rest > 0
        is_bound = self.damping >= of.MOST_DAMPING
        is_allowed = is_first or value <= max(self.losses[-of.NUM_LOSSES :])
        self.is_accepted = bool(is_finite and (is_bound or is_allowed))
        factor = of.MUCH_MORE
        if self.is_accepted:
            factor = of.MORE if value > self.loss else 1
        if is_finite and not is_first and not is_resting:
            missed = gradient - self.gradient - self.leap.change
            squared, squared_outside = (
                np.sum(missed**2 / self.metric),
                np.sum(self.metric * self.leap.outside**2),
            )
            self.error = np.sqrt(squared / np.sum(self.gradient**2 / self.metric))
            worst = of.WORST_IF_IT_ROSE if value > self.loss else of.WORST_ERROR
            if self.is_accepted and self.error**2 < worst:
                factor = of.LESS
            if squared_outside > of.LEAST_OUTSIDE * np.sum(self.metric * self.leap.inside**2):
                found, kept = of.CURVATURE_SHARE * np.sqrt(squared / squared_outside), of.CURVATURE_DECAY
                self.curvature = found if self.curvature is None else self.curvature**kept * found ** (1 - kept)
        if is_finite and not is_first:
            self.moves = np.concatenate([self.moves, [point - self.point]])[-self.window :]
            self.changes = np.concatenate([self.changes, [gradient - self.gradient]])[-self.window :]
        if not is_first and not is_resting:
            self.damping = np.clip(self.damping * factor, of.LEAST_DAMPING, of.MOST_DAMPING)
        self.rest = max(self.rest - 1, 0)
        if self.damping < of.MOST_DAMPING:
            self.rest_length = 0
        elif is_bound and not is_resting:
            self.rest = self.rest_length = min(max(2 * self.rest_length, 1), of.MOST_REST)
        if self.is_accepted:
            self.point, self.gradient, self.loss = point, gradient, value
            self.losses.append(value)
            self.num_accepted += 1
        decay = of.METRIC_DECAY
        share = (1 - decay) / (1 - decay**self.num_evaluations)
        self.mean_square = (1 - share) * self.mean_square + share * self.gradient**2
        self.metric = np.sqrt(self.mean_square) + of.secants.EPSILON

    def update(self, point, gradient, value):
        """The step from ``point`` to the next point."""
        self.judge(point, gradient, value)
        if not self.num_accepted:
            return np.zeros_like(point)
        base = self.base(self.gradient)
        if self.rest:
            return self.point - point + base
        is_base = self.damping >= self.of.MOST_DAMPING or not len(self.moves)
        self.leap = Leap(
            self.moves,
            self.changes,
            self.gradient,
            base,
            self.metric,
            curvature=1.0 if self.curvature is None else self.curvature,
            damping=np.inf if is_base else self.damping,
            ridge=self.fit.RIDGE,
            least=self.fit._LEAST_EIGENVALUE,
        )
        return self.point - point + self.leap.inside + self.leap.outside


class CompressedMean:
    """The mean of n devices' gradients, lists of flat arrays, bucket by bucket and row by row.

    ``code(row, step)`` is what a receiver decodes of a row; one of fewer than ``block`` coordinates, but at least
    ``worth_padding``, is filled up. ``rounded`` is what the leaves' dtypes hold of a list of flat arrays. ``most`` is
    how many coordinates are in a bucket; None for all of them.
    """

    def __init__(self, code, num, block, worth_padding, rounded, most=None):
        self.code, self.num, self.block, self.worth_padding, self.rounded = code, num, block, worth_padding, rounded
        self.most, self.step = most, 0

    def order(self, leaves):
        """Large leaves as they come, then the small ones, largest first."""
        large = [i for i in range(len(leaves)) if len(leaves[i]) >= 16 * self.block]
        small = [i for i in range(len(leaves)) if len(leaves[i]) < 16 * self.block]
        return large + sorted(small, key=lambda i: -len(leaves[i]))

    def flat(self, leaves):
        return np.concatenate([leaves[i] for i in self.order(leaves)])

    def leaves_of(self, flat, like):
        leaves, start = [None] * len(like), 0
        for i in self.order(like):
            leaves[i] = flat[start : start + len(like[i])]
            start += len(like[i])
        return leaves

    def rows(self, bucket):
        width = -(-len(bucket) // self.num)
        if self.worth_padding <= width < self.block:
            width = self.block
        return np.pad(bucket, (0, self.num * width - len(bucket))).reshape(self.num, width)

    def mean(self, gradients):
        """The emitted mean, and the unsent part of each device."""
        num, like = self.num, gradients[0]
        if num == 1:
            return self.rounded(like), [[np.zeros_like(x) for x in like]]
        flats = np.stack([self.flat(leaves) for leaves in gradients])
        most = flats.shape[1] if self.most is None else self.most
        starts = range(0, flats.shape[1], most)
        averages, seen, sent = [], [], []
        for b, start in enumerate(starts):
            rows = np.stack([self.rows(flat[start : start + most]) for flat in flats])
            first = [2 * (num * (len(starts) * self.step + b) + i) for i in range(num)]
            seen.append(rows.copy())
            for i in range(num):
                for r in range(num):
                    if r != i:
                        seen[-1][i, r] = self.code(rows[i, r], first[i])
            averages.append(np.sum(seen[-1] / num, axis=0))
            decoded = np.concatenate([self.code(averages[-1][r], first[r] + 1) for r in range(num)])
            sent.append(decoded[: len(flats[0, start : start + most])])
        sent = self.rounded(self.leaves_of(np.concatenate(sent), like))
        left = [[] for _ in range(num)]
        for b, start in enumerate(starts):
            of_mean = self.rows(self.flat(sent)[start : start + most])
            for i in range(num):
                lost = self.rows(flats[i, start : start + most]) - seen[b][i]
                lost[i] = num * (averages[b][i] - of_mean[i])
                left[i].append(lost.reshape(-1)[: len(flats[i, start : start + most])])
        self.step += 1
        return sent, [self.leaves_of(np.concatenate(of_device), like) for of_device in left]


class MomentumPredictor:
    """The legacy predictor of vsa-optim-rs in its own order: record, then correct by the last prediction, then apply.

    Errors are relative, and kept for all gradients with two records before them.
    """

    def __init__(self, momentum=0.9, weight=0.5, predict_steps=4, most_error=0.5):
        self.momentum, self.weight = momentum, weight
        self.predict_steps, self.most_error = predict_steps, most_error
        self.records, self.last, self.sum, self.errors, self.predicted = [], None, 0.0, [], 0

    def wants_true(self):
        recent = self.errors[-10:]
        is_poor = len(recent) == 10 and np.mean(recent) > self.most_error
        return len(self.records) < 2 or self.predicted >= self.predict_steps or is_poor

    def expected(self):
        if not self.records:
            return 0.0
        newest = self.records[-1]
        return newest + self.momentum * (newest - self.records[-2]) if len(self.records) > 1 else newest

    def predict(self):
        self.predicted += 1
        self.last = self.expected()
        return self.last

    def true_step(self, gradient):
        """The emitted update for a true gradient."""
        gradient = np.asarray(gradient, np.float64)
        if len(self.records) > 1:
            self.errors.append(np.linalg.norm(gradient - self.expected()) / np.linalg.norm(gradient))
        self.records.append(gradient)
        if self.predicted:
            self.sum = self.sum + (gradient - self.last)
        corrected, self.sum, self.predicted = gradient + self.weight * self.sum, 0.0, 0
        return corrected


def walk_legacy(losses, *, full_steps, predict_steps, correct_every, loss_threshold=None):
    """Phases of the legacy trainer of vsa-optim-rs, a step for each loss; with no threshold its lengths stay."""
    phase, done, walked, recent = "F", 0, "", []
    for loss in losses:
        if phase == "F":
            coming = "P" if done >= full_steps else "F"
        elif phase == "P" and done > 0 and done % correct_every == 0:
            coming = "C"
        else:
            coming = "P" if done < predict_steps else "F"
        if coming == "F" and phase != "F":
            done = 0
            if loss_threshold is not None and len(recent) >= 20:
                first, last = np.mean(recent[:10]), np.mean(recent[-10:])
                if last > first * (1 + loss_threshold):
                    full_steps, predict_steps = min(full_steps + 5, 50), max(predict_steps - 10, 10)
                elif last < first * 0.95:
                    full_steps, predict_steps = max(full_steps - 2, 5), min(predict_steps + 5, 100)
        elif coming == "P" and phase == "F":
            done = 0
        phase = coming
        walked += phase
        recent = [*recent, loss][-100:]
        done += 1
    return walked
