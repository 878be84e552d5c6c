"""The result file of a benchmark run: what it holds, writing it row by row, reading it strictly.

JSON, one file a run, rewritten whole after every row, so that a run that is killed keeps its rows:
``finished`` is false until the last.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from fastscore.files import write_bytes

FORMAT, VERSION = "fastscore-bench", 1
STATUSES = ("ok", "failed", "skipped")
NOT_MEASURED = "not measured"

Plain = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """The gate before the timing: what the answer was compared with, its error and the limit."""

    against: str
    error: float
    limit: float


@dataclass(frozen=True)
class Rounds:
    """Seconds of one call, one a round, in the order they were taken.

    ``reference``: seconds of the fixed reference computation measured right beside each round.
    ``sittings``: the rounds are that many equal parts, each with operands built anew. Where they
    come to lie in memory can change a time by more than everything else does, and stays as it is
    for as long as they live. ``runs``: that many files were joined; 1 in a file.
    """

    values: tuple[float, ...]
    reference: tuple[float, ...] | None = None
    sittings: int = 1
    runs: int = 1
    unit: str = "s"

    @classmethod
    def joined(cls, parts: Sequence[Rounds]) -> Rounds:
        """Sittings as one; ValueError where they differ in rounds, or in having a reference."""
        if len({(len(part.values), part.reference is None) for part in parts}) != 1:
            raise ValueError("sittings of a row must have the same number of rounds each")
        values = tuple(v for part in parts for v in part.values)
        if parts[0].reference is None:
            return cls(values, None, len(parts))
        return cls(values, tuple(v for part in parts for v in part.reference or ()), len(parts))


@dataclass(frozen=True)
class Time:
    """Seconds of one call, over the rounds."""

    median: float
    p20: float
    p80: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Time:
        """Quantiles of seconds, interpolated between the nearest two."""
        return cls(statistics.median(values), *(quantile(values, q) for q in (0.2, 0.8, 0.99)))


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between the nearest two values; ValueError without values."""
    if not values:
        raise ValueError("there is no quantile of no values; measure at least one round")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def none(reason: str) -> Plain:
    """What stands in the place of a figure that there is not, with the reason."""
    return {"none": reason}


def _not_measured() -> Plain:
    return none(NOT_MEASURED)


@dataclass(frozen=True)
class Row:
    """One workload of a suite: measured ("ok"), with a wrong answer ("failed"), or "skipped".

    ``workload`` is its frozen description in plain values. ``memory``, ``energy`` and ``bound``
    (``name``, ``seconds``, ``share`` of the median) are figures by name or ``none(reason)``.
    """

    name: str
    workload: Plain
    status: str
    reason: str = ""
    check: Check | None = None
    rounds: Rounds | None = None
    time: Time | None = None
    memory: Plain = field(default_factory=_not_measured)
    energy: Plain = field(default_factory=_not_measured)
    macs: int | None = None
    bytes: int | None = None
    bound: Plain = field(default_factory=_not_measured)


@dataclass(frozen=True)
class ResultFile:
    """What a result file holds; ``note`` says so where the run did not get to its end."""

    suite: str
    command: str
    finished: bool
    provenance: Plain
    rows: tuple[Row, ...]
    note: str = ""

    def row(self, name: str) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if row.name == name), None)


class Results:
    """Writes a result file, whole after every row; ValueError where that cannot be done."""

    def __init__(self, path: Path, suite: str, command: str, provenance: Plain) -> None:
        self.path = path
        self._head = {"suite": suite, "command": command}
        self._provenance = provenance
        self._rows: list[Row] = []
        self._finished = False

    @classmethod
    def start(
        cls, path: str | os.PathLike[str], suite: str, command: str, provenance: Plain
    ) -> Results:
        """Write a file without rows, unfinished; in the place of an older one of that name."""
        results = cls(Path(path), suite, command, provenance)
        results._write()
        return results

    @property
    def rows(self) -> tuple[Row, ...]:
        """Rows written so far."""
        return tuple(self._rows)

    def add(self, row: Row) -> None:
        """Add a row and write the file; ValueError for a row that a reader would refuse."""
        if self._finished:
            raise ValueError(f"{self.path} is finished; row {row.name!r} needs a file of its own")
        # written what can be read, or not at all
        names = {r.name for r in self._rows}
        _Reader(str(self.path)).row(json.loads(_json(_row_fields(row), row.name)), names)
        self._rows.append(row)
        self._write()

    def finish(self) -> ResultFile:
        """Mark the run as complete, and give back what a reader of the file gets."""
        self._finished = True
        self._write()
        return read_results(self.path)

    def _write(self) -> None:
        write_bytes(self.path, self.text().encode())

    def text(self) -> str:
        """The file: the same bytes for the same content; a row a line."""
        rows = ",\n".join("  " + _json(_row_fields(row), row.name) for row in self._rows)
        head = {"format": FORMAT, "version": VERSION, **self._head, "finished": self._finished}
        lines = [f' "{key}": {_json(value, key)}' for key, value in head.items()]
        lines.append(f' "provenance": {_json(self._provenance, "provenance")}')
        lines.append(' "rows": [\n' + rows + "\n ]" if rows else ' "rows": []')
        return "{\n" + ",\n".join(lines) + "\n}\n"


