"""Clips to draw at once: what differs between them, split and filled up to sizes of batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastscore.inpaint import Inpainting

# columns of clips, and their types as a batch reads them
_COLUMNS = {
    "labels": torch.int64,
    "gammas": torch.float32,
    "seeds": torch.int64,
    "numbers": torch.int64,
}


@dataclass(frozen=True)
class Clips:
    """A label index (-1: unguided), a strength, a seed and a sample number for each clip.

    ``inpainting`` is what is known of them.
    """

    labels: Sequence[int]
    gammas: Sequence[float]
    seeds: Sequence[int]
    numbers: Sequence[int]
    inpainting: Inpainting | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> Clips:
        known = self.inpainting
        return Clips(
            *(getattr(self, name)[part] for name in _COLUMNS),
            inpainting=known and known.rows(range(len(self))[part]),
        )

    @property
    def guided(self) -> bool:
        """Whether any of them is."""
        return any(label >= 0 for label in self.labels)

    def tensors(self, size: int) -> dict[str, Tensor]:
        """What a batch of ``size`` reads, the last clip repeated where there are fewer."""
        rows = [*range(len(self)), *itertools.repeat(len(self) - 1, size - len(self))]
        found = {
            name: torch.tensor([getattr(self, name)[row] for row in rows], dtype=dtype)
            for name, dtype in _COLUMNS.items()
        }
        if self.inpainting is not None:
            known = self.inpainting.rows(rows)
            found |= {
                "known": known.known.expand(size, *known.known.shape[1:]),
                "mask": known.mask.expand(size, *known.mask.shape[1:]),
                "strength": torch.as_tensor(known.strength, dtype=torch.float32),
            }
        return found


def joined(parts: Sequence[Clips]) -> Clips:
    """Clips of several, none of which is known in part."""
    return Clips(*(list(itertools.chain(*(getattr(p, name) for p in parts))) for name in _COLUMNS))


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
