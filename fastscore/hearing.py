"""Recordings as a pipeline takes them: files or waves in, checked, and copy-synthesis."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastscore.audio import SILENCE_PEAK, LogMel, load_audio, resample
from fastscore.vocoder import Generator, vocode

if TYPE_CHECKING:
    import numpy as np


def read_wave(
    audio: Tensor | np.ndarray | str | os.PathLike[str], sample_rate: int | None, target: int
) -> Tensor:
    """Wave [samples] fp32 at ``target`` Hz from a wav, flac or ogg file, or from a wave.

    A wave is [samples], full scale 1, at ``sample_rate`` Hz (None: ``target``). Raises ValueError
    as `fastscore.audio.load_audio` does, and for silence, NaN or another shape.
    """
    if isinstance(audio, str | os.PathLike):
        if sample_rate is not None:
            raise ValueError(f"sample_rate {sample_rate} was given with a file, which has its own")
        return load_audio(audio, target, refuse_silence=True)
    wave = torch.as_tensor(audio).detach().cpu()
    if wave.ndim != 1 or not len(wave) or not wave.is_floating_point():
        raise ValueError(
            f"the wave is {wave.dtype} of shape {tuple(wave.shape)}; floats [samples] of full "
            "scale 1 are needed"
        )
    wave = wave.float()
    if not torch.isfinite(wave).all():
        raise ValueError("the wave holds NaN or infinite samples; record or export it again")
    if (wave - wave.mean()).abs().max() < SILENCE_PEAK:
        raise ValueError(
            f"the wave is silent, its peak lies below {SILENCE_PEAK:g} of full scale; record it "
            "again or amplify it"
        )
    return resample(wave, target if sample_rate is None else sample_rate, target)


@torch.no_grad()
def copy_synthesis(vocoder: Generator, wave: Tensor, front_end: LogMel | None = None) -> Tensor:
    """Wave [samples] fp32 of the log-Mel of wave [samples], by ``vocoder``, on the CPU.

    Zeros fill the wave up to whole frames, and to the fewest the front end takes; they are cut off.
    """
    front_end = front_end or LogMel(vocoder.mel_config)
    hop, fewest = vocoder.mel_config.hop_length, vocoder.mel_config.n_fft
    samples = -(-max(len(wave), fewest) // hop) * hop
    mel = front_end(F.pad(wave, (0, samples - len(wave))))
    device = next(vocoder.parameters()).device
    return vocode(vocoder, mel[None].to(device))[0, : len(wave)].cpu()
