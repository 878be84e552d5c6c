"""Triton's interpreter for tests of GPU kernels, to be imported before any module that has kernels.

Where there is a GPU the same tests run on it. Triton reads the switch when its functions are
decorated, its own library's included, so it must be set before triton is first imported.
"""

import os
import sys
from types import ModuleType

import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before its interpreter was switched on")
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding of the result and those of fp32 sums before it. The interpreter cuts bf16 instead of
# rounding it to nearest, which costs up to 2^-7 of a number, twice what a GPU loses.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-11}
DTYPES = tuple(TOLERANCES)


def used_by(module: ModuleType | None) -> bool:
    """Whether a module of tests takes its device from here, or what makes tensors on it."""
    own = {"DEVICE"} | {n for n, v in globals().items() if getattr(v, "__module__", "") == __name__}
    return any(vars(module).get(n) is globals()[n] for n in own) if module else False


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def poison(monkeypatch) -> None:
    """Fill what torch.empty and its kin allocate with NaN, so that every gap in a result shows."""
    for function in ("empty", "empty_like"):
        original = getattr(torch, function)

        def poisoned(*args, original=original, **kwargs):
            made = original(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, function, poisoned)


def activation(*shape: int, dtype=torch.float32, last: bool = True) -> torch.Tensor:
    """Random [B, C, H, W] in a layout."""
    x = torch.randn(shape).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest error within ``tolerance`` of the largest magnitude expected (at least 1)."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    bound = tolerance * max(1.0, expected.double().abs().max().item())
    # a NaN fails too
    assert (error <= bound).all(), f"{error.max().item()} > {bound}"
