"""Clips to draw at once: what differs between them, split and filled up to sizes of batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clips:
    """A label index (-1: unguided), a strength, a seed and a sample number for each clip.

    ``known`` and ``mask`` [n, ...], both or neither, are what is given of each clip and where.
    """

    labels: Sequence[int]
    gammas: Sequence[float]
    seeds: Sequence[int]
    numbers: Sequence[int]
    known: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> Clips:
        values = (getattr(self, field.name) for field in fields(self))
        return Clips(*(None if value is None else value[part] for value in values))

    @property
    def guided(self) -> bool:
        """Whether any of them is."""
        return any(label >= 0 for label in self.labels)

    def tensors(self, size: int) -> dict[str, Tensor]:
        """What a batch of ``size`` reads, the last clip repeated where there are fewer."""
        missing = size - len(self)
        labels, gammas, seeds, numbers = (
            [*values, *itertools.repeat(values[-1], missing)]
            for values in (self.labels, self.gammas, self.seeds, self.numbers)
        )
        found = {
            "label": torch.tensor(labels, dtype=torch.int64),
            "gamma": torch.tensor(gammas, dtype=torch.float32),
            "seeds": torch.tensor(seeds, dtype=torch.int64),
            "numbers": torch.tensor(numbers, dtype=torch.int64),
        }
        for name, value in (("known", self.known), ("mask", self.mask)):
            if value is not None:
                found[name] = torch.cat((value, value[-1:].expand(missing, *value.shape[1:])))
        return found


def joined(parts: Sequence[Clips]) -> Clips:
    """Clips of several, none of which is known in part."""
    names = ("labels", "gammas", "seeds", "numbers")
    return Clips(*(list(itertools.chain(*(getattr(p, name) for p in parts))) for name in names))


def check_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    """Sizes of batches in ascending order; ValueError unless whole, positive and different."""
    sizes = tuple(sorted(buckets))
    if not sizes or len(set(sizes)) < len(sizes) or sizes[0] < 1:
        raise ValueError(
            f"buckets {tuple(buckets)} must be different batch sizes of at least 1, such as "
            "(1, 2, 4, 8)"
        )
    return sizes


def bucket_for(count: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds ``count`` clips, or the largest there is."""
    return next((size for size in buckets if size >= count), buckets[-1])
