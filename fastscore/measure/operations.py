"""Operations of `fastscore_kernels` at a workload's shape: plain PyTorch and a backend, same input.

Inputs are drawn from a fixed seed: what two processes compute is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastscore_kernels import (
    Norms,
    Projections,
    bias_add,
    class_cotangents,
    edm_inputs,
    noise,
    norm_act,
    norm_act_linearize,
    normals,
    reference,
    solver_step,
    tap_fuse,
    tap_norm,
    tap_path,
    traffic,
)
from torch import Tensor

from fastscore.measure.workloads import Op

Function = Callable[..., Any]
EPS = 1e-5
# what operands may be of
DTYPES = (torch.float32, torch.bfloat16)
# of bf16 one rounding costs 2^-9 of a number. Plain PyTorch rounds after each of its operations:
# after norm, FiLM's two and SiLU, or after weights and values of an attention, four or five times,
# of numbers up to twice the largest answer
_BF16 = 2**-6
# and in a whole path taps, queries, keys, values, fused tokens and two products one after the other
_PATH_BF16 = 2**-5


class Case(NamedTuple):
    """An operation at one shape: ``eager(*arguments)`` and ``ours(*arguments, backend=)``.

    ``tolerance`` is of the largest value; ``traffic`` what must move, None where that is not known.
    ``compilable`` stands in for ``eager`` where that keeps something from call to call.
    """

    arguments: tuple[Any, ...]
    eager: Function
    ours: Callable[[str], Callable[[], Any]]
    tolerance: float
    traffic: traffic.Traffic | None = None
    compilable: Function | None = None

    def run(self, backend: str) -> Callable[[], Any]:
        """A call of plain PyTorch ("eager"), or of a backend of `fastscore_kernels`."""
        if backend == "eager":
            return lambda: self.eager(*self.arguments)
        return self.ours(backend)

    def compiler(self) -> Function:
        """torch.compile of the plain operations, for ``arguments`` and others of their shapes."""
        torch._dynamo.reset()
        return torch.compile(self.compilable or self.eager, fullgraph=True, dynamic=False)

    def compiled(self) -> Callable[[], Any]:
        """A call of torch.compile of the plain operations, for this one shape."""
        function = self.compiler()
        return lambda: function(*self.arguments)


def case(op: Op, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """The operation of a workload, with operands of ``dtype`` built anew from ``seed``.

    fp32 or bf16; what a solver keeps from step to step is fp32 in both. ValueError for another.
    """
    if dtype not in DTYPES:
        raise ValueError(f"operands of {dtype} are not measured; use float32 or bfloat16")
    return _built(op, _Operands(op, device, dtype, None), seed)


def exact(op: Op, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The answer for the operands of ``case(op, device, dtype)``, by plain PyTorch in float64."""
    with torch.no_grad():
        return _built(op, _Operands(op, device, dtype, torch.float64), 0).run("eager")()


def _built(op: Op, operands: _Operands, seed: int) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _CASES[op.op](op, operands)


