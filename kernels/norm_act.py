"""GroupNorm, FiLM and SiLU in one pass, and its vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastscore_kernels import checks, cpu, reference
from fastscore_kernels.backends import choose, provide
from fastscore_kernels.registration import (
    batch,
    call,
    define,
    define_triton,
    differentiate,
    direct,
    once_differentiable,
    vectorise,
)
from torch import Tensor

_FORWARD = (
    "(Tensor x, Tensor weight, Tensor bias, Tensor? film, int groups, bool act, float eps, "
    "Tensor? pre_bias) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor grad, Tensor x, Tensor stats, Tensor weight, Tensor bias, Tensor? film, int groups, "
    "bool act, Tensor? addend, Tensor? pre_bias) -> (Tensor, Tensor)"
)

# place of the addend among the backward operator's arguments
_ADDEND = 8


def norm_act(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None = None,
    act: bool = True,
    eps: float = 1e-5,
    pre_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Group normalisation with affine, optional FiLM, optional SiLU; differentiable.

    x [B, C, H, W] fp32, bf16 or fp16, contiguous or channels-last; weight, bias [C] and film
    [B, 2 C] (scale, then shift) fp32 or of x's dtype. Returns, like x,
    act((1 + scale) * (weight * (x - mean) * rstd + bias) + shift), statistics in fp32 (Wu and He
    2018; Perez et al. 2018). pre_bias [C], fp32 or of x's dtype, is added to x before anything
    else: the bias of the convolution that x comes from. ValueError names the argument that does not
    fit, or what a backend that is not there needs.
    """
    chosen = _prepare(x, groups, weight, bias, film, pre_bias, backend)
    args = (x, weight, bias, film, groups, act, eps, pre_bias)
    if chosen == "native" and direct(args):
        return cpu.norm_act_alone(*args)
    return _forward(chosen, *args)[0]


