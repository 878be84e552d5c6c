"""From clips to the figures of one row: recognition, distance, spread, quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import scores
from .dnsmos import SCORES, dnsmos
from .frechet import balanced_halves, frechet_interval
from .rates import confusion_matrix, wilson
from .recogniser import Judgement, Recogniser
from .report import Row
from .spread import (
    STATISTICS,
    acoustic_spread_ratios,
    shared_labels,
    spread_ratio,
    voice_statistics,
)


@dataclass(frozen=True)
class Heard:
    """Clips [N, samples] fp32 with what was meant (label index, -1 where nothing) and heard."""

    waves: Tensor
    meant: np.ndarray
    judgement: Judgement
    statistics: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Whether the first label is the one meant; for unguided clips, whether it is confident."""
        guided = self.judgement.predicted == self.meant
        return np.where(self.meant >= 0, guided, self.judgement.confident)

    @property
    def labels(self) -> np.ndarray:
        """Label meant, or heard where none was meant, int64 [N]."""
        return np.where(self.meant >= 0, self.meant, self.judgement.predicted)


def listen(recogniser: Recogniser, waves: Tensor, meant: np.ndarray) -> Heard:
    """Judge clips [N, samples] at the recogniser's rate."""
    rate = recogniser.config.sample_rate
    return Heard(waves, meant, recogniser.judge(waves), voice_statistics(waves, rate))


def measure(
    name: str,
    kind: str,
    heard: Heard,
    recordings: Heard,
    reference: Heard,
    seed: int,
    bootstrap: int,
) -> Row:
    """Row of ``heard``: spread over that of ``recordings``, distance to ``reference``.

    The distance takes as many clips, evenly over labels, as the smaller side has. Spread counts
    only clips heard as meant, so that errors do not pass for variety.
    """
    judgement, labels = heard.judgement, heard.judgement.labels
    p = judgement.probabilities
    counts = np.bincount(judgement.predicted[judgement.confident], minlength=len(labels))
    row = Row(name, kind, len(p), confident=wilson(int(judgement.confident.sum()), len(p)))
    row.label_counts = dict(zip(labels, counts.tolist(), strict=True))
    if (heard.meant >= 0).all():
        right = heard.right
        row.recognised = wilson(int(right.sum()), len(p))
        row.sure = wilson(int((right & judgement.confident).sum()), len(p))
        table = confusion_matrix(heard.meant, judgement.predicted, len(labels))
        row.confusion = table.tolist()
    size = min(len(p), len(reference.waves))
    rng = np.random.default_rng(seed)
    ours, theirs = (even_choice(h.labels, size, rng) for h in (heard, reference))
    row.distance = frechet_interval(
        judgement.embeddings[ours], reference.judgement.embeddings[theirs], seed, bootstrap
    )
    row.spread = _spread(heard, recordings)
    octaves = heard.statistics[:, STATISTICS.index("log2_pitch")]
    octaves = octaves[np.isfinite(octaves)]
    if len(octaves):
        row.pitch_hz = np.exp2(np.quantile(octaves, [0.1, 0.5, 0.9])).tolist()
    row.inception = scores.inception_score(p)
    row.inception_shared = scores.inception_score_shared(p)
    row.modified_inception = scores.modified_inception_score(p)
    row.am = scores.am_score(reference.judgement.probabilities, p)
    return row


def even_choice(labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of ``size`` clips at most, spread over the labels as evenly as they allow."""
    shuffled = rng.permutation(len(labels))
    # rank of each clip within its label; taking low ranks first keeps the labels level
    rank = np.zeros(len(labels), dtype=np.int64)
    for kind in np.unique(labels):
        index = shuffled[labels[shuffled] == kind]
        rank[index] = np.arange(len(index))
    return shuffled[np.argsort(rank[shuffled], kind="stable")][:size]


def _spread(heard: Heard, recordings: Heard) -> dict[str, float] | None:
    ours, theirs = heard.right, recordings.right
    labels, data_labels = heard.labels[ours], recordings.labels[theirs]
    if not len(shared_labels(labels, data_labels)):
        return None
    embedding = spread_ratio(
        heard.judgement.embeddings[ours],
        labels,
        recordings.judgement.embeddings[theirs],
        data_labels,
    )
    acoustic = acoustic_spread_ratios(
        heard.statistics[ours], labels, recordings.statistics[theirs], data_labels
    )
    return {"embedding": embedding, **acoustic}


def add_dnsmos(row: Row, heard: Heard, count: int, progress: Callable[[int], object]) -> None:
    """Mean DNSMOS of the first ``count`` clips, evenly over labels, with 95 % half-widths."""
    row.dnsmos = mean_dnsmos(clips_for_dnsmos(heard, count), progress)


def clips_for_dnsmos(heard: Heard, count: int) -> list[Tensor]:
    """The first ``count`` clips [samples], evenly over labels, without silent ones."""
    chosen = even_choice(heard.labels, count, np.random.default_rng(0))
    # an all-zero clip has no speech to rate; it already counts as not recognised
    return [heard.waves[i] for i in chosen if bool(heard.waves[i].abs().max() > 0)]


def mean_dnsmos(
    clips: Sequence[Tensor], progress: Callable[[int], object]
) -> dict[str, list[float]] | None:
    """Mean and 95 % half-width of every score over clips [samples] at 16 kHz; None of no clips."""
    if not clips:
        return None
    table = dnsmos(clips, progress=progress)
    half = 1.96 * table.std(0, ddof=1) / np.sqrt(len(table)) if len(table) > 1 else table[0] * 0
    means = table.mean(0)
    return {name: [float(m), float(h)] for name, m, h in zip(SCORES, means, half, strict=True)}


def add_second_opinion(
    row: Row, heard: Heard, judge, count: int, progress: Callable[[int], object]
) -> None:
    """Share of ``count`` clips ``judge`` hears as meant, or as any digit where none was meant."""
    chosen = even_choice(heard.labels, count, np.random.default_rng(1))
    opinion = judge.hear(heard.waves[torch.from_numpy(chosen)], progress)
    meant = heard.meant[chosen]
    right = np.where(meant >= 0, opinion == meant, opinion >= 0)
    row.asr = wilson(int(right.sum()), len(right))


def split_recordings(labels: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the clips shown as ceilings and of the reference, disjoint, ``n`` each at most.

    Raises ValueError when there are fewer than four clips of some label.
    """
    counts = np.unique(labels, return_counts=True)[1]
    if not len(counts) or counts.min() < 4:
        raise ValueError(
            "evaluate: held-out recordings need at least 4 clips of every label, found "
            f"{counts.min() if len(counts) else 0}; name a folder with a larger test split"
        )
    return balanced_halves(labels, n, np.random.default_rng(seed))
