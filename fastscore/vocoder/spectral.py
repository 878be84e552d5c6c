"""Compact generator: a harmonic and a noise source, shaped and summed in the short-time spectrum.

After Vocos (Siuzdak 2023: ConvNeXt blocks and an inverse-STFT head), the neural source-filter
models (Wang et al. 2019) and NHV (Liu et al. 2020): a pitch head drives a band-limited pulse train,
and the blocks predict, for every bin of a short STFT, how pulse train and noise are filtered and
what is added to them. The absolute level comes from the Mel by interpolation, so the blocks only
learn corrections to it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.config import MelConfig, SpectralVocoderConfig

# gains beyond e^8 relative to the Mel's level are never wanted and would overflow half precision
_MAX_LOG_GAIN = 8.0
_NOISE_TABLE = 1 << 16


class Spectrum(NamedTuple):
    """Real and imaginary part of a short-time spectrum, each [B, L, bins]."""

    real: Tensor
    imag: Tensor


class ConvNeXtBlock(nn.Module):
    """Residual block of ConvNeXt in one dimension, [B, T, C] -> [B, T, C] (Liu et al. 2022)."""

    def __init__(self, dim: int, hidden: int, kernel_size: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.project = nn.Linear(hidden, dim)
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """Residual update of features x, [B, T, C]."""
        y = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        y = self.project(F.gelu(self.expand(self.norm(y))))
        return x + self.scale * y


class PitchHead(nn.Module):
    """Fundamental frequency of each Mel frame, as a choice among log-spaced bins."""

    def __init__(self, config: SpectralVocoderConfig) -> None:
        super().__init__()
        self.embed = nn.Conv1d(
            config.mel.n_mels, config.pitch_dim, config.kernel_size, padding=config.kernel_size // 2
        )
        self.blocks = nn.Sequential(
            *(
                ConvNeXtBlock(config.pitch_dim, 2 * config.pitch_dim, config.kernel_size, 0.5)
                for _ in range(2)
            )
        )
        self.norm = nn.LayerNorm(config.pitch_dim)
        self.out = nn.Linear(config.pitch_dim, config.pitch_bins)
        ends = math.log(config.pitch_min), math.log(config.pitch_max)
        centres = torch.linspace(*ends, config.pitch_bins)
        self.register_buffer("log_centres", centres, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, T, bins] from scaled Mels [B, n_mels, T]."""
        x = self.embed(features).transpose(1, 2)
        return self.out(self.norm(self.blocks(x)))

    def frequency(self, logits: Tensor) -> Tensor:
        """Frequency in Hz, [B, T] fp64: mean of the bins around the likeliest one, as in CREPE.

        The pulse train's phase adds it up over a clip: an error of 1e-6, as fp32 would leave here,
        is 1e-3 of a cycle at the highest harmonic.
        """
        peak = logits.argmax(dim=-1, keepdim=True)
        logits = logits.double()
        bins = torch.arange(logits.shape[-1], device=logits.device)
        near = (bins - peak).abs() <= 3
        weight = logits.masked_fill(~near, -math.inf).softmax(dim=-1)
        return (weight * self.log_centres.double()).sum(dim=-1).exp()


