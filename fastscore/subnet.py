"""ScoreSubnet: a small decoder that reads a frozen classifier's taps and predicts the score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fastscore_kernels import Norms, Projections, dense, tap_fuse, tap_norm, tap_path
from torch import Tensor, nn

from fastscore.config import ClassifierConfig, SubnetConfig
from fastscore.layers import (
    Conditioned,
    Conv2d,
    Linear,
    NoiseEmbedding,
    NormAct,
    ResBlock,
    Upsample,
    zero_init,
)


class TapFusion(nn.Module):
    """Normalise one scale's taps and fuse them by attention.

    feature, gradient [B, C_tap, H, W] -> fused [B, C, H, W] and log RMS of the gradient [B] fp32.
    The features query the tokens of every tap in use; with one tap switched off only the other's
    tokens are attended, and with features off the gradient tap queries itself.
    """

    def __init__(
        self, config: SubnetConfig, index: int, tap_channels: int, tap_groups: int
    ) -> None:
        super().__init__()
        width = config.channels[index]
        self.backend: str | None = None
        self.heads, self.groups = config.heads, tap_groups
        self.spatial = config.attention[index]
        self.use_feature, self.use_gradient = config.feature_taps, config.gradient_taps
        self.feature_weight = nn.Parameter(torch.ones(tap_channels))
        self.feature_bias = nn.Parameter(torch.zeros(tap_channels))
        self.gradient_weight = nn.Parameter(torch.ones(tap_channels))
        self.gradient_bias = nn.Parameter(torch.zeros(tap_channels))
        self.query = nn.Conv2d(tap_channels, width, 1)
        taps_in_use = int(self.use_feature) + int(self.use_gradient)
        self.key_value = nn.ModuleList(
            nn.Conv2d(tap_channels, 2 * width, 1) for _ in range(taps_in_use)
        )
        self.skip = nn.Conv2d(taps_in_use * tap_channels, width, 1)
        self.out = zero_init(nn.Conv2d(width, width, 1))

    def forward(self, feature: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse the taps of one scale."""
        norms = Norms(
            self.feature_weight, self.feature_bias, self.gradient_weight, self.gradient_bias
        )
        if self.use_feature and self.use_gradient and not _autocasting(feature):
            first, second = self.key_value
            layers = (self.query, first, second, self.skip, self.out)
            projections = Projections(*(p for m in layers for p in (m.weight, m.bias)))
            return tap_path(
                feature,
                gradient,
                norms,
                projections,
                self.groups,
                self.heads,
                self.spatial,
                backend=self.backend,
            )
        return self._fuse(feature, gradient, norms)

    def _fuse(self, feature: Tensor, gradient: Tensor, norms: Norms) -> tuple[Tensor, Tensor]:
        """One scale operation by operation: any taps in use, and autocast for training."""
        taps, log_rms = tap_norm(feature, gradient, self.groups, *norms, backend=self.backend)
        c = feature.shape[1]
        used = slice(0 if self.use_feature else c, 2 * c if self.use_gradient else c)
        halves = taps[:, used].split(c, dim=1)
        query, *tokens = (
            dense(m(t))
            for m, t in zip((self.query, *self.key_value), (halves[0], *halves), strict=True)
        )
        second = tokens[1] if len(tokens) > 1 else None
        fused = tap_fuse(query, tokens[0], second, self.heads, self.spatial, self.backend)
        return self.skip(taps[:, used]) + self.out(fused), log_rms


def _autocasting(t: Tensor) -> bool:
    # of a kind of device that knows no autocast PyTorch will not be asked
    return t.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(t.device.type)


class ScoreSubnet(Conditioned):
    """Decoder over feature and gradient taps (Makarov and Gerkmann 2026, arXiv 2606.20457).

    It returns the raw network output S of the EDM preconditioning, [B, 1, n_mels, frames]; the
    denoiser turns it into x0. The noise embedding also carries log RMS of every gradient tap, since
    normalisation removes it and it tells how sure the classifier is.
    """

    def __init__(self, config: SubnetConfig, classifier: ClassifierConfig) -> None:
        super().__init__()
        if len(config.channels) != len(classifier.channels):
            raise ValueError(
                f"ScoreSubnet: {len(config.channels)} scales for a classifier with "
                f"{len(classifier.channels)} taps; give channels one entry a tap"
            )
        self.config = config
        self.patch = classifier.patch
        scales = range(len(config.channels))
        self.embedding = NoiseEmbedding(config.emb_dim)
        self.magnitude = zero_init(Linear(len(config.channels), config.emb_dim))
        self.stem = Conv2d(classifier.patch**2, config.channels[0], 3, padding=1)
        self.band = nn.Parameter(
            torch.zeros(1, config.channels[0], classifier.n_mels // classifier.patch, 1)
        )
        self.fusion = nn.ModuleList(
            TapFusion(config, i, classifier.channels[i], classifier.groups) for i in scales
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(
                ResBlock(config.channels[i], config.groups, config.emb_dim, config.dropout)
                for _ in range(config.blocks[i])
            )
            for i in scales
        )
        self.up = nn.ModuleList(
            Upsample(config.channels[i], config.channels[i - 1]) for i in scales if i
        )
        self.norm = NormAct(config.channels[0], config.groups)
        self.out = zero_init(Conv2d(config.channels[0], classifier.patch**2, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        features: tuple[Tensor, ...],
        gradients: tuple[Tensor, ...],
    ) -> Tensor:
        """Raw output S(c_in x, c_noise, {h_l}, {g_l}) [B, 1, n_mels, frames].

        x [B, 1, n_mels, frames] and c_noise [B], or patches and features of them.
        """
        fused, log_rms = zip(
            *(m(f, g) for m, f, g in zip(self.fusion, features, gradients, strict=True)),
            strict=True,
        )
        emb = self.embedding(c_noise)
        if self.config.gradient_taps:
            # log RMS lies between about -20 and 0: a tenth of it is of order one
            emb = emb + self.magnitude(torch.stack(log_rms, dim=1).to(emb.dtype) * 0.1)
        condition = self.condition(emb)
        h = fused[-1]
        for i in reversed(range(len(self.stages))):
            if i == 0:
                h = self.stem.complete(self.stem.product(self.patches(x)), h, self.band)
            for block in self.stages[i]:
                h = block(h, condition)
            if i:
                h = self.up[i - 1](h, fused[i - 1])
        return F.pixel_shuffle(self.out(self.norm(h)), self.patch)
