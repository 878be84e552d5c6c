"""The reference operations against float64 numpy, numerical gradients, and awkward numbers."""

import math

import numpy as np
import pytest
import torch
from fastscore_kernels import norm_act, sample_rms, tap_fuse, tap_norm
from small_models import keep_double
from torch import Tensor

# Statistics are fp32, so an fp32 result carries some roundings of 2^-24 each, and a narrow one its
# own last rounding besides: 2^-8 for bf16 and 2^-11 for fp16, relative, twice for the output and
# an intermediate of the same width.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d).removeprefix("torch."))
# batch, channels, groups, height, width: even, odd, one position a group, one channel a group
SHAPES = pytest.mark.parametrize(
    "shape",
    [(2, 16, 4, 8, 6), (3, 12, 4, 5, 7), (1, 8, 4, 1, 1), (2, 6, 6, 3, 1), (1, 9, 1, 1, 63)],
)


def wide(t: Tensor) -> np.ndarray:
    return t.detach().double().numpy()


def assert_near(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    error = np.abs(wide(actual) - expected)
    assert error.max() <= tolerance * max(1.0, np.abs(expected).max()), error.max()


def normalised(x: np.ndarray, groups: int, eps: float = 1e-5) -> np.ndarray:
    y = x.reshape(x.shape[0], groups, -1)
    y = (y - y.mean(axis=2, keepdims=True)) / np.sqrt(y.var(axis=2, keepdims=True) + eps)
    return y.reshape(x.shape)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def affine(x: np.ndarray, weight: Tensor, bias: Tensor) -> np.ndarray:
    return x * wide(weight)[:, None, None] + wide(bias)[:, None, None]


@DTYPES
@SHAPES
@pytest.mark.parametrize("film", [False, True], ids=["plain", "film"])
def test_norm_act(shape, dtype, film):
    b, c, groups, h, w = shape
    x = (2 * torch.randn(b, c, h, w) + 1).to(dtype)
    weight, bias = torch.randn(c), torch.randn(c)
    scale, shift = (torch.randn(b, c), torch.randn(b, c)) if film else (None, None)
    expected = affine(normalised(wide(x), groups), weight, bias)
    if film:
        expected = expected * (1 + wide(scale)[..., None, None]) + wide(shift)[..., None, None]
    for act in (False, True):
        y = norm_act(x, groups, weight, bias, scale, shift, act=act)
        assert y.dtype == dtype
        assert_near(y, expected * sigmoid(expected) if act else expected, TOLERANCES[dtype])


def test_norm_act_keeps_statistics_wide():
    """Means of thousands over narrow numbers: sums in their own dtype would lose the difference."""
    x = (300 + torch.randn(1, 8, 40, 32)).to(torch.float16)
    y = norm_act(x, 2, torch.ones(8), torch.zeros(8), act=False)
    assert_near(y, normalised(wide(x), 2), TOLERANCES[torch.float16])


@DTYPES
@SHAPES
def test_tap_norm(shape, dtype):
    b, c, groups, h, w = shape
    feature, gradient = torch.randn(b, c, h, w).to(dtype), torch.randn(b, c, h, w)
    # the magnitudes that the taps of different noise levels have
    gradient = (gradient * torch.logspace(-4, 1, b)[:, None, None, None]).to(dtype)
    parameters = [torch.randn(c) for _ in range(4)]
    f, g, log_rms = tap_norm(feature, gradient, groups, *parameters)
    assert (f.dtype, g.dtype, log_rms.dtype) == (dtype, dtype, torch.float32)
    rms = np.sqrt(np.square(wide(gradient)).mean(axis=(1, 2, 3)))
    scaled = wide(gradient) / rms[:, None, None, None]
    assert_near(f, affine(normalised(wide(feature), groups), *parameters[:2]), TOLERANCES[dtype])
    assert_near(g, affine(normalised(scaled, groups), *parameters[2:]), TOLERANCES[dtype])
    assert_near(log_rms, np.log(rms), 1e-5)


@pytest.mark.parametrize("size", [1e-25, 1e-18, 1e18, 1e25])
def test_gradients_of_any_magnitude_keep_their_shape(size):
    """Squares of these leave fp32 on either side; the normalised tap must not notice."""
    feature, gradient = torch.randn(2, 8, 5, 4), torch.randn(2, 8, 5, 4)
    ones, zeros = torch.ones(8), torch.zeros(8)
    _, expected, log_rms = tap_norm(feature, gradient, 4, ones, zeros, ones, zeros)
    _, actual, tiny = tap_norm(feature, gradient * size, 4, ones, zeros, ones, zeros)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiny, log_rms + math.log(size), rtol=1e-5, atol=1e-4)


