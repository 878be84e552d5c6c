"""Several runs of the same code as one side of a comparison: a folder of result files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastscore.measure.results import ResultFile, Rounds, Row, Time, read_results

# of the provenance: what runs of one side must share
_SHARED = ("commit", "device", "threads", "versions")


def read_side(path: str | os.PathLike[str]) -> ResultFile:
    """A result file, or all those of a folder joined row by row.

    Raises ValueError, in a sentence, as `read_results` does, and for files of a folder that are of
    different suites, commits, versions, devices or numbers of threads, or that disagree on a row.
    """
    path = Path(path)
    if not path.is_dir():
        return read_results(path)
    paths = sorted(path.glob("*.json"))
    if not paths:
        raise ValueError(f"{path} has no result files; fastscore bench SUITE --out writes one")
    files = [read_results(p) for p in paths]
    for p, file in zip(paths[1:], files[1:], strict=True):
        _check_same(paths[0], files[0], p, file)
    first = files[0]
    names = dict.fromkeys(row.name for file in files for row in file.rows)
    rows = tuple(_joined(name, [file.row(name) for file in files], path) for name in names)
    return ResultFile(
        first.suite,
        first.command,
        all(file.finished for file in files),
        first.provenance | {"warnings": _warnings(paths, files)},
        rows,
        "; ".join(file.note for file in files if file.note),
    )


def _check_same(path: Path, first: ResultFile, other_path: Path, other: ResultFile) -> None:
    sides = [{key: file.provenance.get(key) for key in _SHARED} for file in (first, other)]
    for file, side in zip((first, other), sides, strict=True):
        side["suite"] = file.suite
    for key, value in sides[0].items():
        if sides[1][key] != value:
            raise ValueError(
                f"{path} and {other_path.name} are of different {key} ({value} and "
                f"{sides[1][key]}); give each side of the comparison a folder of its own"
            )


def _joined(name: str, found: Sequence[Row | None], folder: Path) -> Row:
    """One row of several files; one that is missing, failed or skipped in a file is so in all."""
    rows = [row for row in found if row is not None]
    for row in rows:
        if row.status != "ok":
            return row
    first = rows[0]
    if len(rows) < len(found):
        reason = f"in {len(rows)} of {len(found)} files"
        return Row(name, first.workload, "skipped", reason)
    if any(_plain(row.workload) != _plain(first.workload) for row in rows):
        raise ValueError(
            f"{folder} has files in which {name} is another workload; keep one of them"
        )
    timed = [row.rounds for row in rows if row.rounds is not None]
    if len(timed) < len(rows):
        return Row(name, first.workload, "ok", check=first.check)
    rounds = _pooled(timed)
    return Row(
        name, first.workload, "ok", "", first.check, rounds, Time.of(rounds.values), first.memory,
        first.energy, first.macs, first.bytes, first.bound,
    )  # fmt: skip


def _plain(workload: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in workload.items() if key != "command"}


def _pooled(parts: Sequence[Rounds]) -> Rounds:
    """Sittings of all, each as long as the shortest; first rounds, which warm up, are left out."""
    each = min(len(part.values) // part.sittings for part in parts)
    beside = all(part.reference is not None for part in parts)
    values: list[float] = []
    reference: list[float] = []
    for part in parts:
        size = len(part.values) // part.sittings
        for end in range(size, len(part.values) + 1, size):
            values += part.values[end - each : end]
            reference += part.reference[end - each : end] if part.reference and beside else ()
    count = sum(part.sittings for part in parts)
    return Rounds(tuple(values), tuple(reference) if beside else None, count, len(parts))


def _warnings(paths: Sequence[Path], files: Sequence[ResultFile]) -> list[str]:
    return [
        f"{path.name}: {warning}"
        for path, file in zip(paths, files, strict=True)
        for warning in file.provenance.get("warnings") or []
    ]
