"""What a training consists of: its settings, and the protocol of the tasks it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class DivergenceError(RuntimeError):
    """The loss or its gradients were not finite for many steps in a row."""


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the training loop.

    ``batch_size`` is per process; ``clip_norm`` None switches clipping off; ``devices`` counts
    processes on this machine (torchrun overrides it); ``num_threads`` None keeps PyTorch's own.
    """

    steps: int = 10000
    batch_size: int = 64
    lr: float = 1e-3
    warmup_steps: int = 200
    final_lr_ratio: float = 0.01
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    ema_decay: float = 0.999
    clip_norm: float | None = 1.0
    precision: str = "32-true"
    seed: int = 0
    log_every: int = 50
    validate_every: int = 1000
    checkpoint_minutes: float = 10.0
    accelerator: str = "auto"
    devices: int = 1
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "validate_every", "devices"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "checkpoint_minutes"):
            self._require(name, getattr(self, name) > 0, "positive")
        for name in ("warmup_steps", "weight_decay", "seed"):
            self._require(name, getattr(self, name) >= 0, "zero or more")
        self._require("final_lr_ratio", 0 <= self.final_lr_ratio <= 1, "between 0 and 1")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "at least 0 and below 1")
        betas = self.betas
        self._require("betas", len(betas) == 2 and all(0 <= b < 1 for b in betas), "two in [0, 1)")
        clip = self.clip_norm
        self._require("clip_norm", clip is None or 0 < clip < math.inf, "positive or None")
        threads = self.num_threads
        self._require("num_threads", threads is None or threads >= 1, "at least 1 or None")
        self._require("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        kinds = ("auto", "cpu", "cuda")
        self._require("accelerator", self.accelerator in kinds, f"one of {', '.join(kinds)}")

    def _require(self, name: str, ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"LoopConfig: {name} {getattr(self, name)!r} must be {what}")


class Task(Protocol):
    """What is trained: modules, batches, losses, validation and export.

    A task may also have ``setup(device, autocast) -> None``, called once before the first step, to
    move what is not trained (a frozen classifier) to the device; ``autocast()`` returns the
    training's precision context for calls of such modules.
    """

    name: str
    # one optimizer a module, stepped in this order
    trained: dict[str, nn.Module]
    # which of them get an exponential moving average
    ema: tuple[str, ...]
    # JSON-ready; stored in the resume state and compared on resume
    config: dict[str, Any]

    def batch(self, step: int, rng: torch.Generator, rank: int, world: int) -> dict[str, Any]:
        """Batch of a step, on the CPU: a pure function of its arguments (``rng`` is seeded so).

        On a GPU it runs in a background thread, one step ahead.
        """
        ...

    def loss(
        self, name: str, modules: dict[str, nn.Module], batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of module ``name`` and further scalars to report.

        Modules must be called (not their methods), so that several processes stay in step.
        ``batch`` may carry tensors, graphs included, to the calls for modules later in the order.
        """
        ...

    def validate(self, modules: dict[str, nn.Module]) -> dict[str, float]:
        """Metrics of the averaged weights; modules are in evaluation mode, gradients are off."""
        ...

    def export(self, modules: dict[str, nn.Module], path: Path) -> None:
        """Write the averaged weights as a fastscore checkpoint at ``path``."""
        ...


def learning_rate(config: LoopConfig, step: int) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then half a cosine downwards."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


def check_task(task: Task) -> None:
    """Raise ValueError unless the task trains something and averages only what it trains."""
    if not task.trained:
        raise ValueError(f"task {task.name!r} trains no module; name at least one")
    for name in task.ema:
        if name not in task.trained:
            raise ValueError(
                f"task {task.name!r} averages {name!r}, which is not among its trained modules "
                f"{', '.join(task.trained)}"
            )
    for name, module in task.trained.items():
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"module {name!r} has no parameter to train; all are frozen")
