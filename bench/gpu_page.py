"""The GPU's part of docs/results.md and of the README, from bench/results/GPU/COMMIT.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_results import FORMAT, Goal, Stages, goals, said
from page_parts import NOT_HERE, source, table

BEGIN, END = "<!-- GPU figures: python bench/results_page.py -->", "<!-- end of GPU figures -->"
NONE_YET = (
    "No GPU figures exist yet; `bench/results/STATUS.md` says what is unproved, "
    "[docs/gpu.md](docs/gpu.md) how they are measured where there is one."
)
_MODELS = {
    "paper": "**ScoreSubnet**",
    "unet-paper-equal-trainable": "U-Net + classifier, equal trainable",
    "unet-paper-equal-total": "U-Net + classifier, equal total",
}


def files(results: Path) -> list[Path]:
    """Result files of GPUs, those written last first."""
    found = [p for p in results.glob("*/*.json") if _is_ours(p)]
    return sorted(found, key=lambda p: _values(p)["kept"], reverse=True)


def _is_ours(path: Path) -> bool:
    # a glance at the beginning: other results are large
    with path.open(encoding="utf-8") as file:
        return f'"format": "{FORMAT}"' in file.read(200)


def _values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(values["kept"], str) and isinstance(values["stages"], dict)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{path} is not a whole GPU result; keep the stages again")
    return values


def newest(results: Path) -> Stages:
    """The stages of the result that was kept last; none where there is none."""
    paths = files(results)
    return _values(paths[0])["stages"] if paths else {}


def goal_table(found: list[Goal]) -> str:
    """Figures beside what was aimed at; a mark that is met is in bold."""
    rows = []
    for goal in found:
        marks = [
            f"**{m:g}**" if goal.figure is not None and goal.figure <= m else f"{m:g}"
            for m in goal.marks
        ]
        command = f"`{goal.command}`" if goal.command else ""
        rows.append([goal.name, said(goal), ", ".join(marks), command])
    return table(["", "measured", "aimed at", "again by"], rows)


def step_table(stage: dict[str, Any]) -> str:
    """Latency of a step in all ways of running it, each baseline with its ratio to ScoreSubnet."""
    found: dict[tuple[str, str, str], float] = {}
    batches = set()
    for row in stage["rows"]:
        w = row["workload"]
        if row["status"] != "ok" or w["model"] not in _MODELS:
            continue
        way = " ".join(x for x in (w["backend"], w["mode"], w["precision"]) if x)
        kind = "guided" if w["guided"] else "unguided"
        found[w["model"], kind, way] = row["time"]["median"]
        batches.add(w["batch"])
    if not found:
        return f"Steps: {NOT_HERE}."
    ways = list(dict.fromkeys(way for _, _, way in found))
    rows = []
    for kind in ("guided", "unguided"):
        for model, title in _MODELS.items():
            cells = list(_cells(found, model, kind, ways))
            if any(cells):
                rows.append([f"{title}, {kind}", *(c or NOT_HERE for c in cells)])
    size = ", ".join(str(b) for b in sorted(batches))
    return table([f"us a step, batch {size}", *ways], rows)


def _cells(
    found: dict[tuple[str, str, str], float], model: str, kind: str, ways: list[str]
) -> Iterator[str]:
    for way in ways:
        value, ours = found.get((model, kind, way)), found.get(("paper", kind, way))
        if value is None:
            yield ""
            continue
        ratio = "" if model == "paper" or ours is None else f" ({value / ours:.2f}x)"
        yield f"{1e6 * value:.0f}{ratio}"


def serving_table(stage: dict[str, Any]) -> str:
    """Single requests and many clips, by model and way of running."""
    rows = []
    for name, row in stage["rows"].items():
        kind, _, rest = name.partition("/")
        if "failed" in row:
            rows.append([rest, f"failed: {row['failed']}", "", "", ""])
        elif kind == "latency":
            seconds = row["latency"]
            cells = (f"{1e3 * seconds['p50']:.2f}", f"{1e3 * seconds['p99']:.2f}")
            rows.append([f"{rest}, one clip", *cells, "", ""])
        else:
            energy = row.get("energy", {})
            joules = f"{energy['joules'] / row['clips']:.3g}" if "joules" in energy else "none"
            cells = ("", "", f"{row['best']:.2f} ({row['clips_per_second']:.0f} a second)", joules)
            rows.append([f"{rest}, {row['clips']} clips", *cells])
    return table(["8 evaluations, vocoder included", "p50, ms", "p99, ms", "s", "J a clip"], rows)


def check_line(stage: dict[str, Any] | None) -> str:
    """What the tests on that GPU said before anything was measured."""
    if stage is None:
        return "The tests were not run on this GPU: nothing below counts."
    tests = [r for r in stage["rows"].values() if "passed" in r]
    passed, failed = (sum(r.get(k, 0) for r in tests) for k in ("passed", "failure_count"))
    return f"Tests on this GPU: {passed} passed, {failed} failed. {source(stage, timed=False)}"


def section(results: Path) -> list[str]:
    """The GPU's section of the results page; says so where there is no result."""
    paths = files(results)
    if not paths:
        return [f"{NOT_HERE.capitalize()}: `bench/results/STATUS.md`, [gpu.md](gpu.md)."]
    stages = newest(results)
    parts = [
        f"From `bench/results/{paths[0].relative_to(results)}`.",
        check_line(stages.get("check")),
    ]
    parts += [goal_table(goals(stages))]
    for name in ("step-1", "step-8", "step-64", "step-256"):
        if name in stages:
            parts += [step_table(stages[name]), source(stages[name])]
    if "serving" in stages:
        parts += [serving_table(stages["serving"]), source(stages["serving"])]
    older = [f"`{p.relative_to(results)}`" for p in paths[1:]]
    return parts + ([f"Earlier: {', '.join(older)}."] if older else [])


def readme(text: str, results: Path) -> str:
    """The README with its GPU figures renewed; ValueError where it has no place for them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no lines {BEGIN!r} and {END!r}; put them back")
    paths = files(results)
    figures = NONE_YET
    if paths:
        gpu = paths[0].parent.name.upper()
        figures = f"On one {gpu}, each figure with its command:\n\n"
        figures += goal_table(goals(newest(results)))
    return f"{before}{begin}\n{figures}\n{end}{after}"
