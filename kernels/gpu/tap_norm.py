"""Normalisation of a feature tap and its gradient tap, into one channels-last tensor.

A small sample takes one launch: every program adds up the squares of the whole gradient itself. A
large one takes two, the first for the moments of stretches of positions. Squares and moments of
the gradient are fp64, whose range holds those of any fp32 number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastscore_kernels.gpu.common import (
    begin,
    channel_moments,
    combine_moments,
    group_moments,
    load_tile,
    membership,
    spread,
)
from fastscore_kernels.gpu.launch import is_last, launch, like
from fastscore_kernels.gpu.plans import NormPlan, plan_taps
from torch import Tensor


@triton.jit
def square_sum(x, count, BLOCK: tl.constexpr):
    """Sum of squares of ``count`` dense numbers, in fp64."""
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        v = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32).to(tl.float64)
        total += v * v
    return tl.sum(total, axis=0)


@triton.jit
def rstd_of(m2, count, square, EPS: tl.constexpr):
    """1 / sqrt(variance + EPS * square) of fp64 moments, in fp32."""
    return (1.0 / tl.sqrt(m2 / count + EPS * square)).to(tl.float32)


@triton.jit
def write_tap(
    x,
    taps,
    weight,
    bias,
    mean,
    rstd,
    c,
    c_mask,
    start,
    stop,
    C: tl.constexpr,
    N,
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Normalise channels ``c`` of one tap over positions start .. stop into taps [N, 2C]."""
    factor = rstd * tl.load(weight + c, mask=c_mask, other=0.0).to(tl.float32)
    summand = tl.load(bias + c, mask=c_mask, other=0.0).to(tl.float32)
    for at in range(start, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        mask = (n < stop)[:, None] & c_mask[None, :]
        tile = load_tile(x, n, c, mask, C, N, LAST)
        out = (tile - mean[None, :]) * factor[None, :] + summand[None, :]
        places = taps + n[:, None] * (2 * C) + c[None, :]
        tl.store(places, out.to(taps.dtype.element_ty), mask=mask)


@triton.jit
def store_statistics(stats, b, g, known, f_mean, f_rstd, g_mean, g_rstd, G: tl.constexpr):
    """Groups ``g`` of stats [B, G, 4]."""
    row = stats + (b * G + g) * 4
    tl.store(row, f_mean, mask=known)
    tl.store(row + 1, f_rstd, mask=known)
    tl.store(row + 2, g_mean, mask=known)
    tl.store(row + 3, g_rstd, mask=known)


@triton.jit
def tap_norm_kernel(
    feature,
    gradient,
    feature_weight,
    feature_bias,
    gradient_weight,
    gradient_bias,
    taps,
    log_rms,
    stats,
    N,
    EPS: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    BUNDLE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    FLAT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Both taps of one sample and bundle of groups."""
    begin(DEPENDENT)
    CPG: tl.constexpr = C // G
    program = tl.program_id(0)
    b = (program // (G // BUNDLE)).to(tl.int64)
    g0 = (program % (G // BUNDLE)) * BUNDLE
    lane = tl.arange(0, BLOCK_C)
    c_mask = lane < BUNDLE * CPG
    c = g0 * CPG + lane
    feature += b * C * N
    gradient += b * C * N
    taps += b * 2 * C * N
    square = square_sum(gradient, C * N, FLAT) / (C * N * 1.0)
    rms = tl.maximum(tl.sqrt(square), 1e-30)
    if g0 == 0:
        tl.store(log_rms + b, tl.log(rms.to(tl.float32)))
    member = membership(c_mask, CPG, BLOCK_C, BLOCK_G)
    mean_c, m2_c = channel_moments(feature, c, c_mask, 0, N, C, N, LAST, BLOCK_N, True)
    f_mean, m2 = group_moments(mean_c, m2_c, member, N * 1.0, CPG)
    f_rstd = rstd_of(m2, N * CPG * 1.0, 1.0, EPS)
    mean_c, m2_c = channel_moments(gradient, c, c_mask, 0, N, C, N, LAST, BLOCK_N, True)
    g_mean, m2 = group_moments(mean_c.to(tl.float64), m2_c, member, N * 1.0, CPG)
    g_mean = g_mean.to(tl.float32)
    g_rstd = rstd_of(m2, N * CPG * 1.0, rms * rms, EPS)
    g = tl.arange(0, BLOCK_G)
    store_statistics(stats, b, g0 + g, g < BUNDLE, f_mean, f_rstd, g_mean, g_rstd, G)
    mean, rstd = spread(f_mean, member), spread(f_rstd, member)
    write_tap(
        feature,
        taps,
        feature_weight,
        feature_bias,
        mean,
        rstd,
        c,
        c_mask,
        0,
        N,
        C,
        N,
        LAST,
        BLOCK_N,
    )
    mean, rstd = spread(g_mean, member), spread(g_rstd, member)
    write_tap(
        gradient, taps + C, gradient_weight, gradient_bias, mean, rstd, c, c_mask, 0, N, C, N, LAST,
        BLOCK_N,
    )  # fmt: skip


@triton.jit
def tap_moments_kernel(
    feature,
    gradient,
    partial,
    N,
    chunk,
    splits,
    C: tl.constexpr,
    G: tl.constexpr,
    BUNDLE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Moments of one stretch: partial [B, splits, 4, G] fp64, mean and squares of each tap."""
    begin(DEPENDENT)
    CPG: tl.constexpr = C // G
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    g0 = tl.program_id(2) * BUNDLE
    lane = tl.arange(0, BLOCK_C)
    c_mask = lane < BUNDLE * CPG
    c = g0 * CPG + lane
    start = split * chunk
    stop = tl.minimum(start + chunk, N)
    count = (stop - start) * 1.0
    member = membership(c_mask, CPG, BLOCK_C, BLOCK_G)
    g = tl.arange(0, BLOCK_G)
    row = partial + (b * splits + split) * 4 * G + g0 + g
    mean_c, m2_c = channel_moments(
        feature + b * C * N, c, c_mask, start, stop, C, N, LAST, BLOCK_N, False
    )
    mean, m2 = group_moments(mean_c, m2_c, member, count, CPG)
    tl.store(row, mean.to(tl.float64), mask=g < BUNDLE)
    tl.store(row + G, m2.to(tl.float64), mask=g < BUNDLE)
    mean_c, m2_c = channel_moments(
        gradient + b * C * N, c, c_mask, start, stop, C, N, LAST, BLOCK_N, True
    )
    mean, m2 = group_moments(mean_c.to(tl.float64), m2_c, member, count, CPG)
    tl.store(row + 2 * G, mean, mask=g < BUNDLE)
    tl.store(row + 3 * G, m2, mask=g < BUNDLE)


@triton.jit
def tap_statistics(
    partial, b, N, chunk, splits, EPS: tl.constexpr, CPG: tl.constexpr, G: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Means and rstd of all groups of both taps, fp32, and RMS of the gradient, fp64.

    partial as `tap_moments_kernel` writes it; BLOCK_G >= G.
    """
    s = tl.arange(0, BLOCK_S)
    g = tl.arange(0, BLOCK_G)
    rows = partial + (b * splits + s)[:, None] * (4 * G) + g[None, :]
    known = (s < splits)[:, None] & (g < G)[None, :]
    means = tl.load(rows, mask=known, other=0.0)
    m2s = tl.load(rows + G, mask=known, other=0.0)
    f_mean, m2 = combine_moments(means, m2s, splits, chunk, N, CPG, BLOCK_S)
    count = N * CPG * 1.0
    f_rstd = rstd_of(m2, count, 1.0, EPS)
    means = tl.load(rows + 2 * G, mask=known, other=0.0)
    m2s = tl.load(rows + 3 * G, mask=known, other=0.0)
    g_mean, m2 = combine_moments(means, m2s, splits, chunk, N, CPG, BLOCK_S)
    square = tl.sum(m2 / count + g_mean * g_mean, axis=0) / G
    rms = tl.maximum(tl.sqrt(square), 1e-30)
    g_rstd = rstd_of(m2, count, rms * rms, EPS)
    return f_mean.to(tl.float32), f_rstd, g_mean.to(tl.float32), g_rstd, rms


@triton.jit
def tap_norm_apply_kernel(
    feature,
    gradient,
    partial,
    feature_weight,
    feature_bias,
    gradient_weight,
    gradient_bias,
    taps,
    log_rms,
    stats,
    N,
    chunk,
    splits,
    EPS: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    BUNDLE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Normalise one stretch of both taps; BLOCK_G holds all groups, of which BUNDLE are ours."""
    begin(DEPENDENT)
    CPG: tl.constexpr = C // G
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    bundle = tl.program_id(2)
    f_mean, f_rstd, g_mean, g_rstd, rms = tap_statistics(
        partial, b, N, chunk, splits, EPS, CPG, G, BLOCK_S, BLOCK_G
    )
    g = tl.arange(0, BLOCK_G)
    if split == 0 and bundle == 0:
        tl.store(log_rms + b, tl.log(rms.to(tl.float32)))
        store_statistics(stats, b, g, g < G, f_mean, f_rstd, g_mean, g_rstd, G)
    lane = tl.arange(0, BLOCK_C)
    c_mask = lane < BUNDLE * CPG
    c = bundle * BUNDLE * CPG + lane
    member = ((c // CPG)[:, None] == g[None, :]) & c_mask[:, None]
    start = split * chunk
    stop = tl.minimum(start + chunk, N)
    feature += b * C * N
    gradient += b * C * N
    taps += b * 2 * C * N
    mean, rstd = spread(f_mean, member), spread(f_rstd, member)
    write_tap(
        feature, taps, feature_weight, feature_bias, mean, rstd, c, c_mask, start, stop, C, N, LAST,
        BLOCK_N,
    )  # fmt: skip
    mean, rstd = spread(g_mean, member), spread(g_rstd, member)
    write_tap(
        gradient, taps + C, gradient_weight, gradient_bias, mean, rstd, c, c_mask, start, stop, C,
        N, LAST, BLOCK_N,
    )  # fmt: skip


def tap_norm(
    feature: Tensor,
    gradient: Tensor,
    groups: int,
    feature_weight: Tensor,
    feature_bias: Tensor,
    gradient_weight: Tensor,
    gradient_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """taps [B, 2C, H, W] channels-last, log RMS of the gradient [B] fp32, stats [B, groups, 4].

    feature, gradient [B, C, H, W]. stats fp32 are mean and rstd of the feature, and those of the
    raw gradient, whose rstd is 1 / sqrt(var + eps rms^2).
    """
    batch, channels, height, width = feature.shape
    positions = height * width
    gradient = like(gradient, feature)
    taps = torch.empty(
        (batch, 2 * channels, height, width),
        dtype=feature.dtype,
        device=feature.device,
        memory_format=torch.channels_last,
    )
    log_rms = torch.empty(batch, dtype=torch.float32, device=feature.device)
    stats = torch.empty(batch, groups, 4, dtype=torch.float32, device=feature.device)
    plan = plan_taps("tap_norm", feature, groups)
    affine = (feature_weight, feature_bias, gradient_weight, gradient_bias)
    outs = (taps, log_rms, stats, positions)
    common = {
        "C": channels,
        "G": groups,
        "BUNDLE": plan.bundle,
        "LAST": is_last(feature),
        "BLOCK_N": plan.block_n,
        "BLOCK_C": plan.block_c,
        "num_warps": plan.warps,
    }
    bundles = groups // plan.bundle
    if plan.splits == 1:
        launch(
            tap_norm_kernel,
            (batch * bundles,),
            feature,
            gradient,
            *affine,
            *outs,
            EPS=eps,
            BLOCK_G=plan.block_g,
            FLAT=plan.flat,
            **common,
        )
        return taps, log_rms, stats
    partial = moments(feature, gradient, plan, groups)
    launch(
        tap_norm_apply_kernel,
        (batch, plan.splits, bundles),
        feature,
        gradient,
        partial,
        *affine,
        *outs,
        plan.chunk,
        plan.splits,
        EPS=eps,
        BLOCK_G=plan.all_groups,
        BLOCK_S=plan.block_s,
        **common,
    )
    return taps, log_rms, stats


def moments(feature: Tensor, gradient: Tensor, plan: NormPlan, groups: int) -> Tensor:
    """Moments of every stretch of both taps, [B, splits, 4, groups] fp64."""
    batch, channels = feature.shape[:2]
    partial = torch.empty(batch, plan.splits, 4, groups, dtype=torch.float64, device=feature.device)
    launch(
        tap_moments_kernel,
        (batch, plan.splits, groups // plan.bundle),
        feature,
        gradient,
        partial,
        feature.shape[2] * feature.shape[3],
        plan.chunk,
        plan.splits,
        C=channels,
        G=groups,
        BUNDLE=plan.bundle,
        LAST=is_last(feature),
        BLOCK_N=plan.block_n,
        BLOCK_C=plan.block_c,
        BLOCK_G=plan.block_g,
        num_warps=plan.warps,
    )
    return partial


__all__ = ["moments", "tap_norm"]
