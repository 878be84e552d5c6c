"""Waveform <-> log-Mel, loading, resampling and saving of audio files."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F

from fastscore.audio_files import check_complete
from fastscore.config import MelConfig

# below this peak (-60 dBFS, mean removed) a recording holds nothing to classify or learn from
SILENCE_PEAK = 1e-3
# floating-point files may overshoot full scale a little; far beyond it they are in another unit
MAX_PEAK = 100.0


class LogMel(nn.Module):
    """Natural-log Mel spectrogram in the convention of HiFi-GAN (Kong et al. 2020, meldataset.py).

    ``forward``: wave [..., samples] fp32 at ``config.sample_rate`` in [-1, 1] -> [..., n_mels, frames]
    fp32 with frames = samples // hop_length. Differentiable; computed in fp32 under autocast too.

    Raises ValueError where the wave is too short to be padded by reflection.
    """

    def __init__(self, config: MelConfig | None = None) -> None:
        super().__init__()
        self.config = config or MelConfig()
        c = self.config
        bank = torchaudio.functional.melscale_fbanks(
            c.n_fft // 2 + 1, c.f_min, c.f_max, c.n_mels, c.sample_rate, "slaney", "slaney"
        )
        # not in state dicts: both follow from the configuration
        self.register_buffer("bank", bank.T.contiguous(), persistent=False)  # [n_mels, n_freqs]
        self.register_buffer("window", torch.hann_window(c.win_length), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        c = self.config
        # an odd total goes to the right, so that frames = samples // hop_length for every hop
        left = (c.n_fft - c.hop_length) // 2
        right = c.n_fft - c.hop_length - left
        shortest = max(right + 1, c.hop_length)
        if wave.shape[-1] < shortest:
            raise ValueError(
                f"LogMel: {wave.shape[-1]} samples are too few for n_fft {c.n_fft} and hop_length "
                f"{c.hop_length}; pad the wave to {shortest} samples or more"
            )
        with torch.autocast(wave.device.type, enabled=False):
            flat = wave.reshape(-1, wave.shape[-1]).to(self.window.dtype)
            flat = F.pad(flat, (left, right), mode="reflect")
            spec = torch.stft(
                flat,
                c.n_fft,
                c.hop_length,
                c.win_length,
                self.window,
                center=False,
                return_complex=True,
            )  # [batch, n_freqs, frames]
            # 1e-9 keeps the gradient of the square root finite in silence
            magnitude = (spec.real.square() + spec.imag.square() + 1e-9).sqrt()
            mel = (self.bank @ magnitude).clamp_min(c.log_floor).log()
        return mel.reshape(*wave.shape[:-1], *mel.shape[-2:])


@functools.lru_cache(maxsize=16)
def _resampler(source: int, target: int) -> nn.Module:
    # torchaudio.functional.resample with its kernel kept between calls
    return torchaudio.transforms.Resample(source, target)


def load_audio(
    path: str | os.PathLike[str],
    sample_rate: int = 16000,
    max_seconds: float | None = 60.0,
    refuse_silence: bool = False,
) -> Tensor:
    """Read a wav, flac or ogg file as mono fp32 [samples] at ``sample_rate`` Hz, full scale 1.

    Channels are averaged; other sample rates are resampled with a band-limited (windowed sinc)
    filter. ``max_seconds`` None lifts the limit on length; ``refuse_silence`` also refuses
    recordings whose peak, mean removed, stays below ``SILENCE_PEAK``.

    Raises ValueError for a file that is missing, empty, truncated, not audio, too long, or that
    holds NaN or infinite samples.
    """
    path = Path(path)
    check_complete(path)
    try:
        with soundfile.SoundFile(path) as file:
            source, frames = file.samplerate, file.frames
            if max_seconds is not None and frames > max_seconds * source:
                raise ValueError(
                    f"{path}: {frames / source:.1f} s of audio exceed the limit of {max_seconds:g} s; "
                    "cut the file or raise max_seconds"
                )
            data = file.read(dtype="float32", always_2d=True)  # [frames, channels]
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: not readable as wav, flac or ogg audio ({error})") from None
    if len(data) < frames:
        raise ValueError(
            f"{path}: truncated, {len(data)} of {frames} samples could be read; "
            "restore the complete file"
        )
    if len(data) == 0:
        raise ValueError(f"{path}: holds no samples; remove it or record it again")
    wave = torch.from_numpy(data.mean(axis=1) if data.shape[1] > 1 else data[:, 0])
    _check_samples(path, wave, refuse_silence)
    if source != sample_rate:
        wave = _resampler(source, sample_rate)(wave)
    return wave


def _check_samples(path: Path, wave: Tensor, refuse_silence: bool) -> None:
    if not torch.isfinite(wave).all():
        bad = int((~torch.isfinite(wave)).sum())
        raise ValueError(f"{path}: {bad} samples are NaN or infinite; record or export it again")
    peak = wave.abs().max().item()
    if peak > MAX_PEAK:
        raise ValueError(
            f"{path}: peak {peak:g}, but floating-point audio has full scale 1; scale it to [-1, 1]"
        )
    if refuse_silence and (wave - wave.mean()).abs().max().item() < SILENCE_PEAK:
        raise ValueError(
            f"{path}: silent, its peak {peak:.1e} lies below {SILENCE_PEAK:g} of full scale; "
            "record it again or amplify it"
        )


def save_wav(path: str | os.PathLike[str], wave: Tensor | np.ndarray, sample_rate: int) -> None:
    """Write wave [samples] or [1, samples], full scale 1, as 16-bit PCM; atomic.

    Samples beyond full scale are clipped. The file appears complete or not at all.

    Raises ValueError for NaN or infinite samples, another shape, no samples, or a path that
    cannot be written.
    """
    path = Path(path)
    samples = torch.as_tensor(wave).detach().to("cpu", torch.float64)
    if samples.ndim == 2 and samples.shape[0] == 1:
        samples = samples[0]
    if samples.ndim != 1 or samples.numel() == 0:
        raise ValueError(
            f"save_wav: wave has shape {list(samples.shape)}, expected [samples] or [1, samples] "
            "with one sample or more"
        )
    if not torch.isfinite(samples).all():
        raise ValueError(f"save_wav: the wave for {path} holds NaN or infinite samples")
    # 32768 is what reading divides by: 16-bit audio survives a round trip bit for bit
    pcm = (samples * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy()
    try:
        _write_atomic(path, pcm, sample_rate)
    except (OSError, soundfile.LibsndfileError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write {path}: {reason}") from None


def _write_atomic(path: Path, pcm: np.ndarray, sample_rate: int) -> None:
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            soundfile.write(file, pcm, sample_rate, format="WAV", subtype="PCM_16")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def fit_length(wave: Tensor, samples: int) -> Tensor:
    """Bring wave [length] to [samples]: pad with zeros on both sides, or cut out the loudest window."""
    length = wave.shape[-1]
    if wave.ndim != 1 or samples <= 0:
        raise ValueError(
            f"fit_length: wave has shape {list(wave.shape)} and samples is {samples}; expected "
            "[length] and a positive number"
        )
    if length <= samples:
        left = (samples - length) // 2
        return F.pad(wave, (left, samples - length - left))
    total = F.pad(wave.double().square().cumsum(0), (1, 0))
    start = int((total[samples:] - total[:-samples]).argmax())
    return wave[start : start + samples]
