"""Inception score, modified inception score and AM score of label probabilities.

All three depend on the recogniser and its calibration: they compare within one table, not across
papers. The scorer that most SC09 papers share normalises its inception score over samples instead
of labels; ``inception_score_shared`` reproduces that reading for comparison.
"""

from __future__ import annotations

import numpy as np

# below this a probability is rounding; mIS is heavy-tailed in log p
FLOOR = 1e-12


def _checked(probabilities: np.ndarray) -> np.ndarray:
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or len(p) < 2:
        raise ValueError(f"scores: probabilities have shape {p.shape}; need [N, labels], N >= 2")
    if not np.isfinite(p).all() or (p < 0).any() or not np.allclose(p.sum(1), 1.0, atol=1e-4):
        raise ValueError("scores: every row of probabilities must be non-negative and sum to 1")
    return p


def inception_score(probabilities: np.ndarray) -> float:
    """exp(mean_i KL(p_i || mean p)) for probabilities [N, K] (Salimans et al. 2016), in 1..K."""
    p = _checked(probabilities)
    marginal = p.mean(0)
    kl = p * (np.log(np.maximum(p, FLOOR)) - np.log(np.maximum(marginal, FLOOR)))
    return float(np.exp(kl.sum(1).mean()))


def modified_inception_score(probabilities: np.ndarray) -> float:
    """exp(mean_ij KL(p_i || p_j)) over all pairs, i = j included (Gurumurthy et al. 2017).

    The mean over pairs is exact: mean_i sum_k p_ik log p_ik - sum_k mean_i p_ik mean_j log p_jk.
    """
    p = _checked(probabilities)
    logs = np.log(np.maximum(p, FLOOR))
    return float(np.exp((p * logs).sum(1).mean() - p.mean(0) @ logs.mean(0)))


def am_score(data: np.ndarray, generated: np.ndarray) -> float:
    """KL(mean data || mean generated) + mean entropy (Zhou et al. 2018); low is best.

    Arguments are probabilities [N, K] of recordings and of generated clips.
    """
    p_data, p = _checked(data).mean(0), _checked(generated)
    entropy = -(p * np.log(np.maximum(p, FLOOR))).sum(1).mean()
    logs = np.log(np.maximum(p_data, FLOOR)) - np.log(np.maximum(p.mean(0), FLOOR))
    return float((p_data * logs).sum() + entropy)


def inception_score_shared(probabilities: np.ndarray, seed: int = 0) -> float:
    """Inception score as the SC09 scorer in common use computes it, defect included.

    One random half against the mean of the other, both normalised over samples (the axis is wrong),
    which equals the inception score on balanced labels only.
    """
    p = _checked(probabilities)
    p = p[np.random.RandomState(seed).permutation(len(p))]
    half = len(p) // 2
    first = p[:half] / p[:half].sum(0)
    # the other half's mean, repeated and normalised over samples, is constant: 1 / half
    kl = (first * np.log(np.maximum(first * half, FLOOR))).sum(0)
    return float(np.exp(kl.mean()))
