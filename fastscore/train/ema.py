"""Exponential moving average of a module's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def decay_at(step: int, decay: float) -> float:
    """Decay of step ``step`` (from 0): min(decay, (1 + step) / (10 + step)), a warm start."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """Average of every floating-point tensor of a module's state; others follow the module."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        # state_dict returns the live storage, which optimizers change in place
        self._live = dict(module.state_dict())
        self.average = {name: tensor.clone() for name, tensor in self._live.items()}
        self._floating = [name for name, t in self._live.items() if t.is_floating_point()]
        self._others = [name for name, t in self._live.items() if not t.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the module's present weights after step ``step`` (from 0)."""
        average = [self.average[name] for name in self._floating]
        live = [self._live[name] for name in self._floating]
        torch._foreach_lerp_(average, live, 1.0 - decay_at(step, self.decay))
        for name in self._others:
            self.average[name].copy_(self._live[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module the averaged weights inside the block, and its own back, to the bit."""
        backup = {name: tensor.clone() for name, tensor in self._live.items()}
        try:
            _copy(self.average, self._live)
            yield
        finally:
            _copy(backup, self._live)

    def load(self, average: dict[str, Tensor]) -> None:
        """Take over a stored average with the same names and shapes."""
        _copy(average, self.average)


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
