"""The baseline: a U-Net score network as the field builds it (ADM blocks, EDM preconditioning)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fastscore_kernels import tap_fuse
from torch import Tensor, nn

from fastscore.config import UNetConfig
from fastscore.layers import (
    Condition,
    Conditioned,
    Conv2d,
    NoiseEmbedding,
    NormAct,
    Upsample,
    zero_init,
)


class SelfAttention(nn.Module):
    """Residual multi-head self-attention over all positions (Dhariwal and Nichol 2021).

    x [B, C, H, W] -> [B, C, H, W]; the norm's statistics are fp32, as in ADM's GroupNorm32.
    """

    def __init__(self, channels: int, groups: int, heads: int) -> None:
        super().__init__()
        self.backend: str | None = None
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Add what every position gathers from all positions."""
        c = x.shape[1]
        y = self.norm(x.float()).to(x.dtype)
        query, tokens = self.qkv(y).split((c, 2 * c), dim=1)
        # a slice of channels-last channels is strided; the kernel wants its rows dense
        query, tokens = _dense(query), _dense(tokens)
        fused = tap_fuse(query, tokens, None, self.heads, True, self.backend)
        return self.out.complete(self.out.product(fused), x)


class UNetBlock(nn.Module):
    """Residual block that may change the width, with attention on request.

    x [B, C_in, H, W], emb [B, E] or `FilmRows` -> [B, C_out, H, W]; norm, SiLU,
    convolution, norm with FiLM, SiLU, convolution.
    """

    def __init__(self, config: UNetConfig, level: int, channels_in: int) -> None:
        super().__init__()
        width = config.channels[level]
        self.norm1 = NormAct(channels_in, config.groups)
        self.conv1 = Conv2d(channels_in, width, 3, padding=1)
        self.norm2 = NormAct(width, config.groups, config.emb_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zero_init(Conv2d(width, width, 3, padding=1))
        self.skip = Conv2d(channels_in, width, 1) if channels_in != width else nn.Identity()
        self.attention = (
            SelfAttention(width, config.groups, config.heads)
            if config.attention[level]
            else nn.Identity()
        )

    def forward(self, x: Tensor, emb: Condition) -> Tensor:
        """Add the block's residual to x, then attend."""
        y = self.norm2(self.conv1.product(self.norm1(x)), emb, self.conv1.deferred)
        y = self.conv2.product(self.dropout(y))
        return self.attention(self.conv2.complete(y, self.skip(x)))


class UNet(Conditioned):
    """U-Net with concatenated skips, FiLM by noise level, and attention at low resolution.

    Raw output S(c_in x, c_noise) of the EDM preconditioning (Karras et al. 2022), in the form of
    Dhariwal and Nichol 2021 (ADM): an encoder whose every stage leaves a skip, a middle, and a
    decoder of one block more a level. It reads and writes patches and knows the Mel band, as the
    classifier and ScoreSubnet do, so a comparison with them is one of architectures.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = config.patch
        first = config.channels[0]
        self.embedding = NoiseEmbedding(config.emb_dim)
        self.stem = Conv2d(config.patch**2, first, 3, padding=1)
        self.band = nn.Parameter(torch.zeros(1, first, config.n_mels // config.patch, 1))
        levels = range(len(config.channels))
        skips, width = [first], first
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        for level in levels:
            if level:
                self.down.append(Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
            stage = nn.ModuleList()
            for _ in range(config.blocks[level]):
                stage.append(UNetBlock(config, level, width))
                width = config.channels[level]
                skips.append(width)
            self.encoder.append(stage)
        self.middle = nn.ModuleList(UNetBlock(config, levels[-1], width) for _ in range(2))
        # its second block looks at nothing but its surroundings, as ADM's
        self.middle[1].attention = nn.Identity()
        self.decoder, self.up = nn.ModuleList(), nn.ModuleList()
        for level in reversed(levels):
            stage = nn.ModuleList()
            for _ in range(config.blocks[level] + 1):
                stage.append(UNetBlock(config, level, width + skips.pop()))
                width = config.channels[level]
            self.decoder.append(stage)
            if level:
                self.up.append(Upsample(width, config.channels[level - 1]))
                width = config.channels[level - 1]
        self.norm = NormAct(width, config.groups)
        self.out = zero_init(Conv2d(width, config.patch**2, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Raw output S [B, 1, n_mels, frames] of c_in x, shaped so, and c_noise [B].

        Patches and features of them will do.
        """
        emb = self.condition(self.embedding(c_noise))
        h = self.stem.complete(self.stem.product(self.patches(x)), band=self.band)
        skips = [h]
        for level, stage in enumerate(self.encoder):
            if level:
                h = self.down[level - 1](h)
                skips.append(h)
            for block in stage:
                h = block(h, emb)
                skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for level, stage in enumerate(self.decoder):
            for block in stage:
                h = block(torch.cat((h, skips.pop()), dim=1), emb)
            if level < len(self.up):
                h = self.up[level](h)
        return F.pixel_shuffle(self.out(self.norm(h)), self.patch)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
