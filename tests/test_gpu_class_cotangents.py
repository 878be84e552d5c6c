"""Cotangents of logits by one Triton kernel: against the reference and against autograd."""

import pytest
import torch
from interpreter import DEVICE, DTYPES, TOLERANCES, assert_near, name, poison

# isort: split
from fastscore_kernels import class_cotangents, reference
from fastscore_kernels.gpu import class_cotangents as gpu

LABEL = torch.tensor([2, -1, 0, 4], device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("classes", [5, 8, 35])
def test_values(dtype, classes, monkeypatch):
    # a softmax that has to be shifted, and one class that has it all
    logits = (30 * torch.randn(4, classes, device=DEVICE)).to(dtype)
    logits[3, 1] = 300
    expected = reference.class_cotangents(logits, LABEL)
    poison(monkeypatch)
    actual = gpu.class_cotangents(logits, LABEL)
    assert actual.dtype == dtype
    assert_near(actual, expected, TOLERANCES[dtype])
    # a label for all samples need not be copied
    every = LABEL[:1].expand(4)
    expected = reference.class_cotangents(logits, every)
    assert_near(gpu.class_cotangents(logits, every), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_they_are_derivatives(backend):
    logits = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    sums = logits.logsumexp(dim=1).sum()
    known = LABEL >= 0
    chosen = logits.log_softmax(dim=1)[torch.arange(4, device=DEVICE), LABEL.clamp_min(0)]
    expected = [torch.autograd.grad(t, logits)[0] for t in (sums, chosen[known].sum())]
    actual = class_cotangents(logits.detach(), LABEL, backend=backend)
    assert_near(actual, torch.cat(expected), 1e-6)


def test_registration_and_derivatives_of_them():
    logits = torch.randn(4, 5, device=DEVICE)
    class_cotangents(logits, LABEL, backend="triton")
    torch.library.opcheck(torch.ops.fastscore_triton.class_cotangents.default, (logits, LABEL))
    found = []
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        y = class_cotangents(leaf, LABEL, backend=backend)
        torch.manual_seed(4)
        found.append(torch.autograd.grad(y, leaf, torch.randn_like(y))[0])
    assert found[0].abs().max() > 0
    assert torch.equal(*found)
