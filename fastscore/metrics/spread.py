"""Variety within a label: is it one voice ten times, or many?

Two views, because a recogniser is trained to ignore voices: the trace of the within-label
covariance of its embedding, and the same for acoustic statistics of the voice (timbre, pitch,
length) that no network computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STATISTICS = (
    *(f"timbre{i}" for i in range(16)),
    "log2_pitch",
    "pitch_range",
    "voiced_share",
    "log2_length",
)
GROUPS = {
    "timbre": slice(0, 16),
    "pitch": slice(16, 17),
    "intonation": slice(17, 19),
    "length": slice(19, 20),
}


def within_label_covariance_trace(features: np.ndarray, labels: np.ndarray) -> float:
    """Trace of the unbiased covariance of features [N, D] within a label, averaged over labels [N].

    Labels with fewer than two clips are left out. Raises ValueError when none is left.
    """
    features = np.asarray(features, dtype=np.float64)
    traces = [
        features[labels == kind].var(axis=0, ddof=1).sum()
        for kind in np.unique(labels)
        if (labels == kind).sum() >= 2
    ]
    if not traces:
        raise ValueError("within-label spread: no label has two or more clips")
    return float(np.mean(traces))


def spread_ratio(
    features: np.ndarray,
    labels: np.ndarray,
    data_features: np.ndarray,
    data_labels: np.ndarray,
) -> float:
    """Within-label covariance trace over that of the data, over labels with two clips in both sets.

    Raises ValueError when there is no such label or the data has no spread.
    """
    shared = shared_labels(labels, data_labels)
    if not len(shared):
        raise ValueError("spread_ratio: no label has two or more clips in both sets")
    keep, keep_data = np.isin(labels, shared), np.isin(data_labels, shared)
    base = within_label_covariance_trace(data_features[keep_data], data_labels[keep_data])
    if base <= 0:
        raise ValueError("spread_ratio: the data has no spread within its labels")
    return within_label_covariance_trace(features[keep], labels[keep]) / base


def shared_labels(labels: np.ndarray, data_labels: np.ndarray) -> np.ndarray:
    """Labels with two or more clips in both sets, on which spread can be compared."""
    several = []
    for each in (labels, data_labels):
        values, counts = np.unique(each, return_counts=True)
        several.append(values[counts >= 2])
    return np.intersect1d(*several)


def acoustic_spread_ratios(
    statistics: np.ndarray,
    labels: np.ndarray,
    data_statistics: np.ndarray,
    data_labels: np.ndarray,
) -> dict[str, float]:
    """Spread ratio of each group of ``voice_statistics``, and of all under "acoustic".

    Every statistic is divided by its deviation over the data first, so none dominates by its unit.
    Clips in which no pitch was found (NaN) are left out of the groups that need it, and groups for
    which no label has two clips left are left out of the result.
    """
    scale = np.nanstd(data_statistics, axis=0)
    scale[scale == 0] = 1.0
    a, b = statistics / scale, data_statistics / scale
    groups = {"acoustic": slice(0, len(STATISTICS)), **GROUPS}
    ratios = {}
    for name, part in groups.items():
        ok = np.isfinite(a[:, part]).all(1)
        ok_data = np.isfinite(b[:, part]).all(1)
        if not len(shared_labels(labels[ok], data_labels[ok_data])):
            continue
        ratios[name] = spread_ratio(
            a[ok][:, part], labels[ok], b[ok_data][:, part], data_labels[ok_data]
        )
    return ratios


def voice_statistics(waves: Tensor | Sequence[Tensor], sample_rate: int = 16000) -> np.ndarray:
    """Timbre, pitch and length of clips: waves [samples] each -> float64 [N, len(STATISTICS)].

    Timbre is the mean log power of 16 bands (100 to 7000 Hz, HTK spacing) over active frames, less
    its own mean; pitch the median over voiced frames, in octaves; its range the 10 to 90 % span;
    length that of the active part. NaN where a clip has too few voiced frames.
    """
    from torchaudio.functional import melscale_fbanks

    bank = melscale_fbanks(513, 100.0, 7000.0, 16, sample_rate, mel_scale="htk").T
    rows = [_one(torch.as_tensor(w, dtype=torch.float32), bank, sample_rate) for w in waves]
    return np.array(rows, dtype=np.float64).reshape(-1, len(STATISTICS))


def _one(wave: Tensor, bank: Tensor, sample_rate: int) -> list[float]:
    hop = sample_rate // 100
    padded = torch.nn.functional.pad(wave, (0, max(0, 1024 - wave.numel())))
    frames = padded.unfold(0, 1024, hop)
    power = torch.fft.rfft(frames * torch.hann_window(1024)).abs().square()
    energy = power.sum(1)
    # 35 dB under the loudest frame is background in every recording we have met
    active = energy > energy.max() * 10**-3.5
    if not bool(active.any()) or float(energy.max()) <= 0:
        return [float("nan")] * len(STATISTICS)
    bands = torch.log(power[active] @ bank.T + 1e-9 * energy.max()).mean(0)
    positions = active.nonzero().squeeze(1)
    length = (int(positions[-1]) - int(positions[0]) + 1) * hop / sample_rate
    pitch = _pitch(frames[active], sample_rate)
    octaves = torch.log2(pitch[pitch > 0])
    if len(octaves) >= 4:
        low, middle, high = torch.quantile(octaves, torch.tensor([0.1, 0.5, 0.9])).tolist()
    else:
        low, middle, high = float("nan"), float("nan"), float("nan")
    voiced = float((pitch > 0).float().mean())
    return [*(bands - bands.mean()).tolist(), middle, high - low, voiced, float(np.log2(length))]


def _pitch(frames: Tensor, sample_rate: int) -> Tensor:
    """Fundamental frequency in Hz of frames [F, 1024], 0 where unvoiced, by autocorrelation.

    Autocorrelation over that of the window (Boersma 1993), 60 to 420 Hz; the shortest lag within
    0.05 of the best wins, which avoids most octave errors.
    """
    size = 2048
    window = torch.hann_window(frames.shape[1])
    frames = (frames - frames.mean(1, keepdim=True)) * window

    def correlate(x: Tensor) -> Tensor:
        r = torch.fft.irfft(torch.fft.rfft(x, size).abs().square(), size)
        return r / r[..., :1].clamp_min(1e-12)

    first, last = sample_rate // 420, sample_rate // 60
    r = correlate(frames)[:, : last + 2] / correlate(window)[: last + 2]
    peak = (r[:, 1:-1] > r[:, :-2]) & (r[:, 1:-1] >= r[:, 2:])
    peak = torch.nn.functional.pad(peak, (1, 1))
    peak[:, :first] = False
    candidates = torch.where(peak, r, torch.tensor(-1.0))
    best = candidates.amax(1, keepdim=True)
    lag = (candidates >= best - 0.05).float().argmax(1)
    return torch.where(best.squeeze(1) > 0.5, sample_rate / lag.clamp_min(1), torch.tensor(0.0))
