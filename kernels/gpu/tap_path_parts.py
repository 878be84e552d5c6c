"""What both ways through the tap path share: normalised tiles, weights, statistics, sizes."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from fastscore_kernels.gpu.common import channel_moments, group_moments, membership, spread
from fastscore_kernels.gpu.launch import choose, device_of, power_of_two
from fastscore_kernels.gpu.tap_norm import rstd_of
from torch import Tensor


class Scale(NamedTuple):
    """Sizes of one call."""

    batch: int
    channels: int
    width: int
    positions: int
    groups: int
    heads: int


def plan_scale(op: str, x: Tensor, sizes: Scale, rule: dict[str, int]) -> dict[str, int]:
    """The launch parameters of ``op`` for a scale, from its rule."""
    shape = {"dtype": str(x.dtype).removeprefix("torch."), **sizes._asdict()}
    return choose(op, device_of(x), shape, rule)


def block_d(sizes: Scale) -> int:
    """Lanes for one head's channels: at least what a tensor core takes."""
    return max(16, power_of_two(sizes.width // sizes.heads))


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
def find_statistics(
    x,
    of_gradient,
    N,
    EPS: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Mean and rstd of all groups of one tap [N, C], fp32, and its RMS, fp64."""
    CPG: tl.constexpr = C // G
    lane = tl.arange(0, BLOCK_C)
    c_mask = lane < C
    member = membership(c_mask, CPG, BLOCK_C, BLOCK_G)
    mean_c, m2_c = channel_moments(x, lane, c_mask, 0, N, C, N, True, BLOCK_N, True)
    mean, m2 = group_moments(mean_c.to(tl.float64), m2_c, member, N * 1.0, CPG)
    count = N * CPG * 1.0
    square = tl.sum(m2 / count + mean * mean, axis=0) / G
    rms = tl.maximum(tl.sqrt(square), 1e-30)
    rstd = rstd_of(m2, count, tl.where(of_gradient, rms * rms, 1.0), EPS)
    return mean.to(tl.float32), rstd, rms
