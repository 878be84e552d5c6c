"""Training of the digit recogniser: cross-entropy on augmented recordings and on garbage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..audio import fit_length
from ..checkpoint import save_checkpoint
from ..config import to_dict
from ..data import WaveSet, load_waves
from ..metrics.recogniser import CONFIDENT, KIND, Recogniser, RecogniserConfig
from . import augment

LENGTHS = (16384, 16384, 24576)
GARBAGE_KINDS = ("synthetic", "shuffled", "reversed", "spliced")


class RecogniserTask:
    """Task of the common loop; every root of recordings has the same weight.

    A share of each batch is garbage (noise, silence, shuffled, reversed or spliced digits) whose
    target is uniform over the labels, so that the recogniser is sure of nothing but digits.
    """

    name = "recogniser"
    ema = ("recogniser",)

    def __init__(
        self,
        roots: list[Path],
        config: RecogniserConfig | None = None,
        cache_dir: Path | None = None,
        batch_size: int = 64,
        garbage: float = 0.125,
    ) -> None:
        if not 0 <= garbage < 1:
            raise ValueError(
                f"RecogniserTask: garbage share {garbage} must be at least 0 and below 1"
            )
        self.model_config = config or RecogniserConfig()
        self.batch_size = batch_size
        self.garbage = garbage
        labels = self.model_config.labels
        load = {"labels": labels, "cache_dir": cache_dir}
        self.train = [load_waves(r, "train", **load) for r in roots]
        self.validation = [load_waves(r, "validation", **load) for r in roots]
        self.names = [Path(r).name for r in roots]
        self.trained: dict[str, nn.Module] = {"recogniser": Recogniser(self.model_config)}
        self.config = {
            "model": to_dict(self.model_config),
            "garbage": garbage,
            "clips": [len(c) for c in self.train],
        }

    def batch(self, step: int, rng: torch.Generator, rank: int, world: int) -> dict[str, Tensor]:
        """Augmented waves [B, samples], target distributions [B, labels] and feature masks."""
        numpy_rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=rng)))
        length = LENGTHS[int(numpy_rng.integers(len(LENGTHS)))]
        K, B = len(self.model_config.labels), self.batch_size
        n_garbage = round(B * self.garbage)
        waves, targets = [], torch.full((B, K), 1.0 / K)
        for i in range(B):
            corpus = self.train[int(numpy_rng.integers(len(self.train)))]
            if i < n_garbage:
                wave = self._garbage(corpus, length, numpy_rng)
            else:
                wave, label = self._digit(corpus, numpy_rng)
                targets[i] = F.one_hot(torch.tensor(label), K).float()
            waves.append(torch.from_numpy(augment.place(wave, length, numpy_rng)))
        wave = augment.augment(torch.stack(waves), rng)
        frames = length // self.model_config.hop_length + 1
        mask = augment.spec_masks(B, self.model_config.n_mels, frames, rng)
        return {"wave": wave, "target": targets, "mask": mask}

    def _digit(self, corpus: WaveSet, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        index = int(rng.integers(len(corpus)))
        wave = corpus.wave(index).numpy()
        if rng.random() < 0.8:
            wave = augment.change_speed(wave, rng.uniform(0.85, 1.15))
        return wave, int(corpus.label_ids[index])

    def _garbage(self, corpus: WaveSet, length: int, rng: np.random.Generator) -> np.ndarray:
        kind = GARBAGE_KINDS[int(rng.integers(len(GARBAGE_KINDS)))]
        if kind == "synthetic":
            return augment.synthetic_garbage(length, rng)
        wave, label = self._digit(corpus, rng)
        if kind == "shuffled":
            return augment.shuffle_in_time(wave, rng)
        if kind == "reversed" and self.model_config.labels[label] != "nine":
            return wave[::-1]  # "nine" is nearly the same backwards
        other = label
        while other == label:
            second, other = self._digit(corpus, rng)
        return augment.splice(wave, second, rng)

    def loss(
        self, name: str, modules: dict[str, nn.Module], batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy against the target distributions; accuracy over the digits of the batch."""
        model = modules[name]
        logits = model(batch["wave"], batch["mask"]).float()
        loss = F.cross_entropy(logits, batch["target"])
        digit = batch["target"].amax(1) == 1.0
        right = (logits.argmax(1) == batch["target"].argmax(1))[digit].float().mean()
        return loss, {"accuracy": right.detach()}

    def _logits(self, model: Recogniser, corpus: WaveSet) -> tuple[Tensor, Tensor]:
        size = self.model_config.min_samples
        device = next(model.parameters()).device
        parts = []
        with torch.no_grad():
            for start in range(0, len(corpus), 100):
                stop = min(start + 100, len(corpus))
                wave = torch.stack([fit_length(corpus.wave(i), size) for i in range(start, stop)])
                parts.append(model(wave.to(device)).float().cpu())
        labels = torch.from_numpy(corpus.label_ids)
        return torch.cat(parts), labels

    def _garbage_logits(self, model: Recogniser, count: int = 300) -> Tensor:
        """Logits [count, labels] of garbage made from validation clips, the same every time."""
        rng = np.random.default_rng(0)
        size = self.model_config.min_samples
        device = next(model.parameters()).device
        parts = []
        with torch.no_grad():
            for start in range(0, count, 100):
                junk = [
                    self._garbage(self.validation[i % len(self.names)], size, rng)
                    for i in range(start, min(start + 100, count))
                ]
                wave = np.stack([augment.place(j, size, rng) for j in junk])
                parts.append(model(torch.from_numpy(wave).to(device)).float().cpu())
        return torch.cat(parts)

    def validate(self, modules: dict[str, nn.Module]) -> dict[str, float]:
        """Accuracy and log-loss per root on validation clips; share of confident garbage."""
        model = modules["recogniser"]
        figures = {}
        for name, corpus in zip(self.names, self.validation, strict=True):
            logits, labels = self._logits(model, corpus)
            figures[f"accuracy/{name}"] = (logits.argmax(1) == labels).double().mean().item()
            figures[f"nll/{name}"] = F.cross_entropy(logits, labels).item()
        sure = self._garbage_logits(model).softmax(-1).amax(-1) >= CONFIDENT
        figures["garbage_confident"] = sure.double().mean().item()
        return figures

    def temperature(self, model: Recogniser) -> float:
        """Softmax temperature, 1 or more, of least log-loss on validation clips, each root alike.

        Never below 1: clean clips, easier than what the network was trained on, would ask for 0.5,
        at which a quarter of the garbage passes for digits.
        """
        sets = [self._logits(model, corpus) for corpus in self.validation]
        grid = torch.logspace(0.0, 0.7, 71, dtype=torch.float64)
        losses = [sum(F.cross_entropy(z.double() / t, y).item() for z, y in sets) for t in grid]
        return round(float(grid[int(np.argmin(losses))]), 4)

    def export(self, modules: dict[str, nn.Module], path: Path) -> None:
        """Calibrated recogniser, stored in half precision, with its validation figures."""
        model = modules["recogniser"]
        config = dataclasses.replace(self.model_config, temperature=self.temperature(model))
        tensors = {k: v.detach().cpu().half() for k, v in model.state_dict().items()}
        extra = {"validation": self.validate(modules)}
        save_checkpoint(path, KIND, to_dict(config), tensors, extra)
