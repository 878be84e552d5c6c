"""What changed between two result files beyond noise, row by row; nothing is silently left out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastscore.measure.noise import FALSE, Change, Interval, changes, interval
from fastscore.measure.results import ResultFile, Row
from fastscore.measure.sides import read_side

SLOWER, FASTER, SAME = "slower", "faster", "same"
CANNOT_TELL, NOT_COMPARED = "cannot tell", "not compared"
# a row counts as the same where a change of this size would have been found
TOLERANCE = 0.1
FORMAT, VERSION = "fastscore-verdict", 1

Plain = dict[str, Any]

__all__ = ["Interval", "RowVerdict", "Verdict", "compare", "compare_files", "interval"]


@dataclass(frozen=True)
class RowVerdict:
    """One row of both files: slower, faster, same, cannot tell, or not compared and why.

    ``medians``: seconds a call in A and B, None where there is none. ``change`` is of the fastest
    tenth of rounds, with the machine's part taken off.
    """

    name: str
    verdict: str
    reason: str = ""
    medians: tuple[float | None, float | None] = (None, None)
    change: Change | None = None


@dataclass(frozen=True)
class Verdict:
    """All rows of two files, in A's order, and what is to be known of the two runs.

    ``differences``: of machine and versions, a sentence each.
    """

    a: str
    b: str
    rows: tuple[RowVerdict, ...]
    differences: tuple[str, ...]
    tolerance: float = TOLERANCE

    def named(self, verdict: str) -> list[str]:
        """Names of the rows with that verdict."""
        return [row.name for row in self.rows if row.verdict == verdict]

    @property
    def changed(self) -> bool:
        """Whether any row is slower or faster."""
        return bool(self.named(SLOWER) or self.named(FASTER))

    @property
    def resolves(self) -> float | None:
        """The slow-down that is found in half of the rows, a fraction; None without rows."""
        found = sorted(row.change.resolves for row in self.rows if row.change is not None)
        return found[len(found) // 2] if found else None

    def json(self) -> Plain:
        """All of it in plain values."""
        counts = {v: len(self.named(v)) for v in (SLOWER, FASTER, SAME, CANNOT_TELL, NOT_COMPARED)}
        return {
            "format": FORMAT,
            "version": VERSION,
            "a": self.a,
            "b": self.b,
            "tolerance": self.tolerance,
            "false_alarms": FALSE,
            "resolves": self.resolves,
            "differences": list(self.differences),
            "counts": counts,
            "rows": [asdict(row) | {"medians": list(row.medians)} for row in self.rows],
        }

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """A table, what the runs differ in, and a summary in words."""
        width = max([len(row.name) for row in self.rows], default=3) + 1
        lines = [f"A  {self.a}", f"B  {self.b}", *self.differences, ""]
        head = f"{'row':{width}}{'A':>11}{'B':>11}{'change':>10}{'interval':>18}{'resolves':>10}"
        lines.append(head + "  verdict")
        lines += [_line(row, width) for row in self.rows]
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """What changed, what was not compared, and how small a change these runs can resolve."""
        parts = []
        for verdict in (SLOWER, FASTER):
            for row in self.rows:
                if row.verdict == verdict and row.change is not None:
                    parts.append(f"{row.name} is {_percent(row.change.change)} {verdict}")
        if not self.changed:
            parts.append("nothing changed beyond noise")
        for verdict in (CANNOT_TELL, NOT_COMPARED):
            if count := len(self.named(verdict)):
                parts.append(f"{count} of {len(self.rows)} rows: {verdict}")
        sentence = "; ".join(parts) + "."
        if self.resolves is not None:
            worst = max(row.change.resolves for row in self.rows if row.change is not None)
            sentence += (
                f" These runs resolve {_percent(self.resolves)}"
                f" (the least steady row {_percent(worst)})."
            )
        return sentence


def compare_files(
    a: str | os.PathLike[str], b: str | os.PathLike[str], tolerance: float = TOLERANCE
) -> Verdict:
    """Compare two result files, or folders of them, whose runs are joined (see `read_side`)."""
    return compare(read_side(a), read_side(b), (str(a), str(b)), tolerance)


def compare(
    a: ResultFile,
    b: ResultFile,
    names: tuple[str, str] = ("A", "B"),
    tolerance: float = TOLERANCE,
    notes: Sequence[str] = (),
    in_turn: bool = False,
) -> Verdict:
    """Compare what two runs found; every row of either appears in the verdict.

    ``tolerance``: the change that a row must be able to show for "same"; ``notes`` come first among
    the differences; ``in_turn`` as in `noise.changes`.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance {tolerance} must be above 0 and below 1, such as 0.1")
    machines = _machines(a.provenance, b.provenance)
    keys = list(dict.fromkeys(row.name for row in (*a.rows, *b.rows)))
    pairs, refused = {}, {}
    for name in keys:
        first, second = a.row(name), b.row(name)
        why = _obstacle(first, second) or "; ".join(machines)
        if why:
            refused[name] = why
        else:
            pairs[name] = (first.rounds, second.rounds)
    found = changes(pairs, in_turn)
    rows = []
    for name in keys:
        medians = _median(a.row(name)), _median(b.row(name))
        if name in refused:
            rows.append(RowVerdict(name, NOT_COMPARED, refused[name], medians))
        else:
            rows.append(_judged(name, medians, found[name], tolerance))
    stopped = [result.note for result in (a, b) if result.note]
    differences = (*notes, *stopped, *_differences(a, b), *_warnings(a, b))
    return Verdict(
        _label(names[0], a.provenance),
        _label(names[1], b.provenance),
        tuple(rows),
        differences,
        tolerance,
    )


