"""What an evaluation found, and how it is written: terminal, Markdown, JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_bytes
from .frechet import Distance
from .rates import Rate
from .recogniser import CONFIDENT

RECORDINGS, TRAINING, COPY = "recordings", "training recordings", "copy-synthesis"
GUIDED, UNGUIDED = "guided", "unguided"


@dataclass
class Row:
    """Figures of one set of clips; None where a figure does not apply or was not asked for.

    ``recognised``: the recogniser's first label is the label meant; ``sure``: and it is confident.
    ``confident``: any label at that confidence. ``spread``: within-label spread over that of the
    recordings. ``agreement``: the guiding classifier's opinion, which is no evidence.
    """

    name: str
    kind: str
    n: int
    nfe: int | None = None
    gamma: float | None = None
    recognised: Rate | None = None
    sure: Rate | None = None
    confident: Rate | None = None
    label_counts: dict[str, int] = field(default_factory=dict)
    distance: Distance | None = None
    spread: dict[str, float] | None = None
    pitch_hz: list[float] | None = None
    inception: float | None = None
    inception_shared: float | None = None
    modified_inception: float | None = None
    am: float | None = None
    confusion: list[list[int]] | None = None
    dnsmos: dict[str, list[float]] | None = None
    asr: Rate | None = None
    agreement: Rate | None = None
    seconds_per_clip: float | None = None


@dataclass(frozen=True)
class Verdict:
    """One aim, the figure that was found, and whether it meets the aim."""

    aim: str
    found: str
    met: bool


@dataclass
class Report:
    """Rows of one evaluation with what is needed to repeat it."""

    labels: tuple[str, ...]
    rows: list[Row]
    halves: Distance
    provenance: dict[str, Any]
    notes: list[str]
    # log-Mels [labels, examples, n_mels, frames] of guided samples, for the picture
    pictures: Any = None

    def rows_of(self, kind: str) -> list[Row]:
        """Rows of one kind, in order."""
        return [row for row in self.rows if row.kind == kind]

    def default_guided(self) -> Row:
        """The guided row drawn with the defaults of the pipeline."""
        return next(r for r in self.rows_of(GUIDED) if r.name == "guided, default")

    def verdicts(self) -> list[Verdict]:
        """The aims of the project against the figures found."""
        return _verdicts(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content."""
        return {
            "labels": list(self.labels),
            "confident_at": CONFIDENT,
            "rows": [_plain(row) for row in self.rows],
            "halves": _plain(self.halves),
            "verdicts": [_plain(v) for v in self.verdicts()],
            "notes": self.notes,
            "provenance": self.provenance,
        }

    def to_markdown(self) -> str:
        """Tables, aims and provenance as Markdown."""
        aims = [[v.aim, v.found, "yes" if v.met else "NO"] for v in self.verdicts()]
        parts = ["# Evaluation", _markdown(*main_table(self)), "## Variety and distribution"]
        parts += [_markdown(*variety_table(self)), "## Aims"]
        parts += [_markdown(["aim", "found", "met"], aims), "## Notes"]
        parts += ["\n".join(f"- {note}" for note in self.notes), "## Provenance"]
        parts.append("```json\n" + json.dumps(self.provenance, indent=1) + "\n```")
        return "\n\n".join(parts) + "\n"

    def to_text(self) -> str:
        """The tables and aims for a terminal."""
        aims = [[v.aim, v.found, "yes" if v.met else "NO"] for v in self.verdicts()]
        tables = [main_table(self), variety_table(self), (["aim", "found", "met"], aims)]
        return "\n\n".join(_text(*table) for table in tables)

    def save(self, folder: str | Path) -> list[Path]:
        """Write report.json, report.md and report.html into ``folder``, each whole or not at all.

        Raises ValueError when the folder cannot be made or written, ImportError without matplotlib.
        """
        from .page import to_html

        folder = Path(folder)
        contents = {
            "report.json": json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n",
            "report.md": self.to_markdown(),
            "report.html": to_html(self),
        }
        make_folder(folder)
        for name, text in contents.items():
            write_bytes(folder / name, text.encode())
        return [folder / name for name in contents]


