"""The shapes that the models' presets give to the operations between their convolutions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastscore.config import CLASSIFIERS, SUBNETS

BATCHES = (1, 8)


class Plane(NamedTuple):
    """An activation [B, C, H, W] of a preset, and the groups of its norm."""

    preset: str
    part: str
    batch: int
    channels: int
    height: int
    width: int
    groups: int

    @property
    def positions(self) -> int:
        return self.height * self.width

    def __str__(self) -> str:
        shape = f"{self.batch} x {self.channels} x {self.height} x {self.width}"
        return f"{self.preset} {self.part} {shape}"


def _planes(preset: str, part: str, channels: tuple[int, ...], groups: int) -> list[Plane]:
    config = CLASSIFIERS[preset]
    height, width = config.n_mels // config.patch, config.frames // config.patch
    return [
        Plane(preset, part, batch, c, height >> i, width >> i, groups)
        for batch in BATCHES
        for i, c in enumerate(channels)
    ]


def classifier_planes() -> list[Plane]:
    """Taps: what tap_norm reads, one a stage."""
    return [
        plane
        for preset, config in CLASSIFIERS.items()
        for plane in _planes(preset, "classifier", config.channels, config.groups)
    ]


def norm_planes() -> list[Plane]:
    """What norm_act reads in classifier and ScoreSubnet, each shape once."""
    planes = classifier_planes()
    for preset, config in SUBNETS.items():
        planes += _planes(preset, "subnet", config.channels, config.groups)
    distinct = {(p.batch, p.channels, p.positions): p for p in reversed(planes)}
    return sorted(distinct.values())


class Fusion(NamedTuple):
    """A scale of ScoreSubnet: tap channels onto its width, and how its attention looks."""

    plane: Plane
    width: int
    heads: int
    spatial: bool

    def __str__(self) -> str:
        kind = "spatial" if self.spatial else "own"
        return f"{self.plane} -> {self.width} {kind}"


def fusions() -> list[Fusion]:
    """Every scale of every preset."""
    found = []
    for plane in classifier_planes():
        config, scales = SUBNETS[plane.preset], CLASSIFIERS[plane.preset].channels
        index = scales.index(plane.channels)
        found.append(Fusion(plane, config.channels[index], config.heads, config.attention[index]))
    return found


def activation(plane: Plane, device: torch.device, channels: int | None = None) -> Tensor:
    """Random channels-last numbers of a plane's shape, or with other channels."""
    shape = (plane.batch, channels or plane.channels, plane.height, plane.width)
    return torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