def test_vanished_gradients_stay_finite():
    """A tap without any gradient: the bias is all there is to say, and training goes on."""
    feature = torch.randn(3, 8, 4, 4, requires_grad=True)
    gradient = torch.randn(3, 8, 4, 4)
    gradient[1] = 0
    parameters = [torch.randn(8, requires_grad=True) for _ in range(4)]
    f, g, log_rms = tap_norm(feature, gradient, 4, *parameters)
    (f.sum() + g.square().sum() + log_rms.sum()).backward()
    bias = parameters[3].detach()[:, None, None].expand(8, 4, 4)
    torch.testing.assert_close(g[1].detach(), bias)
    for t in (f, g, log_rms, feature.grad, *(p.grad for p in parameters)):
        assert t.isfinite().all()


def test_tap_norm_backward_on_frozen_channels_last_taps():
    """torch 2.11's group_norm crashes in backward here when given the affine parameters itself."""
    feature, gradient = (
        torch.randn(4, 16, 10, 8).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    parameters = [torch.randn(16, requires_grad=True) for _ in range(4)]
    f, g, _ = tap_norm(feature, gradient, 4, *parameters)
    (f.square().sum() + g.square().sum()).backward()
    channels_last = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    f, g, _ = tap_norm(feature.contiguous(), gradient.contiguous(), 4, *parameters)
    (f.square().sum() + g.square().sum()).backward()
    for a, p in zip(channels_last, parameters, strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-3)


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, spatial: bool) -> np.ndarray:
    """Attention by loops over samples, heads and positions."""
    q, k, v = wide(q), wide(k), wide(v)
    (b, _, n), taps, d = q.shape, k.shape[1], q.shape[1] // heads
    out = np.zeros_like(q)
    for i in range(b):
        for head in range(heads):
            rows = slice(head * d, (head + 1) * d)
            for at in range(n):
                places = range(n) if spatial else [at]
                tokens = [(t, j) for t in range(taps) for j in places]
                logits = np.array([q[i, rows, at] @ k[i, t, rows, j] for t, j in tokens])
                weights = np.exp((logits - logits.max()) / math.sqrt(d))
                weights /= weights.sum()
                for weight, (t, j) in zip(weights, tokens, strict=True):
                    out[i, rows, at] += weight * v[i, t, rows, j]
    return out


@DTYPES
@pytest.mark.parametrize("spatial", [False, True], ids=["own-position", "all-positions"])
@pytest.mark.parametrize(
    "shape", [(2, 2, 8, 2, 12), (1, 1, 6, 3, 7), (2, 3, 5, 1, 1), (1, 2, 4, 4, 9)]
)
def test_tap_fuse(shape, spatial, dtype):
    b, taps, c, heads, n = shape
    q = torch.randn(b, c, n).to(dtype)
    k, v = (torch.randn(b, taps, c, n).to(dtype) for _ in range(2))
    out = tap_fuse(q, k, v, heads, spatial)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert_near(out, attended(q, k, v, heads, spatial), TOLERANCES[dtype])


@pytest.mark.parametrize("spatial", [False, True])
def test_tap_fuse_of_large_logits_stays_finite(spatial):
    q, k, v = torch.randn(1, 8, 6), torch.randn(1, 2, 8, 6), torch.randn(1, 2, 8, 6)
    out = tap_fuse(1e3 * q, 1e3 * k, v, 2, spatial)
    assert_near(out, attended(1e3 * q, 1e3 * k, v, 2, spatial), 1e-4)


@pytest.mark.parametrize("floor", [1e-20, 1e-3])
def test_sample_rms(floor):
    x = torch.randn(4, 3, 5, 7)
    x[2] = 0
    expected = np.sqrt(np.square(wide(x)).mean(axis=(1, 2, 3)))
    expected[2] = floor
    assert sample_rms(x.bfloat16()).dtype == torch.float32
    np.testing.assert_allclose(sample_rms(x, floor).numpy(), expected, rtol=1e-6)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("act", [False, True])
def test_gradients_of_norm_act(act, monkeypatch):
    keep_double(monkeypatch)
    x, weight, bias, scale, shift = leaves((2, 4, 3, 2), (4,), (4,), (2, 4), (2, 4))
    assert torch.autograd.gradcheck(
        lambda *a: norm_act(a[0], 2, *a[1:], act=act), (x, weight, bias, scale, shift)
    )


def test_gradients_of_tap_norm(monkeypatch):
    keep_double(monkeypatch)
    shapes = [(2, 4, 3, 2)] * 2 + [(4,)] * 4
    assert torch.autograd.gradcheck(lambda f, g, *p: tap_norm(f, g, 2, *p), leaves(*shapes))


@pytest.mark.parametrize("spatial", [False, True])
def test_gradients_of_tap_fuse(spatial, monkeypatch):
    keep_double(monkeypatch)
    q, k, v = leaves((2, 4, 3), (2, 2, 4, 3), (2, 2, 4, 3))
    assert torch.autograd.gradcheck(lambda *a: tap_fuse(*a, 2, spatial), (q, k, v))
