"""The evaluation as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .report import Report, Row

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
td, th { border: 1px solid #8886; padding: .25em .5em; text-align: left; }
td.n { text-align: right; width: 2em; } .no { color: #b00; font-weight: bold; }
.wide { overflow-x: auto; } img { max-width: 100%; } pre { font-size: 12px; overflow-x: auto; }
"""


def check_installed() -> None:
    """Raise ImportError, naming the extra, when matplotlib is missing."""
    _figure_class()


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the HTML report needs matplotlib: pip install 'fastscore[metrics]'"
        ) from error
    return Figure


def to_html(report: Report) -> str:
    """Whole page: tables, aims, plots, confusion matrices, provenance. ImportError: matplotlib."""
    from .report import main_table, variety_table

    parts = ["<h1>Evaluation</h1>", _table(*main_table(report)), _image(_rates(report), "rates")]
    parts += ["<h2>Variety and distribution</h2>", _table(*variety_table(report))]
    parts += ["<h2>Aims</h2>", _aims(report), "<h2>Notes</h2><ul>"]
    parts += [f"<li>{html.escape(note)}</li>" for note in report.notes]
    parts.append("</ul>")
    if report.pictures is not None:
        parts += ["<h2>Guided samples</h2>", _image(_mels(report), "log-Mels by label")]
    parts.append("<h2>Confusion: row meant, column heard</h2>")
    parts += [_confusion(report, row) for row in report.rows if row.confusion is not None]
    record = html.escape(json.dumps(report.provenance, indent=1))
    parts.append(f"<h2>Provenance</h2><pre>{record}</pre>")
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fastscore evaluation'
        f"</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _aims(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(v.aim)}</td><td>{html.escape(v.found)}</td>"
        + ("<td>yes</td></tr>" if v.met else '<td class="no">no</td></tr>')
        for v in report.verdicts()
    )
    return f"<table><tr><th>aim</th><th>found</th><th>met</th></tr>{rows}</table>"


def _confusion(report: Report, row: Row) -> str:
    head = "".join(f"<th>{html.escape(label)}</th>" for label in report.labels)
    lines = []
    for label, counts in zip(report.labels, row.confusion, strict=True):
        total = max(sum(counts), 1)
        cells = "".join(
            f'<td class="n" style="background:rgba(40,110,200,{c / total:.2f})">{c or ""}</td>'
            for c in counts
        )
        lines.append(f"<tr><th>{html.escape(label)}</th>{cells}</tr>")
    table = f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"
    return f"<h3>{html.escape(row.name)}</h3>{table}"


def _image(figure, alt: str) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    image = Image.open(buffer).convert("RGB").quantize(96)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _rates(report: Report):
    """Recognition of guided samples against NFE, with intervals; ceilings as lines."""
    figure = _figure_class()(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    guided = sorted(report.rows_of("guided"), key=lambda r: r.nfe)
    values = np.array([100 * r.recognised.value for r in guided])
    low = values - [100 * r.recognised.low for r in guided]
    high = np.array([100 * r.recognised.high for r in guided]) - values
    # rounding can put an interval's end a hair inside the value
    axes.bar(range(len(guided)), values, yerr=np.maximum([low, high], 0), capsize=4, width=0.6)
    axes.set_xticks(range(len(guided)), [f"{r.nfe} NFE\n{r.name}" for r in guided])
    for kind, style in (("recordings", "-"), ("copy-synthesis", "--")):
        for row in report.rows_of(kind)[:1]:
            level = 100 * row.recognised.value
            axes.axhline(level, linestyle=style, color="0.3", linewidth=1, label=kind)
    axes.set_ylabel("recognised, %")
    axes.set_ylim(0, 105)
    axes.legend(loc="lower right")
    return figure


def _mels(report: Report):
    """Grid of log-Mels: a row a label, a column an example, one scale for all."""
    pictures = np.asarray(report.pictures)
    rows, columns, bands, frames = pictures.shape
    # one picture of all, low bands at the bottom, a gap of four cells around each
    sheet = np.full((rows * (bands + 4), columns * (frames + 4)), np.nan)
    for i in range(rows):
        for j in range(columns):
            top, left = i * (bands + 4), j * (frames + 4)
            sheet[top : top + bands, left : left + frames] = pictures[i, j, ::-1]
    size = (sheet.shape[1] / 60 + 0.8, sheet.shape[0] / 80)
    figure = _figure_class()(figsize=size, layout="constrained")
    axes = figure.subplots()
    low, high = np.quantile(pictures, [0.02, 0.995])
    axes.imshow(sheet, aspect="auto", vmin=low, vmax=high, cmap="magma", interpolation="nearest")
    axes.set_yticks([(i + 0.5) * (bands + 4) - 2 for i in range(rows)], report.labels)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    return figure