def _row_fields(row: Row) -> Plain:
    described = asdict(row)
    if row.rounds is not None:
        # the unit first, as it is read
        described["rounds"] = {
            "unit": row.rounds.unit,
            "sittings": row.rounds.sittings,
            "values": list(row.rounds.values),
            "reference": None if row.rounds.reference is None else list(row.rounds.reference),
        }
    return described


def _json(value: Any, name: str) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be written ({error}); results hold plain and finite values only"
        ) from error


def read_results(path: str | os.PathLike[str]) -> ResultFile:
    """What a result file holds, also where its run was killed.

    Raises ValueError, in a sentence, for a file that is missing, empty, no JSON (with the place),
    not a result file, of another version, or with rows of another shape.
    """
    path = Path(path)
    return _Reader(str(path)).file(_parse(path))


def _parse(path: Path) -> Any:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a result file of fastscore bench in it")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} does not exist; fastscore bench SUITE --out {path.name} writes one"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text (byte {error.start}); a result file is JSON in UTF-8"
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty; run the suite again")
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no JSON: {error.msg} in line {error.lineno}, column {error.colno}; "
            "it was cut off or edited: run the suite again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} holds {error}; times are finite: run the suite again") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for a result file") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


class _Reader:
    """Checks what was parsed; ``self._fail`` says where in the file it is wrong."""

    def __init__(self, path: str) -> None:
        self._path = path

    def _fail(self, where: str, what: str) -> NoReturn:
        raise ValueError(f"{self._path}: {where} {what}; run the suite again")

    def file(self, found: Any) -> ResultFile:
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(
                f"{self._path} is JSON but no result file of fastscore bench: its format is not "
                f"{FORMAT!r}"
            )
        self._version(found.get("version"))
        self._keys(found, ("format", "version", *_file_keys()), "the file")
        for key in ("suite", "command"):
            self._is(found[key], str, key)
        self._is(found["finished"], bool, "finished")
        self._is(found["provenance"], dict, "provenance")
        self._is(found["rows"], list, "rows")
        rows: list[Row] = []
        for row in found["rows"]:
            rows.append(self.row(row, {r.name for r in rows}, f"row {len(rows) + 1}"))
        note = "" if found["finished"] else _unfinished(self._path, rows)
        head = {key: found[key] for key in ("suite", "command", "finished", "provenance")}
        return ResultFile(**head, rows=tuple(rows), note=note)

    def _version(self, version: Any) -> None:
        if not isinstance(version, int) or isinstance(version, bool):
            self._fail("version", f"is {version!r}, not a number")
        if version > VERSION:
            raise ValueError(
                f"{self._path} is of version {version} and this fastscore reads {VERSION}; "
                "update fastscore"
            )
        if version < VERSION:
            raise ValueError(
                f"{self._path} is of version {version} and this fastscore reads {VERSION}; "
                "run the suite again"
            )

    def row(self, found: Any, names: set[str], where: str = "the row") -> Row:
        """One row, its name not among ``names``."""
        self._is(found, dict, where)
        if isinstance(found.get("name"), str):
            where = f"row {found['name']!r}"
        self._keys(found, tuple(f.name for f in fields(Row)), where)
        self._is(found["name"], str, f"{where}, name")
        if found["name"] in names:
            self._fail(where, "stands twice")
        for key in ("workload", "memory", "energy", "bound"):
            self._is(found[key], dict, f"{where}, {key}")
        for key in ("memory", "energy", "bound"):
            self._none(found[key], f"{where}, {key}")
        for key in ("macs", "bytes"):
            if found[key] is not None:
                self._is(found[key], int, f"{where}, {key}")
        parts = {
            "check": self._numbers(Check, found["check"], f"{where}, check"),
            "rounds": self._rounds(found["rounds"], f"{where}, rounds"),
            "time": self._numbers(Time, found["time"], f"{where}, time"),
        }
        self._bound(found["bound"], f"{where}, bound")
        row = Row(**(found | parts))
        self._agrees(row, where)
        return row

    def _agrees(self, row: Row, where: str) -> None:
        if row.status not in STATUSES:
            self._fail(where, f"has status {row.status!r}, which is none of {', '.join(STATUSES)}")
        self._is(row.reason, str, f"{where}, reason")
        if row.status != "ok" and not row.reason:
            self._fail(where, f"is {row.status} without a reason")
        if row.status != "ok" and (row.rounds or row.time):
            self._fail(where, f"is {row.status} and has a time")
        if (row.rounds is None) != (row.time is None):
            self._fail(where, "has one of rounds and time without the other")
        if row.rounds and row.time:
            low, high = min(row.rounds.values), max(row.rounds.values)
            if not low <= row.time.median <= high:
                self._fail(where, "has a median that is not one of its rounds")

    def _rounds(self, found: Any, where: str) -> Rounds | None:
        if found is None:
            return None
        self._is(found, dict, where)
        self._keys(found, ("unit", "sittings", "values", "reference"), where)
        if found["unit"] != "s":
            self._fail(where, f"are in {found['unit']!r}, not in 's'")
        values = self._seconds(found["values"], f"{where}, values")
        sittings = found["sittings"]
        self._is(sittings, int, f"{where}, sittings")
        if sittings < 1 or len(values) % sittings:
            self._fail(where, f"are {len(values)}, not {sittings} equal sittings")
        if found["reference"] is None:
            return Rounds(values, None, sittings)
        reference = self._seconds(found["reference"], f"{where}, reference")
        if len(reference) != len(values):
            self._fail(where, f"are {len(values)}, with {len(reference)} of the reference")
        return Rounds(values, reference, sittings)

    def _seconds(self, found: Any, where: str) -> tuple[float, ...]:
        self._is(found, list, where)
        if not found:
            self._fail(where, "are none")
        for value in found:
            self._number(value, where)
            if value <= 0:
                self._fail(where, f"has {value}, which is no duration")
        return tuple(float(value) for value in found)

    def _numbers(self, kind: Any, found: Any, where: str) -> Any:
        if found is None:
            return None
        self._is(found, dict, where)
        self._keys(found, tuple(f.name for f in fields(kind)), where)
        for f in fields(kind):
            if f.type == "str":
                self._is(found[f.name], str, f"{where}, {f.name}")
            else:
                self._number(found[f.name], f"{where}, {f.name}")
        return kind(**found)

    def _bound(self, found: Plain, where: str) -> None:
        if "none" in found:
            return
        self._keys(found, ("name", "seconds", "share"), where)
        self._is(found["name"], str, f"{where}, name")
        self._number(found["seconds"], f"{where}, seconds")
        self._number(found["share"], f"{where}, share")

    def _none(self, found: Plain, where: str) -> None:
        if "none" not in found:
            return
        if set(found) != {"none"} or not isinstance(found["none"], str) or not found["none"]:
            self._fail(where, "says none and more, or without a reason")

    def _keys(self, found: Plain, expected: Sequence[str], where: str) -> None:
        missing = [key for key in expected if key not in found]
        unknown = sorted(set(found) - set(expected))
        if missing:
            self._fail(where, f"lacks {', '.join(missing)}")
        if unknown:
            self._fail(where, f"has {', '.join(map(repr, unknown))}, which no row or file has")

    def _number(self, found: Any, where: str) -> None:
        if isinstance(found, bool) or not isinstance(found, int | float) or math.isinf(found):
            self._fail(where, f"has {found!r}, which is no number")

    def _is(self, found: Any, kind: type, where: str) -> None:
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            names: Mapping[type, str] = {str: "text", dict: "an object", list: "a list"}
            self._fail(where, f"is {_brief(found)}, not {names.get(kind, kind.__name__)}")


def _file_keys() -> tuple[str, ...]:
    return tuple(f.name for f in fields(ResultFile) if f.name != "note")


def _unfinished(path: str, rows: Sequence[Row]) -> str:
    if not rows:
        return f"{path} is of a run that was stopped before its first row"
    count = f"{len(rows)} rows" if len(rows) > 1 else "1 row"
    return f"{path} is of a run that was stopped after {count}, the last {rows[-1].name}"


def _brief(found: Any) -> str:
    text = json.dumps(found, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
