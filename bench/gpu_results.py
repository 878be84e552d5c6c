"""Results of the GPU campaign as one file, and how they stand to its goals.

    python bench/gpu_results.py RESULTS [--keep]

RESULTS is the folder that bench/gpu_suite.sh wrote, or its results.tar.gz. --keep puts all of it,
raw rounds of `fastscore bench` left out, into bench/results/GPU/COMMIT.json, from which
`python bench/results_page.py` writes docs/results.md and the README's table. Results of several
calls at one commit are put together; a stage measured again takes the place of the older one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastscore.files import write_bytes

OUT = Path(__file__).resolve().parent / "results"
FORMAT, VERSION = "fastscore-gpu", 1
_KINDS = ("fastscore-stage", "fastscore-bench", "fastscore-headline")
PARTS = ("static", "memory", "time", "energy")
Stages = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """A figure that was aimed at: ``marks`` are what is asked first, next, and the limit if known.

    ``figure`` is what was measured, None where it was not; ``higher`` is never better here.
    ``source`` names the row it comes from, ``command`` what measures it again.
    """

    name: str
    unit: str
    marks: tuple[float, ...]
    figure: float | None = None
    source: str = ""
    command: str = ""

    @property
    def met(self) -> int:
        """How many marks are met, the first of them first."""
        if self.figure is None:
            return 0
        return sum(self.figure <= mark for mark in self.marks)


def read_folder(path: Path) -> Stages:
    """All results of a folder by stage; ValueError for one that is not JSON."""
    found: Stages = {}
    for file in sorted(path.glob("*.json")):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}); measure that stage again") from None
        if isinstance(values, dict) and values.get("format") in _KINDS:
            found[file.stem] = values
    for file in sorted(path.glob("*.jsonl")):
        lines = file.read_text(encoding="utf-8").splitlines()
        found[file.stem] = {"format": "lines", "rows": [json.loads(line) for line in lines]}
    return found


def read(path: Path) -> Stages:
    """Results of a folder or of the archive of one; ValueError where it is neither."""
    if path.is_dir():
        return read_folder(path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"{path} is no folder or archive of results: {error}") from None
        return read_folder(Path(folder))


def rows(stages: Stages, prefix: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Rows of all stages whose names begin so, with the command of their stage."""
    for stage in stages.values():
        found = stage.get("rows", {})
        named = found.items() if isinstance(found, dict) else ((r.get("name"), r) for r in found)
        for name, row in named:
            if name is not None and name.startswith(prefix) and isinstance(row, dict):
                yield name, row, row.get("workload", {}).get("command", stage.get("command", ""))


def least(
    stages: Stages, prefix: str, pick: Callable[[dict[str, Any]], float | None], want: str = ""
) -> tuple[float | None, str, str]:
    """The smallest figure of the rows whose names begin with ``prefix`` and match ``want``."""
    best: tuple[float | None, str, str] = (None, "", "")
    for name, row, command in rows(stages, prefix):
        value = pick(row) if re.search(want, name) else None
        if value is not None and (best[0] is None or value < best[0]):
            best = value, name, command
    return best


def _median(row: dict[str, Any]) -> float | None:
    return (row.get("time") or {}).get("median")


def _p99(row: dict[str, Any]) -> float | None:
    return row.get("latency", {}).get("p99")


def goals(stages: Stages) -> list[Goal]:
    """What was aimed at, each with its figure where that was measured."""
    found = []

    def goal(
        name: str, unit: str, marks: tuple[float, ...], best: tuple, scale: float = 1.0
    ) -> None:
        value, source, command = best
        scaled = None if value is None else scale * value
        found.append(Goal(name, unit, marks, scaled, source, command))

    step = least(stages, "step/paper/b1/guided/", _median)
    goal("guided step of `paper`, batch 1", "us", (150, 80, 33), step, 1e6)
    goal("the same over an unguided one", "x", (1.10,), _guidance(stages))
    for model in ("digits", "paper"):
        soon = least(stages, f"latency/{model}/", _p99)
        goal(f"label to 1.02 s of waveform, `{model}`, 8 evaluations, p99", "ms", (5, 3), soon, 1e3)
    for model in ("digits", "paper"):
        many = least(stages, f"clips/{model}/", lambda r: _for_clips(r, 2048))
        goal(f"2048 guided clips of `{model}`, vocoder included", "s", (5, 2), many)
    goal("peak memory at batch 64 over the pair of equal total size", "x", (0.6,), _memory(stages))
    goal("shapes of operations slower than the best of the others", "", (0,), _losers(stages))
    return found


def _for_clips(row: dict[str, Any], clips: int) -> float | None:
    return row.get("best") if row.get("clips") == clips else None


