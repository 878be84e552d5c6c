"""Training task of the U-Net baseline: the same denoising score matching without a classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastscore.config import MelSpace, SigmaRange, UNetConfig, to_dict
from fastscore.data import MelSet
from fastscore.train.denoising import DenoisingTask
from fastscore.train.mels import MelAugment, NoiseLevels
from fastscore.unet import UNet


class UNetTask(DenoisingTask):
    """Trains the U-Net on the clips, levels and noise that ScoreSubnet of the same seed sees."""

    name, part = "unet", "unet"

    def __init__(
        self,
        config: UNetConfig,
        train: MelSet,
        validation: MelSet,
        space: MelSpace,
        sigma: SigmaRange,
        batch_size: int,
        levels: NoiseLevels = DenoisingTask.LEVELS,
        augment: MelAugment = DenoisingTask.AUGMENT,
        compiled: bool = False,
    ) -> None:
        super().__init__(train, validation, space, sigma, batch_size, levels, augment)
        model = UNet(config).to(memory_format=torch.channels_last)
        if compiled:
            model.compile(fullgraph=True)
        stored = {
            "unet": to_dict(config),
            "mel": to_dict(self.mel),
            "space": to_dict(space),
            "sigma": to_dict(sigma),
        }
        self._hold(model, stored)

    def raw(self, model: nn.Module, scaled: Tensor, c_noise: Tensor) -> Tensor:
        """The U-Net's raw output."""
        with self._autocast():
            return model(scaled, c_noise)