@dataclass(frozen=True)
class _Operands:
    """Draws operands: numbers rounded to ``dtype``, and held as ``wide`` where that is given."""

    op: Op
    device: torch.device
    dtype: torch.dtype
    wide: torch.dtype | None

    @property
    def narrow(self) -> bool:
        """Whether operands are rounded to bf16."""
        return self.dtype == torch.bfloat16

    @property
    def itemsize(self) -> int:
        """Bytes of an activation's element."""
        return self.dtype.itemsize

    def held(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``x`` on the device, rounded."""
        x = x.to(self.device, dtype or self.dtype)
        return x if self.wide is None else x.to(self.wide)

    def activation(self, channels: int | None = None, scale: float = 1.0) -> Tensor:
        """[batch, channels, height, width], channels-last."""
        op = self.op
        x = torch.randn(op.batch, channels or op.channels, op.height, op.width)
        if scale != 1.0:
            x = scale * x
        return self.held(x).contiguous(memory_format=torch.channels_last)

    def vectors(self, count: int) -> list[Tensor]:
        """``count`` times [channels]."""
        return [self.held(torch.randn(self.op.channels)) for _ in range(count)]


def _norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, film: Tensor) -> Tensor:
    scale, shift = film[:, :, None, None].chunk(2, dim=1)
    return F.silu(F.group_norm(x, groups, weight, bias) * (1 + scale) + shift)


def _norm_arguments(op: Op, operands: _Operands) -> tuple[Any, ...]:
    film = operands.held(torch.randn(op.batch, 2 * op.channels))
    return (operands.activation(), op.groups, *operands.vectors(2), film)


def _norm_act(op: Op, operands: _Operands) -> Case:
    arguments = _norm_arguments(op, operands)
    moved = traffic.norm_act(op.batch, op.channels, op.positions, operands.itemsize)
    return Case(
        arguments,
        _norm,
        lambda backend: lambda: norm_act(*arguments, backend=backend),
        _BF16 if operands.narrow else 2e-5,
        moved,
    )


def _norm_act_vjp(op: Op, operands: _Operands) -> Case:
    x, *rest = _norm_arguments(op, operands)
    cotangent = operands.activation()
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        y = _norm(leaf, *rest)

    def eager(cotangent: Tensor, *_: Any) -> Tensor:
        return torch.autograd.grad(y, leaf, cotangent, retain_graph=True)[0]

    def pull(cotangent: Tensor, x: Tensor, *rest: Any) -> Tensor:
        # from the input again: compiled functions keep nothing of an earlier pass
        return torch.func.vjp(lambda t: _norm(t, *rest), x)[1](cotangent)[0]

    def ours(backend: str) -> Callable[[], Tensor]:
        pull_back = norm_act_linearize(x, *rest, backend=backend)[1]
        return lambda: pull_back(cotangent)

    moved = traffic.norm_act_backward(op.batch, op.channels, op.positions, operands.itemsize)
    tolerance = _BF16 if operands.narrow else 2e-5
    return Case((cotangent, x, *rest), eager, ours, tolerance, moved, pull)


def _tap_norm(op: Op, operands: _Operands) -> Case:
    feature, gradient = operands.activation(), operands.activation(scale=1e-6)
    arguments = (feature, gradient, op.groups, *operands.vectors(4))
    return Case(
        arguments,
        lambda *a: reference.tap_norm(*a, EPS),
        lambda backend: lambda: tap_norm(*arguments, backend=backend),
        _BF16 if operands.narrow else 2e-5,
        traffic.tap_norm(op.batch, op.channels, op.positions, operands.itemsize),
    )


def _tap_fuse(op: Op, operands: _Operands) -> Case:
    q, *taps = (operands.activation(op.fused * n) for n in (1, 2, 2))
    arguments = (q, *taps, op.heads, op.spatial)
    sizes = (op.batch, op.fused, op.positions, operands.itemsize)
    return Case(
        arguments,
        reference.tap_fuse,
        lambda backend: lambda: tap_fuse(*arguments, backend=backend),
        _BF16 if operands.narrow else 2e-5,
        traffic.tap_fuse(*sizes, spatial=op.spatial),
    )


def _tap_path(op: Op, operands: _Operands) -> Case:
    """Norms, 1 x 1 convolutions, attention and residual of a scale: matrix products included."""
    feature, gradient = operands.activation(), operands.activation(scale=1e-6)
    norms, weights, w, c = Norms(*operands.vectors(4)), [], op.fused, op.channels
    for rows, columns in ((w, c), (2 * w, c), (2 * w, c), (w, 2 * c), (w, w)):
        weights.append(operands.held(torch.randn(rows, columns, 1, 1) / columns**0.5))
        weights.append(operands.held(torch.randn(rows)))
    rest = (norms, Projections(*weights), op.groups, op.heads, op.spatial)
    arguments = (feature, gradient, *rest)
    return Case(
        arguments,
        lambda *a: tap_path(*a, backend="reference"),
        lambda backend: lambda: tap_path(*arguments, backend=backend),
        _PATH_BF16 if operands.narrow else 1e-4,
    )


def _bias_add(op: Op, operands: _Operands) -> Case:
    """Bias and residual of a block."""
    x, residual, (bias,) = operands.activation(), operands.activation(), operands.vectors(1)

    def eager(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return reference.bias_add(x, bias, None, residual)

    return Case(
        (x, bias, residual),
        eager,
        lambda backend: lambda: bias_add(x, bias, residual=residual, backend=backend),
        _BF16 if operands.narrow else 2e-5,
    )


def _edm_inputs(op: Op, operands: _Operands) -> Case:
    """A sample's patches of two by two, sixteen frequencies, and a strength; levels in fp32."""
    fp32 = torch.float32
    x = operands.held(torch.randn(op.batch, 1, op.height, op.width), fp32)
    sigma, gamma = (operands.held(torch.rand(op.batch) + 0.5, fp32) for _ in range(2))
    freqs = operands.held(torch.linspace(0.25, 100.0, 16), fp32)
    kind = operands.wide or operands.dtype
    arguments = (x, sigma, gamma, freqs, 1.0, 2, kind)
    # an angle of some 20 is rounded in fp32 before its cosine is taken
    return Case(
        arguments,
        reference.edm_inputs,
        lambda backend: lambda: edm_inputs(*arguments, backend=backend),
        _BF16 if operands.narrow else 2e-5,
    )


def _class_cotangents(op: Op, operands: _Operands) -> Case:
    """Logits of ``channels`` classes, which are fp32 in both dtypes."""
    logits = operands.held(torch.randn(op.batch, op.channels), torch.float32)
    label = (torch.arange(op.batch) % op.channels).to(operands.device)
    return Case(
        (logits, label),
        reference.class_cotangents,
        lambda backend: lambda: class_cotangents(logits, label, backend=backend),
        2e-5,
    )


def _solver_tensors(op: Op, operands: _Operands) -> tuple[Tensor, ...]:
    shape = (op.batch, op.channels, op.height, op.width)
    state = torch.float32
    x, raw, guidance, old = (torch.randn(shape) for _ in range(4))
    numbers = (torch.arange(op.batch), torch.zeros(op.batch), torch.full((op.batch,), 7))
    counters = torch.stack(numbers, dim=1).long().to(operands.device)
    return (
        operands.held(x, state),
        operands.held(raw),
        operands.held(guidance),
        operands.held(old, state),
        operands.held(torch.randn(op.batch, 7), state),
        counters,
    )


def _solver_step(op: Op, operands: _Operands, noisy: bool = True) -> Case:
    """The eager step draws the same counter-based noise; sums are fp32 in both dtypes."""
    x, raw, guidance, old, coefficients, counters = _solver_tensors(op, operands)
    size = x[0].numel()

    def eager(x: Tensor, raw: Tensor, guidance: Tensor, old: Tensor, c: Tensor, n: Tensor) -> Any:
        z = None
        if noisy:
            seeds, samples, steps = n.unbind(1)
            z = noise.normals(seeds, samples, steps[None], size)[0].reshape(x.shape)
        return reference.solver_step(x, raw, guidance, None, old, c, z)

    named = {"raw": raw, "guidance": guidance, "old": old}
    named |= {"counters": counters} if noisy else {}
    return Case(
        (x, raw, guidance, old, coefficients, counters),
        eager,
        lambda backend: lambda: solver_step(x, coefficients, **named, backend=backend),
        1e-5,
        traffic.solver_step(op.batch, size, operands.itemsize),
    )


def _normals(op: Op, operands: _Operands) -> Case:
    device = operands.device
    seeds = torch.arange(op.batch, device=device)
    size = op.channels * op.positions
    arguments = (seeds, torch.zeros_like(seeds), torch.tensor([7], device=device), size)
    # equal to the bit
    return Case(
        arguments,
        noise.normals,
        lambda backend: lambda: normals(*arguments, backend=backend),
        0.0,
    )


_CASES: dict[str, Callable[[Op, _Operands], Case]] = {
    "norm_act": _norm_act,
    "norm_act_vjp": _norm_act_vjp,
    "tap_norm": _tap_norm,
    "tap_fuse": _tap_fuse,
    "tap_path": _tap_path,
    "bias_add": _bias_add,
    "edm_inputs": _edm_inputs,
    "class_cotangents": _class_cotangents,
    "solver_step": _solver_step,
    "solver_step_without_noise": lambda op, operands: _solver_step(op, operands, noisy=False),
    "normals": _normals,
}
