"""What a training cost: time, memory, energy and samples, accumulated over resumes."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastscore.files import write_bytes

_RAPL = Path("/sys/class/powercap")
_ACCUMULATED = ("wall_seconds", "validation_seconds", "cpu_seconds", "energy_joules")


class RunRecord:
    """Cost of a training so far: earlier sessions, as stored in the resume state, plus this one.

    Work done after the last stored state and lost in a crash is not counted. Energy is None, with
    the reason beside it, unless every session could read a counter.
    """

    def __init__(self, devices: list[torch.device], earlier: dict[str, Any] | None = None) -> None:
        self._earlier = earlier or {}
        self._devices = devices
        self._wall = time.perf_counter()
        self._cpu = time.process_time()
        self._validation = 0.0
        self._energy = EnergyCounter(devices)

    def poll(self) -> None:
        """Read the energy counters; often enough that they cannot wrap around unseen."""
        self._energy.poll()

    def add_validation(self, seconds: float) -> None:
        """Count time spent in validation and export; it is part of the wall time too."""
        self._validation += seconds

    def totals(self) -> dict[str, Any]:
        """Accumulated costs, JSON-ready; seconds, bytes and joules."""
        self.poll()
        now = {
            "wall_seconds": time.perf_counter() - self._wall,
            "validation_seconds": self._validation,
            "cpu_seconds": time.process_time() - self._cpu,
            "energy_joules": self._energy.joules,
        }
        totals: dict[str, Any] = {}
        for name in _ACCUMULATED:
            before = self._earlier.get(name, 0.0)
            known = before is not None and now[name] is not None
            totals[name] = before + now[name] if known else None
        totals["energy_source"] = self._energy.source
        if totals["energy_joules"] is None and self._energy.joules is not None:
            totals["energy_source"] = "none: an earlier session had no energy counter"
        peaks = {"peak_rss_bytes": peak_rss(), "peak_device_bytes": self._peak_device()}
        for name, peak in peaks.items():
            totals[name] = max(peak, self._earlier.get(name, 0))
        totals["sessions"] = self._earlier.get("sessions", 0) + 1
        return totals

    def _peak_device(self) -> int:
        cuda = [d for d in self._devices if d.type == "cuda"]
        return max((torch.cuda.max_memory_allocated(d) for d in cuda), default=0)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a run record as JSON, atomically; numbers that are not finite become null."""
    text = json.dumps(_finite(record), indent=2, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def device_name(device: torch.device) -> str:
    """Marketing name of a GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


def peak_rss() -> int:
    """Largest resident memory of this process since it started, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class EnergyCounter:
    """Joules since construction, from NVML (GPUs) or RAPL (CPU packages), else None with a reason.

    The counters cover whole devices, so other programs on the same machine are counted too.
    """

    def __init__(self, devices: list[torch.device], rapl: Path = _RAPL) -> None:
        self.joules: float | None = None
        self._readers: list[tuple[Callable[[], float], float]] = []
        gpus = [d for d in devices if d.type == "cuda"]
        try:
            self._readers = _nvml_readers(gpus) if gpus else _rapl_readers(rapl)
            self.source = "NVML total energy counter" if gpus else "RAPL package counters"
            self._last = [read() for read, _ in self._readers]
            self.joules = 0.0
        except (OSError, ImportError, RuntimeError) as error:
            self.source = f"none: {error}"

    def poll(self) -> None:
        """Add what was used since the last reading, allowing for one wrap of each counter."""
        if self.joules is None:
            return
        try:
            now = [read() for read, _ in self._readers]
        except (OSError, RuntimeError) as error:
            self.joules, self.source = None, f"none: {error}"
            return
        for new, old, (_, span) in zip(now, self._last, self._readers, strict=True):
            self.joules += new - old if new >= old else new - old + span
        self._last = now


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nvml_readers(devices: list[torch.device]) -> list[tuple[Callable[[], float], float]]:
    try:
        import pynvml
    except ImportError as error:
        raise ImportError("no NVML binding; pip install 'fastscore[bench]'") from error
    try:
        pynvml.nvmlInit()
        handles = []
        for device in devices:
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handles.append(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except pynvml.NVMLError as error:
        raise RuntimeError(f"NVML: {error}") from error

    def reader(handle: Any) -> Callable[[], float]:
        def read() -> float:
            try:
                return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            except pynvml.NVMLError as error:
                raise RuntimeError(f"NVML: {error}") from error

        return read

    return [(reader(handle), 0.0) for handle in handles]


def _rapl_readers(root: Path) -> list[tuple[Callable[[], float], float]]:
    # intel-rapl:N are packages (also on AMD); intel-rapl:N:M are parts of them
    zones = [
        z
        for z in sorted(root.glob("intel-rapl:*"))
        # psys, on laptops, holds the packages and more
        if z.name.count(":") == 1 and (z / "name").read_text().startswith("package")
    ]
    if not zones:
        raise OSError("no GPU and no RAPL counter on this machine")

    def reader(zone: Path) -> Callable[[], float]:
        return lambda: int((zone / "energy_uj").read_text()) / 1e6

    spans = [int((z / "max_energy_range_uj").read_text()) / 1e6 for z in zones]
    return [(reader(zone), span) for zone, span in zip(zones, spans, strict=True)]
