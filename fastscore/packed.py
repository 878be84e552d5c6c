"""Convolution weights prepared once, for inference on a CPU.

A plain convolution brings its weight into the kernel's layout anew in every call, and at batch 1
PyTorch leaves oneDNN altogether for small inputs. Neither matters in training; it does in a sampler
that calls the same sixty convolutions again and again. Prepared, 3 x 3 kernels of stride 1 go by
Winograd's filtering with half the products, all others to oneDNN. Linear layers go to a product
whose rows do not see each other: what a sample gives is then the same in every batch, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastscore_kernels import resolve
from fastscore_kernels.linear import linear, linear_pack
from fastscore_kernels.registration import untraced
from fastscore_kernels.winograd import winograd, winograd_pack
from torch import Tensor, nn

from fastscore.denoiser import Denoiser
from fastscore.layers import Conv2d, Linear

_OPS = torch.ops.mkldnn


def obstacle(module: nn.Module) -> str:
    """Why the convolutions of ``module`` cannot be packed, and the remedy; "" if they can."""
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN; leave the convolutions as they are"
    for conv in _convolutions(module):
        kind, place = conv.weight.dtype, conv.weight.device.type
        if place != "cpu":
            return f"its weights are on {place} and oneDNN runs on the cpu; move it there"
        if kind not in (torch.float32, torch.bfloat16):
            return f"its weights are {kind}; packed are float32 and bfloat16"
        if kind == torch.bfloat16 and not _OPS._is_mkldnn_bf16_supported():
            return "this CPU has no bfloat16 instructions that oneDNN uses; take float32"
    return ""


def pack(denoiser: Denoiser) -> int:
    """Prepare the layers of ``denoiser`` for inference; returns how many convolutions there are.

    Forward and pull-back have a weight each besides the model's own, which stays what is saved and
    hashed; they are laid out for Mels of the length trained on and serve every length and batch.
    They are used where nothing else wants to see the call: with a gradient, a transform, autocast,
    a trace or a compiler at work the plain layer runs. Our own kernels, for linear layers too, take
    part where the model's backend is native (`fastscore.layers.set_backend`, called before this):
    in fp32 a sample's bits are then the same in every batch and beside every neighbour, as long as
    embeddings have a multiple of 32 channels (PyTorch's silu rounds what is left over otherwise).
    Weights that change afterwards make the next call a ValueError until they are packed again, or
    `unpack` is called. A copy of a packed model is not packed. ValueError as `obstacle` says.
    """
    problem = obstacle(denoiser)
    if problem:
        raise ValueError(f"the model cannot be packed: {problem}")
    unpack(denoiser)
    native = all(resolve(m.backend, "cpu") == "native" for m in _fused(denoiser))
    for conv, (x, y) in _shapes(denoiser).items():
        conv.prepared = PackedConv(conv, x, y, native)
    for layer in _linears(denoiser) if native else ():
        layer.prepared = PackedLinear(layer)
    return len(_convolutions(denoiser))


@torch.no_grad()
def _shapes(denoiser: Denoiser) -> dict[Conv2d, tuple[torch.Size, torch.Size]]:
    """Shapes of every convolution's input and output in a step of one sample."""
    found: dict[Conv2d, tuple[torch.Size, torch.Size]] = {}

    def note(conv: Conv2d, args: tuple[Tensor], y: Tensor) -> None:
        found[conv] = (args[0].shape, y.shape)

    hooks = [conv.register_forward_hook(note) for conv in _convolutions(denoiser)]
    label = None if denoiser.classifier is None else torch.zeros(1, dtype=torch.int64)
    gamma = None if label is None else torch.ones(1)
    try:
        denoiser(torch.zeros(1, 1, *denoiser.shape), torch.ones(1), label, gamma)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def unpack(module: nn.Module) -> None:
    """Return every layer inside ``module`` to its own weight."""
    for layer in (*_convolutions(module), *_linears(module)):
        layer.prepared = None


def _linears(module: nn.Module) -> list[Linear]:
    # of another type than fp32 they are left to PyTorch
    return [m for m in module.modules() if type(m) is Linear and m.weight.dtype == torch.float32]


def _fused(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if hasattr(m, "backend")]


def _convolutions(module: nn.Module) -> list[Conv2d]:
    return [m for m in module.modules() if isinstance(m, Conv2d)]


class _Packed:
    """What packed weights share: when they may be used, and that copies are not packed."""

    def __init__(self, layer: Conv2d | Linear) -> None:
        self._state = _state(layer)

    def __deepcopy__(self, memo: dict) -> None:
        """Nothing: a copied weight is another weight, to be packed itself."""

    def __reduce__(self) -> tuple:
        return _nothing, ()

    def takes(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether this weight may stand in for that of ``layer`` on x.

        ValueError where the weight has changed since it was packed.
        """
        weight = layer.weight
        if not untraced((x, weight)) or x.dtype != weight.dtype or x.device.type != "cpu":
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        if _state(layer) != self._state:
            raise ValueError(
                "a layer's weight has changed since it was packed; call fastscore.packed.pack "
                "again, or unpack"
            )
        return True


class PackedLinear(_Packed):
    """The weight and bias of one linear layer, forward and transposed, fp32."""

    def __init__(self, layer: Linear) -> None:
        super().__init__(layer)
        weight, bias = layer.weight.detach(), layer.bias
        self._forward = linear_pack(weight, None if bias is None else bias.detach())
        self._pull = linear_pack(weight.T)

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """``layer(x)``, x [B, in]."""
        return linear(x.contiguous(), self._forward, layer.out_features)

    def pull(self, layer: nn.Linear, grad: Tensor, padding: Sequence[int] = ()) -> Tensor:
        """Cotangents [B, in] of the input of those of the output."""
        return linear(grad.contiguous(), self._pull, layer.in_features)


class PackedConv(_Packed):
    """The weight of one convolution in the layouts of its kernels, forward and transposed.

    x and y are shapes of its input and output. float32 or bfloat16 on a CPU; see `pack` for when
    it is used. ``native`` allows kernels of our own where they are faster.
    """

    def __init__(
        self, conv: Conv2d, x: Sequence[int], y: Sequence[int], native: bool = False
    ) -> None:
        super().__init__(conv)
        weight = conv.weight.detach()
        self._winograd = native and _suits_winograd(conv)
        if self._winograd:
            self._forward = winograd_pack(weight)
            self._pull = winograd_pack(weight.transpose(0, 1).flip(2, 3))
            return
        geometry = (conv.stride, conv.dilation, conv.groups)
        # without the shapes of input and output oneDNN guesses: up to 1.8 times as slow
        self._forward = _OPS._reorder_convolution_weight(weight, conv.padding, *geometry, x)
        self._pull = _OPS._reorder_convolution_transpose_weight(
            weight, conv.padding, conv.output_padding_of(x, y), *geometry, y
        )

    def forward(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """``conv(x)``, x [B, C, H, W], channels-last."""
        if self._winograd:
            return winograd(_dense(x), self._forward, conv.out_channels, conv.bias)
        return _OPS._convolution_pointwise(
            *(_dense(x), self._forward, conv.bias, conv.padding, conv.stride, conv.dilation),
            *(conv.groups, "none", [], ""),
        )

    def pull(self, conv: nn.Conv2d, grad: Tensor, padding: Sequence[int] = ()) -> Tensor:
        """Cotangents of the input, channels-last, of those of the output."""
        if self._winograd:
            return winograd(_dense(grad), self._pull, conv.in_channels)
        return _OPS._convolution_transpose_pointwise(
            *(_dense(grad), self._pull, None, conv.padding, padding, conv.stride, conv.dilation),
            *(conv.groups, "none", [], ""),
        )


def _suits_winograd(conv: Conv2d) -> bool:
    """Whether `winograd` computes this convolution: then it is faster, whatever the size."""
    plain = (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1)
    shaped = conv.kernel_size == (3, 3) and conv.padding == (1, 1)
    return plain and shaped and conv.weight.dtype == torch.float32


def _nothing() -> None:
    return None


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _state(layer: nn.Module) -> tuple:
    """What changes when a weight or bias is written to or replaced."""
    # a convolution reads its bias where it lies, a linear layer has it packed
    both = (layer.weight, layer.bias if isinstance(layer, Linear) else None)
    return tuple(
        None if t is None else (t.data_ptr(), -1 if t.is_inference() else t._version, t.dtype)
        for t in both
    )
