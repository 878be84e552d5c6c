"""How far a row's time moves between runs of the same code, and what is more than that.

What disturbs a timing adds to it: other work, interrupts, caches that others fill. So two runs are
compared by the mean of the fastest tenth of their rounds, which moves half as much from one process
to the next as the median does. What is left is of three kinds, and all of them widen the interval:

- chance within a run: a bootstrap over sittings, because rounds of one sitting resemble each other
  (without sittings, over blocks of consecutive rounds; Kuensch, Ann. Statist. 17, 1989);
- the machine's speed, which drifts: the reference computation beside each round tells of it. A row
  follows it by a share that is estimated from both runs (regression with a prior), and how unsure
  that share is counts in proportion to how far the reference moved. What the other rows moved
  together is taken off as well, up to 3 %;
- what a run cannot see of itself, measured once over many runs of the same code. Runs that are
  joined (`sides`) have less of it, and sides that are measured in turn (`against`) have least.

The last figures were found on two cores of an AMD EPYC; bench/NOTES.md says how.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastscore.measure.results import Rounds

# share of the rounds, the fastest, by whose mean runs are compared
FAST = 0.1
# share of the reference's movement that a row follows: mean and deviation over operations
SHARE, SHARE_SD = 0.45, 0.2
# deviations of log seconds that a run does not see of itself: what differs between processes; what
# disturbs the machine for as long as a row takes, if the other run was not in turn with this one;
# and where operands lie, if they were never built anew
PROCESS, STRETCH, LAYOUT = 0.008, 0.009, 0.02
# of the median of a row, which is less steady than the fastest tenth
UNSEEN_MEDIAN = 0.05
# what all rows of a run moved together, in log seconds, that is taken for the machine's and not for
# a change of each; of so many other rows at least
MOST_SHARED, FEWEST_OTHERS = 0.03, 3
# of a table of unchanged rows: that any is called changed; of a change of the size that is said to
# be resolved: that it is found
FALSE, POWER = 0.01, 0.9
FEWEST_SITTINGS = 4
BLOCKS, RESAMPLED = 8, 200

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Change:
    """Seconds of B over those of A, less 1, with what bounds it; all of them fractions.

    ``low`` and ``high`` hold the change unless chance was extreme; ``resolves`` is the smallest
    slow-down that would have been found nine times in ten; ``share`` that of the movement
    ``reference`` which was taken off (None without one), ``shared`` what all rows moved together.
    """

    change: float
    low: float
    high: float
    resolves: float
    share: float | None
    reference: float
    shared: float

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval excludes no change."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Interval:
    """The median of a row and where that of another run of the same code is to be expected."""

    median: float
    low: float
    high: float


class _Side:
    """Log seconds of a run in units [units, rounds], and of the reference beside them."""

    def __init__(self, rounds: Rounds) -> None:
        count = _units(rounds)
        self.y = _in_units(rounds.values, count)
        self.x = None if rounds.reference is None else _in_units(rounds.reference, count)
        self._rounds = rounds

    def unseen(self, in_turn: bool) -> float:
        """Variance that the rounds do not show."""
        own = [PROCESS] + ([LAYOUT] if self._rounds.sittings < FEWEST_SITTINGS else [])
        # runs that are joined have each their own, but drift together
        drift = 0.0 if in_turn else STRETCH
        return sum(part**2 for part in own) / self._rounds.runs + drift**2

    def fast(self) -> tuple[float, float]:
        """The fastest tenth of the row and of the reference."""
        x = 0.0 if self.x is None else float(fastest(self.x.ravel()))
        return float(fastest(self.y.ravel())), x

    def deviations(self) -> tuple[np.ndarray, np.ndarray]:
        """Medians of the units about theirs, of the row and of the reference, tamed."""
        assert self.x is not None
        return _tamed(np.median(self.y, 1)), _tamed(np.median(self.x, 1))

    def error(self, share: float, of: Statistic | None = None) -> float:
        """Standard error of a statistic (default: `fastest`) less the share: units drawn anew."""
        of = of or fastest
        count = len(self.y)
        # seeded: the same files give the same verdict
        drawn = np.random.default_rng(0).integers(count, size=(RESAMPLED, count))
        found = of(self.y[drawn].reshape(RESAMPLED, -1))
        if self.x is not None and share:
            found = found - share * of(self.x[drawn].reshape(RESAMPLED, -1))
        # a bootstrap of few units is too narrow by this much
        return float(found.std(ddof=1)) * math.sqrt(count / (count - 1))


def fastest(logs: np.ndarray) -> np.ndarray:
    """Mean over the smallest tenth, at least one, along the last axis."""
    count = max(1, round(FAST * logs.shape[-1]))
    return np.partition(logs, count - 1, axis=-1)[..., :count].mean(axis=-1)


def _median(logs: np.ndarray) -> np.ndarray:
    return np.median(logs, axis=-1)


@dataclass(frozen=True)
class _Shift:
    """Log seconds that a row moved from A to B, the reference's share taken off."""

    middle: float
    deviation: float
    free: int
    share: float | None
    reference: float


