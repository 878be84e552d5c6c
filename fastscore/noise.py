"""Noise of a batch, a seed a sample: bits depend on seed, number and step alone.

The numbers come from `fastscore_kernels.normals`, counter-based and equal to the bit on every
backend, processor and batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from fastscore_kernels import normals
from torch import Tensor

SEED_LIMIT = 2**63
# step 0 draws the initial state; step i of a sampler draws at i + 1
INITIAL_STEP = 0

_WORD = 2**32
# Philox blocks worked on at once on a CPU: the temporaries of more leave the second-level cache
_TILE = 10240


def seed_tensor(seeds: Tensor | Iterable[int], device: torch.device | str = "cpu") -> Tensor:
    """Seeds as int64 [B]; ValueError unless every one is a whole number with 0 <= seed < 2^63."""
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.ndim != 1:
            raise ValueError(
                f"seeds are {seeds.dtype} of shape {tuple(seeds.shape)}; pass int64 [batch]"
            )
        seeds = seeds.tolist()
    values = list(seeds)
    for seed in values:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
            raise ValueError(
                f"seed {seed!r} is not a whole number from 0 to 2^63 - 1; choose one there"
            )
    return torch.tensor(values, dtype=torch.int64, device=device)


class NoiseSource:
    """Noise of a batch, a seed a sample: ``source(step, shape, draw)`` is N(0, 1), [B, ...] fp32.

    ``seeds`` are int64 [B] or whole numbers, 0 <= seed < 2^63; ``samples`` number the samples that
    share a seed (default 0), 0 <= number < 2^32. ``draw`` tells several draws within a step apart.
    ValueError when a seed or number is out of range, or when ``shape[0]`` is not B.
    """

    def __init__(
        self,
        seeds: Tensor | Iterable[int],
        samples: Tensor | Iterable[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seeds = seed_tensor(seeds, device)
        self.samples = (
            torch.zeros_like(self.seeds) if samples is None else seed_tensor(samples, device)
        )
        if self.samples.shape != self.seeds.shape:
            raise ValueError(
                f"{len(self.samples)} sample numbers for {len(self.seeds)} seeds; pass one for each"
            )
        if len(self.samples) and int(self.samples.max()) >= _WORD:
            raise ValueError(
                f"sample number {int(self.samples.max())} is not below 2^32; use another seed"
            )
        self._kept: dict[int, tuple[tuple[int, tuple[int, ...]], Tensor]] = {}

    def __call__(self, step: int, shape: Sequence[int], draw: int = 0) -> Tensor:
        """Noise [B, ...] fp32 of ``shape`` for one step.

        A small batch on a CPU draws the steps that share a tile at once and hands them out as
        asked: the same bits, but the cost of some hundred tensor operations is paid once a tile.
        """
        ahead = 1
        if self.seeds.device.type == "cpu":
            ahead = max(1, _TILE * 4 // max(1, math.prod(shape)))
        first, shape = step - step % ahead, tuple(shape)
        kept = self._kept.get(draw)
        if kept is None or kept[0] != (first, shape):
            block = self.block(range(first, min(first + ahead, _WORD)), shape, draw)
            kept = self._kept[draw] = ((first, shape), block)
        # a copy: the caller may work in place
        return kept[1][step - first].clone()

    @classmethod
    def over(cls, seeds: Tensor, samples: Tensor) -> NoiseSource:
        """Noise of seeds and sample numbers [B] int64 that change in place, as buffers do.

        Their range is not looked at: that would wait for the device.
        """
        source = cls.__new__(cls)
        source.seeds, source.samples, source._kept = seeds, samples, {}
        return source

    def counters(self, step: int | Tensor) -> Tensor:
        """Counters [B, 3] int64 of a step's first draw: seed, sample number, step.

        ``step`` is a number, or a tensor of one on the seeds' device.
        """
        if isinstance(step, Tensor):
            steps = step.expand_as(self.seeds)
        elif 0 <= step < _WORD:
            steps = torch.full_like(self.seeds, step)
        else:
            raise ValueError(f"noise step {step} is not in 0 .. 2^32 - 1")
        return torch.stack((self.seeds, self.samples, steps), dim=1)

    def initial(self, shape: Sequence[int], backend: str | None = None) -> Tensor:
        """Noise [B, ...] fp32 of the initial state; waits for no device."""
        step = torch.full((1,), INITIAL_STEP, dtype=torch.int64, device=self.seeds.device)
        size = math.prod(shape[1:])
        drawn = normals(self.seeds, self.samples, step, size, backend=backend)
        return drawn.reshape(tuple(shape))

    def block(self, steps: Sequence[int], shape: Sequence[int], draw: int = 0) -> Tensor:
        """Noise [S, B, ...] fp32 of several steps at once, the same bits as S single calls."""
        if not shape or shape[0] != len(self.seeds):
            raise ValueError(
                f"noise of shape {tuple(shape)} was asked for a batch of {len(self.seeds)} seeds; "
                "give one seed a sample"
            )
        for number in (*steps, draw):
            if not 0 <= number < _WORD:
                raise ValueError(f"noise step or draw {number} is not in 0 .. 2^32 - 1")
        steps_tensor = _numbers(steps, self.seeds.device)
        size = math.prod(shape[1:])
        rows = len(self.seeds)
        if self.seeds.device.type == "cpu":
            rows = max(1, _TILE * 4 // max(1, size * len(steps)))
        pieces = [
            normals(seeds, samples, steps_tensor, size, draw)
            for seeds, samples in zip(self.seeds.split(rows), self.samples.split(rows), strict=True)
        ]
        return torch.cat(pieces, dim=1).reshape(len(steps), *shape)


def _numbers(steps: Sequence[int], device: torch.device) -> Tensor:
    """Step numbers as int64 [S]; a range is made on the device, which then is not waited for."""
    if isinstance(steps, range) and len(steps):
        return torch.arange(steps.start, steps.stop, steps.step, device=device)
    return torch.tensor(list(steps), dtype=torch.int64, device=device)
