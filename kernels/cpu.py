"""Calls into the compiled library of CPU kernels: pointers and strides of checked tensors."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from fastscore_kernels import library
from torch import Tensor

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _function(name: str) -> ctypes._CFuncPtr:
    return getattr(library.native(), name)


def _call(name: str, *args: object) -> None:
    code = _function(name)(*args)
    if code:
        library.raise_error(name, code)


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Batch, channel and position strides of a dense [B, C, H, W]."""
    _, c, h, w = t.shape
    n = h * w
    # strides of axes of length one mean nothing, so they are not asked
    if t.is_contiguous():
        return c * n, n, 1
    if not t.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"a tensor of shape {tuple(t.shape)} has strides {t.stride()}; the native kernels read "
            "contiguous or channels-last tensors, which .contiguous() makes"
        )
    return c * n, 1, c


def _tokens(t: Tensor) -> tuple[int, int]:
    """Batch and position strides of a channels-last [B, C, H, W]."""
    _, c, h, w = t.shape
    return c * h * w, c


def _film(film: Tensor | None) -> tuple[Tensor | None, int | None, int, int]:
    """FiLM with its columns side by side, and its pointer, row stride and type."""
    if film is None:
        return None, None, 0, 0
    if film.stride(1) != 1:
        film = film.contiguous()
    return film, film.data_ptr(), film.stride(0), _CODES[film.dtype]


def norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, film: Tensor | None, groups: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Kernel of ``fastscore_native::norm_act``."""
    stats = torch.empty((2, x.shape[0], groups))
    return _norm_act(x, weight, bias, film, groups, *rest, stats.data_ptr()), stats


def _biased(x: Tensor, pre_bias: Tensor | None) -> Tensor:
    # a convolution on a CPU brings its bias along, so no kernel takes it
    return x if pre_bias is None else x + pre_bias.to(x.dtype)[:, None, None]


def norm_act_alone(*args: Any) -> Tensor:
    """`norm_act` without statistics, which only its VJP needs."""
    return _norm_act(*args, None)


def _norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    groups: int,
    act: bool,
    eps: float,
    pre_bias: Tensor | None,
    mean: int | None,
) -> Tensor:
    x = _biased(x, pre_bias)
    b, c, h, w = x.shape
    y = torch.empty_like(x)
    strides = _strides(x)
    film, *modulation = _film(film)
    rstd = None if mean is None else mean + 4 * b * groups
    code = _function("fs_norm_act")(
        *(x.data_ptr(), *strides, y.data_ptr(), *strides, _CODES[x.dtype], weight.data_ptr()),
        *(bias.data_ptr(), _CODES[weight.dtype], *modulation, mean, rstd),
        *(b, c, h * w, groups, act, eps),
    )
    if code:
        library.raise_error("fs_norm_act", code)
    return y


def norm_act_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Kernel of ``fastscore_native::norm_act_backward``."""
    sums = torch.empty((2, grad.shape[0], grad.shape[1]))
    return _pull(grad, *args, sums.data_ptr()), sums


def norm_act_pull(*args: Any) -> Tensor:
    """`norm_act_backward` without the sums, which only parameters need."""
    return _pull(*args, None)


