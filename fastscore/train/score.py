"""Training task of ScoreSubnet: denoising score matching over a frozen classifier's taps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.checkpoint import weights_hash
from fastscore.classifier import Classifier
from fastscore.config import MelConfig, MelSpace, SigmaRange, SubnetConfig, to_dict
from fastscore.data import MelSet
from fastscore.subnet import ScoreSubnet
from fastscore.taps import read_taps
from fastscore.train.denoising import DenoisingTask
from fastscore.train.mels import MelAugment, NoiseLevels


class ScoreTask(DenoisingTask):
    """Trains ScoreSubnet. The classifier is frozen: no gradient reaches it or its taps."""

    name, part = "score", "subnet"

    def __init__(
        self,
        config: SubnetConfig,
        classifier: Classifier,
        train: MelSet,
        validation: MelSet,
        space: MelSpace,
        sigma: SigmaRange,
        batch_size: int,
        levels: NoiseLevels = DenoisingTask.LEVELS,
        augment: MelAugment = DenoisingTask.AUGMENT,
        tap_dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        super().__init__(train, validation, space, sigma, batch_size, levels, augment)
        self.tap_dtype, self.compiled = tap_dtype, compiled
        frozen = copy.deepcopy(classifier).to(tap_dtype, memory_format=torch.channels_last)
        self.frozen = frozen.requires_grad_(False).eval()
        model = ScoreSubnet(config, classifier.config).to(memory_format=torch.channels_last)
        stored = checkpoint_config(config, classifier, self.mel, space, sigma)
        self._hold(model, stored, tap_dtype=str(tap_dtype))
        self._read = self._taps
        if compiled:
            model.compile(fullgraph=True)
            self._read = torch.compile(self._taps, fullgraph=True)

    def setup(self, device: torch.device, autocast: Callable[[], AbstractContextManager]) -> None:
        """Move the frozen classifier to the training device and keep the training's precision."""
        super().setup(device, autocast)
        self.frozen.to(device)

    def _taps(self, x: Tensor, c_noise: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        taps = read_taps(self.frozen, x, c_noise)
        return taps.features, taps.gradients

    def raw(self, model: nn.Module, scaled: Tensor, c_noise: Tensor) -> Tensor:
        """ScoreSubnet's raw output over the taps."""
        with torch.no_grad():
            features, gradients = self._read(scaled.to(self.tap_dtype), c_noise)
        # validation calls the bare module, which knows nothing of the training's precision
        with self._autocast():
            return model(scaled, c_noise, features, gradients)


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
