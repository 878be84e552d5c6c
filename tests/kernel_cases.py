"""What the tests of the operations share: tolerances, shapes, oracles in float64 numpy."""

import fastscore_kernels
import numpy as np
import pytest
import torch
from torch import Tensor

# Statistics are fp32, so an fp32 result carries some roundings of 2^-24 each, and a narrow one its
# own last rounding besides: 2^-8 for bf16 and 2^-11 for fp16, relative, twice for the output and
# an intermediate of the same width.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d).removeprefix("torch."))
LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
# batch, channels, groups, height, width: even, odd, one position a group, one channel a group, and
# channel counts that fit no vector
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        (2, 16, 4, 8, 6),
        (3, 12, 4, 5, 7),
        (1, 8, 4, 1, 1),
        (2, 6, 6, 3, 1),
        (1, 9, 1, 1, 63),
        (2, 80, 8, 5, 3),
        (1, 208, 8, 9, 4),
    ],
    ids=str,
)


def native_or_skip() -> str:
    """The backend's name, where the library has been built."""
    if "native" not in fastscore_kernels.available():
        pytest.skip("the native kernels have not been built: no C++ compiler at installation")
    return "native"


def wide(t: Tensor) -> np.ndarray:
    return t.detach().double().numpy()


def assert_near(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    error = np.abs(wide(actual) - expected)
    assert error.max() <= tolerance * max(1.0, np.abs(expected).max()), error.max()


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Shape, dtype and strides as expected, numbers near."""
    assert (actual.shape, actual.dtype, actual.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    )
    assert_near(actual, wide(expected), tolerance)


def normalised(x: np.ndarray, groups: int, eps: float = 1e-5) -> np.ndarray:
    y = x.reshape(x.shape[0], groups, -1)
    y = (y - y.mean(axis=2, keepdims=True)) / np.sqrt(y.var(axis=2, keepdims=True) + eps)
    return y.reshape(x.shape)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def affine(x: np.ndarray, weight: Tensor, bias: Tensor) -> np.ndarray:
    return x * wide(weight)[:, None, None] + wide(bias)[:, None, None]


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
