"""Fundamental frequency of recordings: normalised cross-correlation and a Viterbi search.

The labels that the compact vocoder's pitch head learns from; after RAPT (Talkin 1995).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# frames of the track: one every HOP samples, centred at (i + 0.5) * HOP
HOP = 128
_WINDOW = 640
_FFT = 1024
# the correlation is computed on a grid this much finer than the samples
_FINE = 4


@dataclass(frozen=True)
class PitchTrack:
    """``f0`` fp32 [frames] in Hz, through unvoiced parts too; ``weight`` [frames] in 0..1."""

    f0: Tensor
    weight: Tensor


def track_pitch(
    wave: Tensor,
    sample_rate: int = 16000,
    f_min: float = 50.0,
    f_max: float = 550.0,
    bins: int = 96,
) -> PitchTrack:
    """Pitch of wave [samples] fp32 by the smoothest path through ``bins`` log-spaced candidates.

    Raises ValueError where the longest period does not fit into the analysis.
    """
    longest = math.ceil(sample_rate / f_min) + 1
    if longest > _FFT - _WINDOW:
        raise ValueError(
            f"track_pitch: f_min {f_min} Hz has a period of {longest} samples at {sample_rate} Hz, "
            f"the limit is {_FFT - _WINDOW}; raise f_min or resample to 16000 Hz"
        )
    centres = f_min * (f_max / f_min) ** (np.arange(bins) / (bins - 1))
    similarity, rms = _correlation(wave, sample_rate / centres)
    active = rms > max(0.02 * float(rms.max()), 1e-4)
    path = _best_path(similarity, active, np.log2(centres))
    rows, inner = np.arange(len(path)), np.clip(path, 1, bins - 2)
    low, mid, high = (similarity[rows, inner + i] for i in (-1, 0, 1))
    # vertex of the parabola through the three bins, where the middle one is the highest
    bend = np.minimum(low - 2 * mid + high, -1e-9)
    offset = np.clip((low - high) / (2 * bend), -0.5, 0.5) * ((mid >= low) & (mid >= high))
    f0 = f_min * (f_max / f_min) ** ((inner + offset) / (bins - 1))
    weight = np.clip((mid - 0.4) / 0.4, 0, 1) * active
    return PitchTrack(torch.from_numpy(f0).float(), torch.from_numpy(weight).float())


def _correlation(wave: Tensor, lags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised cross-correlation [frames, lags] at fractional lags, and the level [frames]."""
    frames = max(len(wave) // HOP, 1)
    longest = math.ceil(lags.max()) + 1
    lead = _WINDOW // 2 + 100
    # faint noise, so that digital silence has no period; the same for every recording
    dither = torch.randn(len(wave) + lead + 2 * _WINDOW + longest, generator=_generator())
    padded = F.pad(wave, (lead, 2 * _WINDOW + longest)) + 1e-5 * dither
    starts = torch.arange(frames) * HOP + HOP // 2
    view = padded[starts[:, None] + torch.arange(_WINDOW + longest)]
    view = view - view[:, :_WINDOW].mean(dim=1, keepdim=True)
    head = view[:, :_WINDOW]
    cross = torch.fft.rfft(head, _FFT).conj() * torch.fft.rfft(view, _FFT)
    cross = F.pad(cross, (0, (_FINE - 1) * _FFT // 2))
    values = torch.fft.irfft(cross, _FINE * _FFT)[:, : _FINE * longest] * _FINE
    energy = F.pad(view.double().square().cumsum(dim=1), (1, 0))
    whole = torch.from_numpy(lags).round().long()
    shifted = (energy[:, whole + _WINDOW] - energy[:, whole]).float()
    own = head.square().sum(dim=1, keepdim=True)
    picked = values[:, torch.from_numpy(lags * _FINE).round().long()]
    norm = (own * shifted + 1e-12).sqrt().clamp_min(1e-9)
    return (picked / norm).numpy(), (own[:, 0] / _WINDOW).sqrt().numpy()


def _best_path(similarity: np.ndarray, active: np.ndarray, octaves: np.ndarray) -> np.ndarray:
    """Bin of each frame on the path of highest similarity less pitch jumps."""
    # a period and its double fit equally well: a slight preference for the shorter one
    score = similarity + 0.03 * (octaves - octaves[0])
    jump = 4.8 * np.abs(octaves[:, None] - octaves[None])
    best, steps = score[0], np.zeros(similarity.shape, dtype=np.int64)
    rows = np.arange(len(octaves))
    for t in range(1, len(score)):
        total = best[None] - jump
        steps[t] = total.argmax(axis=1)
        best = total[rows, steps[t]] + score[t] * active[t]
    path = np.zeros(len(score), dtype=np.int64)
    path[-1] = best.argmax()
    for t in range(len(score) - 1, 0, -1):
        path[t - 1] = steps[t][path[t]]
    return path


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
