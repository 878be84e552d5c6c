"""Losses of a vocoder's generator apart from the adversarial ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VocoderLossConfig:
    """Weights of the generator's losses, and the step at which discriminators join.

    ``match_periods`` extends feature matching to the period discriminators. Their features follow
    the wave's phase, which a generator with random sources cannot know: matched, they would teach
    it to be quiet. For HiFi-GAN it belongs on.
    """

    mel: float = 3.0
    spectrum: float = 1.5
    pitch: float = 0.3
    adversarial: float = 1.0
    features: float = 2.0
    match_periods: bool = False
    adversarial_from: int = 1000
    resolutions: tuple[int, ...] = (256, 512, 2048)


def spectral_loss(fake: Tensor, real: Tensor, resolutions: tuple[int, ...]) -> Tensor:
    """Distance of log and linear magnitudes at several resolutions (Yamamoto et al. 2020)."""
    total = fake.new_zeros(())
    for n_fft in resolutions:
        window = torch.hann_window(n_fft, device=fake.device)
        a, b = (_magnitude(wave, n_fft, window) for wave in (fake, real))
        # the floor keeps inaudible parts from outweighing the rest; the Mel loss has its own
        logs = ((a + 1e-2).log() - (b + 1e-2).log()).abs().mean()
        total = total + logs + 0.3 * (a - b).abs().mean() / b.mean().clamp_min(1e-2)
    return total / len(resolutions)


def _magnitude(wave: Tensor, n_fft: int, window: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(wave.unfold(-1, n_fft, n_fft // 4) * window)
    return (spectrum.real.square() + spectrum.imag.square() + 1e-7).sqrt()


def pitch_loss(logits: Tensor, f0: Tensor, voiced: Tensor, log_centres: Tensor) -> Tensor:
    """Cross-entropy against bins blurred by one bin (CREPE, Kim et al. 2018), by voicing.

    logits [B, T, bins], f0 [B, T] in Hz, voiced [B, T] in 0..1.
    """
    spacing = log_centres[1] - log_centres[0]
    distance = (log_centres - f0.log().unsqueeze(-1)) / spacing
    target = (-0.5 * distance.square()).softmax(dim=-1)
    # a little weight on unvoiced frames keeps the frequency from jumping through them
    weight = voiced + 0.02
    losses = -(target * logits.float().log_softmax(dim=-1)).sum(dim=-1)
    return (losses * weight).sum() / weight.sum()
