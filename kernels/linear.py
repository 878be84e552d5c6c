"""Linear layers on a CPU whose rows do not see each other, not by a bit."""

from __future__ import annotations

import torch
from fastscore_kernels import checks, cpu
from torch import Tensor


def linear_pack(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Prepare weight [out, in] fp32, of any strides, and bias [out] for `linear` of this process.

    ValueError where one has another shape or type, or the compiled library is not there.
    """
    if weight.dtype != torch.float32 or weight.ndim != 2 or weight.device.type != "cpu":
        raise ValueError(
            f"linear: weight is {weight.dtype} {tuple(weight.shape)} on {weight.device}; expected "
            "float32 [out, in] on the cpu"
        )
    if bias is not None:
        checks.parameter("linear", "bias", bias, (len(weight),), weight)
    return cpu.linear_pack(weight, bias)


def linear(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """x [rows, in] fp32 times the weight that ``packed`` was made of, plus bias: [rows, outputs].

    An output is one chain of sums over the inputs in order, so its bits depend on its row alone;
    those of a library's product depend on how many rows there are. Not an operation of PyTorch's:
    nothing differentiates, traces or compiles it. ValueError names the argument that does not fit.
    """
    if x.dtype != torch.float32 or x.ndim != 2 or not x.numel() or not x.is_contiguous():
        raise ValueError(
            f"linear: x is {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}; expected "
            "contiguous float32 [rows, in]"
        )
    if packed.shape != (cpu.linear_size(x.shape[1], outputs),):
        raise ValueError(
            f"linear: packed has shape {tuple(packed.shape)}; expected what linear_pack returned "
            f"for {x.shape[1]} inputs and {outputs} outputs"
        )
    return cpu.linear(x, packed, outputs)
