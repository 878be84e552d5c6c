"""The problems that kernels are built for ahead of time: those of the models' presets, as numbers.

Kernels know no model. A test holds these equal to ``fastscore.config``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Classifier:
    """Channels of each stage, and the groups of its norms."""

    channels: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Subnet:
    """Channels of each scale, groups of its norms, heads, and where attention is spatial."""

    channels: tuple[int, ...]
    groups: int
    heads: int
    attention: tuple[bool, ...]


# height and width of each stage's activations
PLANES = ((40, 32), (20, 16), (10, 8))
# Mel bands and frames of a sample
SAMPLE = (80, 64)
CLASSIFIERS = {
    "tiny": Classifier((32, 64, 128), 8),
    "paper": Classifier((192, 208, 256), 8),
}
SUBNETS = {
    "tiny": Subnet((32, 80, 128), 8, 4, (False, False, True)),
    "paper": Subnet((144, 112, 112), 8, 4, (False, True, True)),
}
BATCHES = (1, 8, 64)
DTYPES = ("float32", "bfloat16", "float16")
EPS = 1e-5
