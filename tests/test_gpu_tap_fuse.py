"""The Triton kernels of tap_fuse against the reference and its derivatives."""

import pytest
import torch
from interpreter import DEVICE, DTYPES, TOLERANCES, activation, assert_near, name, poison

# isort: split
from fastscore_kernels import reference
from fastscore_kernels.gpu.launch import parameters
from fastscore_kernels.gpu.tap_fuse import tap_fuse, tap_fuse_backward

# batch, channels, heads, height, width: head widths 5 and 20, heads 3, one position, one head
SHAPES = [(2, 10, 2, 5, 3), (1, 60, 3, 5, 4), (3, 8, 4, 1, 1), (1, 16, 1, 3, 7)]
SPATIAL = pytest.mark.parametrize("spatial", [False, True], ids=["own", "all"])


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def taps(shape, dtype, second, last=True):
    b, c, _, h, w = shape
    q = activation(b, c, h, w, dtype=dtype, last=last)
    both = [activation(b, 2 * c, h, w, dtype=dtype, last=last) for _ in range(2)]
    return q, both[0], both[1] if second else None


def check(shape, dtype, second, spatial, last=True):
    heads = shape[2]
    tensors = taps(shape, dtype, second, last)
    given = [t for t in tensors if t is not None]
    leaves = [t.detach().float().requires_grad_() for t in given]
    expected = reference.tap_fuse(*leaves, *[None] * (3 - len(leaves)), heads, spatial)
    grad = activation(*expected.shape, dtype=dtype, last=last)
    pulled = torch.autograd.grad(expected, leaves, grad.float(), allow_unused=True)
    way, blocks = ("all", {"block_n": 16}) if spatial else ("own", {"block_r": 8})
    with parameters(f"tap_fuse_{way}", **blocks):
        out = tap_fuse(*tensors, heads, spatial)
    assert (out.dtype, out.stride()) == (dtype, tensors[0].stride())
    # weights and logits' cotangents are rounded to the dtype before they meet a tensor core
    assert_near(out, expected, 2 * TOLERANCES[dtype])
    with parameters(f"tap_fuse_backward_{way}", **blocks):
        gradients = tap_fuse_backward(grad, *tensors, heads, spatial)
    assert second or gradients[2] is None
    for actual, t, e in zip(gradients, given, pulled, strict=False):
        assert (actual.dtype, actual.stride()) == (dtype, t.stride())
        assert_near(actual, torch.zeros_like(t) if e is None else e, 3 * TOLERANCES[dtype])


@SPATIAL
@pytest.mark.parametrize("shape", SHAPES)
def test_two_taps(shape, spatial):
    check(shape, torch.float32, True, spatial)


@SPATIAL
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name)
def test_narrow_taps(dtype, spatial):
    check(SHAPES[0], dtype, True, spatial, last=False)


@SPATIAL
def test_one_tap(spatial):
    check(SHAPES[0], torch.float32, False, spatial)


@SPATIAL
def test_large_logits_stay_finite(spatial):
    q, first, second = taps((1, 8, 2, 3, 3), torch.float32, True)
    given = (100 * q, 100 * first, 100 * second, 2, spatial)
    assert_near(tap_fuse(*given), reference.tap_fuse(*given), 1e-4)
    grad = torch.randn_like(q).to(DEVICE)
    assert all(t.isfinite().all() for t in tap_fuse_backward(grad, *given))
