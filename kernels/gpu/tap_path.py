"""One scale of the tap path, inference only: statistics, normalisation, projections, attention."""

from __future__ import annotations

import torch
from fastscore_kernels.gpu.launch import like
from fastscore_kernels.gpu.tap_path_all import all_positions
from fastscore_kernels.gpu.tap_path_own import own_positions
from fastscore_kernels.gpu.tap_path_parts import Scale
from torch import Tensor


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
    sizes = Scale(batch, channels, query.shape[0], height * width, groups, heads)
    # channels-last, as a view: for torch.empty with a memory format Inductor writes a kernel
    out = torch.empty(batch, height, width, sizes.width, dtype=f.dtype, device=f.device)
    out = out.permute(0, 3, 1, 2)
    log_rms = torch.empty(batch, dtype=torch.float32, device=f.device)
    norms = (feature_weight, feature_bias, gradient_weight, gradient_bias)
    inner = (query, query_bias, key_value_feature, key_value_feature_bias)
    inner += (key_value_gradient, key_value_gradient_bias, skip, skip_bias)
    inner = tuple(t.contiguous() for t in inner)
    outer = (out_weight.contiguous(), out_bias)
    run = all_positions if spatial else own_positions
    run(f, g, norms, inner, outer, out, log_rms, sizes, eps)
    return like(out, feature), log_rms


__all__ = ["tap_path"]
