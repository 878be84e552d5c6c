"""Devices a pipeline runs on, and timing on them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

# samples computed at once unless told otherwise: one at a time is heard soonest on a CPU
BATCH_SIZES = {"cpu": 1, "cuda": 16}


# what CUDA says of a device that will not come back; an error in a kernel takes the context with it
_LOST = ("device-side assert", "illegal memory access", "device is unavailable", "launch failure")
_LOST_TOO = ("unspecified launch", "uncorrectable ecc", "has fallen off the bus", "device lost")
_LOST_AS_WELL = ("misaligned address", "illegal instruction", "launch timed out", "nvlink error")
# what says that memory did not suffice: the CPU's allocator raises a plain RuntimeError, a compiler
# wraps what was raised while it ran, libraries and Triton have errors of their own
_NO_MEMORY = ("can't allocate memory", "cuda out of memory", "_alloc_failed")
_NO_MEMORY_EITHER = ("cuda error: out of memory", "[cuda]: out of memory")


class DeviceLostError(RuntimeError):
    """The device is gone for this process."""


def device_lost(error: BaseException) -> bool:
    """Whether an error says that the device cannot be used any more."""
    text = str(error).lower()
    return "cuda" in text and any(sign in text for sign in (*_LOST, *_LOST_TOO, *_LOST_AS_WELL))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory did not suffice."""
    said = str(error).lower()
    signs = (*_NO_MEMORY, *_NO_MEMORY_EITHER)
    return isinstance(error, torch.OutOfMemoryError) or any(sign in said for sign in signs)


def usable_device(device: str | torch.device) -> torch.device:
    """The device where it can be used; ValueError otherwise."""
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; use cpu, cuda or cuda:0") from None
    if device.type not in BATCH_SIZES:
        raise ValueError(f"device {str(device)!r} is not supported; use cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"device {str(device)!r} was asked for, but PyTorch sees {count} GPUs; use cpu or "
                "another"
            )
    return device


# floating-point types of the network's products: fp32 exact to rounding, tf32 of 10 bits on a GPU's
# tensor cores, bf16 of 8 bits with sums, statistics and the solver's state in fp32
PRECISIONS = ("fp32", "tf32", "bf16")


def check_precision(precision: str, device: torch.device) -> str:
    """``precision`` where ``device`` offers it; ValueError otherwise."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}"
        )
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision 'tf32' exists on CUDA devices, not on {device}; use 'fp32'")
    return precision


@contextlib.contextmanager
def fp32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Let products of fp32 numbers on a GPU use TF32, or not, which PyTorch decides by itself."""
    if device.type != "cuda":
        yield
        return
    kind = "tf32" if tf32 else "ieee"
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = kind
        yield
    finally:
        for switch, old in zip(switches, before, strict=True):
            switch.fp32_precision = old


@contextlib.contextmanager
def one_order(device: torch.device, wanted: bool) -> Iterator[None]:
    """Where ``wanted``, let cuDNN take no convolution that adds up in an order that varies."""
    if not wanted or device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


class Clock:
    """Seconds a stage, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._now()

    def lap(self) -> float:
        """Seconds since the start or the last lap."""
        before, self.start = self.start, self._now()
        return self.start - before

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
