"""One scale of the tap path, inference only: statistics, normalisation, projections, attention.

Own positions: moments first, then one launch that goes from taps to the fused output for a few
positions at a time; queries, keys and values never reach memory.

All positions: a first launch normalises and projects, a second attends, projects and adds the
residual. A lone sample's projecting programs find the moments for themselves, so that two launches
do; where there are many programs that would read too much, and moments are a launch of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastscore_kernels.gpu.attention import LOG2_E, attend
from fastscore_kernels.gpu.common import channel_moments, dot, group_moments, membership, spread
from fastscore_kernels.gpu.launch import ceil_div, choose, device_of, launch, like, power_of_two
from fastscore_kernels.gpu.plans import plan_taps
from fastscore_kernels.gpu.tap_norm import moments, rstd_of, tap_statistics
from torch import Tensor


@triton.jit
def normalised_tile(
    x,
    weight,
    bias,
    mean,
    rstd,
    n,
    n_mask,
    at,
    C: tl.constexpr,
    CPG: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Channels at .. at + BLOCK_K of a tap [N, C] at positions ``n``, normalised, in its dtype.

    mean, rstd [BLOCK_G] of all groups. Padding is zero.
    """
    c = at + tl.arange(0, BLOCK_K)
    c_mask = c < C
    mask = n_mask[:, None] & c_mask[None, :]
    tile = tl.load(x + n[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    member = ((c // CPG)[:, None] == tl.arange(0, BLOCK_G)[None, :]) & c_mask[:, None]
    factor = spread(rstd, member) * tl.load(weight + c, mask=c_mask, other=0.0).to(tl.float32)
    summand = tl.load(bias + c, mask=c_mask, other=0.0).to(tl.float32)
    out = (tile - spread(mean, member)[None, :]) * factor[None, :] + summand[None, :]
    return out.to(x.dtype.element_ty)


@triton.jit
def weight_tile(
    w,
    row,
    row_mask,
    at,
    stop,
    stride,
    BLOCK_K: tl.constexpr,
    dtype: tl.constexpr,
):
    """[BLOCK_K, rows] of a matrix [out, in] with row distance ``stride``, columns at .. stop."""
    k = at + tl.arange(0, BLOCK_K)
    mask = row_mask[:, None] & (k < stop)[None, :]
    tile = tl.load(w + row[:, None] * stride + k[None, :], mask=mask, other=0.0)
    return tl.trans(tile.to(dtype))


@triton.jit
def load_bias(b, row, mask):
    """One row of biases, [1, rows] fp32."""
    return tl.load(b + row, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def own_path_kernel(
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
    w_out,
    b_out,
    out,
    log_rms,
    N,
    chunk,
    splits,
    EPS: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """From taps to output for BLOCK_M positions of one sample, each attending to its own tokens."""
    CPG: tl.constexpr = C // G
    D: tl.constexpr = W // HEADS
    dtype: tl.constexpr = feature.dtype.element_ty
    b = tl.program_id(1).to(tl.int64)
    f_mean, f_rstd, g_mean, g_rstd, rms = tap_statistics(
        partial, b, N, chunk, splits, EPS, CPG, G, BLOCK_S, BLOCK_G
    )
    if tl.program_id(0) == 0:
        tl.store(log_rms + b, tl.log(rms.to(tl.float32)))
    feature += b * N * C
    gradient += b * N * C
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_mask = n < N
    o = tl.arange(0, BLOCK_W)
    o_mask = o < W
    acc = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for at in range(0, C, BLOCK_K):
        f = normalised_tile(
            feature, feature_weight, feature_bias, f_mean, f_rstd, n, n_mask, at, C, CPG, BLOCK_K,
            BLOCK_G,
        )  # fmt: skip
        g = normalised_tile(
            gradient, gradient_weight, gradient_bias, g_mean, g_rstd, n, n_mask, at, C, CPG,
            BLOCK_K, BLOCK_G,
        )  # fmt: skip
        acc = dot(f, weight_tile(w_skip, o, o_mask, at, C, 2 * C, BLOCK_K, dtype), acc)
        acc = dot(g, weight_tile(w_skip + C, o, o_mask, at, C, 2 * C, BLOCK_K, dtype), acc)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < D
    for head in range(HEADS):
        row = head * D + d
        q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32) + load_bias(b_query, row, d_mask)
        k0 = tl.zeros((BLOCK_M, BLOCK_D), tl.float32) + load_bias(b_feature, row, d_mask)
        v0 = tl.zeros((BLOCK_M, BLOCK_D), tl.float32) + load_bias(b_feature + W, row, d_mask)
        k1 = tl.zeros((BLOCK_M, BLOCK_D), tl.float32) + load_bias(b_gradient, row, d_mask)
        v1 = tl.zeros((BLOCK_M, BLOCK_D), tl.float32) + load_bias(b_gradient + W, row, d_mask)
        for at in range(0, C, BLOCK_K):
            f = normalised_tile(
                feature, feature_weight, feature_bias, f_mean, f_rstd, n, n_mask, at, C, CPG,
                BLOCK_K, BLOCK_G,
            )  # fmt: skip
            g = normalised_tile(
                gradient, gradient_weight, gradient_bias, g_mean, g_rstd, n, n_mask, at, C, CPG,
                BLOCK_K, BLOCK_G,
            )  # fmt: skip
            q = dot(f, weight_tile(w_query, row, d_mask, at, C, C, BLOCK_K, dtype), q)
            k0 = dot(f, weight_tile(w_feature, row, d_mask, at, C, C, BLOCK_K, dtype), k0)
            v0 = dot(f, weight_tile(w_feature + W * C, row, d_mask, at, C, C, BLOCK_K, dtype), v0)
            k1 = dot(g, weight_tile(w_gradient, row, d_mask, at, C, C, BLOCK_K, dtype), k1)
            v1 = dot(g, weight_tile(w_gradient + W * C, row, d_mask, at, C, C, BLOCK_K, dtype), v1)
        l0 = tl.sum(q * k0, axis=1) * SCALE
        l1 = tl.sum(q * k1, axis=1) * SCALE
        top = tl.maximum(l0, l1)
        e0 = tl.exp(l0 - top)
        e1 = tl.exp(l1 - top)
        fused = (v0 * e0[:, None] + v1 * e1[:, None]) / (e0 + e1)[:, None]
        first = head * D
        w = weight_tile(w_out, o, o_mask, first, first + D, W, BLOCK_D, dtype)
        acc = dot(fused.to(dtype), w, acc)
    acc += load_bias(b_skip, o, o_mask) + load_bias(b_out, o, o_mask)
    places = out + b * N * W + n[:, None] * W + o[None, :]
    tl.store(places, acc.to(out.dtype.element_ty), mask=n_mask[:, None] & o_mask[None, :])


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
):
    """One tile of projected [B, N, 7, W]; KNOWN: the moments are in ``partial``.

    Seven parts: query, keys, values and residual of the feature, then keys, values and residual of
    the gradient.
    """
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
        lane = tl.arange(0, BLOCK_C)
        c_mask = lane < C
        member = membership(c_mask, CPG, BLOCK_C, BLOCK_G)
        mean_c, m2_c = channel_moments(x, lane, c_mask, 0, N, C, N, True, BLOCK_N, True)
        wide_mean, m2 = group_moments(mean_c.to(tl.float64), m2_c, member, N * 1.0, CPG)
        count = N * CPG * 1.0
        square = tl.sum(m2 / count + wide_mean * wide_mean, axis=0) / G
        rms = tl.maximum(tl.sqrt(square), 1e-30)
        mean = wide_mean.to(tl.float32)
        rstd = rstd_of(m2, count, tl.where(of_gradient, rms * rms, 1.0), EPS)
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
):
    """Attention over all positions of both taps, output projection and residual for BLOCK_M."""
    D: tl.constexpr = W // HEADS
    dtype: tl.constexpr = out.dtype.element_ty
    b = tl.program_id(1).to(tl.int64)
    projected += b * N * 7 * W
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
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


class _Scale(NamedTuple):
    """Sizes of one call."""

    batch: int
    channels: int
    width: int
    positions: int
    groups: int
    heads: int


def tap_path(
    feature: Tensor,
    gradient: Tensor,
    feature_weight: Tensor,
    feature_bias: Tensor,
    gradient_weight: Tensor,
    gradient_bias: Tensor,
    query: Tensor,
    query_bias: Tensor,
    key_value_feature: Tensor,
    key_value_feature_bias: Tensor,
    key_value_gradient: Tensor,
    key_value_gradient_bias: Tensor,
    skip: Tensor,
    skip_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    groups: int,
    heads: int,
    spatial: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """skip(taps) + out(tap_fuse(query, key_values)) [B, W, H, W'] and log RMS [B] fp32.

    feature, gradient [B, C, H, W']; matrices [out, in, ...] as `fastscore_kernels.tap_path` names
    them. The output has the feature's memory format.
    """
    last = torch.channels_last
    f, g = feature.contiguous(memory_format=last), gradient.contiguous(memory_format=last)
    batch, channels, height, width = f.shape
    sizes = _Scale(batch, channels, query.shape[0], height * width, groups, heads)
    out = torch.empty(
        (batch, sizes.width, height, width), dtype=f.dtype, device=f.device, memory_format=last
    )
    log_rms = torch.empty(batch, dtype=torch.float32, device=f.device)
    norms = (feature_weight, feature_bias, gradient_weight, gradient_bias)
    inner = (query, query_bias, key_value_feature, key_value_feature_bias)
    inner += (key_value_gradient, key_value_gradient_bias, skip, skip_bias)
    inner = tuple(t.contiguous() for t in inner)
    outer = (out_weight.contiguous(), out_bias)
    run = _all_positions if spatial else _own_positions
    run(f, g, norms, inner, outer, out, log_rms, sizes, eps)
    return like(out, feature), log_rms


def _plan(op: str, x: Tensor, sizes: _Scale, rule: dict[str, int]) -> dict[str, int]:
    shape = {"dtype": str(x.dtype).removeprefix("torch."), **sizes._asdict()}
    return choose(op, device_of(x), shape, rule)


def _own_positions(
    f: Tensor,
    g: Tensor,
    norms: tuple[Tensor, ...],
    inner: tuple[Tensor, ...],
    outer: tuple[Tensor, ...],
    out: Tensor,
    log_rms: Tensor,
    sizes: _Scale,
    eps: float,
) -> None:
    stretches = plan_taps("tap_norm", f, sizes.groups, split=True)
    partial = moments(f, g, stretches, sizes.groups)
    narrow = f.element_size() == 2
    full = sizes.batch * ceil_div(sizes.positions, 32) >= 2 * device_of(f).multiprocessors
    rule = {
        "block_m": 32 if full and narrow else 16,
        # wide outputs leave fewer registers for weights on their way
        "block_k": (64 if narrow else 32) // (2 if sizes.width > 128 else 1),
        "warps": 8 if sizes.width > 64 else 4,
        "stages": 2,
    }
    plan = _plan("tap_path_own", f, sizes, rule)
    launch(
        own_path_kernel,
        (ceil_div(sizes.positions, plan["block_m"]), sizes.batch),
        f,
        g,
        partial,
        *norms,
        *inner,
        *outer,
        out,
        log_rms,
        sizes.positions,
        stretches.chunk,
        stretches.splits,
        EPS=eps,
        C=sizes.channels,
        W=sizes.width,
        G=sizes.groups,
        HEADS=sizes.heads,
        SCALE=(sizes.width // sizes.heads) ** -0.5,
        BLOCK_M=plan["block_m"],
        BLOCK_K=plan["block_k"],
        BLOCK_D=_block_d(sizes),
        BLOCK_W=max(16, power_of_two(sizes.width)),
        BLOCK_G=stretches.all_groups,
        BLOCK_S=stretches.block_s,
        num_warps=plan["warps"],
        num_stages=plan["stages"],
    )


def _block_d(sizes: _Scale) -> int:
    return max(16, power_of_two(sizes.width // sizes.heads))


def _all_positions(
    f: Tensor,
    g: Tensor,
    norms: tuple[Tensor, ...],
    inner: tuple[Tensor, ...],
    outer: tuple[Tensor, ...],
    out: Tensor,
    log_rms: Tensor,
    sizes: _Scale,
    eps: float,
) -> None:
    shape = (sizes.batch, sizes.positions, 7, sizes.width)
    projected = torch.empty(shape, dtype=f.dtype, device=f.device)
    _project(f, g, norms, inner, projected, log_rms, sizes, eps)
    narrow = f.element_size() == 2
    full = sizes.batch * ceil_div(sizes.positions, 64) >= device_of(f).multiprocessors
    rule = {
        "block_m": 64 if full and narrow else 16,
        "block_n": 64 if narrow else 32,
        "warps": 4,
        "stages": 2,
    }
    plan = _plan("tap_path_attend", f, sizes, rule)
    launch(
        attend_kernel,
        (ceil_div(sizes.positions, plan["block_m"]), sizes.batch),
        projected,
        *outer,
        out,
        sizes.positions,
        W=sizes.width,
        HEADS=sizes.heads,
        SCALE=(sizes.width // sizes.heads) ** -0.5 * LOG2_E,
        BLOCK_M=plan["block_m"],
        BLOCK_N=plan["block_n"],
        BLOCK_D=_block_d(sizes),
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
    sizes: _Scale,
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
    plan = _plan("tap_path_project", f, sizes, rule)
    stretches = plan_taps("tap_norm", f, sizes.groups, split=True)
    # without moments of stretches their place is taken by a tensor that nobody reads
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


__all__ = ["tap_path"]
