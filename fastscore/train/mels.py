"""Batches of normalised log-Mels, shifted and scaled at random, and noise levels for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastscore.config import MelSpace, SigmaRange
from fastscore.data import MelSet


@dataclass(frozen=True)
class NoiseLevels:
    """Distribution of sigma in training: log-normal, clipped to the range (Karras et al. 2022)."""

    log_mean: float
    log_std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.log_mean) and 0 < self.log_std < math.inf):
            raise ValueError(
                f"noise levels: log_mean {self.log_mean} must be finite and log_std {self.log_std} "
                "positive"
            )

    def draw(self, n: int, limits: SigmaRange, rng: torch.Generator) -> Tensor:
        """n noise levels, [n] fp32."""
        log_sigma = torch.randn(n, generator=rng) * self.log_std + self.log_mean
        return log_sigma.exp().clamp(limits.min, limits.max)


@dataclass(frozen=True)
class MelAugment:
    """Largest time shift in frames and largest gain in nats, each uniform in both directions."""

    shift: int = 0
    gain: float = 0.0

    def __post_init__(self) -> None:
        if self.shift < 0 or not 0 <= self.gain < math.inf:
            raise ValueError(
                f"augmentation: shift {self.shift} frames and gain {self.gain} nats must not be "
                "negative"
            )


def measure_space(mels: MelSet) -> MelSpace:
    """Mean and standard deviation of a training set's log-Mels; its sigma_data is then 1."""
    values = np.asarray(mels.mels)
    mean, std = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    return MelSpace(frames=values.shape[2], mean=mean, std=std, sigma_data=1.0)


class MelBatches:
    """Random batches of a MelSet in the normalised space."""

    def __init__(self, mels: MelSet, space: MelSpace, augment: MelAugment | None = None) -> None:
        self.mels = torch.from_numpy(np.asarray(mels.mels))
        self.label_ids = torch.from_numpy(np.asarray(mels.label_ids))
        self.floor = mels.mel.log_min
        self.space = space
        self.augment = augment or MelAugment()

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """n clips with replacement: x0 [n, 1, n_mels, frames] fp32 and labels [n] int64."""
        index = torch.randint(len(self.label_ids), (n,), generator=rng)
        mels = self.mels[index]
        if self.augment.shift:
            limit = self.augment.shift
            shift = torch.randint(-limit, limit + 1, (n,), generator=rng)
            mels = shift_frames(mels, shift, self.floor)
        if self.augment.gain:
            gain = (torch.rand(n, generator=rng) * 2 - 1) * self.augment.gain
            mels = (mels + gain[:, None, None]).clamp_min(self.floor)
        return self.normalise(mels), self.label_ids[index]

    def normalise(self, mels: Tensor) -> Tensor:
        """Log-Mels [n, n_mels, frames] to x0 [n, 1, n_mels, frames]."""
        return ((mels - self.space.mean) / self.space.std)[:, None]

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """n clips spread evenly over the set, unaugmented, as ``draw`` returns them."""
        count = len(self.label_ids)
        index = torch.linspace(0, count - 1, min(n, count)).long()
        return self.normalise(self.mels[index]), self.label_ids[index]


def shift_frames(mels: Tensor, shift: Tensor, floor: float) -> Tensor:
    """Delay each log-Mel [n, n_mels, frames] by shift [n] frames; what enters is silence."""
    frames = mels.shape[2]
    source = torch.arange(frames) - shift[:, None]
    inside = (source >= 0) & (source < frames)
    moved = mels.gather(2, source.clamp(0, frames - 1)[:, None].expand_as(mels))
    return torch.where(inside[:, None], moved, torch.full_like(moved, floor))


def log_sigma_grid(low: float, high: float, n: int) -> list[float]:
    """n noise levels equally spaced in log sigma."""
    return np.exp(np.linspace(math.log(low), math.log(high), n)).tolist()