def norm_act_forward(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None = None,
    act: bool = True,
    eps: float = 1e-5,
    pre_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm_act` and stats [2, B, groups] fp32, means and reciprocal deviations, for its VJP."""
    chosen = _prepare(x, groups, weight, bias, film, pre_bias, backend)
    return _forward(chosen, x, weight, bias, film, groups, act, eps, pre_bias)


def _prepare(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    pre_bias: Tensor | None,
    backend: str | None,
) -> str:
    """Check the arguments of the forward pass and choose the backend."""
    checks.activation("norm_act", "x", x)
    _check_parameters(x, groups, weight, bias, film, pre_bias)
    return choose(backend, x)


def _forward(chosen: str, *args: Any) -> tuple[Tensor, Tensor]:
    if chosen == "reference":
        return reference.norm_act(*args)
    return call(*_OPERATORS[chosen][0], *args)


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None = None,
    act: bool = True,
    addend: Tensor | None = None,
    pre_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Vector-Jacobian product of `norm_act`, several cotangents of each sample at once.

    grad [R B, C, H, W]: row i belongs to sample i % B of x; stats as `norm_act_forward` gave them;
    addend, like grad, is what flows into x beside: it is added to the cotangents of x. Returns the
    cotangents of x [R B, C, H, W] and sums [2, R B, C] fp32 over positions of dz and of dz * xhat,
    dz the cotangent of what enters the activation and xhat = (x + pre_bias - mean) * rstd: those of
    the parameters follow from them. ValueError as for `norm_act`.
    """
    checks.activation("norm_act", "x", x)
    _check_parameters(x, groups, weight, bias, film, pre_bias)
    _check_cotangent(grad, x, addend)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    expected = (2, x.shape[0], groups)
    if stats.shape != expected or stats.dtype != kind or not stats.is_contiguous():
        raise ValueError(
            f"norm_act: stats is {stats.dtype} of shape {tuple(stats.shape)} and strides "
            f"{stats.stride()}; expected contiguous {kind} {expected}"
        )
    chosen = choose(backend, x)
    if chosen == "reference":
        return reference.norm_act_backward(
            grad, x, stats, weight, bias, film, groups, act, addend, pre_bias
        )
    rest = (x, stats, weight, bias, film, groups, act, _match(addend, x), pre_bias)
    args = (_match(grad, x), *rest)
    return call(*_OPERATORS[chosen][1], *args)


def norm_act_linearize(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None = None,
    act: bool = True,
    eps: float = 1e-5,
    pre_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Callable[..., Tensor]]:
    """`norm_act` and its pull-back to x, (grad, addend=None) as `norm_act_backward` takes them.

    Frozen parameters: theirs are not computed. Arguments are checked once for both.
    """
    chosen = _prepare(x, groups, weight, bias, film, pre_bias, backend)
    given = (x, weight, bias, film, groups, act, eps, pre_bias)
    if chosen == "reference":
        return reference.norm_act_linearize(*given)
    y, stats = _forward(chosen, *given)

    def pull(grad: Tensor, addend: Tensor | None = None) -> Tensor:
        _check_cotangent(grad, x, addend)
        rest = (x, stats, weight, bias, film, groups, act, _match(addend, x), pre_bias)
        args = (_match(grad, x), *rest)
        if chosen == "native" and direct(args):
            return cpu.norm_act_pull(*args)
        return call(*_OPERATORS[chosen][1], *args)[0]

    return y, pull


def _check_cotangent(grad: Tensor, x: Tensor, addend: Tensor | None = None) -> None:
    checks.activation("norm_act", "grad", grad)
    checks.placed("norm_act", "grad", grad, "x", x)
    if grad.shape[1:] != x.shape[1:] or grad.shape[0] % x.shape[0]:
        raise ValueError(
            f"norm_act: grad has shape {tuple(grad.shape)}; expected that of x, {tuple(x.shape)}, "
            "or a multiple of its batch"
        )
    if addend is not None:
        checks.activation("norm_act", "addend", addend)
        checks.alike("norm_act", "addend", addend, "grad", grad)


def _check_parameters(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    pre_bias: Tensor | None,
) -> None:
    channels = x.shape[1]
    checks.dividing("norm_act", "groups", groups, channels)
    expected = (channels,)
    checks.parameter("norm_act", "weight", weight, expected, x)
    checks.parameter("norm_act", "bias", bias, expected, x)
    if bias.dtype is not weight.dtype:
        checks.placed("norm_act", "bias", bias, "weight", weight)
    if pre_bias is not None:
        checks.parameter("norm_act", "pre_bias", pre_bias, expected, x)
    if film is not None:
        checks.floating("norm_act", "film", film)
        checks.on_device("norm_act", "film", film, "x", x)
        expected = (x.shape[0], 2 * channels)
        if film.shape != expected:
            raise ValueError(f"norm_act: film has shape {tuple(film.shape)}; expected {expected}")


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, film: Tensor | None, groups: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2, x.shape[0], groups), dtype=torch.float32)


def _fake_backward(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    sums = x.new_empty((2, grad.shape[0], grad.shape[1]), dtype=torch.float32)
    return torch.empty_like(grad), sums


# forward and backward operator of a backend, each with its kernel
_OPERATORS: dict[str, tuple[tuple[Any, Callable], tuple[Any, Callable]]] = {}


def _register_native() -> None:
    name, cpus = "fastscore_native::norm_act", ("CPU",)
    forward = define(name, _FORWARD, cpu.norm_act, _fake, cpus)
    backward = define(f"{name}_backward", _BACKWARD, cpu.norm_act_backward, _fake_backward, cpus)
    _derive(forward, backward)
    _OPERATORS["native"] = (forward, cpu.norm_act), (backward, cpu.norm_act_backward)


def _register_triton() -> None:
    from fastscore_kernels.gpu import norm_act as gpu

    name = "fastscore_triton::norm_act"
    forward = define_triton(name, _FORWARD, gpu.norm_act, _fake)
    backward = define_triton(f"{name}_backward", _BACKWARD, gpu.norm_act_backward, _fake_backward)
    _derive(forward, backward)
    _OPERATORS["triton"] = (forward, gpu.norm_act), (backward, gpu.norm_act_backward)


def backward_operator(backend: str) -> Any:
    """The operator of `norm_act_backward`: its tensors and numbers in the schema's order."""
    return _OPERATORS[backend][1][0]


def _derive(forward: Any, backward: Any) -> None:
    def save(ctx: Any, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, film, groups, act, _, pre_bias = inputs
        ctx.save_for_backward(x, outputs[1], weight, bias, film, pre_bias)
        ctx.mark_non_differentiable(outputs[1])
        ctx.groups, ctx.act = groups, act

    def pull(ctx: Any, grad: Tensor | None, _: None) -> tuple:
        if grad is None:
            return (None,) * 8
        x, stats, weight, bias, film, pre = ctx.saved_tensors
        # autograd may hand over an expanded or sliced cotangent
        grad = _match(grad, x)
        args = (grad, x, stats, weight, bias, film, ctx.groups, ctx.act, None, pre)
        grad_x, sums = backward(*args)
        # it is added to every position
        to_pre = None if pre is None else grad_x.sum((0, 2, 3), dtype=torch.float32).to(pre.dtype)
        return (grad_x, *parameter_gradients(sums, weight, bias, film), None, None, None, to_pre)

    differentiate(forward, save, pull)
    once_differentiable(backward)
    batch(forward, {0, 3}, (0, 1))
    _batch_backward(backward)


def _match(grad: Tensor | None, x: Tensor) -> Tensor | None:
    """A cotangent in x's type and layout: kernels read both in one."""
    if grad is None:
        return None
    if grad.dtype != x.dtype:
        grad = grad.to(x.dtype)
    if checks.batched(grad):
        # the batching rule sees to the layout
        return grad
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return grad.contiguous(memory_format=layout)


def parameter_gradients(
    sums: Tensor, weight: Tensor, bias: Tensor, film: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cotangents of weight, bias and film from the sums of `norm_act_backward` (one copy)."""
    dz, dz_xhat = sums
    if film is None:
        return dz_xhat.sum(dim=0).to(weight.dtype), dz.sum(dim=0).to(bias.dtype), None
    gain = 1.0 + film[:, : weight.shape[0]].float()
    grad_film = torch.cat((weight.float() * dz_xhat + bias.float() * dz, dz), dim=1)
    return (
        (gain * dz_xhat).sum(dim=0).to(weight.dtype),
        (gain * dz).sum(dim=0).to(bias.dtype),
        grad_film.to(film.dtype),
    )


def _batch_backward(op: Any) -> None:
    """vmap over cotangents alone needs no copy of x: they become more copies of each sample."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        size = info.batch_size
        rows = []
        batched = {i for i, dim in enumerate(in_dims) if dim is not None}
        if 0 in batched and batched <= {0, _ADDEND}:
            given = list(args)
            for i in (0, _ADDEND):
                if args[i] is not None:
                    given[i] = _folded(args[i], in_dims[i], size, _layout(args[1]))
            grad_x, sums = op(*given)
            return (grad_x.unflatten(0, (size, -1)), sums.unflatten(1, (size, -1))), (0, 1)
        for i in range(size):
            picked = [
                a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)
            ]
            picked[1] = picked[1].contiguous(memory_format=_layout(picked[1]))
            for at in (0, _ADDEND):
                if picked[at] is not None:
                    picked[at] = picked[at].contiguous(memory_format=_layout(picked[1]))
            rows.append(op(*picked))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True)), (0, 0)

    vectorise(op, rule)


def _folded(t: Tensor, dim: int | None, size: int, layout: torch.memory_format) -> Tensor:
    """``size`` batches of ``t`` one after the other, which vmap has in ``dim``."""
    rows = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return rows.flatten(0, 1).contiguous(memory_format=layout)


def _layout(t: Tensor) -> torch.memory_format:
    return torch.contiguous_format if t.is_contiguous() else torch.channels_last


_register_native()
provide("triton", _register_triton)
