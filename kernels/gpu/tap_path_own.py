"""The tap path where every position attends to its own tokens.

One launch goes from taps to the fused output for a few positions at a time; queries, keys and
values never reach memory. Moments are found by every program where a tap is small, and by a launch
before where it is not.
"""

from __future__ import annotations

import triton
import triton.language as tl
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

# elements of a tap that every program may read for itself
_LONE_TAP = 49152


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
    KNOWN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """From taps to output for BLOCK_M positions of one sample, each attending to its own tokens.

    KNOWN: the moments are in ``partial``.
    """
    begin(DEPENDENT)
    CPG: tl.constexpr = C // G
    D: tl.constexpr = W // HEADS
    dtype: tl.constexpr = feature.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    feature += b * N * C
    gradient += b * N * C
    if KNOWN:
        f_mean, f_rstd, g_mean, g_rstd, rms = tap_statistics(
            partial, b, N, chunk, splits, EPS, CPG, G, BLOCK_S, BLOCK_G
        )
    else:
        f_mean, f_rstd, rms = find_statistics(
            feature, False, N, EPS, C, G, BLOCK_N, BLOCK_C, BLOCK_G
        )
        g_mean, g_rstd, rms = find_statistics(
            gradient, True, N, EPS, C, G, BLOCK_N, BLOCK_C, BLOCK_G
        )
    if tl.program_id(1) == 0:
        tl.store(log_rms + b, tl.log(rms.to(tl.float32)))
    n = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
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


def own_positions(
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
    """Launch own_path_kernel, after the moments where they are not found on the way.

    f, g [B, C, H, W'] channels-last; norms, inner and outer as `tap_path` lists them: of the taps'
    norms, of what reads taps, of what reads the fused tokens. out and log_rms are written.
    """
    narrow = f.element_size() == 2
    cores = device_of(f).multiprocessors
    full = sizes.batch * ceil_div(sizes.positions, 32) >= 2 * cores
    tap = sizes.channels * sizes.positions
    at_once = sizes.batch * ceil_div(sizes.positions, 16) <= cores
    block_c = power_of_two(sizes.channels)
    # every program reads both taps: cheaper than a launch while they are small and all run
    known = tap > _LONE_TAP or not at_once or block_c > 512
    few = known and narrow and not full and sizes.width <= 128
    rule = {
        "block_m": 32 if full and narrow else 16,
        # as many channels at a time as ptxas finds registers for
        "block_k": (64 if full and sizes.width <= 128 else 32) if narrow else 16,
        "warps": 4 if few else 8,
        "known": int(known),
        "stages": 2,
    }
    plan = plan_scale("tap_path_own", f, sizes, rule)
    stretches = plan_taps("tap_path_moments", f, sizes.groups, split=True)
    # without moments of stretches their place is taken by a tensor that nobody reads
    partial = moments(f, g, stretches, sizes.groups) if plan["known"] else log_rms
    launch(
        own_path_kernel,
        (sizes.batch, ceil_div(sizes.positions, plan["block_m"])),
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
        KNOWN=bool(plan["known"]),
        BLOCK_M=plan["block_m"],
        BLOCK_K=plan["block_k"],
        BLOCK_D=block_d(sizes),
        BLOCK_W=max(16, power_of_two(sizes.width)),
        BLOCK_N=max(1, 2048 // block_c),
        BLOCK_C=block_c,
        BLOCK_G=stretches.all_groups,
        BLOCK_S=stretches.block_s,
        num_warps=plan["warps"],
        num_stages=plan["stages"],
    )


__all__ = ["own_positions"]
