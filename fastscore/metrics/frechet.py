"""Frechet distance between two sets of features, with its sampling error.

The plug-in estimate is biased upwards by roughly (dimension / n): figures compare only at equal n,
and the figure to hold a distance against is that between two halves of real data at the same n.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distance:
    """Estimate at ``n`` clips a side, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def frechet_gaussian(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), means [D], covariances [D, D] float64.
    The symmetric form needs only eigenvalues, which stay real when a covariance is singular.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root)
    overlap = np.sqrt(np.clip(cross, 0, None)).sum()
    difference = np.asarray(mean_a) - np.asarray(mean_b)
    total = difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    return float(max(total, 0.0))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to features ``a`` [N, D] and ``b`` [M, D].

    No shrinkage: covariances are the unbiased sample ones. Raises ValueError below two clips a side
    or when the dimensions differ.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"frechet: features have shapes {a.shape} and {b.shape}; need [N, D] and [M, D] with "
            "two or more clips each"
        )
    moments = [(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (a, b)]
    return frechet_gaussian(*moments[0], *moments[1])


def frechet_interval(a: np.ndarray, b: np.ndarray, seed: int = 0, rounds: int = 200) -> Distance:
    """Frechet distance with a bootstrap interval over both sets.

    Resampling repeats clips and so adds bias of its own; the resampled distances are therefore
    centred on the estimate before their 2.5 % and 97.5 % quantiles are read.
    """
    rng = np.random.default_rng(seed)
    value = frechet(a, b)
    drawn = np.array(
        [
            frechet(a[rng.integers(0, len(a), len(a))], b[rng.integers(0, len(b), len(b))])
            for _ in range(rounds)
        ]
    )
    low, high = value + np.quantile(drawn - drawn.mean(), [0.025, 0.975])
    return Distance(value, float(max(low, 0.0)), float(high), min(len(a), len(b)))


def balanced_halves(
    labels: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two disjoint random sets of at most ``size`` clips, with equal labels in both."""
    first, second = [], []
    kinds = np.unique(labels)
    share = size // len(kinds)
    for kind in kinds:
        index = rng.permutation(np.flatnonzero(labels == kind))
        half = min(len(index) // 2, share)
        first.append(index[:half])
        second.append(index[half : 2 * half])
    return np.concatenate(first), np.concatenate(second)


def halves_distance(
    features: np.ndarray, labels: np.ndarray, size: int, seed: int = 0, rounds: int = 20
) -> Distance:
    """Mean Frechet distance between two halves of one set, and the range of 95 % of the splits.

    Raises ValueError when a half would have fewer than two clips.
    """
    rng = np.random.default_rng(seed)
    drawn, n = [], 0
    for _ in range(rounds):
        first, second = balanced_halves(labels, size, rng)
        n = len(first)
        drawn.append(frechet(features[first], features[second]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Distance(float(np.mean(drawn)), float(low), float(high), n)
