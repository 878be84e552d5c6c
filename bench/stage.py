"""What the scripts of the GPU campaign share: a result that is whole after every row, and goes on.

    with Stage.open("ops", args) as stage:
        for name in names:
            if stage.wants(name):
                stage.add(name, {"seconds": ..})

A stage has a time to end by (--minutes); rows that no time is left for are missing, and the same
command goes on with them, since rows that the file holds already for the same commit are kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from fastscore.files import write_bytes
from fastscore.measure.provenance import Watch, commit

FORMAT, VERSION = "fastscore-stage", 1
DEVICES = ("cpu", "cuda")


def parser(description: str, minutes: float = 9.0) -> argparse.ArgumentParser:
    """Arguments that every stage takes."""
    found = argparse.ArgumentParser(description=description.splitlines()[0])
    found.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON of the stage")
    found.add_argument("--device", choices=DEVICES, default="cuda")
    found.add_argument("--minutes", type=float, default=minutes, help="to end by (%(default)s)")
    found.add_argument(
        "--dry", action="store_true", help="smallest sizes and few rounds: does it run, here?"
    )
    return found


class Stage:
    """One stage's result file.

    ``rows`` by name; ``status`` is "partial" until `finish`, "failed" where a row's own "failed" or
    an exception says so. ValueError where the file is not one, or where the device is not there.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no GPU here; use --device cpu --dry")
        self.name, self.path = name, args.out
        self.device = torch.device(args.device)
        self._until = time.monotonic() + 60 * args.minutes
        self._watch = Watch(self.device)
        self.values: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "stage": name,
            "dry": args.dry,
            "status": "partial",
            "command": _command(sys.argv),
            "provenance": self._watch.record,
            "rows": self._kept(args.dry),
        }

    @classmethod
    def open(cls, name: str, args: argparse.Namespace) -> Self:
        """A stage that goes on with what its file holds."""
        return cls(name, args)

    @property
    def rows(self) -> dict[str, Any]:
        """Rows so far."""
        return self.values["rows"]

    @property
    def seconds_left(self) -> float:
        """Until the time to end by."""
        return self._until - time.monotonic()

    def wants(self, row: str, seconds: float = 0.0) -> bool:
        """Whether a row is missing and there is time for one that takes about so long."""
        return row not in self.rows and self.seconds_left > seconds

    def add(self, row: str, figures: dict[str, Any]) -> None:
        """Keep a row; it is on the disk when this returns."""
        self.rows[row] = figures
        self._write()

    def measure(
        self, row: str, run: Callable[[], dict[str, Any]], seconds: float = 0.0
    ) -> dict[str, Any] | None:
        """Measure a row that is wanted and keep it; None where it is not, or no time is left.

        One that cannot run is kept as failed, and takes no other with it.
        """
        if not self.wants(row, seconds):
            return None
        try:
            self.add(row, run())
        # Triton's errors are of no common kind
        except Exception as error:
            self.add(row, {"failed": f"{type(error).__name__}: {str(error)[:500]}"})
        return self.rows[row]

    def finish(self, expected: int | None = None) -> None:
        """Say that all rows are there; fewer than ``expected`` leave the stage partial."""
        if expected is None or len(self.rows) >= expected:
            bad = any(isinstance(r, dict) and r.get("failed") for r in self.rows.values())
            self.values["status"] = "failed" if bad else "ok"
        self._watch.end()
        self._write()

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.values["status"] = "failed"
            lines = traceback.format_exception(kind, error, trace)
            self.values["error"] = "".join(lines)[-4000:]
            self._watch.end()
            self._write()

    def _kept(self, dry: bool) -> dict[str, Any]:
        """Rows of an earlier call, where it measured the same code."""
        found = read(self.path)
        if found is None:
            return {}
        same = found["provenance"]["commit"] == commit() and found["dry"] == dry
        return {k: r for k, r in found["rows"].items() if same and not r.get("failed")}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.values, indent=1, allow_nan=False) + "\n"
        write_bytes(self.path, text.encode())


def _command(words: Sequence[str]) -> str:
    """The call as it is to be repeated: where results went and when it had to end are left out."""
    kept, rest = ["python"], iter(words)
    for word in rest:
        if word in ("--out", "--minutes"):
            next(rest, None)
        else:
            kept.append(word)
    return shlex.join(kept)


def read(path: Path) -> dict[str, Any] | None:
    """A stage's file, None where there is none; ValueError where it is another kind of file."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        good = values["format"] == FORMAT and values["version"] == VERSION
        good = good and isinstance(values["rows"], dict) and "commit" in values["provenance"]
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{path} is not the result of a stage; remove it or choose another --out")
    return values


def mark_failed(path: Path, reason: str) -> None:
    """Say in a stage's file that its command failed; what has another format is left as it is."""
    try:
        values = read(path)
    except ValueError:
        return
    if values is not None:
        values["status"] = "failed"
        values.setdefault("error", reason)
        write_bytes(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
