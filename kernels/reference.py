"""Plain PyTorch semantics of every operation, statistics in fp32: what other backends must equal.

Nothing here imports fastscore: the operations know tensors only. Arguments have been checked by the
callers in ``norm_act``, ``tap_norm``, ``tap_fuse`` and ``solver_step``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """``t`` in fp32, or as it is in float64, which serves as a yardstick."""
    return t if t.dtype == torch.float64 else t.float()


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    groups: int,
    act: bool,
    eps: float,
    pre_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Group normalisation with affine, optional FiLM, optional SiLU.

    x [B, C, H, W]; weight, bias [C]; film [B, 2 C] (scale, then shift) or None. Returns, in x's
    dtype, act((1 + scale) * (weight * (x - mean) * rstd + bias) + shift), and stats [2, B, groups]
    fp32: means and rstd = 1 / sqrt(var + eps) (Wu and He 2018; Perez et al. 2018). pre_bias [C] is
    added to x before anything else.
    """
    b, c, h, w = x.shape
    y, mean, rstd = torch.native_group_norm(
        _biased(x, pre_bias), wide(weight), wide(bias), b, c, h * w, groups, eps
    )
    if film is not None:
        scale, shift = wide(film)[:, :, None, None].chunk(2, dim=1)
        y = y * (1.0 + scale) + shift
    if act:
        y = F.silu(y)
    return y.to(x.dtype), torch.stack((mean, rstd))


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    groups: int,
    act: bool,
    addend: Tensor | None = None,
    pre_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Vector-Jacobian product of `norm_act`, several cotangents of each sample at once.

    grad [R B, C, H, W]: row i belongs to sample i % B of x [B, C, H, W]. Returns its image
    [R B, C, H, W], to which addend of the same shape is added, and sums [2, R B, C] fp32 over
    positions of dz and of dz * xhat, where dz is the cotangent of what enters the activation and
    xhat = (x + pre_bias - mean) * rstd.
    """
    b, c, h, w = x.shape
    copies = grad.shape[0] // b
    rows = _biased(x, pre_bias).repeat(copies, 1, 1, 1)
    mean, rstd = stats.repeat(1, copies, 1)
    spread = (copies * b, groups, c // groups, h * w)
    xhat = (rows.reshape(spread) - mean[:, :, None, None]) * rstd[:, :, None, None]
    xhat = xhat.reshape(grad.shape)
    gain = wide(weight)[:, None, None]
    dz = wide(grad)
    if film is not None:
        scale, shift = wide(film).repeat(copies, 1)[:, :, None, None].chunk(2, dim=1)
    if act:
        z = xhat * gain + wide(bias)[:, None, None]
        z = z if film is None else z * (1.0 + scale) + shift
        dz = torch.ops.aten.silu_backward(dz, z)
    gain = gain if film is None else gain * (1.0 + scale)
    # ATen's kernel takes both in one layout only, and says nothing when they differ
    layout = torch.contiguous_format if rows.is_contiguous() else torch.channels_last
    dxhat = (dz * gain).contiguous(memory_format=layout)
    grad_x = torch.ops.aten.native_group_norm_backward(
        dxhat, rows, mean, rstd, None, copies * b, c, h * w, groups, [True, False, False]
    )[0]
    sums = torch.stack((dz.sum(dim=(2, 3)), (dz * xhat).sum(dim=(2, 3))))
    return _added(addend, grad_x.to(x.dtype)), sums


def norm_act_linearize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    groups: int,
    act: bool,
    eps: float,
    pre_bias: Tensor | None = None,
) -> tuple[Tensor, Callable[..., Tensor]]:
    """`norm_act` and its pull-back to x, by ATen's kernels on what the forward pass left."""
    b, c, h, w = x.shape
    rows, gain = _biased(x, pre_bias), wide(weight)
    y, mean, rstd = torch.native_group_norm(rows, gain, wide(bias), b, c, h * w, groups, eps)
    scale = None
    if film is not None:
        scale, shift = wide(film)[:, :, None, None].chunk(2, dim=1)
        scale = 1.0 + scale
        y = y * scale + shift
    z = y

    def pull(grad: Tensor, addend: Tensor | None = None) -> Tensor:
        copies = grad.shape[0] // b
        dz = wide(grad)
        if act:
            dz = torch.ops.aten.silu_backward(dz, _repeat(z, copies))
        if scale is not None:
            dz = dz * _repeat(scale, copies)
        # ATen's kernel takes both in one layout only, and says nothing when they differ
        layout = torch.contiguous_format if rows.is_contiguous() else torch.channels_last
        image = torch.ops.aten.native_group_norm_backward(
            dz.contiguous(memory_format=layout),
            _repeat(rows, copies).contiguous(memory_format=layout),
            _repeat(mean, copies),
            _repeat(rstd, copies),
            gain,
            copies * b,
            c,
            h * w,
            groups,
            [True, False, False],
        )[0]
        return _added(addend, image.to(x.dtype))

    return (F.silu(z) if act else z).to(x.dtype), pull


