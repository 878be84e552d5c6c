"""Vector-Jacobian product of norm_act in one or two launches, several cotangents a sample.

As in the forward pass a program holds whole groups, or stretches of positions whose sums a second
launch combines in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastscore_kernels.gpu.common import (
    at_position,
    begin,
    gather,
    load_affine,
    load_pre_bias,
    membership,
    sigmoid,
    spread,
)
from fastscore_kernels.gpu.launch import film_rows, is_last, launch, like
from fastscore_kernels.gpu.plans import plan_norm
from torch import Tensor


@triton.jit
def load_statistics(
    stats,
    pre_bias,
    batch,
    b,
    g0,
    c,
    c_mask,
    member,
    G: tl.constexpr,
    BUNDLE: tl.constexpr,
    PRE: tl.constexpr,
):
    """What to take from x, and rstd, for every channel of a program, from stats [2, batch, G]."""
    g = tl.arange(0, member.shape[1])
    row = stats + b * G + g0 + g
    mean = spread(tl.load(row, mask=g < BUNDLE, other=0.0), member)
    rstd = spread(tl.load(row + batch * G, mask=g < BUNDLE, other=0.0), member)
    if PRE:
        mean -= load_pre_bias(pre_bias, c, c_mask)
    return mean, rstd


@triton.jit
def pull_tile(grad, x, offsets, mask, mean, rstd, factor, summand, ACT: tl.constexpr):
    """dz and xhat of one tile: the cotangent before the activation, and its input normalised."""
    dz = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    xhat = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    xhat = (xhat - mean[None, :]) * rstd[None, :]
    if ACT:
        z = xhat * factor[None, :] + summand[None, :]
        s = sigmoid(z)
        dz = dz * s * (1.0 + z * (1.0 - s))
    # cotangents of padding are zero already, so xhat need not be
    return dz, xhat


@triton.jit
def push_tile(dz, xhat, rstd, factor, mean_d, mean_dx):
    """Cotangent of x from dz and the group means of dxhat and dxhat * xhat, spread to channels."""
    return rstd[None, :] * (dz * factor[None, :] - mean_d[None, :] - xhat * mean_dx[None, :])


@triton.jit
def store_image(grad_x, addend, offsets, mask, out, ADD: tl.constexpr):
    """Write one tile of the cotangent of x, with what else flows into x added to it in fp32."""
    if ADD:
        out += tl.load(addend + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x + offsets, out.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def norm_act_backward_kernel(
    grad,
    x,
    stats,
    weight,
    bias,
    film,
    film_stride,
    pre_bias,
    addend,
    grad_x,
    sums,
    batch,
    rows,
    N,
    C: tl.constexpr,
    G: tl.constexpr,
    BUNDLE: tl.constexpr,
    LAST: tl.constexpr,
    PRE: tl.constexpr,
    FILM: tl.constexpr,
    ACT: tl.constexpr,
    ADD: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a cotangent and bundle of groups; WHOLE: its numbers stay in registers."""
    begin(DEPENDENT)
    CPG: tl.constexpr = C // G
    program = tl.program_id(0)
    row = (program // (G // BUNDLE)).to(tl.int64)
    b = row % batch
    g0 = (program % (G // BUNDLE)) * BUNDLE
    lane = tl.arange(0, BLOCK_C)
    c_mask = lane < BUNDLE * CPG
    c = g0 * CPG + lane
    member = membership(c_mask, CPG, BLOCK_C, BLOCK_G)
    mean, rstd = load_statistics(stats, pre_bias, batch, b, g0, c, c_mask, member, G, BUNDLE, PRE)
    factor, summand = load_affine(weight, bias, film, film_stride, b, c, c_mask, C, FILM)
    x += b * C * N
    grad += row * C * N
    addend += row * C * N
    grad_x += row * C * N
    n = tl.arange(0, BLOCK_N)
    mask = (n < N)[:, None] & c_mask[None, :]
    offsets = at_position(n[:, None], c[None, :], C, N, LAST)
    dz, xhat = pull_tile(grad, x, offsets, mask, mean, rstd, factor, summand, ACT)
    total, total_x = dz, dz * xhat
    if not WHOLE:
        for at in range(BLOCK_N, N, BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            mask = (n < N)[:, None] & c_mask[None, :]
            offsets = at_position(n[:, None], c[None, :], C, N, LAST)
            dz, xhat = pull_tile(grad, x, offsets, mask, mean, rstd, factor, summand, ACT)
            total += dz
            total_x += dz * xhat
    sum_d = tl.sum(total, axis=0)
    sum_dx = tl.sum(total_x, axis=0)
    tl.store(sums + row * C + c, sum_d, mask=c_mask)
    tl.store(sums + (rows + row) * C + c, sum_dx, mask=c_mask)
    mean_d = spread(gather(sum_d * factor, member), member) / (N * CPG)
    mean_dx = spread(gather(sum_dx * factor, member), member) / (N * CPG)
    if WHOLE:
        out = push_tile(dz, xhat, rstd, factor, mean_d, mean_dx)
        store_image(grad_x, addend, offsets, mask, out, ADD)
    else:
        for at in range(0, N, BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            mask = (n < N)[:, None] & c_mask[None, :]
            offsets = at_position(n[:, None], c[None, :], C, N, LAST)
            dz, xhat = pull_tile(grad, x, offsets, mask, mean, rstd, factor, summand, ACT)
            out = push_tile(dz, xhat, rstd, factor, mean_d, mean_dx)
            store_image(grad_x, addend, offsets, mask, out, ADD)


@triton.jit
def norm_act_backward_partial_kernel(
    grad,
    x,
    stats,
    weight,
    bias,
    film,
    film_stride,
    pre_bias,
    channel_sums,
    group_sums,
    batch,
    N,
    chunk,
    splits,
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
    DEPENDENT: tl.constexpr,
):
    """Sums over one stretch of positions, for each channel and for each group.

    channel_sums [rows, splits, 2, C] of dz and dz * xhat, group_sums [rows, splits, 2, G] of dxhat
    and dxhat * xhat.
    """
    begin(DEPENDENT)
    CPG: tl.constexpr = C // G
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = row % batch
    g0 = tl.program_id(2) * BUNDLE
    lane = tl.arange(0, BLOCK_C)
    c_mask = lane < BUNDLE * CPG
    c = g0 * CPG + lane
    member = membership(c_mask, CPG, BLOCK_C, BLOCK_G)
    mean, rstd = load_statistics(stats, pre_bias, batch, b, g0, c, c_mask, member, G, BUNDLE, PRE)
    factor, summand = load_affine(weight, bias, film, film_stride, b, c, c_mask, C, FILM)
    x += b * C * N
    grad += row * C * N
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    total_x = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    start = split * chunk
    stop = tl.minimum(start + chunk, N)
    for at in range(start, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        mask = (n < stop)[:, None] & c_mask[None, :]
        offsets = at_position(n[:, None], c[None, :], C, N, LAST)
        dz, xhat = pull_tile(grad, x, offsets, mask, mean, rstd, factor, summand, ACT)
        total += dz
        total_x += dz * xhat
    sum_d = tl.sum(total, axis=0)
    sum_dx = tl.sum(total_x, axis=0)
    place = (row * splits + split) * 2
    tl.store(channel_sums + place * C + c, sum_d, mask=c_mask)
    tl.store(channel_sums + (place + 1) * C + c, sum_dx, mask=c_mask)
    g = tl.arange(0, BLOCK_G)
    known = g < BUNDLE
    tl.store(group_sums + place * G + g0 + g, gather(sum_d * factor, member), mask=known)
    tl.store(group_sums + (place + 1) * G + g0 + g, gather(sum_dx * factor, member), mask=known)


@triton.jit
def sum_splits(
    sums, row, splits, at, mask, WIDTH: tl.constexpr, WHICH: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Sum over the stretches of sums [rows, splits, 2, WIDTH] at columns ``at``."""
    s = tl.arange(0, BLOCK_S)
    places = ((row * splits + s) * 2 + WHICH) * WIDTH
    known = (s < splits)[:, None] & mask[None, :]
    return tl.sum(tl.load(sums + places[:, None] + at[None, :], mask=known, other=0.0), axis=0)


@triton.jit
def norm_act_backward_apply_kernel(
    grad,
    x,
    stats,
    weight,
    bias,
    film,
    film_stride,
    pre_bias,
    channel_sums,
    group_sums,
    addend,
    grad_x,
    sums,
    batch,
    rows,
    N,
    chunk,
    splits,
    C: tl.constexpr,
    G: tl.constexpr,
    BUNDLE: tl.constexpr,
    LAST: tl.constexpr,
    PRE: tl.constexpr,
    FILM: tl.constexpr,
    ACT: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Cotangent of one stretch; one more program a row adds up the channel sums beside them."""
    begin(DEPENDENT)
    CPG: tl.constexpr = C // G
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = row % batch
    g0 = tl.program_id(2) * BUNDLE
    lane = tl.arange(0, BLOCK_C)
    c_mask = lane < BUNDLE * CPG
    c = g0 * CPG + lane
    if split == splits:
        # all stretches of 32 channels at a time: a tile of all channels would not fit in registers
        for first in range(0, BUNDLE * CPG, 32):
            at = g0 * CPG + first + tl.arange(0, 32)
            known = at < (g0 + BUNDLE) * CPG
            sum_d = sum_splits(channel_sums, row, splits, at, known, C, 0, BLOCK_S)
            sum_dx = sum_splits(channel_sums, row, splits, at, known, C, 1, BLOCK_S)
            tl.store(sums + row * C + at, sum_d, mask=known)
            tl.store(sums + (rows + row) * C + at, sum_dx, mask=known)
    else:
        member = membership(c_mask, CPG, BLOCK_C, BLOCK_G)
        mean, rstd = load_statistics(
            stats, pre_bias, batch, b, g0, c, c_mask, member, G, BUNDLE, PRE
        )
        factor, summand = load_affine(weight, bias, film, film_stride, b, c, c_mask, C, FILM)
        g = tl.arange(0, BLOCK_G)
        group_d = sum_splits(group_sums, row, splits, g0 + g, g < BUNDLE, G, 0, BLOCK_S)
        group_dx = sum_splits(group_sums, row, splits, g0 + g, g < BUNDLE, G, 1, BLOCK_S)
        mean_d = spread(group_d, member) / (N * CPG)
        mean_dx = spread(group_dx, member) / (N * CPG)
        x += b * C * N
        grad += row * C * N
        addend += row * C * N
        grad_x += row * C * N
        start = split * chunk
        stop = tl.minimum(start + chunk, N)
        for at in range(start, stop, BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            mask = (n < stop)[:, None] & c_mask[None, :]
            offsets = at_position(n[:, None], c[None, :], C, N, LAST)
            dz, xhat = pull_tile(grad, x, offsets, mask, mean, rstd, factor, summand, ACT)
            out = push_tile(dz, xhat, rstd, factor, mean_d, mean_dx)
            store_image(grad_x, addend, offsets, mask, out, ADD)


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    groups: int,
    act: bool,
    addend: Tensor | None,
    pre_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Cotangent of x, like grad [R B, C, H, W], and sums [2, R B, C] fp32 of dz and dz * xhat.

    x [B, C, H, W], stats [2, B, groups] as ``norm_act`` returned them; row i of grad belongs to
    sample i % B. addend, shaped as grad, is added to the cotangent, and pre_bias [C] was to x;
    None adds nothing.
    """
    batch, channels = x.shape[:2]
    rows, positions = grad.shape[0], x.shape[2] * x.shape[3]
    # the result has grad's memory format, whatever it is: the kernels know one for all
    cotangent = like(grad, x)
    plan = plan_norm("norm_act_backward", x, groups, rows)
    grad_x = torch.empty_like(cotangent)
    sums = torch.empty(2, rows, channels, dtype=torch.float32, device=x.device)
    film_row, film_stride = film_rows(film, weight)
    # in place of what is not there, pointers that nobody reads
    pre = weight if pre_bias is None else pre_bias
    given = (cotangent, x, stats.contiguous(), weight, bias, film_row, film_stride, pre)
    common = {
        "C": channels,
        "G": groups,
        "BUNDLE": plan.bundle,
        "LAST": is_last(x),
        "PRE": pre_bias is not None,
        "FILM": film is not None,
        "ACT": act,
        "BLOCK_N": plan.block_n,
        "BLOCK_C": plan.block_c,
        "BLOCK_G": plan.block_g,
        "num_warps": plan.warps,
    }
    bundles = groups // plan.bundle
    outs = (cotangent if addend is None else like(addend, x), grad_x, sums, batch, rows)
    adding = {"ADD": addend is not None}
    if plan.splits == 1:
        launch(
            norm_act_backward_kernel,
            (rows * bundles,),
            *given,
            *outs,
            positions,
            **common,
            **adding,
            WHOLE=plan.whole,
        )
        return like(grad_x, grad), sums
    shape = (rows, plan.splits, 2)
    channel_sums = torch.empty(*shape, channels, dtype=torch.float32, device=x.device)
    group_sums = torch.empty(*shape, groups, dtype=torch.float32, device=x.device)
    partials = (channel_sums, group_sums)
    stretch = (positions, plan.chunk, plan.splits)
    launch(
        norm_act_backward_partial_kernel,
        (rows, plan.splits, bundles),
        *given,
        *partials,
        batch,
        *stretch,
        **common,
    )
    launch(
        norm_act_backward_apply_kernel,
        (rows, plan.splits + 1, bundles),
        *given,
        *partials,
        *outs,
        *stretch,
        **common,
        **adding,
        BLOCK_S=plan.block_s,
    )
    return like(grad_x, grad), sums


__all__ = ["norm_act_backward"]