class SpectralGenerator(nn.Module):
    """Waveform from a natural-log Mel, by filtering a pulse train and noise in a short STFT."""

    def __init__(self, config: SpectralVocoderConfig) -> None:
        super().__init__()
        self.config = config
        mel, k = config.mel, config.kernel_size
        self.pitch = PitchHead(config)
        self.embed = nn.Conv1d(mel.n_mels, config.dim, k, padding=k // 2)
        self.blocks = nn.Sequential(
            *(ConvNeXtBlock(config.dim, config.hidden, k, 0.5) for _ in range(config.blocks))
        )
        self.up = nn.Linear(config.dim, self.upsample * config.fine_dim)
        self.source = nn.Linear(2 * self.bins, config.fine_dim)
        self.fine_blocks = nn.Sequential(
            *(
                ConvNeXtBlock(config.fine_dim, config.fine_hidden, k, 0.5)
                for _ in range(config.fine_blocks)
            )
        )
        self.norm = nn.LayerNorm(config.fine_dim)
        self.out = nn.Linear(config.fine_dim, 5 * self.bins)
        nn.init.normal_(self.out.weight, std=0.01)
        with torch.no_grad():
            bias = torch.zeros(5, self.bins)
            bias[4] = -3.0  # the free part starts well below the two sources
            self.out.bias.copy_(bias.flatten())
        self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)
        self.register_buffer("envelope", _envelope_matrix(config), persistent=False)
        self.register_buffer("noise", _noise_table(), persistent=False)

    @property
    def mel_config(self) -> MelConfig:
        """Mel front end that this generator inverts."""
        return self.config.mel

    @property
    def bins(self) -> int:
        """Frequency bins of the head's STFT."""
        return self.config.n_fft // 2 + 1

    @property
    def upsample(self) -> int:
        """Frames of the head for one frame of the Mel."""
        return self.config.mel.hop_length // self.config.hop_length

    def forward(self, mel: Tensor) -> Tensor:
        """Waveform [B, T * hop] fp32 from an un-normalised natural-log Mel [B, n_mels, T]."""
        f0 = self.pitch.frequency(self.pitch_logits(mel))
        samples = mel.shape[-1] * self.mel_config.hop_length + self._margin * 2
        repeats = -(-samples // _NOISE_TABLE)
        noise = self.noise.repeat(repeats)[:samples].expand(mel.shape[0], -1)
        phase = torch.zeros(mel.shape[0], dtype=torch.float64, device=mel.device)
        return self.render(mel, f0, phase, noise)

    def pitch_logits(self, mel: Tensor) -> Tensor:
        """Logits [B, T, bins] of the fundamental frequency."""
        return self.pitch(self._features(mel))

    def render(self, mel: Tensor, f0: Tensor, phase: Tensor, noise: Tensor) -> Tensor:
        """Waveform [B, T * hop] fp32, with the sources given.

        f0 [B, T] in Hz, fp64 where phases must agree; phase [B] fp64, of the pulse train at the
        start, in cycles; noise [B, T * hop + n_fft - head hop], white with unit variance.
        """
        harmonic = self._spectrum(self._pulses(f0, phase))
        hiss = self._spectrum(noise)
        x = self.blocks(self.embed(self._features(mel)).transpose(1, 2))
        x = self.up(x).unflatten(-1, (self.upsample, -1)).flatten(1, 2)
        x = x + self.source(torch.cat(harmonic, dim=-1))
        y = self.out(self.norm(self.fine_blocks(x))).float()
        gain, turn, noise_gain, angle, free = y.unflatten(-1, (5, self.bins)).unbind(dim=-2)
        level = self._level(mel)
        gain = (level + gain.clamp(max=_MAX_LOG_GAIN)).exp()
        noise_gain = (level + noise_gain.clamp(max=_MAX_LOG_GAIN)).exp()
        free = (level + free.clamp(max=_MAX_LOG_GAIN)).exp()
        a, b = gain * turn.cos(), gain * turn.sin()
        real = a * harmonic.real - b * harmonic.imag + noise_gain * hiss.real + free * angle.cos()
        imag = a * harmonic.imag + b * harmonic.real + noise_gain * hiss.imag + free * angle.sin()
        return self._invert(Spectrum(real, imag))

    @property
    def _margin(self) -> int:
        return (self.config.n_fft - self.config.hop_length) // 2

    def _features(self, mel: Tensor) -> Tensor:
        # fixed scaling: about zero mean and unit deviation on speech at ordinary levels
        return (mel.float() + 5.0) / 2.5

    def _level(self, mel: Tensor) -> Tensor:
        """Log magnitude [B, T * upsample, bins] that the Mel implies, by linear interpolation."""
        fine = F.interpolate(mel.float(), scale_factor=float(self.upsample), mode="linear")
        return fine.transpose(1, 2) @ self.envelope[:-1] + self.envelope[-1]

    def _pulses(self, f0: Tensor, phase: Tensor) -> Tensor:
        """Pulse train [B, samples + 2 margin]: all harmonics below 0.475 rate, amplitude 1 each."""
        rate = self.mel_config.sample_rate
        f0 = self._stretch(f0.double())
        f0 = F.pad(f0.unsqueeze(1), (self._margin, self._margin), mode="replicate").squeeze(1)
        # cycles add up over a whole clip: fp32 would lose the phase of high harmonics
        cycles = phase.unsqueeze(1) + _running_sum(f0 / rate)
        theta = (2 * math.pi * (cycles - cycles.floor())).float()
        count = (0.475 * rate / f0).float()
        whole = count.floor()
        half = (theta / 2).sin()
        near = half.abs() < 1e-4
        kernel = ((whole + 0.5) * theta).sin() / torch.where(near, torch.ones_like(half), 2 * half)
        kernel = torch.where(near, whole + 0.5, kernel) - 0.5
        # the highest harmonic fades in, or a gliding pitch would click each time one appears
        return kernel + (count - whole) * ((whole + 1) * theta).cos()

    def _spectrum(self, wave: Tensor) -> Spectrum:
        frames = wave.unfold(-1, self.config.n_fft, self.config.hop_length)
        return self._transform(frames * self.window)

    # what not every runtime can do, complex numbers and interpolation in fp64, is in these three:
    # exported generators have others in their place

    def _stretch(self, f0: Tensor) -> Tensor:
        """A value a sample, [B, T * hop], by linear interpolation."""
        hop = float(self.mel_config.hop_length)
        return F.interpolate(f0.unsqueeze(1), scale_factor=hop, mode="linear").squeeze(1)

    def _transform(self, frames: Tensor) -> Spectrum:
        spectrum = torch.fft.rfft(frames) / math.sqrt(self.config.n_fft)
        return Spectrum(spectrum.real, spectrum.imag)

    def _transform_back(self, spectrum: Spectrum) -> Tensor:
        return torch.fft.irfft(torch.complex(*spectrum), self.config.n_fft)

    def _invert(self, spectrum: Spectrum) -> Tensor:
        """Weighted overlap-add without torch.istft, which synchronises and cannot be captured."""
        n, hop = self.config.n_fft, self.config.hop_length
        frames = self._transform_back(spectrum) * self.window * math.sqrt(n)
        weight = (self.window**2).expand(1, frames.shape[1], n)
        wave = _overlap_add(frames, hop) / _overlap_add(weight, hop).clamp_min(1e-6)
        return wave[:, self._margin : wave.shape[1] - self._margin]


def _running_sum(x: Tensor) -> Tensor:
    """Sums along the rows of x [B, T], which do not vary from call to call."""
    if not x.is_cuda:
        return x.cumsum(dim=1)
    # a lone row is summed by as many blocks as there are, in the order they come by; of several
    # rows each has its block
    return torch.cat((x, x[:1])).cumsum(dim=1)[:-1]


def _overlap_add(frames: Tensor, hop: int) -> Tensor:
    """Sum of frames [B, L, n] placed hop apart, [B, (L - 1) * hop + n]; n is a multiple of hop."""
    parts = frames.unflatten(-1, (-1, hop))
    count = parts.shape[2]
    total = F.pad(parts[:, :, 0], (0, 0, 0, count - 1))
    for i in range(1, count):
        total = total + F.pad(parts[:, :, i], (0, 0, i, count - 1 - i))
    return total.flatten(1)


def _envelope_matrix(config: SpectralVocoderConfig) -> Tensor:
    """Linear map [n_mels + 1, bins] from log-Mel to log magnitude; the last row is an offset."""
    mel = config.mel
    edges = _mel_to_hz(np.linspace(_hz_to_mel(mel.f_min), _hz_to_mel(mel.f_max), mel.n_mels + 2))
    centres = edges[1:-1]
    bins = np.linspace(0.0, mel.sample_rate / 2, config.n_fft // 2 + 1)
    upper = np.clip(np.searchsorted(centres, bins), 1, mel.n_mels - 1)
    share = np.clip((bins - centres[upper - 1]) / (centres[upper] - centres[upper - 1]), 0.0, 1.0)
    matrix = np.zeros((mel.n_mels + 1, len(bins)))
    matrix[upper - 1, np.arange(len(bins))] = 1 - share
    matrix[upper, np.arange(len(bins))] = share
    # white noise of unit variance: a Hann window's root energy, a Rayleigh variable's mean over
    # its root mean square, and a slaney band of unit area that sums n_fft / rate bins
    noise = math.sqrt(0.375 * mel.win_length) * math.sqrt(math.pi) / 2
    noise *= mel.n_fft / mel.sample_rate
    matrix[-1] = -math.log(noise)
    return torch.from_numpy(matrix).float()


def _hz_to_mel(hz: float) -> float:
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def _mel_to_hz(mels: np.ndarray) -> np.ndarray:
    high = 1000.0 * np.exp((mels - 15) * math.log(6.4) / 27)
    return np.where(mels < 15, mels * 200 / 3, high)


def _noise_table() -> Tensor:
    """White Gaussian noise [65536] from an integer hash: the same bits wherever it is computed."""
    z = np.arange(1, _NOISE_TABLE + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    first = ((z >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32
    second = (z & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32
    noise = np.sqrt(-2 * np.log(first)) * np.cos(2 * math.pi * second)
    return torch.from_numpy(noise).float()
