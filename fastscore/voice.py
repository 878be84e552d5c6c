"""A model on its device: what it says of a normalised Mel, and what it hears in a recording."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from fastscore_kernels import resolve
from torch import Tensor, nn

from fastscore.config import MelConfig
from fastscore.denoiser import Denoiser, set_precision
from fastscore.devices import check_precision, usable_device
from fastscore.inpaint import prefix_mask
from fastscore.layers import set_backend
from fastscore.packed import obstacle, pack
from fastscore.stacked import stack
from fastscore.vocoder import Generator, render, vocode

if TYPE_CHECKING:
    import numpy as np

    from fastscore.audio import LogMel


class Voice:
    """A denoiser and a vocoder on a device, frozen and in evaluation mode; or exported ones.

    ``backend`` and ``precision`` as `fastscore.pipeline.Pipeline` takes them; ValueError where they
    or the device are not there, and where the shapes of the parts differ.
    """

    batch_size = 1

    def __init__(
        self,
        denoiser: Denoiser,
        vocoder: Generator,
        device: str | torch.device = "cpu",
        backend: str | None = None,
        precision: str = "fp32",
    ) -> None:
        self.device = usable_device(device)
        self.precision = check_precision(precision, self.device)
        self.backend = resolve(backend, self.device.type)
        self.mel_config = vocoder.mel_config
        self.packed = False
        # an exported model is prepared already
        if isinstance(denoiser, nn.Module):
            denoiser = self._prepared(denoiser)
        if isinstance(vocoder, nn.Module):
            vocoder = vocoder.eval().requires_grad_(False).to(self.device)
        self.denoiser, self.vocoder = denoiser, vocoder
        self._front_end: LogMel | None = None

    def _prepared(self, denoiser: Denoiser) -> Denoiser:
        """Networks frozen, on the device, in its layout, precision and backend."""
        _check_shapes(denoiser, self.mel_config)
        denoiser = denoiser.eval().requires_grad_(False)
        denoiser = denoiser.to(self.device, memory_format=torch.channels_last)
        set_precision(denoiser, "bf16" if self.precision == "bf16" else "fp32")
        set_backend(denoiser, self.backend)
        # convolutions whose weights are laid out for the CPU once, not in every call
        self.packed = self.backend == "native" and not obstacle(denoiser)
        if self.packed:
            pack(denoiser)
        if self.backend == "triton":
            stack(denoiser)
        return denoiser

    @property
    def labels(self) -> tuple[str, ...]:
        """What can be asked for, in the order of the classifier's outputs."""
        return self.denoiser.labels

    @property
    def sample_rate(self) -> int:
        """Sample rate of the waveforms, Hz."""
        return self.mel_config.sample_rate

    @property
    def samples(self) -> int:
        """Samples of a waveform."""
        return self.frames * self.mel_config.hop_length

    @property
    def frames(self) -> int:
        """Mel frames of a sample."""
        return self.denoiser.space.frames

    def finish(self, x: Tensor) -> tuple[Tensor, ...]:
        """Log-Mels, waves, and whether both are finite [B], of normalised Mels; waits for nothing.

        x [B, 1, n_mels, frames].
        """
        mels = self.mels(x)
        waves = render(self.vocoder, mels)
        fine = torch.isfinite(x).flatten(1).all(1) & torch.isfinite(waves).all(1)
        return mels, waves, fine

    def mels(self, x: Tensor) -> Tensor:
        """Log-Mels [B, n_mels, frames] of normalised ones [B, 1, n_mels, frames]."""
        space = self.denoiser.space
        return (x[:, 0] * space.std + space.mean).clamp_min(self.mel_config.log_min)

    @torch.no_grad()
    def classify(
        self, audio: Tensor | np.ndarray | str | os.PathLike[str], sample_rate: int | None = None
    ) -> dict[str, float]:
        """Probability of every label, likeliest first, of a wav, flac or ogg file or a wave.

        A wave is [samples], full scale 1, at ``sample_rate`` Hz (None: the pipeline's). It is
        resampled and brought to the length of a sample: zeros around it, or its loudest window. The
        classifier hears it at the lowest noise level of its training. Raises ValueError for files
        as ``fastscore.audio.load_audio`` does and for silence, NaN or another shape.
        """
        from fastscore.audio import fit_length
        from fastscore.hearing import read_wave

        wave = read_wave(audio, sample_rate, self.sample_rate)
        wave = fit_length(wave, self.samples)
        p = self.probabilities(self.front_end(wave)[None].to(self.device))[0].tolist()
        order = sorted(range(len(p)), key=p.__getitem__, reverse=True)
        return {self.labels[i]: p[i] for i in order}

    @torch.no_grad()
    def beginning(
        self,
        audio: Tensor | np.ndarray | str | os.PathLike[str],
        seconds: float,
        sample_rate: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-Mel [n_mels, frames] of how a recording begins, and a mask of its first ``seconds``.

        As ``Pipeline.sample`` takes them for ``known`` and ``mask``. Raises ValueError for audio as
        ``classify`` does, and for a beginning that is longer than the recording, or leaves nothing
        of a sample to draw.
        """
        from fastscore.hearing import read_wave

        wave = read_wave(audio, sample_rate, self.sample_rate)
        longest = min(len(wave), self.samples - self.mel_config.hop_length) / self.sample_rate
        frame = self.mel_config.hop_length / self.sample_rate
        # written so that NaN fails too
        if not frame / 2 < seconds <= longest:
            raise ValueError(
                f"a beginning of {seconds:g} s cannot be kept; choose a frame ({frame:g} s) to "
                f"{longest:g} s of it"
            )
        wave = F.pad(wave[: self.samples], (0, max(0, self.samples - len(wave))))
        shape = (self.mel_config.n_mels, self.frames)
        return self.front_end(wave), prefix_mask(round(seconds / frame), shape)[0, 0]

    @torch.no_grad()
    def probabilities(self, mels: Tensor) -> Tensor:
        """Probabilities [B, K] fp32, in the order of ``labels``, of log-Mels [B, n_mels, frames].

        Raises ValueError for another shape.
        """
        shape = (self.mel_config.n_mels, self.frames)
        if mels.ndim != 3 or tuple(mels.shape[1:]) != shape:
            raise ValueError(
                f"the Mels have shape {tuple(mels.shape)}; [batch, {shape[0]}, {shape[1]}] is "
                "needed"
            )
        space = self.denoiser.space
        x = ((mels.to(self.device).float() - space.mean) / space.std)[:, None]
        sigma = torch.full((len(x),), self.denoiser.sigma_range.min, device=self.device)
        return self.denoiser.class_logits(x, sigma).softmax(dim=1)

    def guide_labels(self, mels: Tensor) -> Tensor:
        """Index of the likeliest label, int64 [B], of log-Mels [B, n_mels, frames]."""
        return self.probabilities(mels).argmax(dim=1).cpu()

    @torch.no_grad()
    def vocode(self, mels: Tensor) -> Tensor:
        """Waves [B, T * hop] fp32 of natural-log Mels [B, n_mels, T], T any number of frames."""
        if mels.ndim != 3 or not len(mels):
            raise ValueError(
                f"the Mels have shape {tuple(mels.shape)}; [batch, bands, frames] is needed"
            )
        waves = []
        for part in mels.to(self.device).split(self.batch_size):
            # filled up, so that a wave does not depend on how many others there are
            missing = self.batch_size - len(part)
            full = torch.cat([part, part[-1:].expand(missing, -1, -1)])
            waves.append(vocode(self.vocoder, full)[: len(part)].cpu())
        return torch.cat(waves)

    @torch.no_grad()
    def vocode_file(self, path: str | os.PathLike[str]) -> Tensor:
        """Copy-synthesis: wave [samples] fp32 at ``sample_rate`` of a wav, flac or ogg file's Mel.

        Raises ValueError as ``classify`` does.
        """
        from fastscore.hearing import copy_synthesis, read_wave

        return copy_synthesis(self.vocoder, read_wave(path, None, self.sample_rate), self.front_end)

    @property
    def front_end(self) -> LogMel:
        """Log-Mel transform of the pipeline, on the CPU."""
        if self._front_end is None:
            from fastscore.audio import LogMel

            self._front_end = LogMel(self.mel_config)
        return self._front_end


def _check_shapes(denoiser: Denoiser, mel: MelConfig) -> None:
    (bands, length), frames = denoiser.shape, denoiser.space.frames
    if (bands, length) != (mel.n_mels, frames):
        raise ValueError(
            f"the classifier reads {bands} bands x {length} frames, but the vocoder "
            f"inverts {mel.n_mels} bands and the space has {frames} frames; use parts made for "
            "each other"
        )
