"""Group normalisation, FiLM and SiLU in one or two launches.

A program holds some groups of a sample, all their positions: one launch. When that leaves most of
the processor idle, positions are split as well: a first launch writes the moments of every
stretch, a second combines them in a fixed order and normalises.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastscore_kernels.gpu.common import (
    at_position,
    begin,
    channel_moments,
    combine_moments,
    finish_moments,
    group_moments,
    load_affine,
    load_pre_bias,
    membership,
    sigmoid,
    spread,
)
from fastscore_kernels.gpu.launch import film_rows, is_last, launch
from fastscore_kernels.gpu.norm_act_backward import norm_act_backward
from fastscore_kernels.gpu.plans import plan_norm
from torch import Tensor


@triton.jit
def normalise_tile(tile, mean, factor, summand, ACT: tl.constexpr):
    """act((tile - mean) * factor + summand) with a number a channel each."""
    z = (tile - mean[None, :]) * factor[None, :] + summand[None, :]
    if ACT:
        z = z * sigmoid(z)
    return z


@triton.jit
def norm_act_kernel(
    x,
    weight,
    bias,
    film,
    film_stride,
    pre_bias,
    y,
    stats,
    batch,
    N,
    EPS: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    BUNDLE: tl.constexpr,
    LAST: tl.constexpr,
    PRE: tl.constexpr,
    FILM: tl.constexpr,
    ACT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a sample and bundle of groups; WHOLE: its numbers stay in registers."""
    begin(DEPENDENT)
    CPG: tl.constexpr = C // G
    program = tl.program_id(0)
    b = (program // (G // BUNDLE)).to(tl.int64)
    g0 = (program % (G // BUNDLE)) * BUNDLE
    lane = tl.arange(0, BLOCK_C)
    c_mask = lane < BUNDLE * CPG
    c = g0 * CPG + lane
    x += b * C * N
    y += b * C * N
    n = tl.arange(0, BLOCK_N)
    mask = (n < N)[:, None] & c_mask[None, :]
    offsets = at_position(n[:, None], c[None, :], C, N, LAST)
    if WHOLE:
        tile = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        first = tl.sum(tile, axis=0) / N
        d = tl.where(mask, tile - first[None, :], 0.0)
        mean_c, m2_c = finish_moments(first, d, d * d, N * 1.0, False)
    else:
        mean_c, m2_c = channel_moments(x, c, c_mask, 0, N, C, N, LAST, BLOCK_N, False)
    if PRE:
        # it moves a channel's mean and no difference from it
        mean_c += load_pre_bias(pre_bias, c, c_mask)
    member = membership(c_mask, CPG, BLOCK_C, BLOCK_G)
    mean, m2 = group_moments(mean_c, m2_c, member, N * 1.0, CPG)
    rstd = 1.0 / tl.sqrt_rn(m2 / (N * CPG * 1.0) + EPS)
    g = tl.arange(0, BLOCK_G)
    tl.store(stats + b * G + g0 + g, mean, mask=g < BUNDLE)
    tl.store(stats + (batch + b) * G + g0 + g, rstd, mask=g < BUNDLE)
    factor, summand = load_affine(weight, bias, film, film_stride, b, c, c_mask, C, FILM)
    factor *= spread(rstd, member)
    centre = spread(mean, member)
    if PRE:
        centre -= load_pre_bias(pre_bias, c, c_mask)
    if WHOLE:
        z = normalise_tile(tile, centre, factor, summand, ACT)
        tl.store(y + offsets, z.to(y.dtype.element_ty), mask=mask)
    else:
        for at in range(0, N, BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            mask = (n < N)[:, None] & c_mask[None, :]
            offsets = at_position(n[:, None], c[None, :], C, N, LAST)
            tile = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
            z = normalise_tile(tile, centre, factor, summand, ACT)
            tl.store(y + offsets, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def norm_act_partial_kernel(
    x,
    pre_bias,
    partial,
    N,
    chunk,
    splits,
    C: tl.constexpr,
    G: tl.constexpr,
    BUNDLE: tl.constexpr,
    LAST: tl.constexpr,
    PRE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Moments of one stretch of positions: partial [B, splits, 2, G] (mean, squares)."""
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
    mean_c, m2_c = channel_moments(
        x + b * C * N, c, c_mask, start, stop, C, N, LAST, BLOCK_N, False
    )
    if PRE:
        mean_c += load_pre_bias(pre_bias, c, c_mask)
    member = membership(c_mask, CPG, BLOCK_C, BLOCK_G)
    mean, m2 = group_moments(mean_c, m2_c, member, (stop - start) * 1.0, CPG)
    g = tl.arange(0, BLOCK_G)
    row = partial + (b * splits + split) * 2 * G + g0 + g
    tl.store(row, mean, mask=g < BUNDLE)
    tl.store(row + G, m2, mask=g < BUNDLE)


@triton.jit
def norm_act_apply_kernel(
    x,
    partial,
    weight,
    bias,
    film,
    film_stride,
    pre_bias,
    y,
    stats,
    batch,
    N,
    chunk,
    splits,
    EPS: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    BUNDLE: tl.constexpr,
    LAST: tl.constexpr,
    PRE: tl.constexpr,
    FILM: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Normalise one stretch of positions, given the moments of all of them."""
    begin(DEPENDENT)
    CPG: tl.constexpr = C // G
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    g0 = tl.program_id(2) * BUNDLE
    g = tl.arange(0, BLOCK_G)
    s = tl.arange(0, BLOCK_S)
    rows = partial + ((b * splits + s) * 2 * G + g0)[:, None] + g[None, :]
    known = (s < splits)[:, None] & (g < BUNDLE)[None, :]
    means = tl.load(rows, mask=known, other=0.0)
    m2s = tl.load(rows + G, mask=known, other=0.0)
    mean, m2 = combine_moments(means, m2s, splits, chunk, N, CPG, BLOCK_S)
    rstd = 1.0 / tl.sqrt_rn(m2 / (N * CPG * 1.0) + EPS)
    if split == 0:
        tl.store(stats + b * G + g0 + g, mean, mask=g < BUNDLE)
        tl.store(stats + (batch + b) * G + g0 + g, rstd, mask=g < BUNDLE)
    lane = tl.arange(0, BLOCK_C)
    c_mask = lane < BUNDLE * CPG
    c = g0 * CPG + lane
    member = membership(c_mask, CPG, BLOCK_C, BLOCK_G)
    factor, summand = load_affine(weight, bias, film, film_stride, b, c, c_mask, C, FILM)
    factor *= spread(rstd, member)
    centre = spread(mean, member)
    if PRE:
        centre -= load_pre_bias(pre_bias, c, c_mask)
    x += b * C * N
    y += b * C * N
    start = split * chunk
    stop = tl.minimum(start + chunk, N)
    for at in range(start, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        mask = (n < stop)[:, None] & c_mask[None, :]
        offsets = at_position(n[:, None], c[None, :], C, N, LAST)
        tile = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        z = normalise_tile(tile, centre, factor, summand, ACT)
        tl.store(y + offsets, z.to(y.dtype.element_ty), mask=mask)


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    groups: int,
    act: bool,
    eps: float,
    pre_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Group normalisation, FiLM and SiLU of x [B, C, H, W], and stats [2, B, groups] fp32.

    weight, bias [C]; film [B, 2C] (scale, then shift) or None; pre_bias [C] is added to x first,
    None adds nothing. stats are means and rstd.
    """
    batch, channels = x.shape[:2]
    positions = x.shape[2] * x.shape[3]
    plan = plan_norm("norm_act", x, groups, batch)
    y = torch.empty_like(x)
    stats = torch.empty(2, batch, groups, dtype=torch.float32, device=x.device)
    film_row, film_stride = film_rows(film, weight)
    # without one a pointer that nobody reads
    pre = weight if pre_bias is None else pre_bias
    affine = (weight, bias, film_row, film_stride, pre, y, stats, batch, positions)
    shape = {"C": channels, "G": groups, "BUNDLE": plan.bundle, "LAST": is_last(x)}
    shape["PRE"] = pre_bias is not None
    blocks = {"BLOCK_N": plan.block_n, "BLOCK_C": plan.block_c, "BLOCK_G": plan.block_g}
    form = {"EPS": eps, "FILM": film is not None, "ACT": act}
    common = {**shape, **blocks, "num_warps": plan.warps}
    if plan.splits == 1:
        grid = (batch * (groups // plan.bundle),)
        launch(norm_act_kernel, grid, x, *affine, **form, **common, WHOLE=plan.whole)
        return y, stats
    partial = torch.empty(batch, plan.splits, 2, groups, dtype=torch.float32, device=x.device)
    grid = (batch, plan.splits, groups // plan.bundle)
    stretch = (plan.chunk, plan.splits)
    launch(norm_act_partial_kernel, grid, x, pre, partial, positions, *stretch, **common)
    launch(
        norm_act_apply_kernel,
        grid,
        x,
        partial,
        *affine,
        *stretch,
        **form,
        **common,
        BLOCK_S=plan.block_s,
    )
    return y, stats


__all__ = ["norm_act", "norm_act_backward"]
