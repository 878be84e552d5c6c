"""HiFi-GAN generator (Kong et al. 2020, arXiv 2010.05646) with the published code's numerics."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.config import HifiGanConfig, MelConfig

# before the last convolution: PyTorch's default, which the published code falls back to
_LAST_SLOPE = 0.01

_V1 = HifiGanConfig()
# the shapes of the paper's table 1 for a hop of 256 samples
PRESETS = {
    "v1": _V1,
    "v2": dataclasses.replace(_V1, upsample_initial_channel=128),
    "v3": HifiGanConfig(
        resblock="2",
        upsample_rates=(8, 8, 4),
        upsample_kernel_sizes=(16, 16, 8),
        upsample_initial_channel=256,
        resblock_kernel_sizes=(3, 5, 7),
        resblock_dilation_sizes=((1, 2), (2, 6), (3, 12)),
    ),
}


def _conv(channels: int, kernel_size: int, dilation: int) -> nn.Conv1d:
    padding = dilation * (kernel_size - 1) // 2
    return nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding=padding)


class ResBlock1(nn.Module):
    """Residual block of pairs of convolutions, the first of a pair dilated: [B, C, T] -> same."""

    def __init__(
        self, channels: int, kernel_size: int, dilations: tuple[int, ...], slope: float
    ) -> None:
        super().__init__()
        self.slope = slope
        self.convs1 = nn.ModuleList(_conv(channels, kernel_size, d) for d in dilations)
        self.convs2 = nn.ModuleList(_conv(channels, kernel_size, 1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """Sum of x and the residuals of all pairs."""
        for first, second in zip(self.convs1, self.convs2, strict=True):
            y = first(F.leaky_relu(x, self.slope))
            x = second(F.leaky_relu(y, self.slope)) + x
        return x


class ResBlock2(nn.Module):
    """Residual block of single dilated convolutions: [B, C, T] -> same."""

    def __init__(
        self, channels: int, kernel_size: int, dilations: tuple[int, ...], slope: float
    ) -> None:
        super().__init__()
        self.slope = slope
        self.convs = nn.ModuleList(_conv(channels, kernel_size, d) for d in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """Sum of x and the residuals of all convolutions."""
        for conv in self.convs:
            x = conv(F.leaky_relu(x, self.slope)) + x
        return x


class HifiGanGenerator(nn.Module):
    """Waveform from a natural-log Mel by transposed convolutions and multi-receptive-field fusion.

    Parameter names are those of the published checkpoints, weight normalisation folded.
    """

    def __init__(self, config: HifiGanConfig) -> None:
        super().__init__()
        self.config = config
        width = config.upsample_initial_channel
        self.conv_pre = nn.Conv1d(config.mel.n_mels, width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        block = ResBlock1 if config.resblock == "1" else ResBlock2
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            # the output padding makes odd differences come out at exactly rate times the length
            extra = (kernel - rate) % 2
            padding = (kernel - rate + extra) // 2
            self.ups.append(
                nn.ConvTranspose1d(
                    width, width // 2, kernel, rate, padding=padding, output_padding=extra
                )
            )
            width //= 2
            for size, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            ):
                self.resblocks.append(block(width, size, dilations, config.leaky_relu_slope))
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)
        if config.normalize_before:
            self.register_buffer("mean", torch.zeros(config.mel.n_mels))
            self.register_buffer("scale", torch.ones(config.mel.n_mels))
        self._initialise()

    @property
    def mel_config(self) -> MelConfig:
        """Mel front end that this generator inverts."""
        return self.config.mel

    def forward(self, mel: Tensor) -> Tensor:
        """Waveform [B, T * hop] in (-1, 1) from an un-normalised natural-log Mel [B, n_mels, T]."""
        slope = self.config.leaky_relu_slope
        blocks = len(self.config.resblock_kernel_sizes)
        if self.config.normalize_before:
            mel = (mel - self.mean.unsqueeze(-1)) / self.scale.unsqueeze(-1)
        x = self.conv_pre(mel)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, slope))
            total = self.resblocks[i * blocks](x)
            for j in range(i * blocks + 1, (i + 1) * blocks):
                total = total + self.resblocks[j](x)
            x = total / blocks
        x = self.conv_post(F.leaky_relu(x, _LAST_SLOPE))
        return torch.tanh(x).squeeze(1)

    def _initialise(self) -> None:
        """Normal with deviation 0.01; the first convolution keeps PyTorch's default."""
        for module in (*self.ups.modules(), *self.resblocks.modules(), self.conv_post):
            if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
                nn.init.normal_(module.weight, std=0.01)


def receptive_frames(config: HifiGanConfig) -> int:
    """Mel frames on either side that can influence the samples of one frame."""
    # walk from the output to the input, in samples of the current stage, rounded up
    reach = 3
    widest = max(
        sum((k - 1) // 2 * (d + (config.resblock == "1")) for d in dilations)
        for k, dilations in zip(
            config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
        )
    )
    for rate, kernel in zip(
        reversed(config.upsample_rates), reversed(config.upsample_kernel_sizes), strict=True
    ):
        reach = -(-(reach + widest + kernel) // rate)
    return reach + 3


@torch.no_grad()
def vocode_in_chunks(generator: HifiGanGenerator, mel: Tensor, chunk: int = 256) -> Tensor:
    """Waveform [B, T * hop] of a long Mel [B, n_mels, T], ``chunk`` frames at a time.

    Equal to ``generator(mel)`` up to rounding: chunks overlap by the receptive field. Raises
    ValueError when ``chunk`` is not positive.
    """
    if chunk <= 0:
        raise ValueError(f"vocode_in_chunks: chunk {chunk} must be 1 frame or more")
    context, hop = receptive_frames(generator.config), generator.mel_config.hop_length
    parts = []
    for start in range(0, mel.shape[-1], chunk):
        low = max(start - context, 0)
        stop = min(start + chunk, mel.shape[-1])
        wave = generator(mel[..., low : stop + context])
        parts.append(wave[:, (start - low) * hop : (stop - low) * hop])
    return torch.cat(parts, dim=1)
