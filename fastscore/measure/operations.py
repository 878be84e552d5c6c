"""Operations of `fastscore_kernels` at a workload's shape: plain PyTorch and a backend, same input.

Inputs are drawn from a fixed seed: what two processes compute is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastscore_kernels import (
    Norms,
    Projections,
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

    def compiled(self) -> Callable[[], Any]:
        """A call of torch.compile of the plain operations, for this one shape."""
        torch._dynamo.reset()
        function = torch.compile(self.compilable or self.eager, fullgraph=True, dynamic=False)
        return lambda: function(*self.arguments)


def case(op: Op, device: torch.device) -> Case:
    """The operation of a workload, with operands built anew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _CASES[op.op](op, device)


def _activation(op: Op, device: torch.device, channels: int | None = None) -> Tensor:
    shape = (op.batch, channels or op.channels, op.height, op.width)
    return torch.randn(shape).to(device).contiguous(memory_format=torch.channels_last)


def _vectors(op: Op, device: torch.device, count: int) -> list[Tensor]:
    return [torch.randn(op.channels).to(device) for _ in range(count)]


def _norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, film: Tensor) -> Tensor:
    scale, shift = film[:, :, None, None].chunk(2, dim=1)
    return F.silu(F.group_norm(x, groups, weight, bias) * (1 + scale) + shift)


def _norm_arguments(op: Op, device: torch.device) -> tuple[Any, ...]:
    film = torch.randn(op.batch, 2 * op.channels).to(device)
    return (_activation(op, device), op.groups, *_vectors(op, device, 2), film)


def _norm_act(op: Op, device: torch.device) -> Case:
    arguments = _norm_arguments(op, device)
    moved = traffic.norm_act(op.batch, op.channels, op.positions, 4)
    return Case(
        arguments,
        _norm,
        lambda backend: lambda: norm_act(*arguments, backend=backend),
        2e-5,
        moved,
    )


def _norm_act_vjp(op: Op, device: torch.device) -> Case:
    x, *rest = _norm_arguments(op, device)
    cotangent = _activation(op, device)
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        y = _norm(leaf, *rest)

    def eager(cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(y, leaf, cotangent, retain_graph=True)[0]

    def pull(cotangent: Tensor) -> Tensor:
        # from the input again: compiled functions keep nothing of an earlier pass
        return torch.func.vjp(lambda t: _norm(t, *rest), x)[1](cotangent)[0]

    def ours(backend: str) -> Callable[[], Tensor]:
        pull_back = norm_act_linearize(x, *rest, backend=backend)[1]
        return lambda: pull_back(cotangent)

    moved = traffic.norm_act_backward(op.batch, op.channels, op.positions, 4)
    return Case((cotangent,), eager, ours, 2e-5, moved, pull)


def _tap_norm(op: Op, device: torch.device) -> Case:
    feature, gradient = _activation(op, device), 1e-6 * _activation(op, device)
    arguments = (feature, gradient, op.groups, *_vectors(op, device, 4))
    return Case(
        arguments,
        lambda *a: reference.tap_norm(*a, EPS),
        lambda backend: lambda: tap_norm(*arguments, backend=backend),
        2e-5,
        traffic.tap_norm(op.batch, op.channels, op.positions, 4),
    )


def _tap_fuse(op: Op, device: torch.device) -> Case:
    q, *taps = (_activation(op, device, op.fused * n) for n in (1, 2, 2))
    arguments = (q, *taps, op.heads, op.spatial)
    moved = traffic.tap_fuse(op.batch, op.fused, op.positions, 4, spatial=op.spatial)
    return Case(
        arguments,
        reference.tap_fuse,
        lambda backend: lambda: tap_fuse(*arguments, backend=backend),
        2e-5,
        moved,
    )


def _tap_path(op: Op, device: torch.device) -> Case:
    """Norms, 1 x 1 convolutions, attention and residual of a scale: matrix products included."""
    feature, gradient = _activation(op, device), 1e-6 * _activation(op, device)
    norms, weights, w, c = Norms(*_vectors(op, device, 4)), [], op.fused, op.channels
    for rows, columns in ((w, c), (2 * w, c), (2 * w, c), (w, 2 * c), (w, w)):
        weights.append((torch.randn(rows, columns, 1, 1) / columns**0.5).to(device))
        weights.append(torch.randn(rows).to(device))
    rest = (norms, Projections(*weights), op.groups, op.heads, op.spatial)
    return Case(
        (feature, gradient),
        lambda f, g: tap_path(f, g, *rest, backend="reference"),
        lambda backend: lambda: tap_path(feature, gradient, *rest, backend=backend),
        1e-4,
    )


def _solver_tensors(op: Op, device: torch.device) -> tuple[Tensor, ...]:
    shape = (op.batch, op.channels, op.height, op.width)
    x, raw, guidance, old = (torch.randn(shape).to(device) for _ in range(4))
    numbers = (torch.arange(op.batch), torch.zeros(op.batch), torch.full((op.batch,), 7))
    counters = torch.stack(numbers, dim=1).long().to(device)
    return x, raw, guidance, old, torch.randn(op.batch, 7).to(device), counters


def _solver_step(op: Op, device: torch.device, noisy: bool = True) -> Case:
    """The eager step draws the same counter-based noise."""
    x, raw, guidance, old, coefficients, counters = _solver_tensors(op, device)
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
        traffic.solver_step(op.batch, size, 4),
    )


def _normals(op: Op, device: torch.device) -> Case:
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


_CASES: dict[str, Callable[[Op, torch.device], Case]] = {
    "norm_act": _norm_act,
    "norm_act_vjp": _norm_act_vjp,
    "tap_norm": _tap_norm,
    "tap_fuse": _tap_fuse,
    "tap_path": _tap_path,
    "solver_step": _solver_step,
    "solver_step_without_noise": lambda op, device: _solver_step(op, device, noisy=False),
    "normals": _normals,
}
