"""A result file as plain text: a line a row, then what was skipped, refused, and doubtful."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from fastscore.measure.results import ResultFile, Row

_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))


def table(found: ResultFile) -> str:
    """All of a file that fits on a screen's width."""
    ok = [row for row in found.rows if row.status == "ok"]
    lines = [_machine(found)]
    if ok:
        lines += ["", *_columns(ok)]
    for status in ("failed", "skipped"):
        lines += _refused(status, [row for row in found.rows if row.status == status])
    warnings = found.provenance.get("warnings") or ()
    lines += ["", *(f"warning: {sentence}" for sentence in warnings)] if warnings else []
    if found.note:
        lines += ["", found.note]
    return "\n".join([*lines, "", f"again: {found.command}"])


def _machine(found: ResultFile) -> str:
    p = found.provenance
    gpu = (p.get("gpu") or {}).get("name")
    commit = p["commit"]["id"]
    place = gpu or f"{p['processor']['model']}, {p['threads']} of {p['processor']['cores']} cores"
    version = "no commit" if commit is None else commit[:10]
    changed = " with changes" if p["commit"]["dirty"] else ""
    return f"suite {found.suite}, {place}, torch {p['versions']['torch']}, {version}{changed}"


def _columns(rows: Sequence[Row]) -> list[str]:
    head = (
        "",
        "median",
        "p20 .. p80",
        "p99",
        "rounds",
        "GMACs",
        "MB",
        "of bound",
        "peak MB",
        "error",
    )
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _cells(row: Row) -> tuple[str, ...]:
    assert row.time is not None
    assert row.rounds is not None
    t, bound, peak = row.time, row.bound, row.memory.get("tensor_peak")
    share = "-" if "none" in bound else f"{bound['share']:.0%} {bound['name']}"
    check = "-" if row.check is None else f"{row.check.error:.1e}/{row.check.limit:.0e}"
    return (
        row.name,
        seconds(t.median),
        f"{seconds(t.p20)} .. {seconds(t.p80)}",
        seconds(t.p99),
        str(len(row.rounds.values)),
        _scaled(row.macs, 1e9),
        _scaled(row.bytes, 1e6),
        share,
        _scaled(peak, 1e6),
        check,
    )


def seconds(value: float) -> str:
    """Three digits with the unit that suits."""
    name, scale = next((u for u in _UNITS if value >= u[1]), _UNITS[-1])
    return f"{value / scale:.3g} {name}" if value / scale < 1000 else f"{value / scale:.0f} {name}"


def _scaled(value: int | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.3g}" if value < 100 * unit else (
        f"{value / unit:.0f}"
    )  # fmt: skip


def _refused(status: str, rows: Iterable[Row]) -> list[str]:
    """Rows without a figure by reason; never missing."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        reasons[row.reason].append(row.name)
    lines = []
    for reason, names in reasons.items():
        several = status == "skipped" and len(names) > 3
        shown = f"{len(names)} rows, such as {names[0]}" if several else ", ".join(names)
        lines.append(f"{status}: {shown}: {reason}")
    return ["", *lines] if lines else []
