"""The public interface: from labels to waveforms, and from waveforms to labels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fastscore_kernels import resolve
from torch import Tensor

from fastscore.checkpoint import weights_hash
from fastscore.classifier import Classifier
from fastscore.config import MelSpace, SigmaRange, to_dict
from fastscore.denoiser import TapDenoiser
from fastscore.devices import BATCH_SIZES, Clock, usable_device
from fastscore.layers import set_backend
from fastscore.noise import NoiseSource
from fastscore.presets import Defaults, load_parts
from fastscore.request import Labels, Request, Strengths, make_request, whole
from fastscore.results import Result, save_result
from fastscore.samplers import Guidance, Sample, initial_state
from fastscore.subnet import ScoreSubnet
from fastscore.vocoder import Generator, vocode

if TYPE_CHECKING:
    import numpy as np

    from fastscore.audio import LogMel


@dataclass(frozen=True)
class Progress:
    """Where sampling stands after a solver step: ``done`` of ``total`` steps over all batches.

    ``mels`` [count, n_mels, frames] fp32 are the log-Mels of the present batch as denoised at noise
    level ``sigma``; the first of them is sample number ``first``.
    """

    done: int
    total: int
    first: int
    step: int
    sigma: float
    mels: Tensor


class Pipeline:
    """Classifier, ScoreSubnet and vocoder that together sample, classify and vocode.

    From a preset with ``from_pretrained``, or from modules: these are moved to ``device``, frozen
    and put in evaluation mode. ``defaults`` says how ``sample`` behaves unless told otherwise;
    ``batch_size`` None is 1 on a CPU and 16 on a GPU. ``backend`` names the implementation of the
    fused operations, one of `fastscore_kernels.BACKENDS`; None takes the device's best. Raises
    ValueError for a device or backend that is not there, or parts whose shapes differ.
    """

    def __init__(
        self,
        classifier: Classifier,
        subnet: ScoreSubnet,
        vocoder: Generator,
        *,
        space: MelSpace,
        sigma: SigmaRange,
        defaults: Defaults | None = None,
        device: str | torch.device = "cpu",
        batch_size: int | None = None,
        backend: str | None = None,
        name: str = "custom",
    ) -> None:
        self.device = usable_device(device)
        self.name = name
        self.defaults = defaults or Defaults()
        size = BATCH_SIZES[self.device.type] if batch_size is None else batch_size
        self.batch_size = whole("batch_size", size, 1)
        self.mel_config = vocoder.mel_config
        config = classifier.config
        if (config.n_mels, config.frames) != (self.mel_config.n_mels, space.frames):
            raise ValueError(
                f"the classifier reads {config.n_mels} bands x {config.frames} frames, but the "
                f"vocoder inverts {self.mel_config.n_mels} bands and the space has {space.frames} "
                "frames; use parts made for each other"
            )
        denoiser = TapDenoiser(classifier, subnet, space, sigma).eval().requires_grad_(False)
        self.denoiser = denoiser.to(self.device, memory_format=torch.channels_last)
        self.backend = resolve(backend, self.device.type)
        set_backend(self.denoiser, self.backend)
        self.vocoder = vocoder.eval().requires_grad_(False).to(self.device)
        self._front_end: LogMel | None = None

    @classmethod
    def from_pretrained(
        cls,
        preset: str | os.PathLike[str] = "digits",
        *,
        device: str | torch.device = "cpu",
        batch_size: int | None = None,
        backend: str | None = None,
    ) -> Pipeline:
        """Pipeline from a preset in the package, by name, or from the folder of one, by path.

        Raises ValueError where a file is missing, damaged, of another kind, or does not belong to
        the others.
        """
        resolve(backend, usable_device(device).type)
        parts = load_parts(preset)
        return cls(
            parts.classifier,
            parts.subnet,
            parts.vocoder,
            space=parts.space,
            sigma=parts.sigma,
            defaults=parts.defaults,
            device=device,
            batch_size=batch_size,
            backend=backend,
            name=parts.folder.name,
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """What can be asked for, in the order of the classifier's outputs."""
        return self.denoiser.classifier.config.labels

    @property
    def sample_rate(self) -> int:
        """Sample rate of the waveforms, Hz."""
        return self.mel_config.sample_rate

    @property
    def frames(self) -> int:
        """Mel frames of a sample."""
        return self.denoiser.space.frames

    @property
    def guidance(self) -> float:
        """Default guidance strength gamma."""
        return self.defaults.guidance

    @torch.no_grad()
    def sample(
        self,
        labels: Labels = None,
        *,
        n: int | None = None,
        guidance: Strengths = None,
        steps: int | None = None,
        nfe: int | None = None,
        sampler: str | None = None,
        interval: tuple[float, float] | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int | None = None,
        callback: Callable[[Progress], Any] | None = None,
    ) -> Result:
        """Draw speech: one label for ``n`` samples, or a list with one entry a sample.

        A label of None, alone or in a list, draws without guidance. ``guidance`` is gamma, one
        number or one a sample. ``steps`` counts solver steps, ``nfe`` bounds denoiser evaluations:
        give one of them or neither. ``interval`` (low, high) guides at low < sigma <= high only.
        What is None is the preset's default.

        Sample i depends on ``seed`` and its number ``first`` + i, never on the other samples:
        ``sample(label, seed=s, first=i)`` draws it again, to the bit on the same machine with the
        same ``batch_size``, up to which batches are filled.

        ``callback`` gets a ``Progress`` after every step; returning False cancels with
        SamplingCancelledError. Raises ValueError for arguments out of range and an unknown label.
        """
        asked = make_request(
            self.defaults,
            self.denoiser.sigma_range,
            self.labels,
            labels=labels,
            n=n,
            guidance=guidance,
            steps=steps,
            nfe=nfe,
            sampler=sampler,
            interval=interval,
            seed=seed,
            first=first,
            batch_size=self.batch_size if batch_size is None else batch_size,
        )
        clock, seconds = Clock(self.device), {"sampling": 0.0, "vocoder": 0.0}
        mels, waves, used = [], [], 0
        for index, batch in enumerate(asked.batches):
            drawn = self._draw(asked, index, callback)
            used = drawn.nfe
            mels.append(self._mels(drawn.x))
            seconds["sampling"] += clock.lap()
            waves.append(vocode(self.vocoder, mels[-1]))
            _check_finite(waves[-1], asked)
            mels[-1], waves[-1] = mels[-1][batch.kept].cpu(), waves[-1][batch.kept].cpu()
            seconds["vocoder"] += clock.lap()
        return Result(
            waves=torch.cat(waves),
            sample_rate=self.sample_rate,
            mels=torch.cat(mels),
            mel=self.mel_config,
            labels=tuple(None if k < 0 else self.labels[k] for k in asked.ids),
            guidance=tuple(asked.gammas),
            nfe=used,
            sampler=asked.spec.name,
            seconds=seconds,
            seed=asked.seed,
            first=asked.first,
        )

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
        wave = fit_length(wave, self.frames * self.mel_config.hop_length)
        p = self.probabilities(self.front_end(wave)[None].to(self.device))[0].tolist()
        order = sorted(range(len(p)), key=p.__getitem__, reverse=True)
        return {self.labels[i]: p[i] for i in order}

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

    def save(
        self, result: Result, folder: str | os.PathLike[str], plot: bool = False
    ) -> list[Path]:
        """Write a result's waves, and mels.png with ``plot``, as `save_result` does."""
        return save_result(result, folder, plot)

    def warm_up(self, batch_size: int | None = None) -> float:
        """Take one guided and one unguided evaluation and vocode a Mel; the seconds they took.

        The first evaluation of a process loads parts of PyTorch; better here than in what is timed.
        """
        clock = Clock(self.device)
        size = self.batch_size if batch_size is None else batch_size
        for label in (self.labels[0], None):
            self.sample([label] * size, steps=1, interval=(0.0, math.inf), batch_size=size)
        return clock.lap()

    def describe(self) -> dict[str, Any]:
        """JSON-ready provenance: preset, defaults, device, backend, sizes and hashes of weights."""
        parts = {
            "classifier": self.denoiser.classifier,
            "subnet": self.denoiser.subnet,
            "vocoder": self.vocoder,
        }
        return {
            "preset": self.name,
            "device": str(self.device),
            "backend": self.backend,
            "batch_size": self.batch_size,
            "labels": list(self.labels),
            "defaults": to_dict(self.defaults),
            "mel": to_dict(self.mel_config),
            "space": to_dict(self.denoiser.space),
            "sigma": to_dict(self.denoiser.sigma_range),
            "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()},
            "hashes": {k: weights_hash(m) for k, m in parts.items()},
        }

    @property
    def front_end(self) -> LogMel:
        """Log-Mel transform of the pipeline, on the CPU."""
        if self._front_end is None:
            from fastscore.audio import LogMel

            self._front_end = LogMel(self.mel_config)
        return self._front_end

    def _draw(
        self, asked: Request, index: int, callback: Callable[[Progress], Any] | None
    ) -> Sample:
        """Normalised log-Mels of one batch, its filling included, and the evaluations they took."""
        rows = asked.batches[index].rows
        noise = NoiseSource([asked.seed] * len(rows), [asked.first + row for row in rows])
        shape = (len(rows), 1, self.mel_config.n_mels, self.frames)
        drawn = asked.spec.run(
            self.denoiser,
            initial_state(noise, shape, asked.sigmas[0]).to(self.device),
            asked.sigmas,
            guidance=_guidance(asked, rows),
            noise=noise,
            callback=callback and self._reporter(asked, index, callback),
            **asked.options,
        )
        _check_finite(drawn.x, asked)
        return drawn

    def _mels(self, x: Tensor) -> Tensor:
        """Log-Mels [B, n_mels, frames] of normalised ones [B, 1, n_mels, frames]."""
        space = self.denoiser.space
        return (x[:, 0] * space.std + space.mean).clamp_min(self.mel_config.log_min)

    def _reporter(
        self, asked: Request, index: int, callback: Callable[[Progress], Any]
    ) -> Callable[[int, float, Tensor, Tensor], Any]:
        steps, batches = len(asked.sigmas) - 1, asked.batches
        rows, kept = batches[index]

        def report(step: int, sigma: float, x: Tensor, x0: Tensor) -> Any:
            return callback(
                Progress(
                    done=index * steps + step + 1,
                    total=steps * len(batches),
                    first=asked.first + rows[kept.start],
                    step=step,
                    sigma=sigma,
                    mels=self._mels(x0[kept]),
                )
            )

        return report


def _check_finite(values: Tensor, asked: Request) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(
            f"sampling diverged at guidance {max(asked.gammas):g} with {asked.spec.name} and "
            f"{len(asked.sigmas) - 1} steps; lower the guidance or take more steps"
        )


def _guidance(asked: Request, rows: Sequence[int]) -> Guidance:
    """Guidance of one batch; none at all, which is cheaper, where no sample is guided."""
    gammas = [asked.gammas[row] for row in rows]
    ids = [asked.ids[row] if gamma > 0 else -1 for row, gamma in zip(rows, gammas, strict=True)]
    if max(ids) < 0:
        return Guidance()
    return Guidance(torch.tensor(ids), torch.tensor(gammas), asked.interval)
