"""What a step must do: multiply-accumulates and bytes of each operation, and of the whole.

Operations are those that fastscore's kernels run: convolutions, linear layers, `norm_act` and its
VJP, one `tap_path` a scale, and in a U-Net's attention its norm and `tap_fuse`. Each reads its
inputs and weights once and writes its outputs once (`fastscore_kernels.traffic`). Residual sums,
casts, concatenations and shuffles between them count nothing: they can be done on the way. The step
as a whole must read its weights once, its input once and write its output once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastscore_kernels import traffic
from torch import Tensor, nn

from fastscore.cost import inputs, on_meta
from fastscore.denoiser import Denoiser
from fastscore.layers import NormAct, PullNorm
from fastscore.measure import macs
from fastscore.measure.roofline import Peaks, bound
from fastscore.subnet import TapFusion
from fastscore.unet import SelfAttention

# Winograd's F(2 x 2, 3 x 3) takes 16 products where the plain sum takes 36 (Lavin and Gray 2016)
_WINOGRAD = 16 / 36


@dataclass(frozen=True)
class Op:
    """One operation of a step.

    ``module`` and ``part`` as in `fastscore.measure.macs`; ``products`` are the fewest
    multiplications of the algorithms in use, which for 3 x 3 convolutions in fp32 are Winograd's;
    ``bytes`` include ``weights``; ``dtype`` is that of its arithmetic.
    """

    module: str
    part: str
    name: str
    macs: int
    products: int
    bytes: int
    weights: int
    dtype: str

    def bound(self, peaks: Peaks, working_set: int | None = None) -> dict[str, Any]:
        """`roofline.bound` of the operation, by itself or within a step of a ``working_set``."""
        return bound(self.products, self.bytes, self.dtype, peaks, working_set)


@dataclass(frozen=True)
class Work:
    """All of a step: its operations in order, and bytes of weights and of input and output."""

    ops: tuple[Op, ...]
    weights: int
    edges: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates, each convolution as the plain sum."""
        return sum(op.macs for op in self.ops)

    @property
    def bytes(self) -> int:
        """The least that must move: weights once, input read once, output written once."""
        return self.weights + self.edges

    @property
    def moved(self) -> int:
        """Bytes of all operations one by one, a weight as often as one reads it."""
        return sum(op.bytes for op in self.ops)

    @property
    def working_set(self) -> int:
        """Bytes that a step run again and again finds in a cache, if it holds as many.

        All weights, and the activations of the operation that has the most.
        """
        return self.weights + max(op.bytes - op.weights for op in self.ops)

    def bound(self, peaks: Peaks) -> dict[str, Any]:
        """Seconds the step takes at least, however its operations are fused, and what binds."""
        types = {op.dtype for op in self.ops if op.products}
        compute = {
            kind: bound(sum(op.products for op in self.ops if op.dtype == kind), 0, kind, peaks)
            for kind in types
        }
        seconds = sum(one["seconds"] for one in compute.values())
        memory = bound(0, self.bytes, "", peaks, self.working_set)
        if memory["seconds"] > seconds:
            return memory
        # named after the type that takes the most of it
        return {**max(compute.values(), key=lambda one: one["seconds"]), "seconds": seconds}

    def bound_by_ops(self, peaks: Peaks) -> float:
        """Seconds the step takes at least as these operations one after the other."""
        return sum(op.bound(peaks, self.working_set)["seconds"] for op in self.ops)


def step(denoiser: Denoiser, batch: int = 1, guided: bool = True, tf32: bool = False) -> Work:
    """Work of an evaluation of ``batch`` samples in the precision of ``denoiser``'s weights.

    ``tf32``: products of fp32 numbers are computed in it, as a GPU can. ValueError for a guided
    step without a classifier.
    """
    if guided and denoiser.classifier is None:
        raise ValueError("a step without a classifier cannot be guided; count it with guided=False")
    model = on_meta(denoiser)
    x, sigma = inputs(model, batch)
    label = torch.zeros(batch, dtype=torch.int64, device="meta")
    walk = _Walk(model, tf32)
    with walk.following():
        macs.watch(
            model,
            lambda: model(x, sigma, label, sigma) if guided else model(x, sigma),
            walk.product,
        )
    used = {op.module.partition(".")[0] for op in walk.ops}
    weights = sum(
        p.nbytes for name, p in model.named_parameters() if name.partition(".")[0] in used
    )
    return Work(tuple(walk.ops), weights, 2 * x.nbytes)


