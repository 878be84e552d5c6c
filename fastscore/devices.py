"""Devices a pipeline runs on, and timing on them."""

from __future__ import annotations

import time

import torch

# samples computed at once unless told otherwise: one at a time is heard soonest on a CPU
BATCH_SIZES = {"cpu": 1, "cuda": 16}


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
