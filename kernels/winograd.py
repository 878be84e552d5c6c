"""3 x 3 convolutions by Winograd's minimal filtering on a CPU, forward and pulled back."""

from __future__ import annotations

import torch
from fastscore_kernels import checks, cpu
from torch import Tensor

# kernel to the 16 places of a tile: G g G^T
_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def winograd_pack(weight: Tensor) -> Tensor:
    """Transform a convolution's weight [out, in, 3, 3] fp32 for `winograd` of this process.

    ValueError where it has another shape or type, or the compiled library is not there.
    """
    if weight.dtype != torch.float32 or weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"winograd: weight is {weight.dtype} {tuple(weight.shape)}; expected float32 "
            "[out, in, 3, 3]"
        )
    g = torch.tensor(_G, dtype=torch.float64)
    transformed = torch.einsum("ai,kcij,bj->abkc", g, weight.detach().double(), g)
    return cpu.winograd_pack(transformed.float().contiguous())


def winograd(x: Tensor, packed: Tensor, channels: int, bias: Tensor | None = None) -> Tensor:
    """Convolution [B, C, H, W] -> [B, channels, H, W] with stride 1 and padding 1, channels-last.

    x fp32 channels-last, ``packed`` from `winograd_pack`, bias [channels] fp32. F(2 x 2, 3 x 3)
    of Lavin and Gray 2016: 16 products where the plain sum takes 36, rounded no worse. An output's
    bits depend neither on the batch nor on the number of threads. Not an operation of PyTorch's:
    nothing differentiates, traces or compiles it. ValueError names the argument that does not fit.
    """
    checks.activation("winograd", "x", x)
    if x.dtype != torch.float32 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"winograd: x is {x.dtype} {x.stride()}; expected channels-last float32")
    size = cpu.winograd_size(x.shape[1], channels)
    if packed.shape != (size,) or packed.dtype != torch.float32:
        raise ValueError(
            f"winograd: packed is {packed.dtype} {tuple(packed.shape)}; expected what winograd_pack"
            f" returned for {x.shape[1]} onto {channels} channels"
        )
    if bias is not None:
        checks.parameter("winograd", "bias", bias, (channels,), x)
    return cpu.winograd(x, packed, channels, bias)