def _biased(x: Tensor, pre_bias: Tensor | None) -> Tensor:
    return wide(x) if pre_bias is None else wide(x) + _per_channel(pre_bias)


def _added(addend: Tensor | None, t: Tensor) -> Tensor:
    return t if addend is None else addend + t


def _repeat(t: Tensor, copies: int) -> Tensor:
    """``copies`` of a batch one after the other, in its layout, which ``Tensor.repeat`` loses."""
    return t if copies == 1 else torch.cat((t,) * copies)


def bias_add(x: Tensor, bias: Tensor, band: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [B, C, H, W] + bias [C] + band [1, C, H, 1] + residual like x, summed in fp32; like x."""
    total = _biased(x, bias)
    for t in (band, residual):
        total = total if t is None else total + wide(t)
    return total.to(x.dtype)


def edm_inputs(
    x: Tensor,
    sigma: Tensor,
    gamma: Tensor | None,
    freqs: Tensor,
    sigma_data: float,
    patch: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches of c_in x, features of c_noise, and the coefficients of a denoiser's sum.

    x [B, 1, H, W], sigma [B], gamma [B] or None, freqs [F] -> [B, patch^2, H / patch, W / patch] of
    ``dtype``, channels-last; [B, 2 F], cosines before sines; [3, B]: c_skip, c_out and
    gamma sigma^2 c_in (Karras et al. 2022, Table 1: c_in = 1 / sqrt(sigma^2 + sigma_data^2),
    c_noise = log(sigma) / 4).
    """
    total = sigma.square() + sigma_data**2
    c_in = total.rsqrt()
    patches = F.pixel_unshuffle(c_in[:, None, None, None] * x, patch).to(dtype)
    angle = (sigma.log() / 4)[:, None] * freqs
    weight = torch.zeros_like(sigma) if gamma is None else gamma * sigma.square() * c_in
    return (
        patches.contiguous(memory_format=torch.channels_last),
        torch.cat((angle.cos(), angle.sin()), dim=1),
        torch.stack((sigma_data**2 / total, sigma * sigma_data * c_in, weight)),
    )


def class_cotangents(logits: Tensor, label: Tensor) -> Tensor:
    """softmax(logits), then e_label - softmax(logits), [2 B, K] of logits [B, K] and label [B].

    In logits' dtype, softmax in fp32; the second is zero where the label is -1.
    """
    p = wide(logits).softmax(dim=1)
    classes = torch.arange(p.shape[1], device=label.device)
    chosen = ((classes == label[:, None]).float() - p) * (label >= 0).float()[:, None]
    return torch.cat((p, chosen)).to(logits.dtype)


def sample_rms(x: Tensor, floor: float = 1e-30) -> Tensor:
    """Root mean square of every sample, [B, ...] -> [B] fp32, at least ``floor``."""
    # scaled by the largest magnitude first: squares of 1e-25 gradients underflow in fp32
    flat = wide(x).flatten(1)
    peak = flat.abs().amax(dim=1, keepdim=True).clamp_min(floor)
    # the mean is at least one over the size, unless all is zero: there the root has no derivative
    square = (flat / peak).square().mean(dim=1).clamp_min(1e-20)
    return (square.sqrt() * peak[:, 0]).clamp_min(floor)


def tap_norm(
    feature: Tensor,
    gradient: Tensor,
    groups: int,
    feature_weight: Tensor,
    feature_bias: Tensor,
    gradient_weight: Tensor,
    gradient_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalise a feature tap and its gradient tap.

    feature, gradient [B, C, H, W]; weights and biases [C]. The gradient is first divided by its
    per-sample RMS, since its magnitude spans many decades over sigma, then both taps are
    group-normalised. Returns them in one tensor [B, 2 C, H, W], channels-last, the feature in the
    first C channels, and log RMS of the gradient, [B] fp32.
    """
    rms = sample_rms(gradient)
    scaled = wide(gradient) / rms[:, None, None, None]
    # affine apart from the norm: torch 2.11 crashes in group_norm's backward on channels-last input
    # that needs no gradient itself, which is what a frozen classifier's taps are
    f, g = _standardise(wide(feature), groups, eps), _standardise(scaled, groups, eps)
    f = f * _per_channel(feature_weight) + _per_channel(feature_bias)
    g = g * _per_channel(gradient_weight) + _per_channel(gradient_bias)
    taps = torch.cat((f.to(feature.dtype), g.to(gradient.dtype)), dim=1)
    return taps.contiguous(memory_format=torch.channels_last), rms.log()


def _standardise(x: Tensor, groups: int, eps: float) -> Tensor:
    b, c, h, w = x.shape
    return torch.native_group_norm(x, None, None, b, c, h * w, groups, eps)[0]


def _per_channel(p: Tensor) -> Tensor:
    return wide(p)[:, None, None]


def tap_fuse(q: Tensor, first: Tensor, second: Tensor | None, heads: int, spatial: bool) -> Tensor:
    """Attention of feature queries over the tokens of one or two taps.

    q [B, C, H, W]; first, second [B, 2 C, H, W]: a tap's keys, then its values. With ``spatial``
    every query attends to the positions of all taps; without, to the token of its own position in
    each, so that it weighs one tap against the other. Softmax over scaled dot products (Vaswani et
    al. 2017). Returns [B, C, H, W] in q's dtype.
    """
    b, c, h, w = q.shape
    taps = [t.flatten(2) for t in (first, second) if t is not None]
    tokens = torch.stack(taps, dim=1).unflatten(2, (2, heads, c // heads))
    keys, values = tokens.unbind(2)  # [B, L, heads, d, N]
    query = q.flatten(2).unflatten(1, (heads, c // heads))  # [B, heads, d, N]
    if spatial:
        keys, values = (t.permute(0, 2, 1, 4, 3).flatten(2, 3) for t in (keys, values))
        out = F.scaled_dot_product_attention(query.transpose(2, 3), keys, values).transpose(2, 3)
    else:
        logits = (wide(query)[:, None] * wide(keys)).sum(dim=3) * (c // heads) ** -0.5
        weights = logits.softmax(dim=1)[:, :, :, None]
        out = (weights * wide(values)).sum(dim=1)
    return out.reshape(b, c, h, w).to(q.dtype)


def solver_step(
    x: Tensor,
    raw: Tensor | None,
    guidance: Tensor | None,
    denoised: Tensor | None,
    old: Tensor | None,
    coefficients: Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Denoiser assembly, guidance and one linear solver update: x' and x0, both fp32 like x.

    With coefficients [B, 7] fp32 = (c_skip, c_out, weight, keep, pull, pull_old, kick),
    x0 = c_skip x + c_out raw + weight guidance unless given as ``denoised``, and
    x' = keep x + pull x0 + pull_old old + kick noise; a missing tensor's term is left out. Products
    and sums are rounded one by one, left to right: a fused multiply-add may round by its place.
    """
    shape = (len(x), *[1] * (x.ndim - 1))
    c_skip, c_out, weight, keep, pull, pull_old, kick = (
        c.reshape(shape) for c in coefficients.unbind(1)
    )
    if raw is not None:
        denoised = c_skip * x + c_out * wide(raw)
        if guidance is not None:
            denoised = denoised + weight * wide(guidance)
    assert denoised is not None
    following = keep * x + pull * denoised
    if old is not None:
        following = following + pull_old * old
    if noise is not None:
        following = following + kick * noise
    return following, denoised


__all__ = [
    "bias_add",
    "class_cotangents",
    "edm_inputs",
    "norm_act",
    "norm_act_backward",
    "norm_act_linearize",
    "sample_rms",
    "solver_step",
    "tap_fuse",
    "tap_norm",
]
