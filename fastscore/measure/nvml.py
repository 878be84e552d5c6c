"""A GPU through NVML: clocks, heat, why it slows down, and who else is on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

# bits of the reasons why clocks are below what was asked for, as nvml.h has them
REASONS = {
    0x1: "idle",
    0x2: "clocks setting",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown by software",
    0x40: "thermal slowdown by hardware",
    0x80: "power brake",
    0x100: "display clocks",
}
# an idle GPU sleeps, and clocks that somebody set are no accident
HARMLESS = ("idle", "clocks setting", "display clocks")


class NvmlError(RuntimeError):
    """NVML does not tell; the message says why, and what to do."""


class Gpu:
    """The NVML handle of a CUDA device, as a context; NvmlError where there is none.

    It is found by its UUID, because CUDA_VISIBLE_DEVICES renumbers devices for PyTorch only.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml = _library()
        self._device = device
        self._handle: Any = None

    def __enter__(self) -> Gpu:
        nvml = self._nvml
        try:
            nvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError as error:
            raise NvmlError(_sentence(nvml, error)) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            # nothing is held that the end of the process does not free
            return

    def state(self) -> dict[str, Any]:
        """Driver, clocks in MHz, degrees Celsius, throttle reasons, other processes.

        ``hot_seconds``: how long heat has slowed it down since the driver was loaded. None where
        this GPU, or the permission, lacks a query.
        """
        nvml, handle = self._nvml, self._handle
        bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return {
            "driver": _text(self._ask("nvmlSystemGetDriverVersion")),
            "mhz": {
                "sm": self._ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
                "memory": self._ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
                "sm_limit": self._ask("nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM),
            },
            "celsius": self._ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
            "throttle": None if bits is None else reasons(bits),
            "hot_seconds": self._hot_seconds(),
            "processes": self._others(),
        }

    def _hot_seconds(self) -> float | None:
        policy = self._nvml.NVML_PERF_POLICY_THERMAL
        found = self._ask("nvmlDeviceGetViolationStatus", self._handle, policy)
        return None if found is None else found.violationTime / 1e9

    def _others(self) -> list[dict[str, Any]] | None:
        """Computing processes but this one: number and bytes."""
        found = self._ask("nvmlDeviceGetComputeRunningProcesses", self._handle)
        if found is None:
            return None
        others = [p for p in found if p.pid != os.getpid()]
        if others and len(others) == len(found) and torch.cuda.is_initialized():
            # in a container this process has another number outside: one of them is it
            others = others[1:]
        return [{"pid": p.pid, "bytes": p.usedGpuMemory} for p in others]

    def _ask(self, name: str, *arguments: Any) -> Any:
        query: Callable[..., Any] | None = getattr(self._nvml, name, None)
        if query is None:
            return None
        try:
            return query(*arguments)
        except self._nvml.NVMLError:
            return None


def reasons(bits: int) -> list[str]:
    """Names of the reasons in a mask; those without a name as numbers."""
    known = [name for bit, name in REASONS.items() if bits & bit]
    rest = bits & ~sum(REASONS)
    return known + ([f"reason {rest:#x}"] if rest else [])


def _library() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise NvmlError("nvidia-ml-py is not installed; pip install 'fastscore[bench]'") from error
    return pynvml


def _sentence(nvml: Any, error: Any) -> str:
    """Why NVML cannot be used, in words."""
    known = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "there is no NVML library here; it comes with the "
        "NVIDIA driver",
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
        nvml.NVML_ERROR_NO_PERMISSION: "NVML gives no permission to this user; ask for access to "
        "the device files, or run as one who has it",
        nvml.NVML_ERROR_NOT_FOUND: "NVML does not know this GPU; it may be a part of one (MIG)",
    }
    return known.get(error.value, f"NVML: {error}")


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
