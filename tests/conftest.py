"""Fixtures every test may use."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fastscore_kernels import cpu
from kernel_cases import native_or_skip
from torch import Tensor

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no recordings at {SHARED}")
    return SHARED


@pytest.fixture(params=["reference", "native"])
def backend(request) -> str:
    return native_or_skip() if request.param == "native" else request.param


@pytest.fixture
def poisoned(monkeypatch) -> None:
    """Every output begins as NaN: what a kernel leaves unwritten shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))

    class Poisoned:
        empty, empty_like = (
            staticmethod(poison(torch.empty)),
            staticmethod(poison(torch.empty_like)),
        )

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    monkeypatch.setattr(cpu, "torch", Poisoned())
