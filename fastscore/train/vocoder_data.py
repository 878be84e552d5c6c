"""Training segments of a vocoder: wave, its Mel, and the pitch of each Mel frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastscore.audio import LogMel
from fastscore.config import MelConfig
from fastscore.train.pitch import HOP, track_pitch

if TYPE_CHECKING:
    from fastscore.data import WaveSet


@dataclass(frozen=True)
class SegmentConfig:
    """Length of training segments and how their Mels are disturbed.

    ``frames`` are judged; ``context`` frames on either side are only heard by the generator.
    Disturbances make it forgive what a diffusion leaves: Gaussian noise of up to ``mel_noise`` nats
    and smoothing over neighbouring bands and frames, each in ``disturbed`` of the segments.
    """

    frames: int = 32
    context: int = 4
    gain_min: float = 0.4
    gain_max: float = 1.1
    mel_noise: float = 0.1
    disturbed: float = 0.3

    def __post_init__(self) -> None:
        if self.frames < 8 or self.context < 0:
            raise ValueError(
                f"SegmentConfig: frames {self.frames} must be 8 or more and context {self.context} "
                "zero or more"
            )
        if not 0 < self.gain_min <= self.gain_max:
            raise ValueError(
                f"SegmentConfig: gain_min {self.gain_min} must be positive and at most gain_max "
                f"{self.gain_max}"
            )


class Segments:
    """Random segments of a WaveSet, silence around the recordings included."""

    def __init__(self, waves: WaveSet, mel: MelConfig, config: SegmentConfig, pitch: bool) -> None:
        self.waves, self.mel, self.config = waves, mel, config
        self.transform = LogMel(mel)
        # frames at the edge of a wave see reflections instead of the recording: cut away
        self.edge = -(-mel.n_fft // (2 * mel.hop_length))
        self.tracks = None
        if pitch:
            self.tracks = [track_pitch(waves.wave(i), mel.sample_rate) for i in range(len(waves))]

    @property
    def frames(self) -> int:
        """Mel frames of a segment, context included."""
        return self.config.frames + 2 * self.config.context

    def draw(self, n: int, rng: torch.Generator) -> dict[str, Tensor]:
        """n segments.

        wave [n, frames * hop] fp32; mel [n, n_mels, frames], disturbed in part; where pitch is
        tracked, f0 [n, frames] in Hz and voiced [n, frames] in 0..1.
        """
        hop, config = self.mel.hop_length, self.config
        index = torch.randint(len(self.waves), (n,), generator=rng).tolist()
        where = torch.rand(n, generator=rng).tolist()
        gain = torch.empty(n).uniform_(config.gain_min, config.gain_max, generator=rng)
        lengths = np.diff(self.waves.offsets)[index]
        # the judged part begins anywhere from half its length before the recording to half before
        # the recording's end
        starts = [
            int(u * length) - (config.frames // 2 + config.context) * hop
            for u, length in zip(where, lengths, strict=True)
        ]
        wide = torch.stack([self._cut(i, s) for i, s in zip(index, starts, strict=True)])
        wide = wide * gain[:, None]
        with torch.no_grad():
            mel = self.transform(wide)[..., self.edge : -self.edge]
        batch = {
            "wave": wide[:, self.edge * hop : -self.edge * hop].contiguous(),
            "mel": self._disturb(mel, rng),
        }
        if self.tracks is not None:
            pairs = [self._pitch(i, s) for i, s in zip(index, starts, strict=True)]
            batch["f0"] = torch.stack([f0 for f0, _ in pairs])
            batch["voiced"] = torch.stack([voiced for _, voiced in pairs])
        return batch

    def _cut(self, index: int, start: int) -> Tensor:
        """Samples of the segment and ``edge`` frames on either side; zeros around the clip."""
        hop = self.mel.hop_length
        low, total = start - self.edge * hop, (self.frames + 2 * self.edge) * hop
        wave = self.waves.wave(index)
        inside = wave[max(low, 0) : max(low + total, 0)]
        left = min(max(-low, 0), total)
        return F.pad(inside, (left, total - left - len(inside)))

    def _pitch(self, index: int, start: int) -> tuple[Tensor, Tensor]:
        track = self.tracks[index]
        hop = self.mel.hop_length
        centres = start + torch.arange(self.frames) * hop + hop // 2
        frame = torch.div(centres, HOP, rounding_mode="floor")
        inside = (frame >= 0) & (frame < len(track.f0))
        frame = frame.clamp(0, len(track.f0) - 1)
        return track.f0[frame], track.weight[frame] * inside

    def _disturb(self, mel: Tensor, rng: torch.Generator) -> Tensor:
        n, config = len(mel), self.config
        noisy = torch.rand(n, 1, 1, generator=rng) < config.disturbed
        smooth = torch.rand(n, 1, 1, generator=rng) < config.disturbed
        level = torch.rand(n, 1, 1, generator=rng) * config.mel_noise
        share = torch.rand(n, 1, 1, generator=rng) * 0.5
        noise = torch.randn(mel.shape, generator=rng) * level
        padded = F.pad(mel.unsqueeze(1), (1, 1, 1, 1), mode="replicate")
        blurred = F.avg_pool2d(padded, 3, stride=1).squeeze(1)
        mel = torch.where(smooth, mel.lerp(blurred, share), mel)
        mel = torch.where(noisy, mel + noise, mel)
        return mel.clamp_min(self.mel.log_min)
