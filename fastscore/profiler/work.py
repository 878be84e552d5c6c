"""What a layer's call must compute and move, from its kind and the shapes it was given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from fastscore_kernels import traffic
from torch import Tensor, nn

from fastscore.denoiser import Denoiser
from fastscore.layers import NormAct
from fastscore.measure.macs import Count
from fastscore.subnet import TapFusion
from fastscore.unet import SelfAttention

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Work:
    """One call of a layer: what it is, where it stands, and its least compute and traffic.

    ``part`` is classifier, subnet, unet, vocoder or solver; ``size`` the rows x columns of what it
    writes; ``rows`` samples or cotangents; ``macs`` multiply-accumulates of the plain definition;
    ``bytes`` what must be read and written at least once.
    """

    kind: str
    part: str
    path: str
    direction: str
    size: str
    rows: int
    macs: int
    bytes: int
    dtype: str

    @property
    def name(self) -> str:
        """As it stands in the trace."""
        return f"layer: {self.path} {self.direction} x{self.rows} {self.size}".rstrip()


def layer_work(
    module: nn.Module, path: str, direction: str, x: Sequence[int], y: Sequence[int], like: Tensor
) -> Work:
    """Work of a module whose input has shape x and output y, of R rows; pulled back or forward.

    ``like`` is a tensor of the call, whose type the activations have.
    """
    rows = y[0] if direction == "forward" else like.shape[0]
    # a pull-back takes the output's cotangents to the input's
    target = y if direction == "forward" else x
    size = " x ".join(str(n) for n in target[2:]) if len(target) == 4 else ""
    macs, moved = _cost(module, direction, tuple(x), tuple(y), rows, like.element_size())
    dtype = _TYPES.get(like.dtype, str(like.dtype))
    part = path.partition(".")[0]
    return Work(_kind(module), part, path, direction, size, rows, macs, moved, dtype)


def solver_work(x: Tensor, raw: Tensor | None, guided: bool) -> Work:
    """Work of one fused solver step over the state x [B, ...]."""
    itemsize = 4 if raw is None else raw.element_size()
    moved = traffic.solver_step(len(x), x[0].numel(), itemsize, guided).must
    direction = "guided" if guided else "unguided"
    return Work(
        *("solver step", "solver", "solver.step", direction, _extent(x.shape), len(x), 0),
        *(moved, "fp32"),
    )


def program_work(
    denoiser: Denoiser, counts: Mapping[str, Count], guided: int, unguided: int, rows: int
) -> Work:
    """Work of evaluations of ``rows`` samples that run as one program; ``counts`` of one sample."""
    macs = sum(counts[k].total * n for k, n in (("guided", guided), ("unguided", unguided)) if n)
    times = guided + unguided
    direction = "guided" if not unguided else ("unguided" if not guided else f"{times} evaluations")
    sample = math.prod(denoiser.shape) * 4
    moved = times * (_size_of(denoiser) + 2 * rows * sample)
    dtype = next((p.dtype for p in denoiser.parameters() if p.ndim == 4), torch.float32)
    return Work(
        *("program", "denoiser", "denoiser", direction, "", rows, macs * rows, moved),
        _TYPES.get(dtype, str(dtype)),
    )


def _extent(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape[2:])


def _kind(module: nn.Module) -> str:
    kernel = getattr(module, "kernel_size", None)
    if isinstance(module, nn.Conv2d):
        stride = " strided" if max(module.stride) > 1 else ""
        return f"{kernel[0]}x{kernel[1]}{stride} convolution"
    if isinstance(module, nn.Conv1d):
        spread = "depthwise " if module.groups > 1 else ""
        return f"{spread}1D convolution of {kernel[0]}"
    kinds = (
        (nn.ConvTranspose1d, "transposed 1D convolution"),
        (nn.Linear, "linear layer"),
        (NormAct, "group norm, FiLM and SiLU"),
        (TapFusion, "tap norm and fusion"),
        (SelfAttention, "self-attention"),
        (nn.LayerNorm, "layer norm"),
        (nn.GroupNorm, "group norm"),
    )
    for kind, words in kinds:
        if isinstance(module, kind):
            return words
    return type(module).__name__


def _cost(
    module: nn.Module,
    direction: str,
    x: tuple[int, ...],
    y: tuple[int, ...],
    rows: int,
    itemsize: int,
) -> tuple[int, int]:
    """Multiply-accumulates and bytes of ``rows`` samples or cotangents."""
    taken, given = math.prod(x[1:]) * rows, math.prod(y[1:]) * rows
    # a pull-back reads no bias
    read = [
        p
        for name, p in module.named_parameters(recurse=False)
        if direction == "forward" or name != "bias"
    ]
    weights = sum(p.numel() * p.element_size() for p in read)
    plain = (taken + given) * itemsize + weights
    if isinstance(module, nn.Conv2d | nn.Conv1d):
        taps = math.prod(module.kernel_size) * module.in_channels // module.groups
        return given * taps, plain
    if isinstance(module, nn.ConvTranspose1d):
        taps = math.prod(module.kernel_size) * module.out_channels // module.groups
        return taken * taps, plain
    if isinstance(module, nn.Linear):
        return given * module.in_features, plain
    if isinstance(module, NormAct):
        shape = (rows, y[1], math.prod(y[2:]), itemsize, module.film is not None)
        if direction == "forward":
            return 0, traffic.norm_act(*shape).must
        # the cotangent in and out, and each sample's input once however many cotangents it has
        return 0, (2 * given + math.prod(x)) * itemsize
    if isinstance(module, TapFusion):
        # the gradient's log RMS is fp32
        moved = (2 * taken + given) * itemsize + 4 * rows + _size_of(module)
        return _fusion_macs(module, x, rows), moved
    if isinstance(module, SelfAttention):
        positions = math.prod(x[2:])
        # its projections are layers of their own
        return 2 * rows * positions**2 * x[1], (2 * taken + 3 * taken) * itemsize
    return 0, plain


def _fusion_macs(module: TapFusion, x: tuple[int, ...], rows: int) -> int:
    """Products of the 1 x 1 convolutions and, over all positions, of attention."""
    positions = math.prod(x[2:])
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    macs = rows * positions * sum(m.in_channels * m.out_channels for m in convs)
    if module.spatial:
        width, taps = module.query.out_channels, len(module.key_value)
        macs += 2 * rows * positions * taps * positions * width
    return macs


def _size_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
