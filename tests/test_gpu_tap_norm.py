"""The Triton kernels of tap_norm against the reference: values, layouts, any magnitude."""

import math

import pytest
import torch
from interpreter import DEVICE, DTYPES, TOLERANCES, activation, assert_near, name, poison

# isort: split
from fastscore_kernels import reference
from fastscore_kernels.gpu.launch import parameters
from fastscore_kernels.gpu.tap_norm import tap_norm

SHAPES = [(2, 16, 4, 5, 3), (3, 20, 2, 7, 5), (1, 8, 4, 1, 1), (2, 6, 6, 3, 1), (1, 9, 1, 1, 23)]
WAYS = {"one launch": {"splits": 1, "block_n": 8}, "stretches": {"splits": 3, "block_n": 8}}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def affine(c):
    return [torch.randn(c, device=DEVICE) for _ in range(4)]


def check(shape, dtype, way, last):
    b, c, groups, h, w = shape
    feature, gradient = (activation(b, c, h, w, last=last) for _ in range(2))
    feature = (3 * feature + 2).to(dtype)
    # the magnitudes that the taps of different noise levels have
    gradient = (gradient * torch.logspace(-4, 1, b, device=DEVICE)[:, None, None, None]).to(dtype)
    p = affine(c)
    with parameters("tap_norm", **WAYS[way]):
        taps, log_rms, stats = tap_norm(feature, gradient, groups, *p, 1e-5)
    expected, expected_log = reference.tap_norm(feature, gradient, groups, *p, 1e-5)
    assert taps.dtype == dtype
    assert taps.is_contiguous(memory_format=torch.channels_last)
    assert_near(taps, expected, TOLERANCES[dtype])
    assert_near(log_rms, expected_log, 1e-6)
    check_statistics(stats, feature, gradient, log_rms, groups)


def check_statistics(stats, feature, gradient, log_rms, groups):
    assert stats.shape == (feature.shape[0], groups, 4)
    for at, tap in ((0, feature), (2, gradient)):
        wide = tap.double().reshape(*stats.shape[:2], -1)
        eps = 1e-5 * (log_rms.double().exp() ** 2 if at else torch.ones_like(log_rms)).double()
        rstd = (wide.var(2, correction=0) + eps[:, None]).rsqrt()
        mean = wide.mean(2)
        assert ((stats[..., at] - mean) * rstd).abs().max() < 1e-5
        assert (stats[..., at + 1] / rstd - 1).abs().max() < 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_taps(shape, way):
    check(shape, torch.float32, way, last=shape[0] > 1)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name)
def test_narrow_taps(dtype):
    check(SHAPES[0], dtype, "one launch", last=False)
    check(SHAPES[1], dtype, "stretches", last=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_gradients_of_any_magnitude_keep_their_shape(size, way):
    """Squares of these leave fp32 on either side; the normalised tap must not notice."""
    feature, gradient = activation(1, 8, 5, 4), activation(1, 8, 5, 4)
    p = affine(8)
    with parameters("tap_norm", **WAYS[way]):
        taps, log_rms, stats = tap_norm(feature, gradient * size, 4, *p, 1e-5)
    expected, plain = reference.tap_norm(feature, gradient, 4, *p, 1e-5)
    assert_near(taps, expected, 1e-5)
    assert_near(log_rms, plain + math.log(size), 1e-6)
    check_statistics(stats, feature, gradient * size, log_rms, 4)


@pytest.mark.parametrize("way", WAYS)
def test_a_vanished_gradient_is_its_bias(way):
    feature, gradient = activation(2, 8, 5, 4), activation(2, 8, 5, 4)
    gradient[1] = 0
    p = affine(8)
    with parameters("tap_norm", **WAYS[way]):
        taps, log_rms, stats = tap_norm(feature, gradient, 4, *p, 1e-5)
    assert torch.equal(taps[1, 8:], p[3][:, None, None].expand(8, 5, 4))
    assert_near(log_rms[1], torch.tensor(1e-30).log(), 1e-6)
    assert stats.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_a_large_mean_costs_no_digits(way):
    feature, gradient = activation(1, 8, 5, 4) + 3000, activation(1, 8, 5, 4) + 3000
    ones, zeros = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    with parameters("tap_norm", **WAYS[way]):
        taps, _, _ = tap_norm(feature, gradient, 4, ones, zeros, ones, zeros, 1e-12)
    for tap, actual in ((feature, taps[:, :8]), (gradient, taps[:, 8:])):
        wide = tap.double().reshape(1, 4, -1)
        wide = (wide - wide.mean(2, keepdim=True)) / wide.std(2, correction=0, keepdim=True)
        assert_near(actual, wide.reshape(tap.shape), 2e-3)


def test_taps_of_different_layouts():
    feature, gradient = activation(2, 8, 5, 4), activation(2, 8, 5, 4, last=False)
    p = affine(8)
    taps, _, _ = tap_norm(feature, gradient, 4, *p, 1e-5)
    assert_near(taps, reference.tap_norm(feature, gradient, 4, *p, 1e-5)[0], 1e-5)