def changes(
    pairs: dict[str, tuple[Rounds, Rounds]], in_turn: bool = False, false: float = FALSE
) -> dict[str, Change]:
    """The change of every row from A to B.

    ``in_turn``: both sides of a row were measured in turn, so that what disturbs the machine for
    seconds disturbs both. ``false``: probability that a table of unchanged rows shows any change,
    however many they are.
    """
    shifts = {name: _shift(*pair, in_turn) for name, pair in pairs.items()}
    found = {}
    for name, s in shifts.items():
        shared = _shared([other for key, other in shifts.items() if key != name])
        middle = s.middle - shared
        half = s.deviation * _student(1 - false / (2 * len(shifts)), s.free)
        seen = half + s.deviation * statistics.NormalDist().inv_cdf(POWER)
        values = (math.expm1(v) for v in (middle, middle - half, middle + half, seen))
        found[name] = Change(*values, s.share, math.expm1(s.reference), math.expm1(shared))
    return found


def _shift(a: Rounds, b: Rounds, in_turn: bool) -> _Shift:
    before, after = _Side(a), _Side(b)
    share, share_sd = _share(before, after)
    (y0, x0), (y1, x1) = before.fast(), after.fast()
    moved = x1 - x0 if share is not None else 0.0
    part = share or 0.0
    variance = before.error(part) ** 2 + after.error(part) ** 2
    variance += before.unseen(in_turn) + after.unseen(in_turn) + (share_sd * moved) ** 2
    free = len(before.y) + len(after.y) - 2
    return _Shift(y1 - y0 - part * moved, math.sqrt(variance), free, share, moved)


def _shared(others: list[_Shift]) -> float:
    """What the other rows moved together: the machine's, up to a limit."""
    if len(others) < FEWEST_OTHERS:
        return 0.0
    middle = statistics.median(other.middle for other in others)
    # the variance of a median; what chance explains is not taken off
    chance = 1.57 * statistics.median(other.deviation**2 for other in others) / len(others)
    known = middle**2 / (middle**2 + chance)
    return max(-MOST_SHARED, min(MOST_SHARED, known * middle))


def interval(
    values: Rounds | tuple[float, ...] | list[float], confidence: float = 0.95
) -> Interval:
    """Where the median of a run on the same machine lies, nineteen times in twenty.

    The intervals of two runs of the same code overlap.
    """
    rounds = values if isinstance(values, Rounds) else Rounds(tuple(values))
    middle = statistics.median(rounds.values)
    if len(rounds.values) < 2:
        raise ValueError("one round has no interval; measure at least two")
    side = _Side(rounds)
    deviation = math.hypot(side.error(0.0, _median), UNSEEN_MEDIAN / math.sqrt(rounds.runs))
    half = deviation * _student((1 + confidence) / 2, len(side.y) - 1)
    return Interval(middle, middle * math.exp(-half), middle * math.exp(half))


def _units(rounds: Rounds) -> int:
    if rounds.sittings >= FEWEST_SITTINGS:
        return rounds.sittings
    return max(2, min(BLOCKS, len(rounds.values) // 3))


def _in_units(values: tuple[float, ...], count: int) -> np.ndarray:
    """Log seconds in equal consecutive parts; what is left over at the beginning is warm-up."""
    each = len(values) // count
    return np.log(np.asarray(values[len(values) - each * count :])).reshape(count, each)


def _tamed(values: np.ndarray) -> np.ndarray:
    """Deviations from the median, those beyond 2.5 robust standard deviations brought back."""
    off = values - np.median(values)
    most = 2.5 * 1.4826 * float(np.median(np.abs(off)))
    return np.clip(off, -most, most)


def _share(a: _Side, b: _Side) -> tuple[float | None, float]:
    """What a row follows of the reference, and how unsure that is: Bayesian regression."""
    if a.x is None or b.x is None:
        return None, 0.0
    parts = [side.deviations() for side in (a, b)]
    dy, dx = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    prior, found, weight = 1 / SHARE_SD**2, SHARE, 0.0
    for _ in range(3):
        noise = float(np.mean((dy - found * dx) ** 2))
        if noise > 0:
            weight = float(dx @ dx) / noise
            found = (prior * SHARE + float(dx @ dy) / noise) / (prior + weight)
    # data can say that a row moves apart from the reference, not that it moves against it
    return min(1.0, max(0.0, found)), 1 / math.sqrt(prior + weight)


def _student(probability: float, free: int) -> float:
    """Quantile of Student's t (Abramowitz and Stegun 26.7.5; within 0.2 % from 8 degrees on)."""
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / free ** (i + 1) for i, term in enumerate(terms))
