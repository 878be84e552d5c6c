"""What the networks of a denoiser read, in one launch: EDM scalings, patches, noise features."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from fastscore_kernels.gpu.common import begin
from fastscore_kernels.gpu.exact import circle
from fastscore_kernels.gpu.launch import ceil_div, choose, device_of, launch, power_of_two
from torch import Tensor

# of a radian, and a quarter of a turn in radians
_PER_TURN = tl.constexpr(1 / (2 * math.pi))
_QUARTER = tl.constexpr(math.pi / 2)


@triton.jit
def edm_inputs_kernel(
    x,
    sigma,
    sigma_stride,
    gamma,
    gamma_stride,
    freqs,
    patches,
    features,
    coefficients,
    batch,
    blocks,
    H,
    W,
    # not arguments: from a compiler numbers arrive as fp64
    VARIANCE: tl.constexpr,
    DEVIATION: tl.constexpr,
    P: tl.constexpr,
    FREQS: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One stretch of one sample's patches; a sample's first program writes the rest as well."""
    begin(DEPENDENT)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    level = tl.load(sigma + b * sigma_stride)
    total = level * level + VARIANCE
    c_in = 1.0 / tl.sqrt_rn(total)
    # written side by side: the channels of one patch, then the next patch of its row
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < H * W
    channel = at % (P * P)
    patch = at // (P * P)
    row = patch // (W // P) * P + channel // P
    column = patch % (W // P) * P + channel % P
    tile = tl.load(x + b * H * W + row * W + column, mask=mask, other=0.0)
    tile = (tile * c_in).to(patches.dtype.element_ty)
    tl.store(patches + b * H * W + at, tile, mask=mask)
    if block == 0:
        f = tl.arange(0, BLOCK_F)
        known = f < FREQS
        angle = tl.log(level) / 4.0 * tl.load(freqs + f, mask=known, other=0.0)
        # the library's cosine keeps a table in memory for angles that are far larger
        turns = angle.to(tl.float64) * _PER_TURN
        cosine, sine = circle((turns - tl.floor(turns + 0.5)) * _QUARTER)
        tl.store(features + b * 2 * FREQS + f, cosine.to(tl.float32), mask=known)
        tl.store(features + b * 2 * FREQS + FREQS + f, sine.to(tl.float32), mask=known)
        tl.store(coefficients + b, VARIANCE / total)
        tl.store(coefficients + batch + b, level * DEVIATION * c_in)
        weight = 0.0
        if GUIDED:
            weight = tl.load(gamma + b * gamma_stride) * level * level * c_in
        tl.store(coefficients + 2 * batch + b, weight)


def edm_inputs(
    x: Tensor,
    sigma: Tensor,
    gamma: Tensor | None,
    freqs: Tensor,
    sigma_data: float,
    patch: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, features and coefficients: `fastscore_kernels.edm_inputs.edm_inputs` says how.

    x contiguous; sigma and gamma of any stride.
    """
    batch, _, height, width = x.shape
    size = height * width
    plan = choose(
        "edm_inputs",
        device_of(x),
        {"rows": int(batch), "size": int(size)},
        {"block": 512, "warps": 4},
    )
    blocks = ceil_div(size, plan["block"])
    # channels-last, as a view: for torch.empty with a memory format Inductor writes a kernel
    shape = (batch, height // patch, width // patch, patch * patch)
    patches = torch.empty(shape, dtype=dtype, device=x.device).permute(0, 3, 1, 2)
    features = torch.empty(batch, 2 * freqs.numel(), dtype=torch.float32, device=x.device)
    coefficients = torch.empty(3, batch, dtype=torch.float32, device=x.device)
    launch(
        edm_inputs_kernel,
        (batch * blocks,),
        x,
        sigma,
        sigma.stride(0),
        # without strengths a pointer that nobody reads
        *((sigma, 0) if gamma is None else (gamma, gamma.stride(0))),
        freqs,
        patches,
        features,
        coefficients,
        batch,
        blocks,
        height,
        width,
        VARIANCE=sigma_data**2,
        DEVIATION=sigma_data,
        P=patch,
        FREQS=freqs.numel(),
        GUIDED=gamma is not None,
        BLOCK=plan["block"],
        BLOCK_F=power_of_two(freqs.numel()),
        num_warps=plan["warps"],
    )
    return patches, features, coefficients


__all__ = ["edm_inputs"]
