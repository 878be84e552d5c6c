"""Blocks that the networks share: noise embedding, norm with FiLM, residual block, upsampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from fastscore_kernels import bias_add, norm_act, norm_act_linearize, resolve
from torch import Tensor, nn

# the pull-back of a linear map: cotangents of its output, any number for each sample (row i belongs
# to sample i % B), to cotangents of its input
Pull = Callable[[Tensor], Tensor]
# that of a norm, which takes besides what else flows into its input, to be added, or None
PullNorm = Callable[..., Tensor]


class Prepared(Protocol):
    """A layer's weight as some library's kernels want it: `fastscore.packed` makes them."""

    def takes(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether it may stand in for ``layer`` on x; ValueError where the weight has changed."""
        ...

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """``layer(x)``."""
        ...

    def pull(self, layer: nn.Module, grad: Tensor, padding: Sequence[int] = ()) -> Tensor:
        """Cotangents of the input; a convolution wants the transposed one's output padding."""
        ...


class FilmRows(NamedTuple):
    """FiLM rows [B, sum of 2 C] of all norms of a network, each norm's at its ``place``."""

    rows: Tensor


# what norms take their FiLM from: an embedding [B, E], or rows that are computed already
Condition = Tensor | FilmRows


class Stacked(Protocol):
    """The FiLM layers of one network as one matrix product: `fastscore.stacked` makes it."""

    def __call__(self, emb: Tensor) -> Condition:
        """Rows of every norm; emb itself where the layers must be seen one by one."""
        ...


class Conditioned(nn.Module):
    """A network that reads patches of a Mel, and whose norms all take FiLM from one embedding."""

    embedding: NoiseEmbedding
    stem: Conv2d
    # side of a patch, in bins
    patch: int
    # of what a network's operations outside of its layers are: `fastscore_kernels.BACKENDS`
    backend: str | None = None
    # neither parameter nor buffer: it shares the memory of the layers' weights
    stacked: Stacked | None = None

    @property
    def reads(self) -> tuple[int, torch.dtype]:
        """Side and type of the patches that the stem convolves."""
        return self.patch, self.stem.weight.dtype

    def patches(self, x: Tensor) -> Tensor:
        """Patches [B, patch^2, H / patch, W / patch] of x [B, 1, H, W], or of those already."""
        if x.shape[1] == 1:
            x = F.pixel_unshuffle(x, self.patch)
        return x.to(self.stem.weight.dtype)

    def condition(self, emb: Tensor) -> Condition:
        """What the network hands to its blocks, given its embedding [B, E]."""
        return emb if self.stacked is None else self.stacked(emb)


class _Preparable(nn.Module):
    """A layer that takes a prepared weight where one is at hand."""

    # neither parameter nor buffer: a prepared weight is not part of the state
    prepared: Prepared | None = None

    def forward(self, x: Tensor) -> Tensor:
        """What the layer without it computes."""
        prepared = self.prepared
        if prepared is not None and prepared.takes(self, x):
            return prepared.forward(self, x)
        return super().forward(x)


class Linear(_Preparable, nn.Linear):
    """nn.Linear, [B, in] -> [B, out], that knows its pull-back."""

    def pull(self, grad: Tensor) -> Tensor:
        """Cotangents of the output [B, out] to those of the input [B, in]."""
        prepared = self.prepared
        if prepared is not None and prepared.takes(self, grad):
            return prepared.pull(self, grad)
        return grad @ self.weight


