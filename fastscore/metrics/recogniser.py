"""Digit recogniser from the waveform: the judge of generated speech.

It shares neither weights, nor training run, nor front end, nor architecture family with the
classifier that guides the diffusion: 25 ms windows every 10 ms, 48 HTK-spaced bands, level relative
to the loudest cell of the clip, then a one-dimensional network over time (depthwise-separable
blocks after Liu et al. 2022, attentive statistics pooling after Okabe et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DIGITS, from_dict

CONFIDENT = 0.9
"""Least probability of the first label, after calibration, at which a label counts as confident."""

PRESET = Path(__file__).resolve().parents[1] / "presets" / "recogniser" / "recogniser.safetensors"
KIND = "recogniser"


@dataclass(frozen=True)
class RecogniserConfig:
    """Front end, width and calibration of the recogniser."""

    labels: tuple[str, ...] = DIGITS
    sample_rate: int = 16000
    n_fft: int = 512
    win_length: int = 400
    hop_length: int = 160
    n_mels: int = 48
    f_min: float = 60.0
    f_max: float = 7600.0
    range_db: float = 70.0
    min_samples: int = 16384
    channels: int = 160
    expansion: int = 2
    blocks: int = 6
    kernel_size: int = 13
    attention: int = 64
    embedding: int = 128
    dropout: float = 0.1
    # softmax temperature fitted on validation recordings (Guo et al. 2017)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"RecogniserConfig: need 2 or more distinct labels, got {self.labels}")
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2:
            raise ValueError(
                f"RecogniserConfig: {self.f_min} to {self.f_max} Hz does not fit in half of "
                f"sample_rate {self.sample_rate} Hz; lower f_max"
            )
        if self.temperature <= 0:
            raise ValueError(f"RecogniserConfig: temperature {self.temperature} must be positive")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"RecogniserConfig: kernel_size {self.kernel_size} must be odd")


class FrontEnd(nn.Module):
    """Relative log-Mel: wave [B, samples] fp32 -> [B, n_mels, frames], 0 at the loudest cell.

    Values fall to -2 at ``range_db`` below it, so a change of gain changes nothing; all-zero input
    gives zeros.
    """

    def __init__(self, config: RecogniserConfig) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.config = config
        bank = melscale_fbanks(
            config.n_fft // 2 + 1,
            config.f_min,
            config.f_max,
            config.n_mels,
            config.sample_rate,
            norm=None,
            mel_scale="htk",
        )
        self.register_buffer("bank", bank.T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(config.win_length), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """Features of ``wave``, in fp32 whatever the surrounding precision."""
        with torch.autocast(wave.device.type, enabled=False):
            return self._features(wave.float())

    def _features(self, wave: Tensor) -> Tensor:
        c = self.config
        spec = torch.stft(
            wave,
            c.n_fft,
            c.hop_length,
            c.win_length,
            self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        power = self.bank @ (spec.real.square() + spec.imag.square())
        db = 10.0 * torch.log10(power.clamp_min(1e-9))
        relative = db - db.amax(dim=(1, 2), keepdim=True)
        return relative.clamp_min(-c.range_db) * (2.0 / c.range_db)


class Block(nn.Module):
    """Residual block over time: depthwise convolution, channel norm, two pointwise layers."""

    def __init__(self, config: RecogniserConfig) -> None:
        super().__init__()
        C, k = config.channels, config.kernel_size
        self.mix = nn.Conv1d(C, C, k, padding=k // 2, groups=C)
        self.norm = nn.LayerNorm(C)
        self.expand = nn.Linear(C, C * config.expansion)
        self.project = nn.Linear(C * config.expansion, C)
        self.scale = nn.Parameter(torch.full((C,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]."""
        h = self.norm(self.mix(x).transpose(1, 2))  # [B, T, C]
        h = self.project(F.gelu(self.expand(h)))
        return x + (self.scale * h).transpose(1, 2)


class AttentivePooling(nn.Module):
    """Attention-weighted mean and deviation over time, [B, C, T] -> [B, 2C]."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Conv1d(channels, hidden, 1), nn.Tanh(), nn.Conv1d(hidden, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Statistics of ``x`` under weights that ``x`` itself chooses, per channel."""
        w = self.score(x).softmax(dim=-1)
        mean = (w * x).sum(dim=-1)
        var = (w * x.square()).sum(dim=-1) - mean.square()
        return torch.cat([mean, var.clamp_min(1e-5).sqrt()], dim=1)


