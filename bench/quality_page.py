"""The plot and the page of `bench/quality.py`: quality.png and quality.md from rows.jsonl."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quality import Setting, generic

from fastscore.files import atomic_write, write_bytes
from fastscore.metrics.rates import Rate, wilson
from fastscore.samplers import SAMPLERS

Row = dict[str, Any]

# settings were chosen on seeds below this number and confirmed on seeds from it
CONFIRMED_FROM = 100
BEFORE = "dpmpp_2m_sde, karras 20 to 0.03"
# the two-sided 97.5 % quantile of Student's t by degrees of freedom (more: 1.96)
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


@dataclass(frozen=True)
class Group:
    """Rows of one setting: shares of all clips together, the distance as mean over seeds."""

    setting: str
    rows: tuple[Row, ...]

    @property
    def nfe(self) -> int:
        """Evaluations a clip."""
        return self.rows[0]["nfe"]

    @property
    def clips(self) -> int:
        """Clips of all seeds."""
        return sum(row["n"] for row in self.rows)

    @property
    def accuracy(self) -> Rate:
        """Share heard as meant."""
        return wilson(sum(row["right"] for row in self.rows), self.clips)

    @property
    def confident(self) -> Rate:
        """Share with a confident label."""
        return wilson(sum(row["confident"] for row in self.rows), self.clips)

    def column(self, name: str) -> list[float]:
        """A figure of every seed: accuracy (in 0..1), frechet, embedding, acoustic."""
        if name == "accuracy":
            return [row["right"] / row["n"] for row in self.rows]
        if name in ("embedding", "acoustic"):
            return [row["spread"][name] for row in self.rows if name in row["spread"]]
        return [row[name] for row in self.rows]

    def mean(self, name: str) -> float:
        """Mean over the seeds, NaN where no row has the figure."""
        values = self.column(name)
        return statistics.fmean(values) if values else math.nan

    def interval(self, name: str) -> tuple[float, float]:
        """In which 95 % of seeds fall: mean +- t s sqrt(1 + 1 / k), a normal law assumed."""
        values = self.column(name)
        k = len(values)
        if k < 2:
            return -math.inf, math.inf
        half = _t(k - 1) * statistics.stdev(values) * math.sqrt(1 + 1 / k)
        middle = statistics.fmean(values)
        return middle - half, middle + half

    def difference(self, other: Group, name: str) -> tuple[float, float]:
        """Mean of this less that of ``other``, and the half width of its 95 % interval (Welch)."""
        a, b = self.column(name), other.column(name)
        gap = statistics.fmean(a) - statistics.fmean(b)
        if min(len(a), len(b)) < 2:
            return gap, math.inf
        va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
        if va + vb == 0:
            return gap, 0.0
        df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
        return gap, _t(int(df)) * math.sqrt(va + vb)


def _t(df: int) -> float:
    return _T[df - 1] if df <= len(_T) else 1.96 + 2.6 / df


def grouped(rows: Sequence[Row]) -> dict[str, Group]:
    """Rows by setting."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["setting"]].append(row)
    return {setting: Group(setting, tuple(part)) for setting, part in found.items()}


def write(out: Path, rows: Sequence[Row]) -> None:
    """Write quality.png and quality.md; ValueError without rows or without OUT/chosen.json.

    chosen.json names the setting of the reference and those that were chosen:
    {"reference": "...", "chosen": ["...", ...]}.
    """
    if not rows:
        raise ValueError(f"{out} holds no rows; draw some first")
    path = out / "chosen.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; it names the reference and the chosen settings")
    names = json.loads(path.read_text(encoding="utf-8"))
    fresh = grouped([row for row in rows if row["seed"] >= CONFIRMED_FROM])
    wanted = [names["reference"], *names["chosen"]]
    for setting in wanted:
        if setting not in fresh:
            raise ValueError(
                f"no row of a seed from {CONFIRMED_FROM} has the setting {setting!r}; draw one"
            )
    reference, *chosen = (fresh[setting] for setting in wanted)
    lines = curves(rows)
    plot(out / "quality.png", lines, reference, chosen)
    text = page(out, rows, lines, reference, chosen)
    write_bytes(out / "quality.md", text.encode())


def curves(rows: Sequence[Row]) -> dict[str, list[Group]]:
    """Settings over evaluations, those that have rows: every sampler's generic one, and BEFORE."""
    groups = grouped([row for row in rows if row["seed"] >= CONFIRMED_FROM])
    nfes = sorted({group.nfe for group in groups.values()})
    shapes = {name: functools.partial(generic, name) for name in SAMPLERS}
    shapes[BEFORE] = lambda nfe: Setting(nfe=nfe)
    found: dict[str, list[Group]] = {}
    for name, shape in shapes.items():
        texts = [shape(nfe).words() for nfe in nfes]
        line = [groups[text] for text in texts if text in groups]
        if line:
            found[name] = line
    return found


