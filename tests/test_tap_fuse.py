"""tap_fuse and tap_path on the CPU backends: loops in float64, autograd, and large logits."""

import math

import numpy as np
import pytest
import torch
from fastscore_kernels import Norms, Projections, tap_fuse, tap_path
from kernel_cases import (
    DTYPES,
    LAYOUTS,
    TOLERANCES,
    assert_near,
    leaves,
    native_or_skip,
    wide,
)

SPATIAL = pytest.mark.parametrize("spatial", [False, True], ids=["own-position", "all-positions"])
# batch, taps, channels, heads, height, width
CASES = pytest.mark.parametrize(
    "shape",
    [(2, 2, 8, 2, 3, 4), (1, 1, 6, 3, 7, 1), (2, 2, 5, 1, 1, 1), (1, 2, 112, 4, 5, 3)],
    ids=str,
)


def attended(q, first, second, heads, spatial):
    """Attention by loops over samples, heads and positions."""
    (b, c, h, w), n, d = q.shape, q.shape[2] * q.shape[3], q.shape[1] // heads
    taps = [wide(t).reshape(b, 2, c, n) for t in (first, second) if t is not None]
    query = wide(q).reshape(b, c, n)
    out = np.zeros_like(query)
    for i in range(b):
        for head in range(heads):
            rows = slice(head * d, (head + 1) * d)
            for at in range(n):
                places = range(n) if spatial else [at]
                tokens = [tap[i, :, rows, j] for tap in taps for j in places]
                logits = np.array([query[i, rows, at] @ key for key, _ in tokens])
                weights = np.exp((logits - logits.max()) / math.sqrt(d))
                weights /= weights.sum()
                for weight, (_, value) in zip(weights, tokens, strict=True):
                    out[i, rows, at] += weight * value
    return out.reshape(b, c, h, w)


def tokens(shape, dtype, layout):
    b, taps, c, _, h, w = shape
    q, *kv = (
        torch.randn(b, size, h, w).to(dtype).contiguous(memory_format=layout)
        for size in (c, *[2 * c] * taps)
    )
    return q, kv[0], kv[1] if taps == 2 else None


@DTYPES
@CASES
@LAYOUTS
@SPATIAL
@pytest.mark.usefixtures("poisoned")
def test_forward_against_loops(shape, dtype, layout, spatial, backend):
    q, first, second = tokens(shape, dtype, layout)
    out = tap_fuse(q, first, second, shape[3], spatial, backend)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert_near(out, attended(q, first, second, shape[3], spatial), TOLERANCES[dtype])


@SPATIAL
def test_large_logits_stay_finite(spatial, backend):
    q, first, second = tokens((1, 2, 8, 2, 2, 3), torch.float32, torch.channels_last)
    q, first = 1e3 * q, first * torch.tensor([1e3, 1.0]).repeat_interleave(8)[:, None, None]
    out = tap_fuse(q, first, second, 2, spatial, backend)
    assert_near(out, attended(q, first, second, 2, spatial), 1e-4)


@SPATIAL
@LAYOUTS
@pytest.mark.parametrize("taps", [1, 2])
def test_gradients_of_all_inputs(spatial, layout, taps, backend):
    inputs = leaves((2, 6, 2, 3), *[(2, 12, 2, 3)] * taps)

    def run(q, first, second=None, backend=None):
        return tap_fuse(q, first, second, 2, spatial, backend)

    assert torch.autograd.gradcheck(run, inputs)
    cotangent = torch.randn(2, 6, 2, 3).double()
    expected = torch.autograd.grad(run(*inputs), inputs, cotangent)
    narrow = [t.detach().float().contiguous(memory_format=layout).requires_grad_() for t in inputs]
    actual = torch.autograd.grad(run(*narrow, backend=backend), narrow, cotangent.float())
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, wide(b), 1e-5)


@DTYPES
@SPATIAL
@pytest.mark.usefixtures("poisoned")
def test_native_backward_of_odd_heads_and_narrow_types(dtype, spatial):
    native_or_skip()
    q, first, second = tokens((2, 2, 112, 4, 5, 3), dtype, torch.channels_last)
    inputs = [t.requires_grad_() for t in (q, first, second)]
    cotangent = torch.randn_like(q)
    actual, expected = (
        torch.autograd.grad(tap_fuse(*inputs, 4, spatial, name), inputs, cotangent)
        for name in ("native", "reference")
    )
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        # the reference's own backward rounds intermediates to the narrow type as well
        assert_near(a, wide(b), 4 * TOLERANCES[dtype])


# batch, channels, width, groups, heads, height, width: as in the presets, and odd
PATHS = pytest.mark.parametrize(
    "shape",
    [(2, 32, 32, 8, 4, 8, 6), (1, 64, 80, 8, 4, 5, 7), (3, 24, 20, 4, 2, 3, 3)],
    ids=str,
)


def path(shape, dtype):
    b, c, width, groups, heads, h, w = shape
    feature, gradient = (
        torch.randn(b, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    norms = Norms(*(torch.randn(c).to(dtype) for _ in range(4)))
    sizes = [(width, c), (2 * width, c), (2 * width, c), (width, 2 * c), (width, width)]
    weights = []
    for rows, columns in sizes:
        weights += [torch.randn(rows, columns, 1, 1) / columns**0.5, torch.randn(rows)]
    projections = Projections(*(p.to(dtype) for p in weights))
    return feature, 1e-6 * gradient, norms, projections, groups, heads


@DTYPES
@PATHS
@SPATIAL
@pytest.mark.usefixtures("poisoned")
def test_path_equals_its_parts(shape, dtype, spatial):
    native_or_skip()
    arguments = (*path(shape, dtype), spatial)
    out, log_rms = tap_path(*arguments, backend="native")
    wide_arguments = [
        type(a)(*(t.float() for t in a)) if isinstance(a, tuple) else a for a in arguments
    ]
    wide_arguments[:2] = [t.float() for t in arguments[:2]]
    expected, expected_log = tap_path(*wide_arguments, backend="reference")
    assert (out.dtype, out.shape) == (dtype, expected.shape)
    assert out.is_contiguous(memory_format=torch.channels_last)
    # narrow types round the taps, the tokens and what is attended, each once
    assert_near(out, wide(expected), 4 * TOLERANCES[dtype])
    assert_near(log_rms, wide(expected_log), 1e-4)


def test_path_is_differentiable_where_asked_for(backend):
    feature, gradient, norms, projections, groups, heads = path(
        (2, 32, 32, 8, 4, 4, 3), torch.float32
    )
    p = Projections(*(t.requires_grad_() for t in projections))
    found = []
    for name in (backend, "reference"):
        out, _ = tap_path(feature, gradient, norms, p, groups, heads, True, backend=name)
        found.append(torch.autograd.grad(out.square().sum(), list(p)))
    for a, b in zip(*found, strict=True):
        assert_near(a, wide(b), 1e-4)


def test_bits_do_not_depend_on_batch_slot_or_threads():
    native_or_skip()
    *pair, norms, projections, groups, heads = path((5, 64, 80, 8, 4, 20, 16), torch.float32)
    rest = (norms, projections, groups, heads, True)
    together, log_rms = tap_path(*pair, *rest, backend="native")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for i in range(5):
                one = slice(i, i + 1)
                alone, its = tap_path(*(t[one] for t in pair), *rest, backend="native")
                assert torch.equal(alone[0], together[i])
                assert torch.equal(its[0], log_rms[i])
    finally:
        torch.set_num_threads(threads)
