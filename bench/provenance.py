"""What a timing was taken on: versions, machine, threads, load, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fastscore", "torch", "torchaudio", "triton", "numpy", "pytest-benchmark")


def git(*arguments: str) -> str | None:
    """Output of a git command in the project, None outside a repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def commit() -> dict[str, Any]:
    """Commit of the project and whether tracked files differ from it."""
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"id": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def versions() -> dict[str, str | None]:
    """Installed versions of what decides the speed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def processor() -> dict[str, Any]:
    """Model and the vector extensions that matter here, and the cores this process may use."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in text.splitlines() if ":" in line
    )
    flags = fields.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return {
        "model": fields.get("model name") or platform.processor(),
        "extensions": [flag for flag in wanted if flag in flags],
        "cores": len(cores),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Everything known about the machine at this moment, JSON-ready."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return {
        "versions": versions(),
        "commit": commit(),
        "processor": processor(),
        "device": str(device),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        # other work on the machine makes timings worthless; here it shows
        "load": list(os.getloadavg()),
    }