class Conv2d(_Preparable, nn.Conv2d):
    """nn.Conv2d of x [B, C, H, W] that knows its pull-back, and may leave its bias to others.

    cuDNN adds a bias in a pass of its own. On the Triton backend ``product`` therefore leaves it
    out, and the next norm takes it (``deferred``), or ``complete`` adds it with what is added there
    anyway. On any other backend ``product`` is ``forward`` and nothing is left to add.
    """

    # of what adds the bias: `fastscore_kernels.BACKENDS`
    backend: str | None = None

    @property
    def deferred(self) -> Tensor | None:
        """The bias [C_out] that ``product`` leaves out; None where it leaves nothing out."""
        return self.bias if self.backend == "triton" else None

    def product(self, x: Tensor) -> Tensor:
        """``forward`` without the bias that is ``deferred``."""
        return self(x) if self.deferred is None else self._conv_forward(x, self.weight, None)

    def complete(
        self, y: Tensor, residual: Tensor | None = None, band: Tensor | None = None
    ) -> Tensor:
        """y of ``product`` + what is ``deferred`` + a residual like y + a band [1, C, H, 1]."""
        if self.deferred is not None:
            return bias_add(y, self.deferred, band, residual, backend=self.backend)
        if residual is not None:
            y = residual + y
        # cast, or autocast's bf16 activations would be promoted to fp32 from here on
        return y if band is None else y + band.to(y.dtype)

    def output_padding_of(self, x: Sequence[int], y: Sequence[int]) -> list[int]:
        """Rows and columns of an input of shape x that the stride of an output of y left over."""
        return [
            size - ((out - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
            for size, out, stride, pad, dilation, kernel in zip(
                *(x[2:], y[2:], self.stride, self.padding, self.dilation, self.kernel_size),
                strict=True,
            )
        ]

    def linearize(self, x: Tensor) -> tuple[Tensor, Pull]:
        """``product`` and its pull-back to x, the transposed convolution.

        The weight serves both as it lies, so nothing is flipped or copied at run time, and
        exporters know the operation, which they do not of a convolution's backward pass.
        """
        y = self.product(x)
        padding = self.output_padding_of(x.shape, y.shape)
        # the type alone: x itself would be held until the pull-back is let go
        dtype = x.dtype

        def pull(grad: Tensor) -> Tensor:
            prepared = self.prepared
            if prepared is not None and prepared.takes(self, grad):
                return prepared.pull(self, grad, padding)
            weight = self.weight.to(grad.dtype)
            image = F.conv_transpose2d(
                *(grad, weight, None, self.stride, self.padding, padding),
                *(self.groups, self.dilation),
            )
            # under autocast the convolution was narrower
            return image.to(dtype)

        return y, pull


class NoiseEmbedding(nn.Module):
    """Sinusoidal features of c_noise followed by a two-layer perceptron.

    c_noise [B] fp32, or its features [B, 32], -> [B, dim] (Vaswani et al. 2017 features, Karras et
    al. 2022 argument).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", self._frequencies(), persistent=False)
        self.fc1 = Linear(32, dim)
        self.fc2 = Linear(dim, dim)

    @staticmethod
    def _frequencies() -> Tensor:
        # c_noise = log(sigma) / 4 spans about -2 to 1; periods from 0.06 to 25 resolve and cover it
        return 2 * math.pi * torch.exp(torch.linspace(math.log(0.04), math.log(16.0), 16))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseEmbedding:
        super()._apply(fn, recurse)
        # frequencies of 8 bits would embed other noise levels than those trained on
        if self.freqs.dtype != torch.float64:
            with torch.device("cpu"):
                self.freqs = self._frequencies().to(self.freqs.device)
        return self

    def forward(self, c_noise: Tensor) -> Tensor:
        """Embed c_noise [B], or its features [B, 32], into [B, dim]."""
        features = c_noise
        if c_noise.ndim == 1:
            angle = c_noise[:, None].float() * self.freqs
            features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return F.silu(self.fc2(F.silu(self.fc1(features.to(self.fc1.weight.dtype)))))


class NormAct(nn.Module):
    """GroupNorm, optional FiLM from an embedding, SiLU; one fused operation.

    x [B, C, H, W], emb [B, E] or a network's `FilmRows` -> [B, C, H, W] in x's dtype, statistics in
    fp32. ``backend`` names the implementation (`fastscore_kernels.BACKENDS`); None takes the best
    one of x's device.
    """

    def __init__(self, channels: int, groups: int, emb_dim: int | None = None) -> None:
        super().__init__()
        self.backend: str | None = None
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.film = Linear(emb_dim, 2 * channels) if emb_dim else None
        # columns of its rows in a `FilmRows`
        self.place = slice(0, 2 * channels)
        if self.film is not None:
            zero_init(self.film)

    def _given(self, x: Tensor, emb: Condition | None) -> tuple:
        """x, groups, affine parameters and FiLM rows, as `norm_act` takes them."""
        film = None
        if self.film is not None:
            film = emb.rows[:, self.place] if isinstance(emb, FilmRows) else self.film(emb)
        return x, self.groups, self.weight, self.bias, film

    def forward(
        self, x: Tensor, emb: Condition | None = None, pre_bias: Tensor | None = None
    ) -> Tensor:
        """Normalise, modulate and activate x + pre_bias, a bias [C] that x lacks."""
        return norm_act(*self._given(x, emb), pre_bias=pre_bias, backend=self.backend)

    def linearize(
        self, x: Tensor, emb: Condition | None = None, pre_bias: Tensor | None = None
    ) -> tuple[Tensor, PullNorm]:
        """``forward`` and its pull-back to x."""
        return norm_act_linearize(*self._given(x, emb), pre_bias=pre_bias, backend=self.backend)


class ResBlock(nn.Module):
    """Pre-activation residual block with FiLM on its second norm (Dhariwal and Nichol 2021).

    x [B, C, H, W], emb [B, E] or `FilmRows` -> [B, C, H, W].
    """

    def __init__(self, channels: int, groups: int, emb_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = NormAct(channels, groups)
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.norm2 = NormAct(channels, groups, emb_dim)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, emb: Condition) -> Tensor:
        """Add the block's residual to x."""
        y = self.norm2(self.conv1.product(self.norm1(x)), emb, self.conv1.deferred)
        return self.conv2.complete(self.conv2.product(self.dropout(y)), x)

    def linearize(self, x: Tensor, emb: Condition) -> tuple[Tensor, Pull]:
        """``forward`` without dropout and its pull-back to x."""
        y, pull_norm1 = self.norm1.linearize(x)
        y, pull_conv1 = self.conv1.linearize(y)
        y, pull_norm2 = self.norm2.linearize(y, emb, self.conv1.deferred)
        y, pull_conv2 = self.conv2.linearize(y)

        def pull(grad: Tensor) -> Tensor:
            return pull_norm1(pull_conv1(pull_norm2(pull_conv2(grad))), grad)

        return self.conv2.complete(y, x), pull


class Upsample(nn.Module):
    """1x1 projection to the next width, nearest-neighbour doubling, 3x3 convolution, a skip."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.proj = Conv2d(channels_in, channels_out, 1)
        self.conv = Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, 2 H, 2 W], to which ``skip`` of that shape is added."""
        wide = F.interpolate(self.proj(x), scale_factor=2.0, mode="nearest")
        return self.conv.complete(self.conv.product(wide), skip)


def chain(pulls: Sequence[Pull]) -> Pull:
    """Pull-back of maps applied one after the other."""

    def pull(grad: Tensor) -> Tensor:
        for one in reversed(pulls):
            grad = one(grad)
        return grad

    return pull


def zero_init(layer: nn.Module) -> nn.Module:
    """Zero a layer's weight and bias, so that a residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def set_backend(module: nn.Module, backend: str | None) -> None:
    """Choose the implementation of every fused operation inside ``module``.

    None, reference, native or triton; ValueError where it cannot run on the module's device.
    """
    first = next(module.parameters(), None)
    if backend is not None and first is not None:
        resolve(backend, first.device.type)
    for part in module.modules():
        if hasattr(part, "backend"):
            part.backend = backend
