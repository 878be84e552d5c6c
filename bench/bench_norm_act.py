"""norm_act and its VJP against eager PyTorch and torch.compile, at every shape of the presets.

pytest bench/bench_norm_act.py --benchmark-only --threads 2 [--benchmark-json FILE]
"""

import pytest
import torch
import torch.nn.functional as F
from compare import compiled
from fastscore_kernels import norm_act, norm_act_linearize, traffic
from problems import activation, norm_planes


def eager(x, groups, weight, bias, film):
    scale, shift = film[:, :, None, None].chunk(2, dim=1)
    return F.silu(F.group_norm(x, groups, weight, bias) * (1 + scale) + shift)


def parameters(plane, device):
    weight, bias = (
        torch.randn(plane.channels, device=device),
        torch.randn(plane.channels, device=device),
    )
    return weight, bias, torch.randn(plane.batch, 2 * plane.channels, device=device)


@pytest.mark.parametrize("plane", norm_planes(), ids=str)
def test_forward(compare, device, kernel, with_compile, plane):
    x, rest = activation(plane, device), parameters(plane, device)
    runs = {"eager": lambda: eager(x, plane.groups, *rest)}
    for name, run in compiled(eager, with_compile).items():
        runs[name] = lambda run=run: run(x, plane.groups, *rest)
    runs[kernel] = lambda: norm_act(x, plane.groups, *rest, backend=kernel)
    moved = traffic.norm_act(plane.batch, plane.channels, plane.positions, x.element_size())
    compare(f"norm_act {plane}", runs, 2e-5, moved)


def pull(x, groups, weight, bias, film, grad):
    """The VJP from the input again: compiled functions keep nothing of an earlier pass."""
    return torch.func.vjp(lambda t: eager(t, groups, weight, bias, film), x)[1](grad)[0]


@pytest.mark.parametrize("plane", norm_planes(), ids=str)
def test_backward(compare, device, kernel, with_compile, plane):
    x, rest = activation(plane, device), parameters(plane, device)
    grad = activation(plane, device)
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        y = eager(leaf, plane.groups, *rest)
    pull_back = norm_act_linearize(x, plane.groups, *rest, backend=kernel)[1]
    runs = {"eager": lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]}
    for name, run in compiled(pull, with_compile).items():
        runs[name] = lambda run=run: run(x, plane.groups, *rest, grad)
    runs[kernel] = lambda: pull_back(grad)
    moved = traffic.norm_act_backward(
        plane.batch, plane.channels, plane.positions, x.element_size()
    )
    compare(f"norm_act VJP {plane}", runs, 2e-5, moved)
