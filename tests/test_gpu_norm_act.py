"""The Triton kernels of norm_act against the reference: values, gradients, layouts, splits."""

import pytest
import torch
from interpreter import DEVICE, DTYPES, TOLERANCES, activation, assert_near, name, poison

# isort: split
from fastscore_kernels import reference
from fastscore_kernels.gpu.launch import parameters
from fastscore_kernels.gpu.norm_act import norm_act, norm_act_backward

# batch, channels, groups, height, width: odd sizes, one position, one channel a group, wide groups
SHAPES = [(2, 16, 4, 5, 3), (3, 20, 2, 7, 5), (1, 8, 4, 1, 1), (2, 6, 6, 3, 1), (1, 9, 1, 1, 23)]
WAYS = {
    "one tile": {"splits": 1, "block_n": 64},
    "tiles": {"splits": 1, "block_n": 8},
    "stretches": {"splits": 3, "block_n": 8},
}


def arguments(shape, dtype, last, film):
    b, c, groups, h, w = shape
    x = (activation(b, c, h, w, last=last) * 2 + 1).to(dtype)
    weight, bias = torch.randn(c, device=DEVICE), torch.randn(c, device=DEVICE)
    return x, weight, bias, torch.randn(b, 2 * c, device=DEVICE) if film else None, groups


def ways(op, way):
    return parameters(op, **WAYS[way])


def pulled(grad, x, *rest):
    """The reference's backward, on the layout that torch 2.11's group norm reads rightly."""
    *rest, addend, pre_bias = rest
    addend = None if addend is None else addend.contiguous()
    return reference.norm_act_backward(grad.contiguous(), x.contiguous(), *rest, addend, pre_bias)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape, way):
    check(shape, torch.float32, way)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name)
def test_narrow_activations(dtype):
    check(SHAPES[0], dtype, "one tile")
    check(SHAPES[1], dtype, "stretches")


def check(shape, dtype, way):
    last, film, act = way != "tiles", shape[0] > 1, shape[3] > 1
    x, weight, bias, film, groups = arguments(shape, dtype, last, film)
    # what a norm with FiLM normalises lacks the bias of its convolution
    pre = torch.randn_like(bias) if shape[0] > 1 else None
    given = (x, weight, bias, film, groups, act, 1e-5, pre)
    with ways("norm_act", way):
        y, stats = norm_act(*given)
    expected, expected_stats = reference.norm_act(*given)
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    assert_near(y, expected, TOLERANCES[dtype])
    assert_near(stats, expected_stats, 1e-5)

    copies = 1 + shape[0] % 2
    grad = activation(copies * shape[0], shape[1], *shape[3:], dtype=dtype, last=last)
    # what flows past a block's first norm, which has no FiLM
    addend = None if shape[0] > 1 else torch.randn_like(grad)
    given = (grad, x, expected_stats, weight, bias, film, groups, act, addend, pre)
    with ways("norm_act_backward", way):
        grad_x, sums = norm_act_backward(*given)
    expected, expected_sums = pulled(*given)
    assert (grad_x.dtype, grad_x.stride()) == (dtype, grad.stride())
    assert_near(grad_x, expected, TOLERANCES[dtype])
    assert_near(sums, expected_sums, 1e-4)


def test_backward_is_the_derivative():
    """Against autograd of the plain formula: what the reference's own backward must equal too."""
    x, weight, bias, film, groups = arguments((2, 12, 3, 5, 4), torch.float32, True, True)
    leaves = [t.requires_grad_() for t in (x, weight, bias, film)]
    grad = torch.randn_like(x)
    y, stats = reference.norm_act(*leaves, groups, True, 1e-5)
    expected = torch.autograd.grad(y, leaves, grad)
    with torch.no_grad():
        given = (grad, x, stats, weight, bias, film, groups, True, None, None)
        grad_x, (dz, dz_xhat) = norm_act_backward(*given)
        gain = 1 + film[:, : x.shape[1]]
        assert_near(grad_x, expected[0], 1e-5)
        assert_near((gain * dz_xhat).sum(0), expected[1], 1e-4)
        assert_near((gain * dz).sum(0), expected[2], 1e-4)
        assert_near(torch.cat((weight * dz_xhat + bias * dz, dz), 1), expected[3], 1e-4)


@pytest.mark.parametrize(
    ("way", "last"), [("one tile", True), ("tiles", False), ("stretches", True)]
)
def test_a_large_mean_costs_no_digits(way, last):
    """fp32 sums of squares would lose all of these: 3000^2 is 2^23 times the variance."""
    x = activation(2, 8, 9, 5, last=last) + 3000
    ones, zeros = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    with ways("norm_act", way):
        y, _ = norm_act(x, ones, zeros, None, 2, False, 1e-5, None)
    wide = x.double().reshape(2, 2, -1)
    wide = (wide - wide.mean(2, keepdim=True)) / (wide.var(2, correction=0, keepdim=True)).sqrt()
    assert_near(y, wide.reshape(x.shape), 2e-3)


def test_film_may_be_a_slice_and_cotangents_of_another_layout():
    x, weight, bias, _, groups = arguments((2, 8, 2, 4, 3), torch.float32, True, False)
    film = torch.randn(2, 40, device=DEVICE)[:, 3:19]
    y, stats = norm_act(x, weight, bias, film, groups, True, 1e-5, None)
    assert_near(y, reference.norm_act(x, weight, bias, film, groups, True, 1e-5)[0], 1e-5)
    grad = activation(4, 8, 4, 3, last=False)
    given = (x, stats, weight, bias, film, groups, True, activation(4, 8, 4, 3), None)
    actual, sums = norm_act_backward(grad, *given)
    expected, expected_sums = pulled(grad, *given)
    assert actual.stride() == grad.stride()
    assert_near(actual, expected, 1e-5)
    assert_near(sums, expected_sums, 1e-4)


def test_narrow_parameters():
    x, weight, bias, film, groups = arguments((2, 8, 2, 4, 3), torch.bfloat16, True, True)
    narrow = [t.bfloat16() for t in (weight, bias, film, torch.randn_like(bias))]
    y, _ = norm_act(x, *narrow[:3], groups, True, 1e-5, narrow[3])
    expected, _ = reference.norm_act(x, *narrow[:3], groups, True, 1e-5, narrow[3])
    assert_near(y, expected, TOLERANCES[torch.bfloat16])
