"""Waveform augmentation for the recogniser: every function is pure given its generator."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 16000


def place(wave: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Clip [n] fp32 at a random place in ``length`` zeros, or a random crop at its loudest part."""
    n = len(wave)
    if n <= length:
        out = np.zeros(length, dtype=np.float32)
        start = int(rng.integers(0, length - n + 1))
        out[start : start + n] = wave
        return out
    energy = np.concatenate([[0.0], np.cumsum(np.square(wave, dtype=np.float64))])
    best = int(np.argmax(energy[length:] - energy[:-length]))
    start = best + int(rng.integers(-length // 16, length // 16 + 1))
    start = min(max(start, 0), n - length)
    return wave[start : start + length].astype(np.float32)


def change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """Clip [n] played ``factor`` times as fast (pitch and formants move with it), [n / factor]."""
    m = max(int(len(wave) / factor), 1)
    return np.interp(np.arange(m) * factor, np.arange(len(wave)), wave).astype(np.float32)


def shuffle_in_time(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Clip [n] cut into pieces of 40 to 120 ms, put together in another order."""
    cuts, position = [], 0
    while position < len(wave):
        step = int(rng.uniform(0.04, 0.12) * SAMPLE_RATE)
        cuts.append(wave[position : position + step])
        position += step
    order = rng.permutation(len(cuts))
    if len(cuts) > 1 and (order == np.arange(len(cuts))).all():
        order = order[::-1]
    return np.concatenate([cuts[i] for i in order])


def splice(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Opening of one clip joined to the end of another over a 10 ms cross-fade."""
    a = first[: max(int(len(first) * rng.uniform(0.4, 0.6)), 1)]
    b = second[int(len(second) * rng.uniform(0.4, 0.6)) :]
    fade = min(SAMPLE_RATE // 100, len(a), len(b))
    ramp = np.linspace(0.0, 1.0, fade, dtype=np.float32)
    joint = a[len(a) - fade :] * (1 - ramp) + b[:fade] * ramp
    return np.concatenate([a[: len(a) - fade], joint, b[fade:]])


def synthetic_garbage(length: int, rng: np.random.Generator) -> np.ndarray:
    """Silence, a click, a hum, a sweep or noise with a random envelope, [length] fp32."""
    t = np.arange(length) / SAMPLE_RATE
    kind = int(rng.integers(0, 6))
    if kind == 0:
        return np.zeros(length, dtype=np.float32)
    if kind == 1:
        out = np.zeros(length)
        out[rng.integers(0, length, size=int(rng.integers(1, 20)))] = 1.0
    elif kind == 2:
        f0 = rng.uniform(50, 400)
        amplitude = rng.uniform(0, 1, size=12) / np.arange(1, 13)
        out = sum(a * np.sin(2 * np.pi * f0 * (i + 1) * t) for i, a in enumerate(amplitude))
    elif kind == 3:
        f = np.linspace(rng.uniform(80, 4000), rng.uniform(80, 4000), length)
        out = np.sin(2 * np.pi * np.cumsum(f) / SAMPLE_RATE)
    else:
        spectrum = np.fft.rfft(rng.standard_normal(length))
        slope = rng.uniform(0, 1.5)
        out = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 1) ** slope, length)
    if kind != 1 and rng.random() < 0.7:
        knots = np.linspace(0, length, int(rng.integers(4, 20)))
        out = out * np.interp(np.arange(length), knots, rng.uniform(0, 1, len(knots)) ** 2)
    return (0.3 * out / (np.abs(out).max() + 1e-9)).astype(np.float32)


def _uniform(n: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=rng)


def _chance(n: int, p: float, rng: torch.Generator) -> Tensor:
    return torch.rand(n, generator=rng) < p


def colour(wave: Tensor, rng: torch.Generator) -> Tensor:
    """Random reverberation, band limits and smooth equaliser, wave [B, samples] -> its shape."""
    B, n = wave.shape
    size = n + SAMPLE_RATE // 2
    spectrum = torch.fft.rfft(wave, size)
    f = torch.linspace(0, SAMPLE_RATE / 2, spectrum.shape[1])

    gain_db = torch.zeros(B, len(f))
    # telephone band, as in half of the recordings, is one of the cut-offs
    low_pass = torch.where(_chance(B, 0.5, rng), _uniform(B, 3200, 7500, rng), torch.tensor(4000.0))
    on = _chance(B, 0.4, rng)[:, None]
    gain_db -= on * 60.0 * torch.sigmoid((f - low_pass[:, None]) / 120.0)
    high_pass = _uniform(B, 50, 300, rng)[:, None]
    gain_db -= _chance(B, 0.25, rng)[:, None] * 40.0 * torch.sigmoid((high_pass - f) / 30.0)
    curve = _uniform(B * 8, -8, 8, rng).view(B, 1, 8) * _chance(B, 0.5, rng)[:, None, None]
    gain_db += torch.nn.functional.interpolate(
        curve, size=len(f), mode="linear", align_corners=True
    ).squeeze(1)
    spectrum = spectrum * torch.pow(10.0, gain_db / 20.0)

    rows = _chance(B, 0.3, rng).nonzero().squeeze(1)
    if len(rows):
        t = torch.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
        t60 = _uniform(len(rows), 0.05, 0.45, rng)[:, None]
        tail = torch.randn(len(rows), len(t), generator=rng) * torch.exp(-6.9 * t / t60)
        tail = tail / tail.square().sum(1, keepdim=True).sqrt()
        tail = tail * torch.pow(10.0, _uniform(len(rows), -20, 0, rng)[:, None] / 20.0)
        tail[:, 0] += 1.0
        spectrum[rows] = spectrum[rows] * torch.fft.rfft(tail, size)
    return torch.fft.irfft(spectrum, size)[:, :n]


def add_noise(wave: Tensor, rng: torch.Generator) -> Tensor:
    """Coloured noise or babble (other clips, backwards) at 0 to 40 dB under the speech, p = 0.7."""
    B, n = wave.shape
    spectrum = torch.fft.rfft(torch.randn(B, n, generator=rng))
    slope = _uniform(B, 0.0, 1.5, rng)[:, None]
    shape = torch.arange(spectrum.shape[1]).clamp_min(1).float().log()
    noise = torch.fft.irfft(spectrum * torch.exp(-slope * shape), n)
    babble = (wave.roll(1, 0) + wave.roll(2, 0) + wave.roll(3, 0)).flip(1)
    noise = torch.where(_chance(B, 0.15, rng)[:, None], babble, noise)
    level = _active_rms(wave) / (noise.square().mean(1).sqrt() + 1e-9)
    snr = _uniform(B, 0, 40, rng)
    scale = level * torch.pow(10.0, -snr / 20.0) * _chance(B, 0.7, rng)
    return wave + scale[:, None] * noise


def _active_rms(wave: Tensor) -> Tensor:
    active = wave.abs() > 0.02 * wave.abs().amax(1, keepdim=True).clamp_min(1e-9)
    return (wave.square().sum(1) / active.sum(1).clamp_min(1)).sqrt()


def smear(wave: Tensor, rng: torch.Generator) -> Tensor:
    """Vocoder-like damage to 30 % of the clips: jittered phase, uneven magnitudes."""
    rows = _chance(len(wave), 0.3, rng).nonzero().squeeze(1)
    if not len(rows):
        return wave
    window = torch.hann_window(1024)
    spec = torch.stft(wave[rows], 1024, 256, window=window, return_complex=True)
    strength = _uniform(len(rows), 0.0, 1.0, rng)[:, None, None]
    phase = torch.randn(spec.shape, generator=rng) * strength * (math.pi / 2)
    loud = torch.exp(torch.randn(spec.shape, generator=rng) * 0.4 * strength)
    damaged = spec * torch.polar(loud, phase)
    out = wave.clone()
    out[rows] = torch.istft(damaged, 1024, 256, window=window, length=wave.shape[1])
    return out


def quantise(wave: Tensor, rng: torch.Generator) -> Tensor:
    """Clipping or coarse quantisation of 15 % of the clips."""
    peak = wave.abs().amax(1, keepdim=True).clamp_min(1e-6)
    clipped = (wave / peak).clamp(-0.4, 0.4) * peak
    coarse = torch.round(wave / peak * 64) / 64 * peak
    which = torch.rand(len(wave), 1, generator=rng)
    return torch.where(which < 0.07, clipped, torch.where(which < 0.15, coarse, wave))


def augment(wave: Tensor, rng: torch.Generator) -> Tensor:
    """The whole chain on a batch, wave [B, samples] fp32 -> [B, samples] fp32."""
    return quantise(smear(add_noise(colour(wave, rng), rng), rng), rng)


def spec_masks(batch: int, bands: int, frames: int, rng: torch.Generator) -> Tensor:
    """Masks for SpecAugment (Park et al. 2019), bool [batch, bands, frames], True where hidden."""
    mask = torch.zeros(batch, bands, frames, dtype=torch.bool)
    for axis, size, widest in ((1, bands, bands // 6), (2, frames, frames // 10)):
        for _ in range(2):
            width = torch.rand(batch, generator=rng) * widest * _chance(batch, 0.7, rng)
            start = torch.rand(batch, generator=rng) * (size - width)
            at = torch.arange(size)
            hit = (at >= start[:, None]) & (at < (start + width)[:, None])
            mask |= hit[:, :, None] if axis == 1 else hit[:, None, :]
    return mask
