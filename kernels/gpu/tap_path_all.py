"""The tap path where every position attends to all positions of both taps.

A first launch normalises and projects, a second attends, projects and adds the residual. A lone
sample's projecting programs find the moments for themselves, so that two launches do; where there
are many programs that would read too much, and moments are a launch of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastscore_kernels.gpu.attention import LOG2_E, attend
from fastscore_kernels.gpu.common import begin, dot
from fastscore_kernels.gpu.launch import ceil_div, device_of, launch, power_of_two
from fastscore_kernels.gpu.plans import plan_taps
from fastscore_kernels.gpu.tap_norm import moments, tap_statistics
from fastscore_kernels.gpu.tap_path_parts import (
    Scale,
    block_d,
    find_statistics,
    load_bias,
    normalised_tile,
    plan_scale,
    weight_tile,
)
from torch import Tensor


@triton.jit
def project_kernel(
    feature,
    gradient,
    partial,
    feature_weight,
    feature_bias,
    gradient_weight,
    gradient_bias,
    w_query,
    b_query,
    w_feature,
    b_feature,
    w_gradient,
    b_gradient,
    w_skip,
    b_skip,
    projected,
    log_rms,
    N,
    tiles,
    chunk,
    splits,
    EPS: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    KNOWN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One tile of projected [B, N, 7, W]; KNOWN: the moments are in ``partial``.

    Seven parts: query, keys, values and residual of the feature, then keys, values and residual of
    the gradient.
    """
    begin(DEPENDENT)
    CPG: tl.constexpr = C // G
    dtype: tl.constexpr = feature.dtype.element_ty
    program = tl.program_id(0)
    tile = program % tiles
    column = (program // tiles) % COLUMNS
    part = (program // (tiles * COLUMNS)) % 7
    b = (program // (tiles * COLUMNS * 7)).to(tl.int64)
    of_gradient = part >= 4
    x = tl.where(of_gradient, gradient, feature) + b * N * C
    weight = tl.where(of_gradient, gradient_weight, feature_weight)
    bias = tl.where(of_gradient, gradient_bias, feature_bias)
    if KNOWN:
        f_mean, f_rstd, g_mean, g_rstd, rms = tap_statistics(
            partial, b, N, chunk, splits, EPS, CPG, G, BLOCK_S, BLOCK_G
        )
        mean = tl.where(of_gradient, g_mean, f_mean)
        rstd = tl.where(of_gradient, g_rstd, f_rstd)
    else:
        mean, rstd, rms = find_statistics(x, of_gradient, N, EPS, C, G, BLOCK_N, BLOCK_C, BLOCK_G)
    if (part == 4) & (tile == 0) & (column == 0):
        tl.store(log_rms + b, tl.log(rms.to(tl.float32)))
    residual = (part == 3) | (part == 6)
    matrix = tl.where(part == 0, w_query, tl.where(of_gradient, w_gradient, w_feature))
    matrix = tl.where(residual, w_skip, matrix)
    offsets = tl.where(part == 0, b_query, tl.where(of_gradient, b_gradient, b_feature))
    offsets = tl.where(residual, b_skip, offsets)
    # values are the second half of their matrix, the gradient's residual the right half of its own
    second = (part == 2) | (part == 5)
    matrix += tl.where(second, W * C, tl.where(part == 6, C, 0))
    offsets += tl.where(second, W, 0)
    stride = tl.where(residual, 2 * C, C)
    n = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n_mask = n < N
    o = column * BLOCK_W + tl.arange(0, BLOCK_W)
    o_mask = o < W
    acc = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for at in range(0, C, BLOCK_K):
        t = normalised_tile(x, weight, bias, mean, rstd, n, n_mask, at, C, CPG, BLOCK_K, BLOCK_G)
        acc = dot(t, weight_tile(matrix, o, o_mask, at, C, stride, BLOCK_K, dtype), acc)
    # one residual brings the bias of both
    acc += load_bias(offsets, o, o_mask & (part != 6))
    places = projected + (b * N * 7 + part) * W + n[:, None] * (7 * W) + o[None, :]
    tl.store(places, acc.to(dtype), mask=n_mask[:, None] & o_mask[None, :])


@triton.jit
def attend_kernel(
    projected,
    w_out,
    b_out,
    out,
    N,
    W: tl.constexpr,
    HEADS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attention over all positions of both taps, output projection and residual for BLOCK_M."""
    begin(DEPENDENT)
    D: tl.constexpr = W // HEADS
    dtype: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    projected += b * N * 7 * W
    n = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_mask = n < N
    o = tl.arange(0, BLOCK_W)
    o_mask = o < W
    mask = n_mask[:, None] & o_mask[None, :]
    rows = projected + n[:, None] * (7 * W) + o[None, :]
    acc = tl.load(rows + 3 * W, mask=mask, other=0.0).to(tl.float32)
    acc += tl.load(rows + 6 * W, mask=mask, other=0.0).to(tl.float32)
    acc += load_bias(b_out, o, o_mask)
    d = tl.arange(0, BLOCK_D)
    q_mask = n_mask[:, None] & (d < D)[None, :]
    for head in range(HEADS):
        first = head * D
        base = projected + first
        query = tl.load(base + n[:, None] * (7 * W) + d[None, :], mask=q_mask, other=0.0)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        top, total, mixed = attend(
            query, base + W, top, total, mixed, N, 7 * W, W, D, SCALE, BLOCK_N, BLOCK_D
        )
        top, total, mixed = attend(
            query, base + 4 * W, top, total, mixed, N, 7 * W, W, D, SCALE, BLOCK_N, BLOCK_D
        )
        w = weight_tile(w_out, o, o_mask, first, first + D, W, BLOCK_D, dtype)
        acc = dot((mixed / total[:, None]).to(dtype), w, acc)
    tl.store(out + b * N * W + n[:, None] * W + o[None, :], acc.to(dtype), mask=mask)


def all_positions(
    f: Tensor,
    g: Tensor,
    norms: tuple[Tensor, ...],
    inner: tuple[Tensor, ...],
    outer: tuple[Tensor, ...],
    out: Tensor,
    log_rms: Tensor,
    sizes: Scale,
    eps: float,
) -> None:
    """Launch project_kernel and attend_kernel, the moments before where they are needed.

    f, g [B, C, H, W'] channels-last; norms, inner and outer as `tap_path` lists them: of the taps'
    norms, of what reads taps, of what reads the fused tokens. out and log_rms are written.
    """
    shape = (sizes.batch, sizes.positions, 7, sizes.width)
    projected = torch.empty(shape, dtype=f.dtype, device=f.device)
    _project(f, g, norms, inner, projected, log_rms, sizes, eps)
    narrow = f.element_size() == 2
    full = sizes.batch * ceil_div(sizes.positions, 64) >= device_of(f).multiprocessors
    # beside an output of all heads there is room for small tiles of fp32 or few queries
    rule = {
        "block_m": 64 if full and narrow else 16,
        "block_n": 64 if full and narrow else 32,
        "warps": 4,
        "stages": 2,
    }
    plan = plan_scale("tap_path_attend", f, sizes, rule)
    launch(
        attend_kernel,
        (sizes.batch, ceil_div(sizes.positions, plan["block_m"])),
        projected,
        *outer,
        out,
        sizes.positions,
        W=sizes.width,
        HEADS=sizes.heads,
        SCALE=(sizes.width // sizes.heads) ** -0.5 * LOG2_E,
        BLOCK_M=plan["block_m"],
        BLOCK_N=plan["block_n"],
        BLOCK_D=block_d(sizes),
        BLOCK_W=max(16, power_of_two(sizes.width)),
        num_warps=plan["warps"],
        num_stages=plan["stages"],
    )


def _project(
    f: Tensor,
    g: Tensor,
    norms: tuple[Tensor, ...],
    inner: tuple[Tensor, ...],
    projected: Tensor,
    log_rms: Tensor,
    sizes: Scale,
    eps: float,
) -> None:
    cores = device_of(f).multiprocessors
    columns = ceil_div(sizes.width, 128)
    programs = sizes.batch * ceil_div(sizes.positions, 64) * 7 * columns
    block_c = power_of_two(sizes.channels)
    rule = {
        "block_m": 64 if programs >= cores else 32,
        "block_k": 64 if f.element_size() == 2 else 32,
        "block_w": min(128, max(16, power_of_two(sizes.width))),
        # every program reads its whole tap: worth a launch while they all run at once
        "known": int(programs > cores or block_c > 512),
        "warps": 8,
        "stages": 2,
    }
    plan = plan_scale("tap_path_project", f, sizes, rule)
    stretches = plan_taps("tap_path_moments", f, sizes.groups, split=True)
    partial = moments(f, g, stretches, sizes.groups) if plan["known"] else log_rms
    columns = ceil_div(sizes.width, plan["block_w"])
    tiles = ceil_div(sizes.positions, plan["block_m"])
    options: dict[str, Any] = {
        "EPS": eps,
        "C": sizes.channels,
        "W": sizes.width,
        "G": sizes.groups,
        "KNOWN": bool(plan["known"]),
        "COLUMNS": columns,
        "BLOCK_M": plan["block_m"],
        "BLOCK_K": plan["block_k"],
        "BLOCK_W": plan["block_w"],
        "BLOCK_N": max(1, 8192 // block_c),
        "BLOCK_C": block_c,
        "BLOCK_G": stretches.all_groups,
        "BLOCK_S": stretches.block_s,
        "num_warps": plan["warps"],
        "num_stages": plan["stages"],
    }
    launch(
        project_kernel,
        (tiles * columns * 7 * sizes.batch,),
        f,
        g,
        partial,
        *norms,
        *inner,
        projected,
        log_rms,
        sizes.positions,
        tiles,
        stretches.chunk,
        stretches.splits,
        **options,
    )


__all__ = ["all_positions"]
