"""tap_norm on the CPU backends: float64 numpy, autograd, and gradients of any magnitude."""

import math

import numpy as np
import pytest
import torch
from fastscore_kernels import tap_norm
from fastscore_kernels.reference import sample_rms
from kernel_cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    TOLERANCES,
    affine,
    assert_near,
    leaves,
    native_or_skip,
    normalised,
    wide,
)


@DTYPES
@SHAPES
@LAYOUTS
@pytest.mark.usefixtures("poisoned")
def test_forward_against_numpy(shape, dtype, layout, backend):
    b, c, groups, h, w = shape
    feature = (torch.randn(b, c, h, w) + 0.5).to(dtype).contiguous(memory_format=layout)
    # the magnitudes that the taps of different noise levels have
    gradient = torch.randn(b, c, h, w) * torch.logspace(-4, 1, b)[:, None, None, None]
    gradient = gradient.to(dtype).contiguous(memory_format=layout)
    parameters = [torch.randn(c) for _ in range(4)]
    taps, log_rms = tap_norm(feature, gradient, groups, *parameters, backend=backend)
    assert (taps.dtype, log_rms.dtype) == (dtype, torch.float32)
    assert taps.is_contiguous(memory_format=torch.channels_last)
    rms = np.sqrt(np.square(wide(gradient)).mean(axis=(1, 2, 3)))
    scaled = wide(gradient) / rms[:, None, None, None]
    f, g = taps.chunk(2, dim=1)
    assert_near(f, affine(normalised(wide(feature), groups), *parameters[:2]), TOLERANCES[dtype])
    assert_near(g, affine(normalised(scaled, groups), *parameters[2:]), TOLERANCES[dtype])
    assert_near(log_rms, np.log(rms), 1e-5)


@pytest.mark.parametrize("size", [1e-25, 1e-18, 1e18, 1e25])
def test_gradients_of_any_magnitude_keep_their_shape(size, backend):
    """Squares of these leave fp32 on either side; the normalised tap must not notice."""
    feature, gradient = torch.randn(2, 8, 5, 4), torch.randn(2, 8, 5, 4)
    ones, zeros = torch.ones(8), torch.zeros(8)
    rest = (4, ones, zeros, ones, zeros)
    expected, log_rms = tap_norm(feature, gradient, *rest, backend="reference")
    actual, moved = tap_norm(feature, gradient * size, *rest, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved, log_rms + math.log(size), rtol=1e-5, atol=1e-4)


def test_vanished_gradients_stay_finite(backend):
    """A tap without any gradient: the bias is all there is to say, and training goes on."""
    feature = torch.randn(3, 8, 4, 4, requires_grad=True)
    gradient = torch.randn(3, 8, 4, 4)
    gradient[1] = 0
    gradient.requires_grad_()
    parameters = [torch.randn(8, requires_grad=True) for _ in range(4)]
    taps, log_rms = tap_norm(feature, gradient, 4, *parameters, backend=backend)
    (taps[:, :8].sum() + taps[:, 8:].square().sum() + log_rms.sum()).backward()
    bias = parameters[3].detach()[:, None, None].expand(8, 4, 4)
    torch.testing.assert_close(taps[1, 8:].detach(), bias)
    torch.testing.assert_close(float(log_rms[1].detach()), math.log(1e-30))
    assert gradient.grad[::2].isfinite().all()
    for t in (taps, log_rms, feature.grad, gradient.grad, *(p.grad for p in parameters)):
        assert t.isfinite().all()


@LAYOUTS
def test_gradients_of_all_inputs(layout, backend):
    """Of the float64 reference to numerical ones, of a backend to the reference's."""
    inputs = leaves((2, 4, 3, 2), (2, 4, 3, 2), *[(4,)] * 4)
    # the eps of the norm is felt through the RMS as well: large enough to be seen here
    eps = 0.3
    assert torch.autograd.gradcheck(lambda f, g, *p: tap_norm(f, g, 2, *p, eps=eps), inputs)
    cotangents = (torch.randn(2, 8, 3, 2).double(), torch.randn(2).double())
    outputs = tap_norm(*inputs[:2], 2, *inputs[2:], eps=eps)
    expected = torch.autograd.grad(outputs, inputs, cotangents)
    narrow = [t.detach().float() for t in inputs]
    narrow = [t.contiguous(memory_format=layout) if t.ndim == 4 else t for t in narrow]
    narrow = [t.requires_grad_() for t in narrow]
    outputs = tap_norm(*narrow[:2], 2, *narrow[2:], eps=eps, backend=backend)
    actual = torch.autograd.grad(outputs, narrow, [c.float() for c in cotangents])
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, wide(b), 2e-5)


def test_backward_on_frozen_channels_last_taps(backend):
    """torch 2.11's group_norm crashes in backward here when given the affine parameters itself."""
    feature, gradient = (
        torch.randn(4, 16, 10, 8).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    parameters = [torch.randn(16, requires_grad=True) for _ in range(4)]
    found = []
    for pair in ((feature, gradient), (feature.contiguous(), gradient.contiguous())):
        taps, _ = tap_norm(*pair, 4, *parameters, backend=backend)
        found.append(torch.autograd.grad(taps.square().sum(), parameters))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("floor", [1e-20, 1e-3])
def test_sample_rms(floor):
    x = torch.randn(4, 3, 5, 7)
    x[2] = 0
    expected = np.sqrt(np.square(wide(x)).mean(axis=(1, 2, 3)))
    expected[2] = floor
    assert sample_rms(x.bfloat16()).dtype == torch.float32
    np.testing.assert_allclose(sample_rms(x, floor).numpy(), expected, rtol=1e-6)


def test_bits_do_not_depend_on_batch_slot_or_threads():
    native_or_skip()
    feature, gradient = (
        torch.randn(5, 64, 20, 16).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    parameters = [torch.randn(64) for _ in range(4)]
    taps, log_rms = tap_norm(feature, gradient, 8, *parameters, backend="native")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for i in range(5):
                one = slice(i, i + 1)
                alone, its = tap_norm(feature[one], gradient[one], 8, *parameters, backend="native")
                assert torch.equal(alone[0], taps[i])
                assert torch.equal(its[0], log_rms[i])
    finally:
        torch.set_num_threads(threads)
