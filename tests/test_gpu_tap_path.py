"""The Triton kernels of tap_path against its composition from reference operations."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, DTYPES, TOLERANCES, activation, assert_near, name, poison

# isort: split
from fastscore_kernels import reference
from fastscore_kernels.gpu.launch import DEVICES, parameters, record
from fastscore_kernels.gpu.tap_path import tap_path

# batch, tap channels, width, groups, heads, height, width; nothing a power of two, one position
SHAPES = [(2, 20, 18, 4, 2, 5, 7), (1, 6, 12, 2, 3, 1, 1), (1, 48, 8, 8, 1, 3, 6)]
SMALL = (1, 20, 18, 4, 2, 3, 5)
SPATIAL = pytest.mark.parametrize("spatial", [False, True], ids=["own", "all"])


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def arguments(shape, dtype, parameter_dtype, last=True):
    b, c, w, _, _, height, width = shape
    feature = activation(b, c, height, width, last=last) * 2 + 1
    gradient = activation(b, c, height, width, last=last) * 1e-3
    norms = [torch.randn(c) for _ in range(4)]
    sizes = ((w, c), (2 * w, c), (2 * w, c), (w, 2 * c), (w, w))
    weights = []
    for rows, columns in sizes:
        weights += [torch.randn(rows, columns, 1, 1) * columns**-0.5, torch.randn(rows)]
    taps = (feature.to(dtype), gradient.to(dtype))
    return *taps, *(t.to(DEVICE, parameter_dtype) for t in (*norms, *weights))


def composed(feature, gradient, *rest, groups, heads, spatial):
    norms, weights = rest[:4], [t.float() for t in rest[4:]]
    taps, log_rms = reference.tap_norm(feature, gradient, groups, *norms, 1e-5)
    taps = taps.float()
    f, g = taps.chunk(2, dim=1)
    q, first, second = (F.conv2d(t, *weights[2 * i : 2 * i + 2]) for i, t in enumerate((f, f, g)))
    fused = reference.tap_fuse(q, first, second, heads, spatial)
    return F.conv2d(taps, *weights[6:8]) + F.conv2d(fused, *weights[8:]), log_rms


def check(
    shape, dtype, spatial, parameter_dtype=torch.float32, last=True, op="tap_path_own", **chosen
):
    groups, heads = shape[3:5]
    given = arguments(shape, dtype, parameter_dtype, last)
    with parameters(op, **chosen):
        out, log_rms = tap_path(*given, groups, heads, spatial, 1e-5)
    expected, expected_log = composed(*given, groups=groups, heads=heads, spatial=spatial)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    # taps, and with all positions queries, keys, values and weights, are rounded on their way
    assert_near(out, expected, 4 * TOLERANCES[dtype])
    assert_near(log_rms, expected_log, 1e-6)


@SPATIAL
@pytest.mark.parametrize("shape", SHAPES)
def test_one_scale(shape, spatial):
    check(shape, torch.float32, spatial)


@SPATIAL
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name)
def test_narrow_taps(dtype, spatial):
    check(SMALL, dtype, spatial, parameter_dtype=dtype if spatial else torch.float32, last=False)


@SPATIAL
@pytest.mark.parametrize("known", [0, 1])
def test_moments_found_either_way(known, spatial):
    op = "tap_path_project" if spatial else "tap_path_own"
    chosen = {"known": known, "block_w": 16} if spatial else {"known": known}
    check(SMALL, torch.float32, spatial, op=op, **chosen)


@pytest.mark.parametrize(
    ("shape", "spatial", "count"),
    [
        ((1, 192, 144, 8, 4, 40, 32), False, 2),
        ((1, 208, 112, 8, 4, 20, 16), True, 2),
        ((1, 256, 112, 8, 4, 10, 8), True, 2),
        ((1, 32, 32, 8, 4, 40, 32), False, 1),
        ((1, 64, 80, 8, 4, 20, 16), False, 1),
        ((1, 128, 128, 8, 4, 10, 8), True, 2),
    ],
)
def test_few_launches_a_scale(shape, spatial, count):
    """A lone sample at the scales of the presets: at most two launches."""
    given = arguments(shape, torch.bfloat16, torch.bfloat16)
    with record(DEVICES["sm_90"]) as launches:
        tap_path(*given, *shape[3:5], spatial, 1e-5)
    assert len(launches) == count