def make_folder(folder: Path) -> None:
    """Create ``folder``; ValueError in one sentence when that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot make the folder {folder}: {error.strerror}; choose another"
        ) from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        plain = {
            f.name: _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.name != "pictures"
        }
        return plain | ({"value": value.value} if isinstance(value, Rate) else {})
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value != value:
        return None
    return value


def main_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Recognition, quality and speed: header and rows."""
    header = ["clips", "n", "NFE", "gamma", "recognised", "and sure", "confident label", "labels"]
    extra = {
        "second opinion": lambda r: _cell(r.asr),
        "DNSMOS ovrl": lambda r: _cell(r.dnsmos and f"{r.dnsmos['ovrl'][0]:.2f}"),
        "s/clip": lambda r: _cell(r.seconds_per_clip and f"{r.seconds_per_clip:.3f}"),
        "guide agrees (no evidence)": lambda r: _cell(
            r.agreement and f"{100 * r.agreement.value:.1f} %"
        ),
    }
    shown = {k: f for k, f in extra.items() if any(f(r) != "" for r in report.rows)}
    rows = []
    for r in report.rows:
        coverage = f"{sum(c > 0 for c in r.label_counts.values())}/{len(report.labels)}"
        gamma = "" if r.gamma is None else f"{r.gamma:g}"
        rows.append(
            [r.name, str(r.n), _cell(r.nfe), gamma]
            + [_cell(r.recognised), _cell(r.sure), _cell(r.confident), coverage]
            + [f(r) for f in shown.values()]
        )
    return header + list(shown), rows


def variety_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Distance to held-out recordings, spread and scores: header and rows."""
    header = ["clips", "Frechet distance", "n a side", "spread, embedding", "spread, acoustic"]
    header += ["spread, pitch", "pitch Hz 10/50/90 %", "IS", "IS shared scorer", "mIS", "AM"]
    rows = []
    for r in report.rows:
        spread = r.spread or {}
        pitch = "/".join(f"{v:.0f}" for v in r.pitch_hz) if r.pitch_hz else ""
        numbers = (r.inception, r.inception_shared, r.modified_inception, r.am)
        rows.append(
            [r.name, _cell(r.distance), _cell(r.distance and r.distance.n)]
            + [
                f"{spread[k]:.2f}" if k in spread else ""
                for k in ("embedding", "acoustic", "pitch")
            ]
            + [pitch, *("" if v is None else f"{v:.3g}" for v in numbers)]
        )
    halves = [_cell(report.halves), str(report.halves.n)]
    rows.append(["two halves of the recordings", *halves, *[""] * (len(header) - 3)])
    return header, rows


def _verdicts(report: Report) -> list[Verdict]:
    guided, found = report.default_guided(), []

    def aim(text: str, value: str, met: bool) -> None:
        found.append(Verdict(text, value, met))

    recordings, copy = report.rows_of(RECORDINGS)[0], report.rows_of(COPY)[0]
    rate = guided.recognised
    aim("guided: at least 95 % recognised", str(rate), rate.value >= 0.95)
    aim("guided: at most 60 evaluations", str(guided.nfe), guided.nfe <= 60)
    for row in report.rows_of(UNGUIDED)[:1]:
        present = sum(c > 0 for c in row.label_counts.values())
        share = row.confident
        aim("unguided: at least 80 % with a confident label", str(share), share.value >= 0.8)
        total = len(report.labels)
        aim("unguided: every label present", f"{present} of {total}", present == total)
    for name in ("embedding", "acoustic"):
        value = (guided.spread or {}).get(name)
        shown = "too few clips heard as meant" if value is None else f"{value:.2f}"
        met = value is not None and value >= 0.7
        aim(f"guided: {name} spread at least 0.7 of the data's", shown, met)
    loss = recordings.recognised.value - copy.recognised.value
    points = f"{100 * loss:.1f} points lost"
    aim("copy-synthesis: recognised within 2 points of the recordings", points, loss <= 0.02)
    if recordings.dnsmos and copy.dnsmos:
        loss = recordings.dnsmos["ovrl"][0] - copy.dnsmos["ovrl"][0]
        aim("copy-synthesis: DNSMOS within 0.3 of the recordings", f"{loss:.2f} lost", loss <= 0.3)
    return found


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )
