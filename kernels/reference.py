"""Plain PyTorch semantics of every operation, statistics in fp32: what other backends must equal.

Nothing here imports fastscore: the operations know tensors only.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def norm_act(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """Group normalisation with affine, optional FiLM, optional SiLU.

    x [B, C, H, W]; weight, bias [C]; scale, shift [B, C] or None. Returns, in x's dtype,
    act((1 + scale) * (weight * (x - mean) / sqrt(var + eps) + bias) + shift), statistics in fp32
    (Wu and He 2018; Perez et al. 2018).
    """
    y = F.group_norm(x.float(), groups, weight.float(), bias.float(), eps)
    if scale is not None:
        y = y * (1.0 + scale.float()[:, :, None, None])
    if shift is not None:
        y = y + shift.float()[:, :, None, None]
    if act:
        y = F.silu(y)
    return y.to(x.dtype)


def sample_rms(x: Tensor, floor: float = 1e-30) -> Tensor:
    """Root mean square of every sample, [B, ...] -> [B] fp32, at least ``floor``."""
    # scaled by the largest magnitude first: squares of 1e-25 gradients underflow in fp32
    flat = x.float().flatten(1)
    peak = flat.abs().amax(dim=1, keepdim=True).clamp_min(floor)
    return ((flat / peak).square().mean(dim=1).sqrt() * peak[:, 0]).clamp_min(floor)


def tap_norm(
    feature: Tensor,
    gradient: Tensor,
    groups: int,
    feature_weight: Tensor,
    feature_bias: Tensor,
    gradient_weight: Tensor,
    gradient_bias: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise a feature tap and its gradient tap.

    feature, gradient [B, C, H, W]; weights and biases [C]. The gradient is first divided by its
    per-sample RMS, since its magnitude spans many decades over sigma, then both taps are
    group-normalised. Returns both taps in their dtypes and log RMS of the gradient, [B] fp32.
    """
    rms = sample_rms(gradient)
    scaled = gradient.float() / rms[:, None, None, None]
    # affine apart from the norm: torch 2.11 crashes in group_norm's backward on channels-last input
    # that needs no gradient itself, which is what a frozen classifier's taps are
    f = F.group_norm(feature.float(), groups, eps=eps)
    g = F.group_norm(scaled, groups, eps=eps)
    f = f * _per_channel(feature_weight) + _per_channel(feature_bias)
    g = g * _per_channel(gradient_weight) + _per_channel(gradient_bias)
    return f.to(feature.dtype), g.to(gradient.dtype), rms.log()


def _per_channel(p: Tensor) -> Tensor:
    return p.float()[:, None, None]


def tap_fuse(q: Tensor, k: Tensor, v: Tensor, heads: int, spatial: bool) -> Tensor:
    """Attention of feature queries over the tokens of L taps.

    q [B, C, N]; k, v [B, L, C, N] for L taps of N positions each. With ``spatial`` every query
    attends to all L * N tokens; without, to the L tokens of its own position only, so that it
    weighs one tap against the other. Softmax over scaled dot products (Vaswani et al. 2017).
    Returns [B, C, N] in q's dtype.
    """
    b, c, n = q.shape
    taps = k.shape[1]
    d = c // heads
    if not spatial:
        qh = q.reshape(b, 1, heads, d, n).float()
        logits = (qh * k.reshape(b, taps, heads, d, n).float()).sum(dim=3) * d**-0.5
        weights = logits.softmax(dim=1)[:, :, :, None]
        out = (weights * v.reshape(b, taps, heads, d, n).float()).sum(dim=1)
        return out.reshape(b, c, n).to(q.dtype)
    qh = q.reshape(b, heads, d, n).transpose(2, 3)
    kh = k.reshape(b, taps, heads, d, n).permute(0, 2, 1, 4, 3).reshape(b, heads, taps * n, d)
    vh = v.reshape(b, taps, heads, d, n).permute(0, 2, 1, 4, 3).reshape(b, heads, taps * n, d)
    out = F.scaled_dot_product_attention(qh, kh, vh)
    return out.transpose(2, 3).reshape(b, c, n)


__all__ = ["norm_act", "sample_rms", "tap_fuse", "tap_norm"]
