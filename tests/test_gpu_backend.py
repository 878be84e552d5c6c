"""The Triton kernels as a backend: registered, differentiated, and under a whole denoiser step."""

import pytest
import torch
from interpreter import DEVICE, activation, assert_near

# isort: split
from fastscore_kernels import (
    Norms,
    Projections,
    available,
    norm_act,
    normals,
    resolve,
    solver_step,
    tap_fuse,
    tap_norm,
    tap_path,
)
from small_models import inputs, small_denoiser

from fastscore.layers import set_backend
from fastscore.stacked import stack


def weights(*shapes):
    return [torch.randn(s, device=DEVICE) for s in shapes]


def test_is_there_but_not_the_default():
    assert "triton" in available(DEVICE)
    assert resolve("triton", DEVICE) == "triton"
    assert resolve(None, DEVICE) != "triton"


@pytest.mark.parametrize("op", ["norm_act", "tap_norm", "tap_fuse"])
def test_gradients_of_all_inputs_through_autograd(op):
    p = weights(*[(12,)] * 4, (2, 24))
    run, given = {
        "norm_act": (
            lambda k, x, w, b, film, pre: norm_act(x, 4, w, b, film, pre_bias=pre, backend=k),
            [activation(2, 12, 3, 2), p[0], p[1], p[4], p[2]],
        ),
        "tap_norm": (
            lambda k, f, g, *p: torch.cat([t.flatten() for t in tap_norm(f, g, 4, *p, backend=k)]),
            [activation(2, 12, 3, 2), activation(2, 12, 3, 2), *p[:4]],
        ),
        "tap_fuse": (
            lambda k, q, a, b: tap_fuse(q, a, b, 2, True, k),
            [activation(2, 12, 3, 2), activation(2, 24, 3, 2), activation(2, 24, 3, 2)],
        ),
    }[op]
    leaves = [t.requires_grad_() for t in given]
    found = []
    for name in ("triton", "reference"):
        y = run(name, *leaves)
        torch.manual_seed(3)
        found.append((y, *torch.autograd.grad(y, leaves, torch.randn_like(y))))
    for actual, expected in zip(*found, strict=True):
        assert_near(actual.detach(), expected.detach(), 2e-5)


def test_vjp_and_opcheck():
    x, w, b = activation(2, 12, 3, 2), *weights((12,), (12,))
    y, pull = torch.func.vjp(lambda t: norm_act(t, 4, w, b, backend="triton"), x)
    z, expected = torch.func.vjp(lambda t: norm_act(t, 4, w, b, backend="reference"), x)
    grad = torch.randn_like(y)
    assert_near(y, z, 1e-5)
    assert_near(pull(grad)[0], expected(grad)[0], 1e-5)
    op = torch.ops.fastscore_triton.norm_act.default
    torch.library.opcheck(op, (x.requires_grad_(), w, b, None, 4, True, 1e-5, None))
    x = x.detach()
    _, stats = op(x, w, b, None, 4, True, 1e-5, b)
    backward = torch.ops.fastscore_triton.norm_act_backward.default
    for addend in (None, torch.randn_like(x)):
        torch.library.opcheck(backward, (grad, x, stats, w, b, None, 4, True, addend, b))


def test_solver_step_has_the_reference_s_bits():
    x, raw, old = (torch.randn(2, 1, 5, 4, device=DEVICE) for _ in range(3))
    coefficients = torch.randn(2, 7, device=DEVICE)
    counters = torch.tensor([[3, 0, 1], [2**40, 5, 9]], device=DEVICE)
    named = {"raw": raw, "old": old, "counters": counters}
    for a, b in zip(
        solver_step(x, coefficients, **named, backend="triton"),
        solver_step(x, coefficients, **named, backend="reference"),
        strict=True,
    ):
        assert torch.equal(a, b)
    seeds, samples, steps = (column.contiguous() for column in counters.unbind(1))
    assert torch.equal(
        normals(seeds, samples, steps, 9, backend="triton"),
        normals(seeds, samples, steps, 9, backend="reference"),
    )


def test_tap_path_equals_its_parts():
    feature, gradient = activation(1, 8, 3, 2), activation(1, 8, 3, 2)
    sizes = [(16, 8), (32, 8), (32, 8), (16, 16), (16, 16)]
    projections = Projections(*weights(*[s for n, m in sizes for s in ((n, m, 1, 1), (n,))]))
    rest = (Norms(*weights(*[(8,)] * 4)), projections, 4, 2, True)
    actual, expected = (
        tap_path(feature, gradient, *rest, backend=name) for name in ("triton", "reference")
    )
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b, 1e-4)


def test_a_guided_step_of_a_model():
    model = small_denoiser().requires_grad_(False)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    x, sigma = (t.to(DEVICE) for t in inputs(2))
    guidance = torch.tensor([1, 3], device=DEVICE), torch.tensor([2.0, 5.0], device=DEVICE)
    found = []
    for name in ("reference", "triton"):
        set_backend(model, name)
        if name == "triton":
            # as a pipeline prepares it: FiLM rows are slices of one product
            stack(model)
        with torch.no_grad():
            found.append(model(x, sigma, *guidance))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
