"""Blocks that classifier and ScoreSubnet share: noise embedding, norm with FiLM, residual block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from fastscore_kernels import norm_act
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    """Sinusoidal features of c_noise followed by a two-layer perceptron.

    c_noise [B] fp32 -> [B, dim] (Vaswani et al. 2017 features, Karras et al. 2022 argument).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # c_noise = log(sigma) / 4 spans about -2 to 1; periods from 0.06 to 25 resolve and cover it
        freqs = 2 * math.pi * torch.exp(torch.linspace(math.log(0.04), math.log(16.0), 16))
        self.register_buffer("freqs", freqs, persistent=False)
        self.fc1 = nn.Linear(32, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Embed c_noise [B] into [B, dim]."""
        angle = c_noise[:, None].float() * self.freqs
        features = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.fc1.weight.dtype)
        return F.silu(self.fc2(F.silu(self.fc1(features))))


class NormAct(nn.Module):
    """GroupNorm, optional FiLM from an embedding, SiLU; one fused operation.

    x [B, C, H, W], emb [B, E] -> [B, C, H, W] in x's dtype, statistics in fp32.
    """

    def __init__(self, channels: int, groups: int, emb_dim: int | None = None) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.film = nn.Linear(emb_dim, 2 * channels) if emb_dim else None
        if self.film is not None:
            zero_init(self.film)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """Normalise, modulate and activate."""
        scale, shift = (None, None) if self.film is None else self.film(emb).chunk(2, dim=1)
        return norm_act(x, self.groups, self.weight, self.bias, scale, shift)


class ResBlock(nn.Module):
    """Pre-activation residual block with FiLM on its second norm (Dhariwal and Nichol 2021).

    x [B, C, H, W], emb [B, E] -> [B, C, H, W].
    """

    def __init__(self, channels: int, groups: int, emb_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = NormAct(channels, groups)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = NormAct(channels, groups, emb_dim)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Add the block's residual to x."""
        y = self.conv1(self.norm1(x))
        return x + self.conv2(self.dropout(self.norm2(y, emb)))


def zero_init(layer: nn.Module) -> nn.Module:
    """Zero a layer's weight and bias, so that a residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