def plot(
    path: Path, lines: dict[str, list[Group]], reference: Group, chosen: Sequence[Group]
) -> None:
    """Accuracy and distance against evaluations, one line a sampler."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    figure = Figure(figsize=(13, 6.2), layout="constrained")
    panels = figure.subplots(1, 2)
    styles = [("-", "o"), ("--", "s"), (":", "^")]
    shown = (("accuracy", 100.0), ("frechet", 1.0))
    for axes, (name, scale) in zip(panels, shown, strict=True):
        low, high = (scale * end for end in reference.interval(name))
        high = min(high, 100.0) if name == "accuracy" else high
        axes.axhspan(low, high, color="0.85", label=f"95 % of seeds, {_short(reference)}")
        axes.axhline(scale * reference.mean(name), color="0.5", linewidth=1)
        for i, (sampler, line) in enumerate(lines.items()):
            dash, marker = styles[i // 10 % len(styles)]
            axes.plot(
                [g.nfe for g in line],
                [scale * g.mean(name) for g in line],
                dash,
                marker=marker,
                markersize=4,
                linewidth=1.3,
                color=f"C{i % 10}",
                label=sampler,
            )
        for i, group in enumerate(chosen):
            values = [scale * v for v in group.column(name)]
            mean = scale * group.mean(name)
            axes.errorbar(
                [group.nfe],
                [mean],
                yerr=[[mean - min(values)], [max(values) - mean]],
                fmt="*",
                markersize=12,
                color="k",
                capsize=4,
                zorder=5,
                label="chosen, mean and range of seeds" if i == 0 else None,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([4, 8, 12, 16, 30, 60]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
        axes.set_xlabel("denoiser evaluations")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("heard as meant, %")
    # finer towards 100, where the good ones are
    panels[0].set_yscale(
        "function",
        functions=(
            lambda a: -np.sqrt(np.maximum(101.0 - a, 0.0)),
            lambda v: 101.0 - np.square(np.minimum(v, 0.0)),
        ),
    )
    panels[0].set_ylim(0, 100.5)
    panels[0].yaxis.set_major_locator(FixedLocator([0, 20, 40, 60, 80, 90, 95, 98, 100]))
    panels[1].set_ylabel(f"Frechet distance, {reference.rows[0]['n']} clips")
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_locator(FixedLocator([5, 7, 10, 15, 20, 30, 50, 100, 200]))
    panels[1].yaxis.set_minor_locator(NullLocator())
    panels[1].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _short(group: Group) -> str:
    setting = Setting.parse(group.setting)
    return f"{setting.sampler} at {group.nfe}"


def page(
    out: Path,
    rows: Sequence[Row],
    lines: dict[str, list[Group]],
    reference: Group,
    chosen: Sequence[Group],
) -> str:
    """quality.md."""
    record = json.loads((out / "provenance.json").read_text(encoding="utf-8"))
    ceiling, n = record["recordings"], reference.rows[0]["n"]
    heads = ["setting", "NFE", "seed:first", "heard as meant", "confident", "Frechet", "spread"]
    parts = [
        "# Quality against evaluations",
        f"Preset `{record['pipeline']['preset']}`; {n} clips a row, by the recogniser of "
        "`fastscore evaluate`, which took no part in training. Brackets after shares: 95 % Wilson "
        f"intervals. Distance to {ceiling['n']} held-out recordings, biased upwards by small n: "
        "compare only within this page. Spread within a label over the recordings', in the "
        "recogniser's features, clips heard as meant only. Other recordings, "
        f"{ceiling['n']} of them: {_percent(ceiling['right'] / ceiling['n'])} heard as meant, "
        f"distance {ceiling['frechet']:.2f}.",
        "![Accuracy and Frechet distance against evaluations](quality.png)",
        "## Reference and chosen settings",
        f"Seeds from {CONFIRMED_FROM}; nothing was tuned on them. A setting says what differs from "
        "`provenance.json`, `defaults_of_a_setting`.",
        _table(heads, [_cells(g) for g in (reference, *chosen)]),
        "In which 95 % of seeds of the reference fall (mean +- t s sqrt(1 + 1/k)), and the chosen "
        "settings' means less its mean, with 95 % intervals (Welch):",
        _verdicts(reference, chosen),
        "## Every sampler",
        _table(heads, [_cells(g) for line in lines.values() for g in line]),
        "## Everything drawn",
        "Rows of seeds below "
        f"{CONFIRMED_FROM} were for the search; one row is rough (two points of accuracy).",
        _table(heads, [_cells(g) for g in _sorted(grouped(rows))]),
    ]
    return "\n\n".join(parts) + "\n"


def _sorted(groups: dict[str, Group]) -> list[Group]:
    return sorted(groups.values(), key=lambda g: (g.nfe, -g.accuracy.value, g.mean("frechet")))


def _cells(group: Group) -> list[str]:
    seeds = [f"{row['seed']}:{row.get('first', 0)}" for row in group.rows]
    return [
        f"`{group.setting}`",
        str(group.nfe),
        ", ".join(sorted(seeds)),
        str(group.accuracy),
        _percent(group.confident.value),
        f"{group.mean('frechet'):.2f}",
        f"{group.mean('embedding'):.2f}",
    ]


def _verdicts(reference: Group, chosen: Sequence[Group]) -> str:
    heads = ["setting", "figure", "reference: 95 % of seeds", "mean", "inside", "difference"]
    cells = []
    for group in chosen:
        for name, scale, unit in (("accuracy", 100.0, " %"), ("frechet", 1.0, "")):
            low, high = (scale * end for end in reference.interval(name))
            mean = scale * group.mean(name)
            gap, half = (scale * x for x in group.difference(reference, name))
            # better than the interval is as good as inside it
            inside = mean >= low if name == "accuracy" else mean <= high
            cells.append(
                [
                    f"`{group.setting}`",
                    "heard as meant" if name == "accuracy" else "Frechet",
                    f"{low:.2f} to {min(high, 100.0):.2f}{unit}",
                    f"{mean:.2f}{unit}",
                    "yes" if inside else "no",
                    f"{gap:+.2f} +- {half:.2f}",
                ]
            )
    return _table(heads, cells)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
