"""One scale of the tap path in one call: normalisation, projections, attention, residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastscore_kernels import checks, cpu
from fastscore_kernels.backends import choose, provide
from fastscore_kernels.registration import call, define, define_triton, dense
from fastscore_kernels.tap_fuse import tap_fuse
from fastscore_kernels.tap_norm import check, tap_norm
from torch import Tensor

_SCHEMA = (
    "(Tensor feature, Tensor gradient, Tensor[] norms, Tensor[] weights, int groups, int heads, "
    "bool spatial, float eps) -> (Tensor, Tensor)"
)


class Norms(NamedTuple):
    """Affine parameters [C] of both taps' normalisation."""

    feature_weight: Tensor
    feature_bias: Tensor
    gradient_weight: Tensor
    gradient_bias: Tensor


class Projections(NamedTuple):
    """Weights of the 1 x 1 convolutions: of C tap channels onto W, biases [out].

    query [W, C, 1, 1], key_value_* [2 W, C, 1, 1], skip [W, 2 C, 1, 1], out [W, W, 1, 1].
    """

    query: Tensor
    query_bias: Tensor
    key_value_feature: Tensor
    key_value_feature_bias: Tensor
    key_value_gradient: Tensor
    key_value_gradient_bias: Tensor
    skip: Tensor
    skip_bias: Tensor
    out: Tensor
    out_bias: Tensor


def tap_path(
    feature: Tensor,
    gradient: Tensor,
    norms: Norms,
    projections: Projections,
    groups: int,
    heads: int,
    spatial: bool,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise one scale's taps and fuse them: skip(taps) + out(tap_fuse(query, key_values)).

    feature, gradient [B, C, H, W] of one dtype -> [B, width, H, W] of that dtype and log RMS of the
    gradient [B] fp32. Where a derivative is wanted it is composed of `tap_norm`, convolutions and
    `tap_fuse`; otherwise native and triton run it as one operation. ValueError names the argument
    that does not fit, or what a backend that is not there needs.
    """
    check("tap_path", feature, gradient, groups)
    _check_parameters(feature, norms, projections, heads)
    chosen = choose(backend, feature)
    tensors = (feature, gradient, *norms, *projections)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if chosen == "reference" or wanted or torch._C._are_functorch_transforms_active():
        return composed(feature, gradient, norms, projections, groups, heads, spatial, eps, chosen)
    rest = (list(norms), list(projections), groups, heads, spatial, eps)
    return call(*_OPERATORS[chosen], feature, gradient, *rest)


def composed(
    feature: Tensor,
    gradient: Tensor,
    norms: Norms,
    projections: Projections,
    groups: int,
    heads: int,
    spatial: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`tap_path` from `tap_norm`, convolutions and `tap_fuse`: what one operation must equal."""
    p = projections
    c = feature.shape[1]
    taps, log_rms = tap_norm(feature, gradient, groups, *norms, eps, backend)
    # slices of a channels-last tensor: convolutions read them by their strides
    f, g = taps[:, :c], taps[:, c:]
    q = F.conv2d(f, p.query, p.query_bias)
    first = F.conv2d(f, p.key_value_feature, p.key_value_feature_bias)
    second = F.conv2d(g, p.key_value_gradient, p.key_value_gradient_bias)
    fused = tap_fuse(*(dense(t) for t in (q, first, second)), heads, spatial, backend)
    return F.conv2d(taps, p.skip, p.skip_bias) + F.conv2d(fused, p.out, p.out_bias), log_rms


def _check_parameters(feature: Tensor, norms: Norms, projections: Projections, heads: int) -> None:
    c, p = feature.shape[1], projections
    width = p.query.shape[0]
    checks.parameters("tap_path", feature, (c,), **norms._asdict())
    # one type for all of them: kernels are told one
    if norms.feature_weight.dtype is not p.query.dtype:
        checks.placed("tap_path", "feature_weight", norms.feature_weight, "query", p.query)
    checks.dividing("tap_path", "heads", heads, width)
    shapes = (
        *((width, c, 1, 1), (width,), (2 * width, c, 1, 1), (2 * width,)),
        *((2 * width, c, 1, 1), (2 * width,), (width, 2 * c, 1, 1), (width,)),
        *((width, width, 1, 1), (width,)),
    )
    for (name, tensor), shape in zip(p._asdict().items(), shapes, strict=True):
        checks.parameter("tap_path", name, tensor, shape, feature)
        if tensor.dtype != p.query.dtype:
            checks.placed("tap_path", name, tensor, "query", p.query)


def _fake(
    feature: Tensor, gradient: Tensor, norms: list[Tensor], weights: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor]:
    b, _c, h, w = feature.shape
    out = feature.new_empty((b, weights[0].shape[0], h, w))
    return (
        out.contiguous(memory_format=torch.channels_last),
        feature.new_empty((b,), dtype=torch.float32),
    )


# a backend's operator and its kernel
_OPERATORS: dict[str, tuple[Any, Callable]] = {}


def _register_native() -> None:
    name = "fastscore_native::tap_path"
    _OPERATORS["native"] = define(name, _SCHEMA, cpu.tap_path, _fake, ("CPU",)), cpu.tap_path


def _register_triton() -> None:
    op = define_triton("fastscore_triton::tap_path", _SCHEMA, _gpu, _fake)
    _OPERATORS["triton"] = op, _gpu


def _gpu(
    feature: Tensor,
    gradient: Tensor,
    norms: list[Tensor],
    weights: list[Tensor],
    groups: int,
    heads: int,
    spatial: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from fastscore_kernels.gpu import tap_path as gpu

    return gpu.tap_path(feature, gradient, *norms, *weights, groups, heads, spatial, eps)


_register_native()
provide("triton", _register_triton)
