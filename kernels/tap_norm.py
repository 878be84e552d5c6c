"""Normalisation of a feature tap and its gradient tap into the layout that the fusion reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastscore_kernels import checks, cpu, reference
from fastscore_kernels.backends import choose, provide
from fastscore_kernels.norm_act import backward_operator
from fastscore_kernels.registration import batch, call, define, define_triton, differentiate
from torch import Tensor

# a little above log 1e-30
_LOG_FLOOR = -69.0775

_SCHEMA = (
    "(Tensor feature, Tensor gradient, int groups, Tensor feature_weight, Tensor feature_bias, "
    "Tensor gradient_weight, Tensor gradient_bias, float eps) -> (Tensor, Tensor, Tensor)"
)


def tap_norm(
    feature: Tensor,
    gradient: Tensor,
    groups: int,
    feature_weight: Tensor,
    feature_bias: Tensor,
    gradient_weight: Tensor,
    gradient_bias: Tensor,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise a feature tap and its gradient tap; differentiable.

    feature, gradient [B, C, H, W] of one dtype; weights and biases [C], fp32 or of that dtype. The
    gradient is first divided by its per-sample RMS, at least 1e-30, since its magnitude spans many
    decades over sigma, then both are group-normalised. Returns them side by side in one tensor
    [B, 2 C, H, W], channels-last, the feature first, and log RMS of the gradient, [B] fp32.
    ValueError names the argument that does not fit, or what a backend that is not there needs.
    """
    check("tap_norm", feature, gradient, groups)
    checks.parameters(
        "tap_norm",
        feature,
        (feature.shape[1],),
        feature_weight=feature_weight,
        feature_bias=feature_bias,
        gradient_weight=gradient_weight,
        gradient_bias=gradient_bias,
    )
    chosen = choose(backend, feature)
    parameters = feature_weight, feature_bias, gradient_weight, gradient_bias
    args = (feature, gradient, groups, *parameters, eps)
    if chosen == "reference":
        return reference.tap_norm(*args)
    return call(*_OPERATORS[chosen], *args)[:2]


def check(op: str, feature: Tensor, gradient: Tensor, groups: int) -> None:
    """Require a pair of taps of one shape and dtype, and groups that divide their channels."""
    checks.activation(op, "feature", feature)
    checks.activation(op, "gradient", gradient)
    checks.alike(op, "gradient", gradient, "feature", feature)
    checks.dividing(op, "groups", groups, feature.shape[1])


def _fake(feature: Tensor, gradient: Tensor, groups: int, *_: Any) -> tuple[Tensor, ...]:
    b, c, h, w = feature.shape
    taps = feature.new_empty((b, 2 * c, h, w)).contiguous(memory_format=torch.channels_last)
    log_rms = feature.new_empty((b,), dtype=torch.float32)
    return taps, log_rms, feature.new_empty((b, groups, 4), dtype=torch.float32)


# a backend's operator and its kernel
_OPERATORS: dict[str, tuple[Any, Callable]] = {}


def _register_native() -> None:
    op = define("fastscore_native::tap_norm", _SCHEMA, cpu.tap_norm, _fake, ("CPU",))
    _OPERATORS["native"] = _derive(op, backward_operator("native")), cpu.tap_norm


def _register_triton() -> None:
    from fastscore_kernels.gpu import tap_norm as gpu

    op = define_triton("fastscore_triton::tap_norm", _SCHEMA, gpu.tap_norm, _fake)
    _OPERATORS["triton"] = _derive(op, backward_operator("triton")), gpu.tap_norm


def _derive(op: Any, pull_norm: Any) -> Any:

    def save(ctx: Any, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
        feature, gradient, groups, fw, fb, gw, gb, eps = inputs
        ctx.save_for_backward(feature, gradient, outputs[1], outputs[2], fw, fb, gw, gb)
        ctx.mark_non_differentiable(outputs[2])
        ctx.groups, ctx.eps = groups, eps

    def pull(ctx: Any, grad: Tensor | None, grad_log: Tensor | None, _: None) -> tuple:
        feature, gradient, log_rms, stats, fw, fb, gw, gb = ctx.saved_tensors
        shape, c = feature.shape, feature.shape[1]
        if grad is None:
            grad = feature.new_zeros((shape[0], 2 * c, *shape[2:]))
        halves = []
        for tap, half, at, w, b in (
            (feature, grad[:, :c], 0, fw, fb),
            (gradient, grad[:, c:], 2, gw, gb),
        ):
            own = stats[..., at : at + 2].permute(2, 0, 1).contiguous()
            layout = torch.contiguous_format if tap.is_contiguous() else torch.channels_last
            half = half.to(tap.dtype).contiguous(memory_format=layout)
            args = (half, tap, own, w, b, None, ctx.groups, False, None, None)
            image, (dz, dz_xhat) = pull_norm(*args)
            halves.append((image, dz_xhat.sum(0).to(w.dtype), dz.sum(0).to(b.dtype), dz_xhat))
        (to_f, to_fw, to_fb, _), (to_g, to_gw, to_gb, dz_xhat) = halves
        pull_rms = _through_rms(gradient, log_rms, stats, gw, dz_xhat, grad_log, ctx.eps)
        to_g = (to_g.float() + pull_rms).to(gradient.dtype)
        return to_f, to_g, None, to_fw, to_fb, to_gw, to_gb, None

    differentiate(op, save, pull)
    batch(op, {0, 1}, (0, 0, 0))
    return op


def _through_rms(
    gradient: Tensor,
    log_rms: Tensor,
    stats: Tensor,
    weight: Tensor,
    dz_xhat: Tensor,
    grad_log: Tensor | None,
    eps: float,
) -> Tensor:
    """What the gradient tap receives through its RMS r: rstd = 1 / sqrt(var + eps r^2), and log r.

    With M elements a sample, d r^2 / d g = 2 g / M and d log r / d g = g / (M r^2); each group has
    d rstd / d r^2 = -eps rstd^3 / 2.
    """
    b = len(gradient)
    size = gradient[0].numel()
    rms = log_rms.exp()
    rstd = stats[..., 3]
    by_group = (weight.float() * dz_xhat).reshape(b, rstd.shape[1], -1).sum(dim=2)
    # rstd r is of order one where rstd^2 and 1 / r^2 alone may leave fp32
    relative = rstd * rms[:, None]
    slope = -eps * (relative.square() * by_group).sum(dim=1)
    if grad_log is not None:
        slope = slope + grad_log
    # a tap without any gradient has the floor for its RMS, which nothing moves
    slope = torch.where(log_rms > _LOG_FLOOR, slope, 0.0) / (size * rms)
    unit = gradient.float() / rms[:, None, None, None]
    return slope[:, None, None, None] * unit


_register_native()
provide("triton", _register_triton)
