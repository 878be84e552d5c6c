"""Recognition rates with intervals, and confusion matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rate:
    """Share of successes with its Wilson interval, all in 0..1."""

    successes: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Observed share."""
        return self.successes / self.n

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> Rate:
    """Share and Wilson score interval (Wilson 1927), 95 % at the default ``z``.

    Raises ValueError when ``n`` is not positive or ``successes`` lies outside 0..n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes of {n}; need 0 <= successes <= n, n > 0")
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # the exact ends at 0 and 1, where rounding would leave 1e-17
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return Rate(successes, n, low, high)


def confusion_matrix(truth: np.ndarray, heard: np.ndarray, size: int) -> np.ndarray:
    """Counts [size, size], row the label meant, column the label heard.

    Raises ValueError when the arrays differ in length or hold indices outside 0..size - 1.
    """
    truth, heard = np.asarray(truth), np.asarray(heard)
    if truth.shape != heard.shape or truth.ndim != 1:
        raise ValueError(f"confusion_matrix: shapes {truth.shape} and {heard.shape} differ")
    both = np.concatenate([truth, heard])
    if len(both) and not (both.min() >= 0 and both.max() < size):
        raise ValueError(
            f"confusion_matrix: indices {both.min()}..{both.max()} outside 0..{size - 1}"
        )
    return np.bincount(truth * size + heard, minlength=size * size).reshape(size, size)
