"""Which implementation runs an operation: ``reference``, ``native`` (CPU) or ``triton`` (GPU)."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
from fastscore_kernels import library
from torch import Tensor

BACKENDS = ("reference", "native", "triton")
# what "auto" takes on a GPU: the Triton kernels have been interpreted and compiled, but no GPU has
# run them yet (bench/results/STATUS.md)
AUTO_ON_CUDA = "reference"


def available(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Backends that can run on tensors of a device, here and now."""
    kind = torch.device(device).type
    return tuple(name for name in BACKENDS if not _obstacle(name, kind))


_REGISTRARS: dict[str, list[Callable[[], None]]] = {}


def provide(backend: str, register: Callable[[], None]) -> None:
    """Have ``register`` called once, before a backend is first used."""
    _REGISTRARS.setdefault(backend, []).append(register)


def resolve(backend: str | None, device_type: str) -> str:
    """Name of the backend that runs tensors of a device type, decided once a process.

    None and "auto" take what the environment variable FASTSCORE_BACKEND names or, without it,
    ``native`` on a CPU where the library has been built, ``reference`` elsewhere. ValueError when
    a backend is unknown, or named and not there; it says how to get it.
    """
    return _resolve(backend, device_type)


# a compiler takes the answer as it is and does not look into it: torch.compiler's
# assume_constant_result, without the import of the whole compiler
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _resolve(backend: str | None, device_type: str) -> str:
    if backend in (None, "auto"):
        # nothing is computed there: shapes and costs only
        if device_type == "meta":
            return "reference"
        backend = os.environ.get("FASTSCORE_BACKEND", "auto")
    if backend == "auto":
        if device_type == "cuda":
            return _registered(AUTO_ON_CUDA)
        return "reference" if _obstacle("native", device_type) else _registered("native")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose {', '.join(BACKENDS)} or auto")
    obstacle = _obstacle(backend, device_type)
    if obstacle:
        raise ValueError(f"backend {backend} cannot run here: {obstacle}")
    return _registered(backend)


def _registered(backend: str) -> str:
    for register in _REGISTRARS.pop(backend, []):
        register()
    return backend


def choose(backend: str | None, x: Tensor) -> str:
    """`resolve` for a tensor: float64, the yardstick of the others, is the reference's alone."""
    if x.dtype is torch.float64:
        if backend not in (None, "auto", "reference"):
            raise ValueError(
                f"backend {backend} computes in float32, bfloat16 or float16 and the tensors are "
                "float64; use reference"
            )
        return "reference"
    return resolve(backend, x.device.type)


def _obstacle(backend: str, device_type: str) -> str:
    """Why a backend cannot run on a device type, and the remedy; "" if it can."""
    if backend == "native":
        if device_type != "cpu":
            return (
                f"it runs on the cpu and the tensors are on {device_type}; use triton or reference"
            )
        return library.problem()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed; it comes with PyTorch on Linux: pip install triton"
        if device_type == "cpu" and not interpreting():
            return (
                "it runs on a GPU and the tensors are on the cpu; use native or reference, or set "
                "TRITON_INTERPRET=1 before Python starts to interpret the kernels, slowly"
            )
        if device_type not in ("cpu", "cuda"):
            return f"it runs on cuda and the tensors are on {device_type}; use reference"
    return ""


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels are interpreted on CPU tensors (TRITON_INTERPRET=1)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