def _judged(
    name: str, medians: tuple[float | None, float | None], change: Change, tolerance: float
) -> RowVerdict:
    if change.beyond_noise:
        return RowVerdict(name, SLOWER if change.low > 0 else FASTER, "", medians, change)
    if change.resolves <= tolerance:
        return RowVerdict(name, SAME, "", medians, change)
    reason = f"a change must exceed {_percent(change.resolves)} to show here; measure for longer"
    return RowVerdict(name, CANNOT_TELL, reason, medians, change)


def _obstacle(a: Row | None, b: Row | None) -> str:
    """Why two rows of a name cannot be compared, "" if they can."""
    if a is None or b is None:
        return f"only in {'B' if a is None else 'A'}"
    for side, row in (("A", a), ("B", b)):
        if row.status != "ok":
            return f"{row.status} in {side}: {row.reason}"
    if why := differs(a.workload, b.workload):
        return f"another workload: {why}"
    for side, row in (("A", a), ("B", b)):
        if row.rounds is None:
            return f"not timed in {side}"
        if len(row.rounds.values) < 6:
            return f"{len(row.rounds.values)} rounds in {side}, of 6 that a comparison needs"
    return ""


def differs(a: Plain, b: Plain) -> str:
    """In what two workloads differ, "" if they are the same."""
    # the command names threads and device, which are compared by themselves
    for key in sorted({*a, *b} - {"command"}):
        first, second = (side.get(key, "nothing") for side in (a, b))
        if first != second:
            return f"{key} is {first} in A and {second} in B"
    return ""


def _machines(a: Plain, b: Plain) -> list[str]:
    """Differences between the machines with which no time can be compared."""
    found = []
    for name, path in (
        ("device", ("device",)),
        ("GPU", ("gpu", "name")),
        ("processor", ("processor", "model")),
        ("threads", ("threads",)),
    ):
        first, second = _at(a, path), _at(b, path)
        if first != second:
            found.append(f"{name} {first} in A and {second} in B")
    return found


def _differences(a: ResultFile, b: ResultFile) -> list[str]:
    """What else differs, and may be what makes the difference."""
    found = []
    if a.suite != b.suite:
        found.append(f"A is of the suite {a.suite}, B of {b.suite}")
    first, second = (_at(r.provenance, ("versions",)) or {} for r in (a, b))
    for key in sorted({*first, *second}):
        if first.get(key) != second.get(key):
            found.append(f"{key} {first.get(key)} in A and {second.get(key)} in B")
    for name, path in (
        ("cores", ("processor", "cores")),
        ("governor", ("processor", "governor")),
        ("system", ("system",)),
        ("CUDA", ("gpu", "cuda")),
    ):
        first, second = _at(a.provenance, path), _at(b.provenance, path)
        if first != second:
            found.append(f"{name} {first} in A and {second} in B")
    return found


def _warnings(a: ResultFile, b: ResultFile) -> list[str]:
    """What the runs themselves say against their figures."""
    found = []
    for side, result in (("A", a), ("B", b)):
        warnings = result.provenance.get("warnings") or []
        found += [f"{side}: {warning}" for warning in warnings]
    return found


def _at(found: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _label(name: str, provenance: Plain) -> str:
    commit = _at(provenance, ("commit", "id"))
    if not isinstance(commit, str):
        return f"{name}, of no known commit"
    dirty = ", with changes" if _at(provenance, ("commit", "dirty")) else ""
    return f"{name}, commit {commit[:10]}{dirty}"


def _median(row: Row | None) -> float | None:
    return None if row is None or row.time is None else row.time.median


def _line(row: RowVerdict, width: int) -> str:
    a, b = (_seconds(median) for median in row.medians)
    start = f"{row.name:{width}}{a:>11}{b:>11}"
    verdict = row.verdict + (f": {row.reason}" if row.reason else "")
    if row.change is None:
        return f"{start}{'':38}  {verdict}"
    c = row.change
    bounds = f"[{100 * c.low:+.1f}, {100 * c.high:+.1f}] %"
    return f"{start}{100 * c.change:+8.1f} %{bounds:>18}{100 * c.resolves:8.1f} %  {verdict}"


def _percent(fraction: float) -> str:
    return f"{100 * abs(fraction):.1f} %"


def _seconds(value: float | None) -> str:
    if value is None:
        return "none"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value / 1e-9:.4g} ns"
