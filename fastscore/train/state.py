"""The resume state of a training: written whole, kept twice, read without executing anything."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastscore.checkpoint import first_difference
from fastscore.files import atomic_write

_FORMAT = "fastscore training state"
_VERSION = 1
# what a resumed training may do differently; num_threads changes the order of floating-point sums,
# so equality to the bit holds for an equal number of threads only
FREE_SETTINGS = (
    "log_every",
    "validate_every",
    "checkpoint_minutes",
    "accelerator",
    "devices",
    "num_threads",
)


def previous_path(path: Path) -> Path:
    """Where the state before the last one lies: state.ckpt -> state.previous.ckpt."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state atomically; the one before it stays as ``previous_path(path)``."""
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            torch.save({"format": _FORMAT, "version": _VERSION, **state}, file)
        if path.exists():
            _keep(path)


def _keep(path: Path) -> None:
    """Make the present state the previous one; with links, ``path`` is there all the time."""
    previous = previous_path(path)
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:
        os.replace(path, previous)


def read_state(path: Path) -> dict[str, Any] | None:
    """Newest readable state at ``path``, or None when there is none at all.

    An unreadable newest state gives way, with a warning, to the one before it. Raises ValueError
    when no stored state is readable.
    """
    present = [p for p in (path, previous_path(path)) if p.exists()]
    errors = []
    for candidate in present:
        try:
            state = _load(candidate)
        except ValueError as error:
            errors.append(str(error))
            continue
        for error in errors:
            warnings.warn(
                f"{error}; resuming from {candidate} at step {state['step']}", stacklevel=2
            )
        return state
    if errors:
        raise ValueError(f"{errors[0]}; delete it to start over")
    return None


def check_state(state: dict[str, Any], expected: dict[str, Any], path: Path, extend: bool) -> None:
    """Raise ValueError naming the first setting in which a stored training differs from this one.

    ``expected`` holds "task", "task_config", "loop" and "world_size". Settings in FREE_SETTINGS may
    differ; ``steps`` may only with ``extend``, because the learning-rate schedule depends on it.
    """
    expected = json.loads(json.dumps(expected))
    for part in ("task", "task_config", "world_size", "loop"):
        stored, wanted = state[part], expected[part]
        if part == "loop":
            free = (*FREE_SETTINGS, "steps") if extend else FREE_SETTINGS
            stored = {k: v for k, v in stored.items() if k not in free}
            wanted = {k: v for k, v in wanted.items() if k not in free}
        difference = first_difference(stored, wanted, part)
        if difference is None:
            continue
        key, before, now = difference
        remedy = "use the same setting or another output folder"
        if key == "loop.steps":
            remedy = "the learning-rate schedule depends on it, so extending must be asked for"
        raise ValueError(f"cannot resume {path}: {key} was {before} and is now {now}; {remedy}")
    if expected["loop"]["steps"] < state["step"]:
        raise ValueError(
            f"cannot resume {path}: it is at step {state['step']}, beyond steps "
            f"{expected['loop']['steps']}; ask for more steps"
        )


def _load(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable training state ({first})") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a training state of fastscore")
    if state["version"] != _VERSION:
        raise ValueError(
            f"{path} has training-state version {state['version']}, this fastscore reads {_VERSION}"
        )
    return state
