"""Waveform <-> log-Mel, loading, resampling and saving of audio files."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import secrets
import wave as wave_file
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastscore.audio_files import check_complete
from fastscore.config import MelConfig

if TYPE_CHECKING:
    import soundfile

# below this peak (-60 dBFS, mean removed) a recording holds nothing to classify or learn from
SILENCE_PEAK = 1e-3
# floating-point files may overshoot full scale a little; far beyond it they are in another unit
MAX_PEAK = 100.0
MAX_CHANNELS = 8
SOURCE_RATES = (1000, 768_000)  # Hz
_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG")
_UNKNOWN_LENGTH = 2**62


def mel_filterbank(config: MelConfig) -> Tensor:
    """Triangular Mel filters of unit area, slaney scale: [n_mels, n_fft // 2 + 1] fp32.

    Formula of librosa.filters.mel (McFee et al. 2015), from which HiFi-GAN takes its filters.
    Computed in float64: torchaudio.functional.melscale_fbanks agrees to its fp32 rounding (1e-5),
    but places the bins of odd sample rates up to 0.3 % off.
    """
    c = config
    log_step = math.log(6.4) / 27  # linear to 1 kHz at 200/3 Hz a Mel, logarithmic above

    def to_mel(hz: float) -> float:
        return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) / log_step

    mels = np.linspace(to_mel(c.f_min), to_mel(c.f_max), c.n_mels + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(log_step * (mels - 15)))  # Hz
    bins = np.linspace(0, c.sample_rate / 2, c.n_fft // 2 + 1)
    rise = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    bank = np.maximum(0, np.minimum(rise, fall)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(bank).float()


class LogMel(nn.Module):
    """Natural-log Mel spectrogram in the convention of HiFi-GAN (Kong et al. 2020, meldataset.py).

    ``forward``: wave [..., samples] fp32 at ``config.sample_rate`` Hz, full scale 1 ->
    [..., n_mels, frames] fp32, frames = samples // hop_length. Differentiable; fp32 under autocast.
    """

    def __init__(self, config: MelConfig | None = None) -> None:
        super().__init__()
        self.config = config or MelConfig()
        # not in state dicts: both follow from the configuration
        self.register_buffer("bank", mel_filterbank(self.config), persistent=False)
        window = torch.hann_window(self.config.win_length)
        self.register_buffer("window", window, persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """Log-Mel [..., n_mels, frames] of wave [..., samples].

        Raises ValueError where the wave is too short to be padded by reflection.
        """
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


def resample(wave: Tensor, source: int, target: int) -> Tensor:
    """Resample wave [samples] fp32 from ``source`` to ``target`` Hz.

    Returns ceil(samples * target / source) samples, filtered by the Hann-windowed sinc of
    torchaudio.functional.resample with its defaults. For rates with a small common divisor
    torchaudio would tabulate gigabytes of filters; those are evaluated where they are needed.

    Raises ValueError for rates that are not positive whole numbers.
    """
    if source <= 0 or target <= 0 or source != int(source) or target != int(target):
        raise ValueError(f"resample: rates {source} and {target} Hz must be positive whole numbers")
    source, target = int(source), int(target)
    if source == target:
        return wave
    divisor = math.gcd(source, target)
    table = (source // divisor) * (target // divisor)
    if table <= 2**22:
        return _resampler(source, target)(wave)
    return _resample_direct(wave, source, target)


@functools.lru_cache(maxsize=16)
def _resampler(source: int, target: int) -> nn.Module:
    # torchaudio.functional.resample with its filters kept between calls; imported here, as
    # soundfile below: whoever computes with arrays does without
    import torchaudio

    return torchaudio.transforms.Resample(source, target)


def _resample_direct(wave: Tensor, source: int, target: int) -> Tensor:
    zeros, rolloff = 6, 0.99
    cutoff = min(source, target) * rolloff / source  # of the source's Nyquist frequency
    width = math.ceil(zeros / cutoff)
    padded = F.pad(wave.double(), (width, width + 1))
    offsets = torch.arange(-width, width + 1)
    parts = []
    for outputs in torch.arange(math.ceil(len(wave) * target / source)).split(8192):
        # whole-number arithmetic: positions of late samples stay exact
        centre, rest = outputs * source // target, (outputs * source % target).double() / target
        t = ((offsets - rest[:, None]) * cutoff).clamp(-zeros, zeros)
        taps = torch.sinc(t) * torch.cos(t * math.pi / zeros / 2).square() * cutoff
        parts.append((padded[centre[:, None] + offsets + width] * taps).sum(1))
    return torch.cat(parts).to(wave.dtype)


def load_audio(
    path: str | os.PathLike[str],
    sample_rate: int = 16000,
    max_seconds: float | None = 60.0,
    refuse_silence: bool = False,
) -> Tensor:
    """Read a wav, flac or ogg file as mono fp32 [samples] at ``sample_rate`` Hz, full scale 1.

    Channels are averaged; other sample rates are resampled (``resample``). ``max_seconds`` None
    lifts the limit on length; ``refuse_silence`` also refuses recordings whose peak, mean removed,
    stays below ``SILENCE_PEAK``.

    Raises ValueError for a file that is missing, empty, truncated, damaged, not audio, too long, or
    that holds NaN or infinite samples.
    """
    import soundfile

    path = Path(path)
    check_complete(path)
    try:
        # a descriptor, because soundfile judges some files by the ending of their names
        with (
            open(path, "rb", buffering=0) as raw,
            soundfile.SoundFile(raw.fileno(), closefd=False) as file,
        ):
            _check_header(path, file, max_seconds)
            source, frames = file.samplerate, file.frames
            data = file.read(dtype="float32", always_2d=True)  # [frames, channels]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{path}: truncated, damaged or not wav, flac or ogg audio "
            f"({error.error_string.removeprefix('Error : ').rstrip('.')}); restore or convert it"
        ) from None
    if len(data) < frames:
        raise ValueError(
            f"{path}: truncated, {len(data)} of {frames} samples could be read; "
            "restore the complete file"
        )
    wave = torch.from_numpy(data.mean(axis=1) if data.shape[1] > 1 else data[:, 0])
    _check_samples(path, wave, refuse_silence)
    return resample(wave, source, sample_rate)


def _check_header(path: Path, file: soundfile.SoundFile, max_seconds: float | None) -> None:
    rate, frames = file.samplerate, file.frames
    if file.format not in _FORMATS:
        raise ValueError(
            f"{path}: {file.format} audio is not supported; convert it to wav, flac or ogg"
        )
    if not SOURCE_RATES[0] <= rate <= SOURCE_RATES[1]:
        raise ValueError(
            f"{path}: its sample rate, {rate} Hz, lies outside {SOURCE_RATES[0]} to "
            f"{SOURCE_RATES[1]} Hz; resample it or mend its header"
        )
    if file.channels > MAX_CHANNELS:
        raise ValueError(
            f"{path}: {file.channels} channels exceed the limit of {MAX_CHANNELS}; mix them down"
        )
    if frames == 0:
        raise ValueError(f"{path}: holds no samples; remove it or record it again")
    if frames >= _UNKNOWN_LENGTH:
        raise ValueError(
            f"{path}: its header does not say how long it is; convert it to a file with a length"
        )
    if max_seconds is not None and frames > max_seconds * rate:
        raise ValueError(
            f"{path}: {frames / rate:.1f} s of audio exceed the limit of {max_seconds:g} s; cut "
            "the file or raise max_seconds"
        )


def _check_samples(path: Path, wave: Tensor, refuse_silence: bool) -> None:
    bad = int((~torch.isfinite(wave)).sum())
    if bad:
        raise ValueError(f"{path}: {bad} samples are NaN or infinite; record or export it again")
    peak = wave.abs().max().item()
    if peak > MAX_PEAK:
        raise ValueError(
            f"{path}: its peak is {peak:g}, but full scale is 1; scale the samples to [-1, 1]"
        )
    if refuse_silence and (wave - wave.mean()).abs().max().item() < SILENCE_PEAK:
        raise ValueError(
            f"{path}: silent, its peak {peak:.1e} lies below {SILENCE_PEAK:g} of full scale; "
            "record it again or amplify it"
        )


def save_wav(path: str | os.PathLike[str], wave: Tensor | np.ndarray, sample_rate: int) -> None:
    """Write wave [samples] or [1, samples], full scale 1, as 16-bit PCM; atomic.

    Samples beyond full scale are clipped. The file appears complete or not at all.

    Raises ValueError for NaN or infinite samples, another shape, no samples, a sample rate that is
    not a positive whole number, or a path that cannot be written.
    """
    path = Path(path)
    samples = torch.as_tensor(wave).detach().to("cpu", torch.float64)
    if samples.ndim == 2 and samples.shape[0] == 1:
        samples = samples[0]
    if samples.ndim != 1 or samples.numel() == 0:
        raise ValueError(
            f"save_wav: the wave for {path} has shape {list(samples.shape)}; expected [samples] or "
            "[1, samples] with one sample or more"
        )
    if not torch.isfinite(samples).all():
        raise ValueError(
            f"save_wav: the wave for {path} holds NaN or infinite samples; nothing was written"
        )
    if sample_rate != int(sample_rate) or not 0 < sample_rate < 2**31:
        raise ValueError(
            f"save_wav: sample_rate {sample_rate} Hz must be a positive whole number below 2^31"
        )
    # 32768 is what reading divides by: 16-bit audio survives a round trip bit for bit
    pcm = (samples * 32768).round().clamp(-32768, 32767).to(torch.int16)
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot write {path}: it exists and is not a file; choose another name")
    try:
        _write_wav(path, pcm.numpy().astype("<i2").tobytes(), int(sample_rate))
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror}; nothing was left behind, free space or choose "
            "another folder"
        ) from None


def _write_wav(path: Path, pcm: bytes, sample_rate: int) -> None:
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # the standard library writes, because libsndfile turns a full disk into a lost exception
        with open(temporary, "xb") as file:
            with wave_file.open(file, "wb") as writer:
                writer.setparams((1, 2, sample_rate, len(pcm) // 2, "NONE", ""))
                writer.writeframes(pcm)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def fit_length(wave: Tensor, samples: int) -> Tensor:
    """Bring wave [length] to [samples]: zeros on both sides, or the window of most energy.

    Raises ValueError for another shape or a number of samples that is not positive.
    """
    if wave.ndim != 1 or samples <= 0:
        raise ValueError(
            f"fit_length: wave has shape {list(wave.shape)} and samples is {samples}; expected "
            "[length] and a positive number"
        )
    length = len(wave)
    if length <= samples:
        left = (samples - length) // 2
        return F.pad(wave, (left, samples - length - left))
    total = F.pad(wave.double().square().cumsum(0), (1, 0))
    start = int((total[samples:] - total[:-samples]).argmax())
    return wave[start : start + samples]
