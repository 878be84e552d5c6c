"""Noise-conditioned speech classifier over normalised log-Mels, with named feature taps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.config import ClassifierConfig
from fastscore.layers import (
    Condition,
    Conditioned,
    Conv2d,
    Linear,
    NoiseEmbedding,
    NormAct,
    Pull,
    ResBlock,
    chain,
)

# cotangents of the logits to cotangents of all taps, shallowest first
PullTaps = Callable[[Tensor], tuple[Tensor, ...]]


class Stage(nn.Module):
    """One resolution: a strided convolution in (except at the first), then residual blocks."""

    def __init__(self, config: ClassifierConfig, index: int) -> None:
        super().__init__()
        width = config.channels[index]
        self.down = (
            Conv2d(config.channels[index - 1], width, 3, stride=2, padding=1) if index else None
        )
        self.blocks = nn.ModuleList(
            ResBlock(width, config.groups, config.emb_dim, config.dropout)
            for _ in range(config.blocks[index])
        )

    def forward(self, h: Tensor, emb: Condition) -> Tensor:
        """Map the previous stage's tap to this stage's."""
        if self.down is not None:
            h = self.down(h)
        for block in self.blocks:
            h = block(h, emb)
        return h

    def linearize(self, h: Tensor, emb: Condition) -> tuple[Tensor, Pull]:
        """``forward`` without dropout and its pull-back to h."""
        pulls = []
        if self.down is not None:
            h, pull = self.down.linearize(h)
            h = self.down.complete(h)
            pulls.append(pull)
        for block in self.blocks:
            h, pull = block.linearize(h, emb)
            pulls.append(pull)
        return h, chain(pulls)


class Classifier(Conditioned):
    """Residual classifier f(c_in x, c_noise) -> logits, with one tap a stage.

    It is split at its shallowest tap: ``lower`` maps the input to that tap and ``upper`` maps the
    tap to the logits, so that gradient taps never cost a pass below it. Any module with
    ``config``, ``embed``, ``lower`` and ``upper`` of these signatures can take its place; with
    ``linearize_lower`` and ``linearize_upper`` besides, no transform of PyTorch's is needed. Inputs
    are x [B, 1, n_mels, frames] and c_noise [B], or patches and features (`fastscore_kernels.
    edm_inputs`).
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = config.patch
        width, last = config.channels[0], config.channels[-1]
        self.embedding = NoiseEmbedding(config.emb_dim)
        self.stem = Conv2d(config.patch**2, width, 3, padding=1)
        # convolutions are blind to absolute pitch; a Mel band's place is what tells a vowel
        self.band = nn.Parameter(torch.zeros(1, width, config.n_mels // config.patch, 1))
        self.stages = nn.ModuleList(Stage(config, i) for i in range(len(config.channels)))
        self.norm = NormAct(last, config.groups)
        self.head = Linear(last, len(config.labels))

    def embed(self, c_noise: Tensor) -> Condition:
        """Noise embedding, [B] -> [B, emb_dim], as ``lower`` and ``upper`` take it."""
        return self.condition(self.embedding(c_noise))

    def lower(self, x: Tensor, emb: Condition) -> Tensor:
        """Shallowest tap [B, C_1, n_mels / patch, frames / patch] of x [B, 1, n_mels, frames]."""
        h = self.stem.product(self.patches(x))
        return self.stages[0](self.stem.complete(h, band=self.band), emb)

    def upper(
        self, h: Tensor, emb: Condition, perturb: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Shallowest tap to logits [B, K] and all taps, shallowest first.

        ``perturb`` holds one tensor a tap, added to it: at zero, derivatives with respect to the
        perturbations are the gradient taps.
        """
        taps = []
        for i, stage in enumerate(self.stages):
            if i:
                h = stage(h, emb)
            if perturb is not None:
                h = h + perturb[i]
            taps.append(h)
        return self._logits(self.norm(h)), tuple(taps)

    def _logits(self, y: Tensor) -> Tensor:
        # pooled in the head's type, which stays wide where convolutions are narrow
        return self.head(y.mean(dim=(2, 3), dtype=self.head.weight.dtype))

    def linearize_lower(self, x: Tensor, emb: Condition) -> tuple[Tensor, Pull]:
        """``lower`` without dropout and its pull-back to x."""
        h, pull_stem = self.stem.linearize(self.patches(x))
        h = self.stem.complete(h, band=self.band)
        h, pull_stage = self.stages[0].linearize(h, emb)

        def pull(grad: Tensor) -> Tensor:
            return F.pixel_shuffle(pull_stem(pull_stage(grad)), self.patch)

        return h, pull

    def linearize_upper(
        self, h: Tensor, emb: Condition
    ) -> tuple[Tensor, tuple[Tensor, ...], PullTaps]:
        """``upper`` without dropout: logits, taps, and the pull-back of logits to all taps."""
        taps, pulls = [h], []
        for stage in self.stages[1:]:
            h, pull = stage.linearize(h, emb)
            taps.append(h)
            pulls.append(pull)
        y, pull_norm = self.norm.linearize(h)
        size = y.shape[2] * y.shape[3]

        def pull_taps(grad: Tensor) -> tuple[Tensor, ...]:
            pooled = (self.head.pull(grad) / size).to(y.dtype)[:, :, None, None]
            # channels-last whatever y is: a dense cotangent is all that its pull-back asks for
            spread = pooled.expand(-1, -1, *y.shape[2:])
            spread = spread.contiguous(memory_format=torch.channels_last)
            found = [pull_norm(spread)]
            for pull in reversed(pulls):
                found.append(pull(found[-1]))
            return tuple(reversed(found))

        return self._logits(y), tuple(taps), pull_taps

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Logits [B, K] of x = c_in (x0 + sigma eps) [B, 1, n_mels, frames] and c_noise [B]."""
        emb = self.embed(c_noise)
        return self.upper(self.lower(x, emb), emb)[0]
