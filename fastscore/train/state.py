"""The resume state of a training: written whole, kept twice, read without executing anything."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastscore.checkpoint import first_difference
from fastscore.config import to_dict
from fastscore.files import atomic_write
from fastscore.train.task import LoopConfig, Task

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

    An unreadable newest state gives way to the one before it, with a warning, and is set aside as
    state.damaged.ckpt. Raises ValueError when no stored state is readable.
    """
    previous = previous_path(path)
    if not path.exists():
        return _of_this_version(_load(previous), previous) if previous.exists() else None
    try:
        return _of_this_version(_load(path), path)
    except UnreadableError as error:
        if not previous.exists():
            raise
        state = _of_this_version(_load(previous), previous)
        aside = path.with_name(f"{path.stem}.damaged{path.suffix}")
        warnings.warn(
            f"{error}; it is now {aside}, and {previous} resumes at step {state['step']}",
            stacklevel=2,
        )
        # it must not become the previous state when the next one is written
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, aside)
        return state


def identity(task: Task, config: LoopConfig, world_size: int) -> dict[str, Any]:
    """What must be equal for a stored training to be this one; ValueError unless JSON-ready."""
    try:
        task_config = json.loads(json.dumps(task.config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"config of task {task.name!r} is not JSON-ready: {error}") from error
    return {
        "task": task.name,
        "task_config": task_config,
        "loop": to_dict(config),
        "world_size": world_size,
    }


def check_state(state: dict[str, Any], expected: dict[str, Any], path: Path, extend: bool) -> None:
    """Raise ValueError naming the first setting in which a stored training differs from this one.

    ``expected`` is the ``identity`` of this one. Settings in FREE_SETTINGS may differ; ``steps``
    may only with ``extend``, because the learning-rate schedule depends on it.
    """
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


class UnreadableError(ValueError):
    """A stored state is damaged, or no stored state at all."""


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableError(
            f"{path} is not a readable training state ({first}); delete it to start over"
        ) from error


def _of_this_version(state: Any, path: Path) -> dict[str, Any]:
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a training state of fastscore")
    if state["version"] != _VERSION:
        raise ValueError(
            f"{path} has training-state version {state['version']}, this fastscore reads {_VERSION}"
        )
    return state