class Recogniser(nn.Module):
    """Waveform [B, samples] fp32 at 16 kHz -> logits [B, labels], uncalibrated."""

    def __init__(self, config: RecogniserConfig | None = None) -> None:
        super().__init__()
        config = config or RecogniserConfig()
        self.config = config
        C = config.channels
        self.front_end = FrontEnd(config)
        self.stem = nn.Conv1d(config.n_mels, C, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.blocks)])
        self.norm = nn.LayerNorm(C)
        self.pool = AttentivePooling(C, config.attention)
        self.embed = nn.Linear(2 * C, config.embedding)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.embedding, len(config.labels))

    def embed_features(self, features: Tensor) -> Tensor:
        """Front-end features [B, n_mels, frames] -> embedding [B, embedding], input of the head."""
        x = self.stem(features + 1.0)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return F.gelu(self.embed(self.pool(x)))

    def forward(self, wave: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, labels] of wave [B, samples]; feature cells under ``mask`` are hidden."""
        features = self.front_end(wave)
        if mask is not None:
            features = features.masked_fill(mask, -1.0)
        return self.head(self.dropout(self.embed_features(features)))

    @torch.no_grad()
    def judge(self, waves: Tensor | Sequence[Tensor], batch_size: int = 100) -> Judgement:
        """Calibrated opinion on clips at 16 kHz: a tensor [B, samples] or a sequence of [samples].

        Clips shorter than ``config.min_samples`` are centred in zeros; longer ones are heard whole.
        Raises ValueError for an empty list, an empty clip or values that are not finite.
        """
        clips = [self._prepare(w, i) for i, w in enumerate(waves)]
        if not clips:
            raise ValueError("Recogniser.judge: no clips; pass at least one waveform")
        was_training = self.training
        self.eval()
        try:
            rows = self._run(clips, batch_size)
        finally:
            self.train(was_training)
        probabilities = np.stack([r[0] for r in rows])
        return Judgement(self.config.labels, probabilities, np.stack([r[1] for r in rows]))

    def _prepare(self, wave: Tensor, index: int) -> Tensor:
        wave = torch.as_tensor(wave, dtype=torch.float32)
        if wave.ndim != 1 or wave.numel() == 0:
            raise ValueError(
                f"Recogniser.judge: clip {index} has shape {tuple(wave.shape)}; "
                "need one dimension [samples] with at least one sample"
            )
        if not torch.isfinite(wave).all():
            raise ValueError(f"Recogniser.judge: clip {index} has values that are not finite")
        # lengths are rounded up so that clips of a few lengths share batches
        grain = 4096
        total = max(self.config.min_samples, math.ceil(wave.numel() / grain) * grain)
        left = (total - wave.numel()) // 2
        return F.pad(wave, (left, total - wave.numel() - left))

    def _run(self, clips: list[Tensor], batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        device = self.head.weight.device
        order = sorted(range(len(clips)), key=lambda i: clips[i].numel())
        rows: list[tuple[np.ndarray, np.ndarray]] = [None] * len(clips)  # type: ignore[list-item]
        start = 0
        while start < len(order):
            length = clips[order[start]].numel()
            part = [i for i in order[start : start + batch_size] if clips[i].numel() == length]
            batch = torch.stack([clips[i] for i in part]).to(device)
            embedding = self.embed_features(self.front_end(batch))
            p = (self.head(embedding) / self.config.temperature).double().softmax(dim=-1)
            for i, prob, emb in zip(part, p.cpu().numpy(), embedding.cpu().numpy(), strict=True):
                rows[i] = (prob, emb)
            start += len(part)
        return rows


@dataclass(frozen=True)
class Judgement:
    """What the recogniser thinks of N clips: probabilities [N, labels], embeddings [N, D]."""

    labels: tuple[str, ...]
    probabilities: np.ndarray
    embeddings: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """Index of the most probable label, int64 [N]."""
        return self.probabilities.argmax(axis=1)

    @property
    def confidence(self) -> np.ndarray:
        """Probability of the most probable label, float64 [N]."""
        return self.probabilities.max(axis=1)

    @property
    def confident(self) -> np.ndarray:
        """Whether the most probable label reaches ``CONFIDENT``, bool [N]."""
        return self.confidence >= CONFIDENT


def load_recogniser(path: str | Path | None = None) -> Recogniser:
    """Recogniser in evaluation mode from ``path``, by default the one in the package.

    Raises ValueError for a missing, truncated or foreign file.
    """
    from ..checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path or PRESET, kind=KIND)
    model = Recogniser(from_dict(RecogniserConfig, checkpoint.config))
    try:
        model.load_state_dict({k: v.float() for k, v in checkpoint.tensors.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path or PRESET}: weights do not fit the recogniser: {reason}") from None
    return model.eval().requires_grad_(False)
