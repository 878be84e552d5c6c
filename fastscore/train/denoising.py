"""Denoising score matching: what the trainings of ScoreSubnet and of the U-Net baseline share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.checkpoint import save_checkpoint
from fastscore.config import MelSpace, SigmaRange, to_dict
from fastscore.data import MelSet
from fastscore.denoiser import scalings
from fastscore.train.mels import MelAugment, MelBatches, NoiseLevels

VALIDATION_SIGMAS = (0.05, 0.2, 0.7, 2.0, 8.0)


class DenoisingTask:
    """Denoising score matching with EDM weights: E[lambda |D(x0 + sigma eps) - x0|^2].

    With lambda = 1 / c_out^2 (Karras et al. 2022, section 5) it is the mean squared error of the
    network's raw output against (x0 - c_skip x) / c_out. A task of one network names its ``part``,
    gives it to ``_hold`` and says in ``raw`` how it is called; batches, noise and validation are a
    function of seed and step alone, so two networks can be trained on the very same numbers.
    """

    name: str
    part: str
    LEVELS = NoiseLevels(log_mean=-0.6, log_std=1.4)
    AUGMENT = MelAugment(shift=2)

    def __init__(
        self,
        train: MelSet,
        validation: MelSet,
        space: MelSpace,
        sigma: SigmaRange,
        batch_size: int,
        levels: NoiseLevels,
        augment: MelAugment,
    ) -> None:
        self.batch_size, self.levels, self.augment = batch_size, levels, augment
        self.space, self.sigma, self.mel = space, sigma, train.mel
        self.train = MelBatches(train, space, augment)
        self.validation = MelBatches(validation, space)
        self.trained: dict[str, nn.Module] = {}
        self.stored: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self._autocast: Callable[[], AbstractContextManager] = nullcontext

    @property
    def ema(self) -> tuple[str, ...]:
        """What is averaged: the network."""
        return (self.part,)

    def _hold(self, model: nn.Module, stored: dict[str, Any], **settings: Any) -> None:
        """Train ``model``; ``stored`` goes into its checkpoint, ``settings`` identify the run."""
        self.trained = {self.part: model}
        self.stored = stored
        self.config = {
            **stored,
            "levels": to_dict(self.levels),
            "augment": to_dict(self.augment),
            **settings,
            "clips": len(self.train.label_ids),
        }

    def setup(self, device: torch.device, autocast: Callable[[], AbstractContextManager]) -> None:
        """Keep the training's precision."""
        self._autocast = autocast

    def raw(self, model: nn.Module, scaled: Tensor, c_noise: Tensor) -> Tensor:
        """Raw output S of ``model`` at c_in x [B, 1, n_mels, frames] and c_noise [B], as x."""
        raise NotImplementedError

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
        raw = self.raw(model, scaled, c_noise).float()
        target = (x0 - c_skip[:, None, None, None] * x) / c_out[:, None, None, None]
        return (raw - target).square().mean(dim=(1, 2, 3))

    def validate(self, modules: dict[str, nn.Module]) -> dict[str, float]:
        """Denoising error at fixed noise levels on held-out clips."""
        model = modules[self.part]
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
        """Write the averaged network with everything needed to feed it."""
        save_checkpoint(path, self.name, self.stored, modules[self.part].state_dict())
