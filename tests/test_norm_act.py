"""norm_act on the CPU backends: float64 numpy, the reference, autograd, and awkward numbers."""

import numpy as np
import pytest
import torch
from fastscore_kernels import norm_act, norm_act_backward, norm_act_forward
from kernel_cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    TOLERANCES,
    affine,
    assert_near,
    assert_same,
    leaves,
    native_or_skip,
    normalised,
    sigmoid,
    wide,
)

FILM = pytest.mark.parametrize("film", [False, True], ids=["plain", "film"])


def case(shape, dtype, layout, film):
    b, c, groups, h, w = shape
    x = (2 * torch.randn(b, c, h, w) + 1).to(dtype).contiguous(memory_format=layout)
    modulation = torch.randn(b, 2 * c).to(dtype) if film else None
    return x, groups, torch.randn(c), torch.randn(c), modulation


@DTYPES
@SHAPES
@LAYOUTS
@FILM
@pytest.mark.usefixtures("poisoned")
def test_forward_against_numpy(shape, dtype, layout, film, backend):
    x, groups, weight, bias, modulation = case(shape, dtype, layout, film)
    expected = affine(normalised(wide(x), groups), weight, bias)
    if film:
        scale, shift = (wide(t)[..., None, None] for t in modulation.chunk(2, dim=1))
        expected = expected * (1 + scale) + shift
    for act in (False, True):
        y, stats = norm_act_forward(x, groups, weight, bias, modulation, act, backend=backend)
        assert y.dtype == dtype
        assert y.stride() == x.stride()
        assert_near(y, expected * sigmoid(expected) if act else expected, TOLERANCES[dtype])
        grouped = wide(x).reshape(len(x), groups, -1)
        assert_near(stats[0], grouped.mean(axis=2), 1e-5)
        rstd = 1 / np.sqrt(grouped.var(axis=2) + 1e-5)
        np.testing.assert_allclose(stats[1].numpy(), rstd, rtol=1e-4)


@DTYPES
@SHAPES
@LAYOUTS
@FILM
@pytest.mark.parametrize("act", [False, True], ids=["linear", "silu"])
@pytest.mark.usefixtures("poisoned")
def test_native_backward_equals_the_reference(shape, dtype, layout, film, act):
    """Two cotangents of each sample at once, the second after all of the first."""
    native_or_skip()
    x, groups, *parameters = case(shape, dtype, layout, film)
    grad = torch.randn(2 * len(x), *x.shape[1:]).to(dtype).contiguous(memory_format=layout)
    stats = norm_act_forward(x, groups, *parameters, act, backend="reference")[1]
    expected = norm_act_backward(grad, x, stats, groups, *parameters, act, backend="reference")
    actual = norm_act_backward(grad, x, stats, groups, *parameters, act, backend="native")
    assert_same(actual[0], expected[0].contiguous(memory_format=layout), TOLERANCES[dtype])
    assert_same(actual[1], expected[1], 1e-5)
    addend = torch.randn_like(grad)
    for name, (image, sums) in (("reference", expected), ("native", actual)):
        summed, same = norm_act_backward(
            grad, x, stats, groups, *parameters, act, addend, backend=name
        )
        # the very sum, so that a step on a CPU keeps its bits
        assert torch.equal(summed, addend + image)
        assert torch.equal(same, sums)


@FILM
@pytest.mark.parametrize("act", [False, True])
def test_gradients_of_all_inputs(film, act, backend):
    """Of the float64 reference to numerical ones, of a backend to the reference's."""
    x, weight, bias, modulation = leaves((2, 4, 3, 2), (4,), (4,), (2, 8))
    inputs = (x, weight, bias, *([modulation] if film else []))
    assert torch.autograd.gradcheck(lambda x, *p: norm_act(x, 2, *p, act=act), inputs)
    cotangent = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    expected = torch.autograd.grad(norm_act(x, 2, *inputs[1:], act=act), inputs, cotangent)
    narrow = [t.detach().float().requires_grad_() for t in inputs]
    y = norm_act(narrow[0], 2, *narrow[1:], act=act, backend=backend)
    for a, b in zip(torch.autograd.grad(y, narrow, cotangent.float()), expected, strict=True):
        assert_near(a, wide(b), 1e-5)


def test_a_bias_before_the_statistics(backend):
    """Of values and of all gradients: as if it had been added to x."""
    x, groups, *parameters = case((2, 12, 4, 5, 3), torch.float32, torch.channels_last, True)
    leaves = [t.requires_grad_() for t in (x, torch.randn(12), *parameters)]
    grad = torch.randn_like(x)
    found = []
    for apart in (False, True):
        x, pre, weight, bias, film = leaves
        given = (x, pre) if apart else (x + pre[:, None, None], None)
        y = norm_act(given[0], groups, weight, bias, film, pre_bias=given[1], backend=backend)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
    for actual, expected in zip(*found, strict=True):
        assert_near(actual, wide(expected), 2e-5)


def test_statistics_stay_wide(backend):
    """Means of thousands over narrow numbers: sums in their own dtype would lose the difference."""
    # ATen's own channels-last norm loses it: the reference is held to what it can
    layouts = [torch.contiguous_format, *([torch.channels_last] if backend != "reference" else [])]
    for layout in layouts:
        x = (300 + torch.randn(1, 8, 40, 32)).to(torch.float16).contiguous(memory_format=layout)
        y = norm_act(x, 2, torch.ones(8), torch.zeros(8), act=False, backend=backend)
        assert_near(y, normalised(wide(x), 2), TOLERANCES[torch.float16])


def test_constant_and_huge_inputs_stay_finite(backend):
    for value in (0.0, 1e4, -1e18):
        x = torch.full((1, 8, 3, 5), value)
        y = norm_act(x, 4, torch.ones(8), torch.full((8,), 0.5), backend=backend)
        assert y.isfinite().all()
    # SiLU far on either side is 0 and the identity
    x = torch.randn(1, 8, 6, 6)
    y = norm_act(x, 1, torch.full((8,), 1e4), torch.zeros(8), backend=backend)
    z = norm_act(x, 1, torch.full((8,), 1e4), torch.zeros(8), act=False, backend=backend)
    assert_near(y, wide(z.clamp_min(0)), 1e-6)


@LAYOUTS
def test_bits_do_not_depend_on_batch_slot_or_threads(layout):
    native_or_skip()
    x, groups, *parameters = case((5, 80, 8, 20, 16), torch.float32, layout, True)
    grad = torch.randn_like(x)
    together, stats = norm_act_forward(x, groups, *parameters, backend="native")
    images, sums = norm_act_backward(grad, x, stats, groups, *parameters, backend="native")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for i in range(5):
                own = (*parameters[:2], parameters[2][i : i + 1])
                alone, its = norm_act_forward(x[i : i + 1], groups, *own, backend="native")
                assert torch.equal(alone[0], together[i])
                image, its_sums = norm_act_backward(
                    grad[i : i + 1], x[i : i + 1], its, groups, *own, backend="native"
                )
                assert torch.equal(image[0], images[i])
                assert torch.equal(its_sums[:, 0], sums[:, i])
    finally:
        torch.set_num_threads(threads)


def test_second_derivatives_say_that_there_are_none():
    native_or_skip()
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    y = norm_act(x, 2, torch.ones(4), torch.zeros(4), backend="native")
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="use backend reference"):
        torch.autograd.grad(first.sum(), x)
