"""What a figure was taken on: commit, versions, machine, its clocks and heat, and its other work.

What the machine does not tell is None, or {"none": reason}; nothing is guessed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastscore.measure.nvml import HARMLESS, Gpu, NvmlError

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = Path("/sys/devices/system/cpu")
ZONES = Path("/sys/class/thermal")
PACKAGES = (
    "fastscore",
    "torch",
    "torchaudio",
    "triton",
    "numpy",
    "nvidia-ml-py",
    "pytest-benchmark",
)
# zones of a processor; others are batteries, disks, radios
_PROCESSOR_ZONES = ("x86_pkg_temp", "cpu-thermal", "cpu_thermal", "soc_thermal")

Plain = dict[str, Any]


def git(*arguments: str) -> str | None:
    """Output of a git command in the project, None where it is no repository, as when installed."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def commit() -> Plain:
    """Commit of the project and whether tracked files differ from it.

    A copy without its repository cannot tell: $FASTSCORE_COMMIT says it there, `git describe
    --always --dirty --abbrev=40` of where it was copied from.
    """
    changed = git("status", "--porcelain", "--untracked-files=no")
    if changed is None:
        told, mark, _ = os.environ.get("FASTSCORE_COMMIT", "").partition("-dirty")
        return {"id": told or None, "dirty": None if not told else bool(mark)}
    return {"id": git("rev-parse", "HEAD"), "dirty": bool(changed)}


def versions() -> dict[str, str | None]:
    """Installed versions of what decides the speed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def processor() -> Plain:
    """Model and the vector extensions that matter here, and the cores this process may use."""
    text = _read(Path("/proc/cpuinfo")) or ""
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in text.splitlines() if ":" in line
    )
    flags = fields.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "model": fields.get("model name") or platform.processor(),
        "extensions": [flag for flag in wanted if flag in flags],
        "cores": cores(),
    }


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_state() -> Plain:
    """Governor, clock in MHz over the cores (least, mean, most allowed), heat in degrees Celsius.

    ``throttled`` counts how often the cores slowed down for heat since the machine was started.
    """
    each = sorted(SYSTEM.glob("cpu[0-9]*"))
    clocks = _numbers([core / "cpufreq" / "scaling_cur_freq" for core in each])
    limits = _numbers([core / "cpufreq" / "cpuinfo_max_freq" for core in each])
    governors = {_read(core / "cpufreq" / "scaling_governor") for core in each} - {None}
    throttled = _numbers([core / "thermal_throttle" / "core_throttle_count" for core in each])
    return {
        "governor": ", ".join(sorted(map(str, governors))) or None,
        "mhz": {"least": min(clocks) / 1e3, "mean": sum(clocks) / len(clocks) / 1e3}
        | {"limit": max(limits) / 1e3 if limits else None}
        if clocks
        else None,
        "celsius": _heat(),
        "throttled": sum(throttled) if throttled else None,
    }


def machine(device: torch.device) -> Plain:
    """Everything known about the machine at this moment, JSON-ready."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            **_gpu_state(device),
        }
    return {
        "versions": versions(),
        "commit": commit(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor() | processor_state(),
        "device": str(device),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        # other work on the machine makes timings worthless; here it shows
        "load": _load(),
    }


class Watch:
    """The machine from the beginning of a run to its end: what `machine` says, kept up to date.

    ``record`` is what a result file holds. `sample`, called between rows, adds what has been seen
    since to ``record["seen"]`` and ``record["warnings"]``.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.record = machine(device) | {"load_after": None, "seen": [], "warnings": []}
        self._heat = self._heat_counts(self.record["processor"], self.record["gpu"])
        self._warn_busy(self.record["load"], 0.5 * cores(), "at the start")
        self._warn_gpu(self.record["gpu"], "at the start")

    @property
    def warnings(self) -> list[str]:
        """What makes the figures doubtful, a sentence each."""
        return self.record["warnings"]

    def sample(self, place: str) -> None:
        """Look at clocks, heat, throttling, load and others on the GPU; ``place`` says when."""
        state = processor_state()
        seen: Plain = {"at": place, "load": _load()}
        seen |= {key: state[key] for key in ("mhz", "celsius", "throttled")}
        if self._device.type == "cuda":
            seen |= {"gpu": _gpu_state(self._device)}
            self._warn_gpu(seen["gpu"], place)
        heat = self._heat_counts(state, seen.get("gpu"))
        for name, count in heat.items():
            if count > self._heat.get(name, count):
                self._warn(f"the {name} slowed down for heat, seen {place}")
        self._heat |= heat
        self.record["seen"].append(seen)

    def end(self) -> None:
        """Note the load at the end, which this run's own threads are part of."""
        self.record["load_after"] = _load()
        self._warn_busy(self.record["load_after"], cores(), "at the end")

    @staticmethod
    def _heat_counts(state: Plain, gpu: Plain | None) -> dict[str, float]:
        """Counters that grow while heat slows a part of the machine down; those there are."""
        hot = None if gpu is None else gpu["state"].get("hot_seconds")
        found = {"processor": state["throttled"], "GPU": hot}
        return {name: count for name, count in found.items() if count is not None}

    def _warn_busy(self, load: list[float] | None, limit: float, place: str) -> None:
        if load is not None and load[0] > limit:
            self._warn(
                f"the machine was busy {place}: load {load[0]:.1f} on {cores()} cores; these "
                "timings mean little"
            )

    def _warn_gpu(self, gpu: Plain | None, place: str) -> None:
        if gpu is None:
            return
        state = gpu["state"]
        if "none" in state:
            self._warn(f"clocks, heat and other work of the GPU are unknown: {state['none']}")
            return
        if state["processes"]:
            others = ", ".join(str(p["pid"]) for p in state["processes"])
            self._warn(f"another process was on the GPU {place}: {others}")
        slowed = [r for r in state["throttle"] or () if r not in HARMLESS]
        if slowed:
            self._warn(f"the GPU slowed down, seen {place}: {', '.join(slowed)}")

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)


def _gpu_state(device: torch.device) -> Plain:
    """Driver, clocks, heat, throttle reasons and other processes; none, and why, without NVML."""
    try:
        with Gpu(device) as gpu:
            return {"state": gpu.state()}
    except NvmlError as error:
        return {"state": {"none": str(error)}}


def _load() -> list[float] | None:
    try:
        return list(os.getloadavg())
    except (AttributeError, OSError):  # Windows
        return None


def _heat() -> float | None:
    """The hottest of the processor's sensors."""
    zones = [z for z in ZONES.glob("thermal_zone*") if _read(z / "type") in _PROCESSOR_ZONES]
    found = _numbers([zone / "temp" for zone in zones])
    return max(found) / 1e3 if found else None


def _numbers(paths: list[Path]) -> list[int]:
    """Those that can be read and are numbers."""
    texts = [_read(path) for path in paths]
    return [int(text) for text in texts if text is not None and text.lstrip("-").isdigit()]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
