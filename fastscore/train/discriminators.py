"""Discriminators of a vocoder's training: over periods of the wave and over spectrograms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SLOPE = 0.1
# speech has a deviation near 0.1: brought near 1 for layers that start with unit gain
_WAVE_SCALE = 4.0

# score map and the features of every layer, of one discriminator
Judgement = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminators.

    Defaults are small enough for one CPU core. HiFi-GAN's own period discriminators have periods
    2, 3, 5, 7, 11 and channels 32, 128, 512, 1024.
    """

    periods: tuple[int, ...] = (2, 3, 5, 7)
    period_channels: tuple[int, ...] = (16, 32, 64, 64)
    resolutions: tuple[int, ...] = (512, 1024)
    spectral_channels: int = 16

    def __post_init__(self) -> None:
        if not self.periods and not self.resolutions:
            raise ValueError("DiscriminatorConfig: no period and no resolution; name at least one")
        if any(p < 1 for p in self.periods) or any(n < 8 or n % 4 for n in self.resolutions):
            raise ValueError(
                f"DiscriminatorConfig: periods {self.periods} must be 1 or more and resolutions "
                f"{self.resolutions} multiples of 4, 8 or more"
            )


class PeriodDiscriminator(nn.Module):
    """Judges every p-th sample together (Kong et al. 2020, HiFi-GAN): wave [B, samples]."""

    def __init__(self, period: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.period = period
        widths = (1, *channels, channels[-1])
        strides = [3] * len(channels) + [1]
        self.layers = nn.ModuleList(
            nn.Conv1d(a, b, 5, stride, padding=2)
            for a, b, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.out = nn.Conv1d(channels[-1], 1, 3, padding=1)
        self.apply(_initialise)

    def forward(self, wave: Tensor) -> Judgement:
        """Scores and features; the remainder of samples / period is left out."""
        whole = wave.shape[1] // self.period * self.period
        # one row a phase of the period: the kernels of the original are 1 wide in this direction
        x = _WAVE_SCALE * wave[:, :whole]
        x = x.unflatten(1, (-1, self.period)).transpose(1, 2).flatten(0, 1).unsqueeze(1)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _SLOPE)
            features.append(x)
        return self.out(x), features


class SpectralDiscriminator(nn.Module):
    """Judges a magnitude spectrogram (UnivNet, Jang et al. 2021), its range compressed."""

    def __init__(self, n_fft: int, channels: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        first = nn.Conv2d(1, channels, (3, 9), (1, 2), padding=(1, 4))
        middle = [nn.Conv2d(channels, channels, (3, 5), (1, 2), padding=(1, 2)) for _ in range(2)]
        last = nn.Conv2d(channels, channels, 3, padding=1)
        self.layers = nn.ModuleList([first, *middle, last])
        self.out = nn.Conv2d(channels, 1, 3, padding=1)
        self.apply(_initialise)
        self.to(memory_format=torch.channels_last)

    def forward(self, wave: Tensor) -> Judgement:
        """Scores and features of wave [B, samples]."""
        frames = wave.float().unfold(-1, self.n_fft, self.n_fft // 4)
        spectrum = torch.fft.rfft(frames * self.window)
        power = spectrum.real.square() + spectrum.imag.square()
        # magnitude to the power 0.3: quiet parts must be seen beside loud ones
        x = (power + 1e-4).pow(0.15).unsqueeze(1)
        x = x.contiguous(memory_format=torch.channels_last)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _SLOPE)
            features.append(x)
        return self.out(x), features


class Discriminators(nn.Module):
    """All discriminators side by side: wave [B, samples] to one judgement each."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.parts = nn.ModuleList(
            [PeriodDiscriminator(p, config.period_channels) for p in config.periods]
            + [SpectralDiscriminator(n, config.spectral_channels) for n in config.resolutions]
        )

    def forward(self, wave: Tensor, periods: bool = True) -> list[Judgement]:
        """Scores and features of every discriminator, or of the spectral ones only."""
        return [part(wave) for part in self.parts if periods or _is_spectral(part)]


def _is_spectral(part: nn.Module) -> bool:
    return isinstance(part, SpectralDiscriminator)


def _initialise(module: nn.Module) -> None:
    # PyTorch's default shrinks the signal in every layer; a stack of six then ignores its input for
    # thousands of steps
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        nn.init.kaiming_normal_(module.weight, a=_SLOPE)
        nn.init.zeros_(module.bias)


def discriminator_loss(real: list[Judgement], fake: list[Judgement]) -> Tensor:
    """Least-squares loss (Mao et al. 2017): real towards 1, fake towards 0; mean over parts."""
    losses = [
        (1 - r.float()).square().mean() + f.float().square().mean()
        for (r, _), (f, _) in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial_loss(fake: list[Judgement]) -> Tensor:
    """Least-squares loss of the generator: fake towards 1; mean over parts."""
    return torch.stack([(1 - score.float()).square().mean() for score, _ in fake]).mean()


def feature_loss(real: list[Judgement], fake: list[Judgement]) -> Tensor:
    """Mean absolute difference of features, relative to the size of the real ones.

    Judgements are paired from the end, so ``real`` may hold those of the spectral parts only.
    """
    fake = fake[len(fake) - len(real) :]
    losses = [
        (a - b).abs().mean(dtype=torch.float32) / b.abs().mean(dtype=torch.float32).clamp_min(1e-4)
        for (_, f), (_, r) in zip(fake, real, strict=True)
        for a, b in zip(f, r, strict=True)
    ]
    return torch.stack(losses).mean()
