"""Training task of the noise-conditioned classifier: cross-entropy over the whole sigma range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.checkpoint import Checkpoint, load_into, save_checkpoint
from fastscore.classifier import Classifier
from fastscore.config import ClassifierConfig, MelConfig, MelSpace, SigmaRange, to_dict
from fastscore.data import MelSet
from fastscore.denoiser import scalings
from fastscore.train.mels import MelAugment, MelBatches, NoiseLevels

VALIDATION_SIGMAS = (0.02, 0.3, 1.0, 3.0)


class ClassifierTask:
    """Cross-entropy of the label on x0 + sigma eps, sigma log-normal; ``initial`` is fine-tuned."""

    name = "classifier"
    ema = ("classifier",)
    LEVELS = NoiseLevels(log_mean=-0.4, log_std=1.6)
    AUGMENT = MelAugment(shift=10, gain=1.0)

    def __init__(
        self,
        config: ClassifierConfig,
        train: MelSet,
        validation: MelSet,
        space: MelSpace,
        sigma: SigmaRange,
        batch_size: int,
        levels: NoiseLevels = LEVELS,
        augment: MelAugment = AUGMENT,
        initial: Checkpoint | None = None,
        compiled: bool = False,
    ) -> None:
        self.batch_size, self.levels = batch_size, levels
        self.space, self.sigma, self.mel = space, sigma, train.mel
        self.train = MelBatches(train, space, augment)
        self.validation = MelBatches(validation, space)
        model = Classifier(config).to(memory_format=torch.channels_last)
        if initial is not None:
            load_into(model, initial.tensors, initial.path or "the initial classifier")
        if compiled:
            model.compile(fullgraph=True)
        self.trained: dict[str, nn.Module] = {"classifier": model}
        self.model_config = config
        self.config: dict[str, Any] = {
            **checkpoint_config(config, self.mel, space, sigma),
            "levels": to_dict(self.levels),
            "augment": to_dict(augment),
            "clips": len(train),
            "initial": initial and str(initial.path),
        }

    def batch(self, step: int, rng: torch.Generator, rank: int, world: int) -> dict[str, Tensor]:
        """Noisy clips scaled by c_in, their c_noise, and labels."""
        x0, label = self.train.draw(self.batch_size, rng)
        sigma = self.levels.draw(self.batch_size, self.sigma, rng)
        noise = torch.randn(x0.shape, generator=rng)
        c = scalings(sigma, self.space.sigma_data)
        x = c.c_in[:, None, None, None] * (x0 + sigma[:, None, None, None] * noise)
        return {"x": x, "c_noise": c.c_noise, "label": label}

    def loss(
        self, name: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and accuracy over the batch."""
        logits = modules[name](batch["x"], batch["c_noise"]).float()
        hits = (logits.argmax(dim=1) == batch["label"]).float().mean()
        return F.cross_entropy(logits, batch["label"]), {"accuracy": hits}

    def validate(self, modules: dict[str, nn.Module]) -> dict[str, float]:
        """Accuracy at fixed noise levels on held-out clips."""
        model = modules["classifier"]
        device = next(model.parameters()).device
        x0, label = (t.to(device) for t in self.validation.first(640))
        rng = torch.Generator().manual_seed(0)
        noise = torch.randn(x0.shape, generator=rng).to(device)
        result = {}
        for level in VALIDATION_SIGMAS:
            c = scalings(torch.full((len(x0),), level, device=device), self.space.sigma_data)
            x = c.c_in[:, None, None, None] * (x0 + level * noise)
            hits = model(x, c.c_noise).argmax(dim=1) == label
            result[f"accuracy_sigma_{level:g}"] = hits.float().mean().item()
        return result

    def export(self, modules: dict[str, nn.Module], path: Path) -> None:
        """Write the averaged classifier with everything needed to feed it."""
        config = checkpoint_config(self.model_config, self.mel, self.space, self.sigma)
        save_checkpoint(path, "classifier", config, modules["classifier"].state_dict())


def checkpoint_config(
    config: ClassifierConfig, mel: MelConfig, space: MelSpace, sigma: SigmaRange
) -> dict[str, Any]:
    """Configuration stored in a classifier checkpoint."""
    return {
        "classifier": to_dict(config),
        "mel": to_dict(mel),
        "space": to_dict(space),
        "sigma": to_dict(sigma),
    }