class _Walk:
    """Writes down the operations of a model on the meta device while it runs."""

    def __init__(self, model: Denoiser, tf32: bool) -> None:
        self.ops: list[Op] = []
        self._model, self._tf32 = model, tf32
        self._modules = dict(model.named_modules())
        # products inside of an operation of ours, by the module that runs it
        self._inside = {
            name: 0
            for name, module in self._modules.items()
            if isinstance(module, TapFusion | SelfAttention)
        }

    def product(self, product: macs.Product) -> None:
        """Enter a convolution or a matrix product, or what an operation of ours does inside."""
        module = self._modules[product.module]
        for name in self._inside:
            fused = isinstance(self._modules[name], TapFusion)
            if product.module == name or (fused and product.module.startswith(f"{name}.")):
                self._inside[name] += product.macs
                return
        bias = module.bias if product.part == macs.FORWARD else None
        weights = module.weight.nbytes + (0 if bias is None else bias.nbytes)
        moved = sum(map(_bytes, (*product.operands, product.result)))
        kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
        if product.part == macs.VJP:
            kind += "_vjp"
        dtype = self._type(module.weight)
        fewest = int(product.macs * _WINOGRAD) if _winograd(module) else product.macs
        self._add(product.module, product.part, kind, product.macs, fewest, moved, weights, dtype)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow norms and fused operations, forward and pulled back."""
        hooks = []
        for name, module in self._modules.items():
            if isinstance(module, NormAct):
                hooks.append(module.register_forward_hook(self._normed(name)))
                module.linearize = self._linearized(name, module.linearize)
            elif isinstance(module, nn.GroupNorm):
                hooks.append(module.register_forward_hook(self._normed(name, "group_norm")))
            elif isinstance(module, TapFusion):
                hooks.append(module.register_forward_hook(self._fused(name)))
            elif isinstance(module, SelfAttention):
                hooks.append(module.register_forward_hook(self._attended(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _normed(self, name: str, kind: str = "norm_act") -> Callable[..., None]:
        def note(module: nn.Module, args: tuple, y: Tensor) -> None:
            self._norm(name, kind, args[0])

        return note

    def _norm(self, name: str, kind: str, x: Tensor) -> None:
        must = traffic.norm_act(*_shape(x), x.itemsize).must
        self._add(name, macs.FORWARD, kind, 0, 0, must, 0, self._type(x))

    def _linearized(self, name: str, linearize: Callable[..., Any]) -> Callable[..., Any]:
        def linearized(x: Tensor, *rest: Any) -> tuple[Tensor, PullNorm]:
            y, pull = linearize(x, *rest)
            self._norm(name, "norm_act", x)

            def pulled(grad: Tensor, addend: Tensor | None = None) -> Tensor:
                found = pull(grad, addend)
                # the input is read once for all cotangents of a sample
                shared = (len(grad) - len(x)) * x[0].numel() * x.itemsize
                must = traffic.norm_act_backward(*_shape(grad), grad.itemsize).must - shared
                self._add(name, macs.VJP, "norm_act_vjp", 0, 0, must, 0, self._type(x))
                return found

            return y, pulled

        return linearized

    def _fused(self, name: str) -> Callable[..., None]:
        def note(module: TapFusion, args: tuple, out: tuple[Tensor, Tensor]) -> None:
            weights = sum(p.nbytes for p in module.parameters())
            moved = weights + sum(map(_bytes, (*args, *out)))
            done = self._inside[name]
            dtype = self._type(module.query.weight)
            self._add(name, macs.FORWARD, "tap_path", done, done, moved, weights, dtype)

        return note

    def _attended(self, name: str) -> Callable[..., None]:
        def note(module: SelfAttention, args: tuple, y: Tensor) -> None:
            done = self._inside[name]
            must = traffic.tap_fuse(*_shape(y), y.itemsize, taps=1, spatial=True).must
            self._add(name, macs.FORWARD, "tap_fuse", done, done, must, 0, self._type(y))

        return note

    def _add(self, module: str, part: str, *rest: Any) -> None:
        network = module.partition(".")[0]
        self.ops.append(Op(module, part if network == "classifier" else network, *rest))

    def _type(self, t: Tensor) -> str:
        name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[t.dtype]
        return "tf32" if name == "fp32" and self._tf32 else name


def _shape(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x[0, 0].numel()


def _bytes(t: Tensor) -> int:
    """Bytes of a tensor that must be read: an expanded one has fewer than elements."""
    return min(t.nbytes, t.untyped_storage().nbytes())


def _winograd(module: nn.Module) -> bool:
    """Whether a convolution can be computed with fewer products, as `fastscore.packed` does."""
    if not isinstance(module, nn.Conv2d) or module.weight.dtype != torch.float32:
        return False
    plain = (module.stride, module.dilation, module.groups) == ((1, 1), (1, 1), 1)
    return plain and module.kernel_size == (3, 3)
