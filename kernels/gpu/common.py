"""Pieces that several kernels share. Only triton.jit functions: they run on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# whether kernels run under Triton's interpreter: read once, as triton itself does when it decorates
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """To be the first thing a kernel does: the one before it may not have ended yet.

    DEPENDENT: it was launched early (programmatic dependent launch). It waits until all that came
    before is in memory, and has let the next one be launched, which waits in its turn.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def at_position(n, c, C: tl.constexpr, N, LAST: tl.constexpr):
    """Offset inside one dense sample of channels ``c`` at positions ``n``."""
    if LAST:
        return n * C + c
    else:
        return c * N + n


@triton.jit
def load_tile(x, n, c, mask, C: tl.constexpr, N, LAST: tl.constexpr):
    """Positions ``n`` by channels ``c`` of one dense sample, in fp32."""
    offsets = at_position(n[:, None], c[None, :], C, N, LAST)
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def channel_moments(
    x,
    c,
    c_mask,
    start,
    stop,
    C: tl.constexpr,
    N,
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean and centred sum of squares of every channel over positions start .. stop.

    Sums run over differences from the first tile's mean, so a large mean costs no digits; with
    WIDE squares are fp64, whose range holds those of any fp32 number.
    """
    n = start + tl.arange(0, BLOCK_N)
    mask = (n < stop)[:, None] & c_mask[None, :]
    tile = load_tile(x, n, c, mask, C, N, LAST)
    shift = tl.sum(tile, axis=0) / (tl.minimum(stop - start, BLOCK_N) * 1.0)
    d = tl.where(mask, tile - shift[None, :], 0.0)
    total = d
    squares = d.to(tl.float64) * d.to(tl.float64) if WIDE else d * d
    for at in tl.range(start + BLOCK_N, stop, BLOCK_N, num_stages=3):
        n = at + tl.arange(0, BLOCK_N)
        mask = (n < stop)[:, None] & c_mask[None, :]
        tile = load_tile(x, n, c, mask, C, N, LAST)
        d = tl.where(mask, tile - shift[None, :], 0.0)
        total += d
        squares += d.to(tl.float64) * d.to(tl.float64) if WIDE else d * d
    return finish_moments(shift, total, squares, (stop - start) * 1.0, WIDE)


@triton.jit
def finish_moments(shift, total, squares, count, WIDE: tl.constexpr):
    """Channel moments from sums over positions of differences from ``shift``."""
    s1 = tl.sum(total, axis=0)
    s2 = tl.sum(squares, axis=0)
    mean = shift + s1 / count
    m2 = s2 - (s1.to(tl.float64) * s1.to(tl.float64) if WIDE else s1 * s1) / count
    return mean, tl.maximum(m2, 0.0)


@triton.jit
def membership(c_mask, CPG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """[BLOCK_C, BLOCK_G]: whether a program's channel belongs to its group."""
    group = tl.arange(0, BLOCK_C) // CPG
    return (group[:, None] == tl.arange(0, BLOCK_G)[None, :]) & c_mask[:, None]


@triton.jit
def gather(per_channel, member):
    """Sums over each group's channels, [BLOCK_C] -> [BLOCK_G]."""
    return tl.sum(tl.where(member, per_channel[:, None], 0.0), axis=0)


@triton.jit
def spread(per_group, member):
    """Every channel's group's number, [BLOCK_G] -> [BLOCK_C]."""
    return tl.sum(tl.where(member, per_group[None, :], 0.0), axis=1)


@triton.jit
def group_moments(mean, m2, member, count, CPG: tl.constexpr):
    """Moments of groups from those of their channels, ``count`` positions each."""
    group_mean = gather(mean, member) / CPG
    d = mean - spread(group_mean, member)
    return group_mean, gather(m2 + d * d * count, member)


@triton.jit
def combine_moments(means, m2s, splits, chunk, N, per_position, BLOCK_S: tl.constexpr):
    """Moments of whole groups from those of ``splits`` stretches of ``chunk`` positions.

    means, m2s [BLOCK_S, BLOCK_G], zero beyond ``splits``; the last stretch may be shorter;
    ``per_position`` numbers a position.
    """
    s = tl.arange(0, BLOCK_S)
    positions = tl.maximum(tl.minimum(N - s * chunk, chunk), 0)
    count = (tl.where(s < splits, positions, 0) * per_position).to(means.dtype)
    mean = tl.sum(means * count[:, None], axis=0) / tl.sum(count, axis=0)
    d = means - mean[None, :]
    return mean, tl.sum(m2s + d * d * count[:, None], axis=0)


@triton.jit
def sigmoid(z):
    """Logistic function; exp overflows to infinity, whose inverse is the right limit."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def load_affine(weight, bias, film, film_stride, b, c, c_mask, C: tl.constexpr, FILM: tl.constexpr):
    """Factor and summand that follow the normalisation, [BLOCK_C] fp32 each."""
    factor = tl.load(weight + c, mask=c_mask, other=0.0).to(tl.float32)
    summand = tl.load(bias + c, mask=c_mask, other=0.0).to(tl.float32)
    if FILM:
        row = film + b * film_stride
        scale = 1.0 + tl.load(row + c, mask=c_mask, other=0.0).to(tl.float32)
        shift = tl.load(row + C + c, mask=c_mask, other=0.0).to(tl.float32)
        factor = factor * scale
        summand = summand * scale + shift
    return factor, summand


@triton.jit
def load_pre_bias(pre_bias, c, c_mask):
    """What is added to every channel before the normalisation, [BLOCK_C] fp32."""
    return tl.load(pre_bias + c, mask=c_mask, other=0.0).to(tl.float32)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b on tensor cores, fp32 accumulation.

    fp32 inputs are split into three tf32 products: 2^-21 of the largest product is lost, where one
    would lose 2^-11, and plain fp32 has no tensor core and spills.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="tf32x3")
