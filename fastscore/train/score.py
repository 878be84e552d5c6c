"""Training task of ScoreSubnet: denoising score matching over a frozen classifier's taps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.checkpoint import save_checkpoint, weights_hash
from fastscore.classifier import Classifier
from fastscore.config import MelConfig, MelSpace, SigmaRange, SubnetConfig, to_dict
from fastscore.data import MelSet
from fastscore.denoiser import scalings
from fastscore.subnet import ScoreSubnet
from fastscore.taps import read_taps
from fastscore.train.mels import MelAugment, MelBatches, NoiseLevels

VALIDATION_SIGMAS = (0.05, 0.2, 0.7, 2.0, 8.0)


class ScoreTask:
    """Denoising score matching with EDM weights: E[lambda |D(x0 + sigma eps) - x0|^2].

    With lambda = 1 / c_out^2 (Karras et al. 2022, section 5) it is the mean squared error of
    ScoreSubnet's raw output against (x0 - c_skip x) / c_out. The classifier is frozen: no gradient
    reaches it or its taps.
    """

    name = "score"
    ema = ("subnet",)
    LEVELS = NoiseLevels(log_mean=-0.6, log_std=1.4)
    AUGMENT = MelAugment(shift=2)

    def __init__(
        self,
        config: SubnetConfig,
        classifier: Classifier,
        train: MelSet,
        validation: MelSet,
        space: MelSpace,
        sigma: SigmaRange,
        batch_size: int,
        levels: NoiseLevels = LEVELS,
        augment: MelAugment = AUGMENT,
        tap_dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self.batch_size, self.levels = batch_size, levels
        self.space, self.sigma, self.mel = space, sigma, train.mel
        self.train = MelBatches(train, space, augment)
        self.validation = MelBatches(validation, space)
        self.tap_dtype, self.compiled = tap_dtype, compiled
        frozen = copy.deepcopy(classifier).to(tap_dtype, memory_format=torch.channels_last)
        self.frozen = frozen.requires_grad_(False).eval()
        model = ScoreSubnet(config, classifier.config).to(memory_format=torch.channels_last)
        if compiled:
            model.compile(fullgraph=True)
        self.trained: dict[str, nn.Module] = {"subnet": model}
        self.stored = checkpoint_config(config, classifier, self.mel, space, sigma)
        self.config: dict[str, Any] = {
            **self.stored,
            "levels": to_dict(self.levels),
            "augment": to_dict(augment),
            "tap_dtype": str(tap_dtype),
            "clips": len(train),
        }
        self._autocast: Callable[[], AbstractContextManager] = nullcontext
        self._read = self._taps
        if compiled:
            self._read = torch.compile(self._taps, fullgraph=True)

    def setup(self, device: torch.device, autocast: Callable[[], AbstractContextManager]) -> None:
        """Move the frozen classifier to the training device and keep the training's precision."""
        self.frozen.to(device)
        self._autocast = autocast

    def _taps(self, x: Tensor, c_noise: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        taps = read_taps(self.frozen, x, c_noise)
        return taps.features, taps.gradients

    def batch(self, step: int, rng: torch.Generator, rank: int, world: int) -> dict[str, Tensor]:
        """Clean clips, noise levels and noise."""
        x0, _ = self.train.draw(self.batch_size, rng)
        sigma = self.levels.draw(self.batch_size, self.sigma, rng)
        return {"x0": x0, "sigma": sigma, "noise": torch.randn(x0.shape, generator=rng)}

    def loss(
        self, name: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """EDM-weighted denoising error over the batch."""
        return self._errors(modules[name], **batch).mean(), {}

    def _errors(self, model: nn.Module, x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Weighted squared error of each clip, [B] fp32."""
        c_skip, c_out, c_in, c_noise = scalings(sigma, self.space.sigma_data)
        x = x0 + sigma[:, None, None, None] * noise
        scaled = (c_in[:, None, None, None] * x).to(memory_format=torch.channels_last)
        with torch.no_grad():
            features, gradients = self._read(scaled.to(self.tap_dtype), c_noise)
        # validation calls the bare module, which knows nothing of the training's precision
        with self._autocast():
            raw = model(scaled, c_noise, features, gradients).float()
        target = (x0 - c_skip[:, None, None, None] * x) / c_out[:, None, None, None]
        return (raw - target).square().mean(dim=(1, 2, 3))

    def validate(self, modules: dict[str, nn.Module]) -> dict[str, float]:
        """Denoising error at fixed noise levels on held-out clips."""
        model = modules["subnet"]
        device = next(model.parameters()).device
        x0 = self.validation.first(self.batch_size)[0].to(device)
        rng = torch.Generator().manual_seed(0)
        noise = torch.randn(x0.shape, generator=rng).to(device)
        result = {}
        for level in VALIDATION_SIGMAS:
            sigma = torch.full((len(x0),), level, device=device)
            result[f"loss_sigma_{level:g}"] = self._errors(model, x0, sigma, noise).mean().item()
        result["loss"] = sum(result.values()) / len(result)
        return result

    def export(self, modules: dict[str, nn.Module], path: Path) -> None:
        """Write the averaged ScoreSubnet with everything needed to feed it."""
        save_checkpoint(path, "score", self.stored, modules["subnet"].state_dict())


def checkpoint_config(
    config: SubnetConfig,
    classifier: Classifier,
    mel: MelConfig,
    space: MelSpace,
    sigma: SigmaRange,
) -> dict[str, Any]:
    """Configuration stored in a ScoreSubnet checkpoint."""
    return {
        "subnet": to_dict(config),
        "classifier": to_dict(classifier.config),
        # a ScoreSubnet is worth nothing beside another classifier, so its file names this one
        "classifier_hash": weights_hash(classifier),
        "mel": to_dict(mel),
        "space": to_dict(space),
        "sigma": to_dict(sigma),
    }
