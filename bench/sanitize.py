"""Every Triton kernel under the four tools of compute-sanitizer, with a planted error first.

    python bench/sanitize.py --out FILE [--jobs 8] [--tool memcheck --tool ..] [--op norm_act ..]
    python bench/sanitize.py --case OP [--device cuda]    # that case alone, watched by nothing

A row a case (bench/odd_cases.py) by itself, which compiles its kernels, and one a tool and case.
A row without errors counts only where the tool's summary says so and the case says that it ran; and
memcheck and initcheck only where they find what is planted. A tool that is missing, or refuses, is
a row that failed and says why. PyTorch's allocator keeps no memory here: it would hide what lies
between two tensors.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import odd_cases
import torch
from stage import Stage, parser

ALONE = "alone"
TOOL = "compute-sanitizer"
TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
# what these two are to find; the others would need a fault that no Triton kernel can have
PLANTED = ("memcheck", "initcheck")
CASES = Path(odd_cases.__file__)
# seconds that one run of a case may take, and that there must be left to begin one
LIMIT, SHORTEST = 120.0, 10.0
LINES = 12
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
_RACES = re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warning")
# what the tool says of itself, and not of a kernel
_REFUSAL = re.compile(
    r"^=+ ((?:Error: (?!Race reported)|Internal Sanitizer Error|Unable to).*)$",
    re.MULTILINE,
)


class Run(NamedTuple):
    """How a process ended: its code (None: not within the limit), what it said, and seconds."""

    code: int | None
    text: str
    seconds: float


def case_command(op: str, device: torch.device) -> list[str]:
    """A case in a process of its own."""
    return [sys.executable, str(CASES), op, "--device", device.type]


def sanitizer_command(tool: str, op: str, device: torch.device) -> list[str]:
    """The same under a tool.

    Compilers that Triton starts are left alone, and so are errors of the CUDA interface that
    PyTorch asks for and handles.
    """
    options = ["--tool", tool, "--target-processes", "application-only"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [TOOL, *options, *case_command(op, device)]


def started(command: list[str], limit: float) -> Run:
    """Run a command, without a cache of device memory."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
            check=False,
        )
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, text = None, (error.stdout or b"").decode(errors="replace")
    return Run(code, text, time.perf_counter() - start)


def alone(op: str, run: Run) -> dict[str, Any]:
    """Row of a case by itself."""
    row: dict[str, Any] = {"op": op, "seconds": run.seconds, "code": run.code}
    return row if _ran(op, run) else row | {"failed": _ending(run), "report": run.text[-2000:]}


def judged(tool: str, op: str, run: Run) -> dict[str, Any]:
    """Row of a case under a tool; ``errors`` is None where the tool gave no verdict."""
    errors = reported(run.text)
    row: dict[str, Any] = {"tool": tool, "op": op, "errors": errors, "seconds": run.seconds}
    row["code"] = run.code
    refusal = _REFUSAL.search(run.text)
    if run.code is None:
        row["failed"] = _ending(run)
    elif errors is None:
        row["failed"] = f"refused: {refusal[1]}" if refusal else f"no summary; {_ending(run)}"
    elif op == odd_cases.PLANTED:
        if not errors:
            row["failed"] = f"{tool} found nothing of what is planted: its other rows mean nothing"
    elif errors:
        row["failed"] = f"{errors} errors"
    elif refusal:
        row |= {"failed": f"refused: {refusal[1]}", "errors": None}
    elif not _ran(op, run):
        row |= {"failed": f"no error reported, but the case did not run; {_ending(run)}"}
    if errors or "failed" in row:
        row["report"] = first_report(run.text)
    return row


def reported(text: str) -> int | None:
    """Errors by the summaries of a tool, warnings of races included; None without a summary."""
    found = [int(n) for n in _SUMMARY.findall(text)]
    found += [int(errors) + int(warnings) for errors, warnings in _RACES.findall(text)]
    return sum(found) if found else None


def first_report(text: str) -> list[str]:
    """The first lines of what a tool says, or the last of what there is where it says nothing."""
    said = [line for line in text.splitlines() if line.startswith("=====")]
    body = [line for line in said if "COMPUTE-SANITIZER" not in line]
    return body[:LINES] or text.splitlines()[-LINES:]


def _ran(op: str, run: Run) -> bool:
    return run.code == 0 and odd_cases.finished(op) in run.text


def _ending(run: Run) -> str:
    return "no end within the limit" if run.code is None else f"the process ended with {run.code}"


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--tool", action="append", choices=TOOLS, help="(default: all)")
    found.add_argument("--op", action="append", choices=tuple(odd_cases.CASES), help="(all)")
    found.add_argument("--jobs", type=int, default=4, help="runs at once (%(default)s)")
    return found.parse_args()


def work(args: argparse.Namespace) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Tool and case of every row: cases by themselves, then under tools, what is planted first."""
    ops = args.op or list(odd_cases.CASES)
    ops = ops[:1] if args.dry else ops
    tools = args.tool or list(TOOLS)
    planted = [(tool, odd_cases.PLANTED) for tool in tools if tool in PLANTED]
    return [(ALONE, op) for op in ops], planted + [(tool, op) for tool in tools for op in ops]


def row_of(tool: str, op: str, device: torch.device, dry: bool) -> dict[str, Any]:
    """Measure one row; a dry run does without the tool where it is not installed, and says so."""
    if tool == ALONE:
        return alone(op, started(case_command(op, device), LIMIT))
    if shutil.which(TOOL) is None:
        sentence = f"{TOOL} is not on the PATH; it comes with the CUDA toolkit"
        why = {"skipped": sentence} if dry else {"failed": f"refused: {sentence}"}
        return {"tool": tool, "op": op, "errors": None, **why}
    return judged(tool, op, started(sanitizer_command(tool, op, device), LIMIT))


def main() -> None:
    args = arguments()
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} must be at least 1")
    with Stage.open("sanitize", args) as stage, ThreadPoolExecutor(args.jobs) as pool:

        def measured(row: tuple[str, str]) -> tuple[str, dict[str, Any] | None]:
            name = "/".join(row)
            if not stage.wants(name, SHORTEST):
                return name, None
            return name, row_of(*row, stage.device, args.dry)

        first, others = work(args)
        # compiled by themselves: under a tool that would take long, and be watched
        for rows in (first, others):
            for name, row in pool.map(measured, rows):
                if row is not None:
                    stage.add(name, row)
                    print(f"{name:32} {row.get('failed', row.get('skipped', 'ok'))}", flush=True)
        stage.finish(len(first) + len(others))
    if stage.values["status"] != "ok":
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        sys.exit(odd_cases.main(sys.argv[2:]))
    try:
        main()
    except ValueError as error:
        sys.exit(f"sanitize: {error}")