def _guidance(stages: Stages) -> tuple[float | None, str, str]:
    """Guided over unguided in the same way of running, where that is fastest guided."""
    best: tuple[float | None, str, str] = (None, "", "")
    medians = {name: _median(row) for name, row, _ in rows(stages, "step/paper/b1/")}
    guided = {n: v for n, v in medians.items() if "/guided/" in n and v is not None}
    for name in sorted(guided, key=guided.__getitem__):
        other = medians.get(name.replace("/guided/", "/unguided/"))
        if other is not None:
            command = (
                f"fastscore bench step --only {name} --only {name.replace('guided', 'unguided')}"
            )
            best = guided[name] / other, name, command
            break
    return best


def _memory(stages: Stages) -> tuple[float | None, str, str]:
    part = stages.get("costs", {}).get("memory", {})
    found = part.get("rows", {})
    sizes = []
    for name in ("scoresubnet/guided", "unet-equal-total/guided"):
        one = found.get(name, {}).get("64", {})
        if "tensor_peak" not in one:
            return None, "", ""
        sizes.append(one["weights"]["total"] + one["tensor_peak"])
    return sizes[0] / sizes[1], "costs", part.get("command", "")


def _losers(stages: Stages) -> tuple[float | None, str, str]:
    ops = stages.get("ops")
    if ops is None or not ops["rows"]:
        return None, "", ""
    # by the state of the caches, each None where nobody else took part
    raced = [r["ratio"] for r in ops["rows"].values() if any((r.get("ratio") or {}).values())]
    if not raced:
        return None, "", ""
    lost = sum(any(one and one["median"] < 1 for one in ratio.values()) for ratio in raced)
    return float(lost), f"{len(raced)} shapes", ops.get("command", "")


def report(folder: Path) -> str:
    """A line a stage, and a line a goal."""
    stages = read_folder(folder)
    lines = [f"{'stage':28} status"]
    for name, stage in stages.items():
        state = stage.get("status", "finished" if stage.get("finished", True) else "partial")
        # the headline comparison has parts instead of rows
        count = len(stage.get("rows", [part for part in PARTS if part in stage]))
        lines.append(f"{name:28} {state}, {count} rows")
    lines.append("")
    lines += [f"{said(g):14} {g.name}  (marks: {', '.join(f'{m:g}' for m in g.marks)})"
              for g in goals(stages)]  # fmt: skip
    return "\n".join(lines)


def said(goal: Goal) -> str:
    """Figure and unit, for people."""
    return "not measured" if goal.figure is None else f"{goal.figure:.3g} {goal.unit}".strip()


def device_name(stages: Stages) -> str:
    """The GPU that stages ran on, as a folder's name: h100; ValueError for several or none."""
    names = {
        (stage.get("provenance", {}).get("gpu") or {}).get("name")
        for stage in stages.values()
        if "provenance" in stage
    } - {None}
    if len(names) != 1:
        raise ValueError(
            f"the results come from {len(names)} GPUs ({', '.join(sorted(names))}); keep those of "
            "one GPU at a time"
        )
    name = names.pop().lower()
    known = re.search(r"\b([a-z]+\d+[a-z]*)\b", name)
    return known[1] if known else re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def commit_of(stages: Stages) -> str:
    """The commit of all stages, with -dirty where files differed; ValueError for several."""
    found = set()
    for stage in stages.values():
        about = stage.get("provenance", {}).get("commit")
        if about is not None:
            found.add((about["id"] or "unknown") + ("-dirty" if about["dirty"] else ""))
    if len(found) != 1:
        raise ValueError(
            f"the results are of {len(found)} commits ({', '.join(sorted(found))}); keep each by "
            "itself"
        )
    return found.pop()


def kept(stages: Stages, out: Path) -> Path:
    """Write all stages into OUT/GPU/COMMIT.json, beside those that the file holds already."""
    path = out / device_name(stages) / f"{commit_of(stages)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before: Stages = {}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))["stages"]
    merged = before | {name: _slim(stage) for name, stage in stages.items()}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    values = {"format": FORMAT, "version": VERSION, "kept": now, "stages": merged}
    write_bytes(path, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())
    return path


def _slim(stage: dict[str, Any]) -> dict[str, Any]:
    """Without single rounds, of which there are hundreds a row; quantiles stay."""
    if not isinstance(stage.get("rows"), list):
        return stage
    return stage | {"rows": [{k: v for k, v in r.items() if k != "rounds"} for r in stage["rows"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, metavar="RESULTS")
    parser.add_argument("--keep", action="store_true", help="into bench/results/GPU/COMMIT.json")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="for --keep")
    args = parser.parse_args()
    stages = read(args.results)
    if not stages:
        raise ValueError(f"{args.results} holds no result")
    for goal in goals(stages):
        print(f"{said(goal):14} {goal.name}  {goal.source}")
    if args.keep:
        print(kept(stages, args.out))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"gpu_results: {error}")