def _pull(
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
    sums: int | None,
) -> Tensor:
    x = _biased(x, pre_bias)
    b, c, h, w = x.shape
    grad_x = torch.empty_like(grad)
    # all three have one layout: strides of a sample do not depend on how many there are
    strides = _strides(x)
    mean = stats.data_ptr()
    film, *modulation = _film(film)
    code = _function("fs_norm_act_backward")(
        *(grad.data_ptr(), *strides, x.data_ptr(), *strides, grad_x.data_ptr(), *strides),
        *(_CODES[x.dtype], weight.data_ptr(), bias.data_ptr(), _CODES[weight.dtype], *modulation),
        *(mean, mean + 4 * b * groups, sums, b, grad.shape[0] // b, c, h * w, groups, act),
    )
    if code:
        library.raise_error("fs_norm_act_backward", code)
    return grad_x if addend is None else grad_x.add_(addend)


def tap_norm(
    feature: Tensor,
    gradient: Tensor,
    groups: int,
    feature_weight: Tensor,
    feature_bias: Tensor,
    gradient_weight: Tensor,
    gradient_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of ``fastscore_native::tap_norm``."""
    b, c, h, w = feature.shape
    taps = torch.empty((b, 2 * c, h, w), dtype=feature.dtype, memory_format=torch.channels_last)
    log_rms, stats = torch.empty(b), torch.empty((b, groups, 4))
    _call(
        "fs_tap_norm",
        *(feature.data_ptr(), *_strides(feature), gradient.data_ptr(), *_strides(gradient)),
        *(taps.data_ptr(), *_tokens(taps), _CODES[feature.dtype]),
        *(feature_weight.data_ptr(), feature_bias.data_ptr()),
        *(gradient_weight.data_ptr(), gradient_bias.data_ptr(), _CODES[feature_weight.dtype]),
        *(log_rms.data_ptr(), stats.data_ptr(), b, c, h * w, groups, eps),
    )
    return taps, log_rms, stats


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _optional(t: Tensor | None) -> tuple[int | None, int, int]:
    return (None, 0, 0) if t is None else (t.data_ptr(), *_tokens(t))


def tap_fuse(q: Tensor, first: Tensor, second: Tensor | None, heads: int, spatial: bool) -> Tensor:
    """Kernel of ``fastscore_native::tap_fuse``; other layouts are brought to channels-last."""
    b, c, h, w = q.shape
    layout = q
    q, first = _channels_last(q), _channels_last(first)
    second = None if second is None else _channels_last(second)
    out = torch.empty_like(q)
    _call(
        "fs_tap_fuse",
        *(q.data_ptr(), *_tokens(q), first.data_ptr(), *_tokens(first), *_optional(second)),
        *(out.data_ptr(), *_tokens(out), _CODES[q.dtype], b, c, h * w, heads, spatial),
    )
    return _restore(out, layout)


def tap_fuse_backward(
    grad: Tensor, q: Tensor, first: Tensor, second: Tensor | None, heads: int, spatial: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of ``fastscore_native::tap_fuse_backward``; without a second tap its part is empty."""
    b, c, h, w = q.shape
    layouts = q, first, second
    grad, q, first = _channels_last(grad), _channels_last(q), _channels_last(first)
    second = None if second is None else _channels_last(second)
    outputs = torch.empty_like(q), torch.empty_like(first)
    third = q.new_empty(0) if second is None else torch.empty_like(second)
    _call(
        "fs_tap_fuse_backward",
        *(grad.data_ptr(), *_tokens(grad), q.data_ptr(), *_tokens(q)),
        *(first.data_ptr(), *_tokens(first), *_optional(second)),
        *(outputs[0].data_ptr(), *_tokens(q), outputs[1].data_ptr(), *_tokens(first)),
        *(_optional(None if second is None else third)),
        *(_CODES[q.dtype], b, c, h * w, heads, spatial),
    )
    return (
        _restore(outputs[0], layouts[0]),
        _restore(outputs[1], layouts[1]),
        third if layouts[2] is None else _restore(third, layouts[2]),
    )


def _restore(t: Tensor, layout: Tensor) -> Tensor:
    """``t`` in the memory format of ``layout``, whose strides the fake kernel promises."""
    if t.stride() == layout.stride():
        return t
    return torch.empty_like(layout).copy_(t)


def tap_path(
    feature: Tensor,
    gradient: Tensor,
    norms: list[Tensor],
    weights: list[Tensor],
    groups: int,
    heads: int,
    spatial: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Kernel of ``fastscore_native::tap_path``."""
    b, c, h, w = feature.shape
    feature, gradient = _channels_last(feature), _channels_last(gradient)
    width = weights[0].shape[0]
    out = torch.empty((b, width, h, w), dtype=feature.dtype, memory_format=torch.channels_last)
    log_rms = torch.empty(b)
    _call(
        "fs_tap_path",
        *(feature.data_ptr(), *_tokens(feature), gradient.data_ptr(), *_tokens(gradient)),
        *(out.data_ptr(), *_tokens(out), _CODES[feature.dtype]),
        *(p.data_ptr() for p in (*norms, *weights)),
        *(_CODES[weights[0].dtype], log_rms.data_ptr()),
        *(b, c, width, h * w, groups, heads, spatial, eps),
    )
    return out, log_rms


def solver_step(
    x: Tensor,
    raw: Tensor | None,
    guidance: Tensor | None,
    denoised: Tensor | None,
    old: Tensor | None,
    coefficients: Tensor,
    counters: Tensor | None,
    draw: int,
) -> tuple[Tensor, Tensor]:
    """Kernel of ``fastscore_native::solver_step``."""
    following, x0 = torch.empty_like(x), torch.empty_like(x)
    kind = 0 if raw is None else _CODES[raw.dtype]
    pointers = [None if t is None else t.data_ptr() for t in (x, raw, guidance)]
    others = [None if t is None else t.data_ptr() for t in (denoised, old, coefficients, counters)]
    _call(
        "fs_solver_step",
        *(*pointers, kind, *others, draw),
        *(following.data_ptr(), x0.data_ptr(), len(x), x.numel() // len(x)),
    )
    return following, x0


def normals(seeds: Tensor, samples: Tensor, steps: Tensor, size: int, draw: int) -> Tensor:
    """Kernel of ``fastscore_native::normals``."""
    out = torch.empty(len(steps), len(seeds), size)
    _call(
        "fs_normals",
        *(seeds.data_ptr(), samples.data_ptr(), steps.data_ptr(), draw, out.data_ptr()),
        *(len(steps), len(seeds), size),
    )
    return out


def winograd_size(inputs: int, outputs: int) -> int:
    """Elements of a packed weight: a header, and 16 matrices of columns in whole vectors."""
    return 16 + 16 * inputs * (-(-outputs // 16) * 16)


def winograd_pack(transformed: Tensor) -> Tensor:
    """A transformed weight [4, 4, out, in] in the layout of the instruction set in use."""
    outputs, inputs = transformed.shape[2:]
    packed = torch.empty(winograd_size(inputs, outputs))
    _call("fs_winograd_pack", transformed.data_ptr(), packed.data_ptr(), inputs, outputs)
    return packed


def winograd(x: Tensor, packed: Tensor, channels: int, bias: Tensor | None) -> Tensor:
    """Convolution of x, channels-last."""
    b, c, h, w = x.shape
    y = torch.empty((b, channels, h, w), memory_format=torch.channels_last)
    _call(
        "fs_winograd",
        *(x.data_ptr(), packed.data_ptr(), None if bias is None else bias.data_ptr()),
        *(y.data_ptr(), b, h, w, c, channels),
    )
    return y


def linear_size(inputs: int, outputs: int) -> int:
    """Elements of a packed weight: a header, the bias and columns in whole vectors."""
    return 16 + (inputs + 1) * (-(-outputs // 16) * 16)


def linear_pack(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A weight [out, in] and its bias in the layout of the instruction set in use."""
    outputs, inputs = weight.shape
    packed = torch.empty(linear_size(inputs, outputs))
    pointer = None if bias is None else bias.data_ptr()
    _call(
        "fs_linear_pack",
        *(weight.data_ptr(), *weight.stride(), pointer, packed.data_ptr(), inputs, outputs),
    )
    return packed


def linear(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """Product of x [rows, in] with the packed weight."""
    y = torch.empty((len(x), outputs))
    _call("fs_linear", x.data_ptr(), packed.data_ptr(), y.data_ptr(), *x.shape, outputs)
    return y
