"""PyTorch's scaled_dot_product_attention at its best, as what fused attention is raced against.

Queries, keys and values lie as its kernels want them before a clock runs: tokens of both taps
beside one another, heads apart, a head's channels padded with zeros to a multiple of eight. A tap
path projects its tokens straight into that form, with weights padded beforehand.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from fastscore_kernels import Norms, Projections, reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastscore.measure.operations import EPS, Case
from fastscore.measure.timing import Run

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# channels of a head come in multiples of these
_EIGHT = 8


def allowed(name: str) -> Callable[[], AbstractContextManager]:
    """Context in which only kernel ``name`` is taken; "any": any of them, but no plain one."""
    chosen = list(KERNELS.values()) if name == "any" else [KERNELS[name]]

    @contextlib.contextmanager
    def around():
        with sdpa_kernel(chosen):
            yield

    return around


def fuse(case: Case) -> Run:
    """Attention alone for a spatial case of tap_fuse; returns [B, heads, N, padded]."""
    q, first, second, heads, _ = case.arguments
    d = q.shape[1] // heads
    query = _tokens(q, heads)
    pairs = [t.chunk(2, dim=1) for t in (first, second)]
    keys, values = (torch.cat([_tokens(p[i], heads) for p in pairs], dim=1) for i in (0, 1))
    # [B, N, heads, D] in memory: what flash attention calls its own
    ready = tuple(t.contiguous().transpose(1, 2) for t in (query, keys, values))
    return functools.partial(F.scaled_dot_product_attention, *ready, scale=d**-0.5)


def fused(case: Case, output: Tensor) -> Tensor:
    """What `fuse` returned, as tap_fuse gives it: [B, C, H, W]."""
    q, _, _, heads, _ = case.arguments
    own = output[..., : q.shape[1] // heads]
    return own.transpose(2, 3).reshape(q.shape)


def path(case: Case, function: Callable[..., Any] | None = None) -> Run:
    """A spatial case of tap_path by ``function``: `tap_path`, or what a compiler made of it."""
    feature, gradient, norms, projections, groups, heads, _ = case.arguments
    weights = tuple(_padded(projections, heads))
    d = projections.query.shape[0] // heads
    arguments = (feature, gradient, norms, weights, groups, heads, d**-0.5)
    return functools.partial(function or tap_path, *arguments)


def tap_path(
    feature: Tensor,
    gradient: Tensor,
    norms: Norms,
    weights: tuple[Tensor, ...],
    groups: int,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The path of one scale in tokens, every projection one matrix product: as one writes it well.

    feature, gradient [B, C, H, W] -> [B, W, H, W'] and log RMS [B]; weights as `_padded` has them.
    """
    b, c, h, w = feature.shape
    both, log_rms = reference.tap_norm(feature, gradient, groups, *norms, EPS)
    # channels-last: a view
    rows = both.permute(0, 2, 3, 1).reshape(b * h * w, 2 * c)
    f, g = rows[:, :c], rows[:, c:]
    wq, bq, wf, bf, wg, bg, ws, bs, wo, bo = weights
    # tokens of both taps beside one another, keys and values where the projections left them
    taps = ((f, wf, bf), (g, wg, bg))
    pairs = [F.linear(x, m, bias).view(b, h * w, -1) for x, m, bias in taps]
    keys, values = (
        t.transpose(1, 2) for t in torch.cat(pairs, dim=1).unflatten(2, (2, heads, -1)).unbind(2)
    )
    query = F.linear(f, wq, bq).view(b, h * w, heads, -1).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(query, keys, values, scale=scale)
    mixed = mixed.transpose(1, 2).reshape(b * h * w, -1)
    out = F.linear(rows, ws, bs) + F.linear(mixed, wo, bo)
    return out.view(b, h, w, -1).permute(0, 3, 1, 2), log_rms


def _tokens(x: Tensor, heads: int) -> Tensor:
    """[B, C, H, W] -> [B, N, heads, D], D padded with zeros."""
    d = x.shape[1] // heads
    return F.pad(x.flatten(2).transpose(1, 2).unflatten(2, (heads, d)), (0, -d % _EIGHT))


def _padded(p: Projections, heads: int):
    """Weights [out, in] and biases; rows of queries, keys and values padded, columns of out."""
    d = p.query.shape[0] // heads
    more = -d % _EIGHT

    def rows(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        wide = F.pad(weight.flatten(1).unflatten(0, (-1, d)), (0, 0, 0, more)).flatten(0, 1)
        return wide.contiguous(), F.pad(bias.unflatten(0, (-1, d)), (0, more)).flatten()

    yield from rows(p.query, p.query_bias)
    yield from rows(p.key_value_feature, p.key_value_feature_bias)
    yield from rows(p.key_value_gradient, p.key_value_gradient_bias)
    yield from (p.skip.flatten(1), p.skip_bias)
    out = F.pad(p.out.flatten(1).unflatten(1, (heads, d)), (0, more)).flatten(1)
    yield from (out.contiguous(), p.out_bias)
