"""Correctness before any figure counts: every test that runs on the GPU, with its failures.

    python bench/gpu_check.py --out FILE [--jobs 8]

Rows: `kernels built` (all kernels of the presets compiled for this GPU, spills counted), and a row
a group of test files run by `pytest -m gpu`: passed, failed, skipped, and the first line of each
failure. Without --jobs tests run one after the other.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import torch
from stage import Stage, parser

ROOT = Path(__file__).resolve().parents[1]
# kernels first: what builds on them fails with them
GROUPS = {
    "kernels": ["tests/test_gpu_*.py", "tests/test_backends.py"],
    "engine": ["tests/test_engine_cuda.py", "tests/test_stats.py"],
    "measuring": ["tests/test_measure_*.py"],
    "training": ["tests/test_train_*.py"],
}
FAILURES = 30


def tests(files: list[str], gpu: bool, jobs: int, seconds: float) -> dict[str, Any]:
    """What pytest says of some files; on a CPU (a dry run) of a few tests of each."""
    found = sorted(str(p.relative_to(ROOT)) for f in files for p in ROOT.glob(f))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *found]
        command += ["-m", "gpu"] if gpu else ["--collect-only"]
        command += [f"--junitxml={report}"]
        if jobs > 1 and importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(jobs)]
        start = time.perf_counter()
        try:
            run = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired as error:
            tail = (error.stdout or b"").decode(errors="replace")[-1500:]
            return {"failed": f"no end within {seconds:.0f} s", "output": tail}
        row = outcome(report) if report.is_file() else {}
    row |= {"command": " ".join(command[1:]), "seconds": time.perf_counter() - start}
    # 5: no test was collected, as on a machine without a GPU
    if run.returncode not in (0, 5):
        row.setdefault("failed", f"pytest ended with {run.returncode}")
        row["output"] = (run.stdout + run.stderr)[-3000:]
    return row


def outcome(report: Path) -> dict[str, Any]:
    """Counts and failures of a JUnit report; ``failed`` where there is a failure."""
    cases = list(ET.parse(report).getroot().iter("testcase"))
    broken = [(c, c.find(kind)) for c in cases for kind in ("failure", "error")]
    failures = [
        f"{c.get('classname')}::{c.get('name')}: {(e.get('message') or '').splitlines()[:1]}"
        for c, e in broken
        if e is not None
    ]
    skipped = sum(c.find("skipped") is not None for c in cases)
    row: dict[str, Any] = {
        "passed": len(cases) - len(failures) - skipped,
        "skipped": skipped,
        "failures": failures[:FAILURES],
        "failure_count": len(failures),
    }
    if failures:
        row["failed"] = f"{len(failures)} of {len(cases)} tests failed"
    return row


def built(arch: str, jobs: int, dry: bool) -> dict[str, Any]:
    """Compile every kernel of the presets, into the cache that launches then find them in."""
    command = [sys.executable, "-m", "fastscore_kernels.build", "--arch", arch]
    command += ["--jobs", str(jobs), "--dtype", "bfloat16", "--dtype", "float32"]
    if dry:
        command += ["--op", "solver_step", "--preset", "tiny", "--batch", "1"]
    # what a launch compiles is looked for here
    if cache := os.environ.get("TRITON_CACHE_DIR"):
        command += ["--cache-dir", cache]
    start = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"seconds": time.perf_counter() - start, "arch": arch}
    said = re.search(r"(\d+) kernels built, (\d+) problems", run.stdout)
    if said is None or run.returncode not in (0, 1):
        return row | {"failed": (run.stdout + run.stderr)[-1500:]}
    row |= {"kernels": int(said[1]), "problems": int(said[2])}
    return row if not row["problems"] else row | {"failed": run.stderr[-1500:]}


def architecture() -> str:
    """Name of the GPU's instruction set, as kernels are built for it."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--jobs", type=int, default=1)
    return found.parse_args()


def main() -> None:
    args = arguments()
    with Stage.open("check", args) as stage:
        gpu = stage.device.type == "cuda"
        arch = architecture() if gpu else "sm_90"
        work = {"kernels built": lambda: built(arch, args.jobs, args.dry)}
        for name, files in GROUPS.items():
            work[name] = lambda f=files: tests(f, gpu, args.jobs, max(30.0, stage.seconds_left))
        for name, run in work.items():
            if stage.wants(name):
                stage.add(name, run())
                print(f"{name:15} {summary(stage.rows[name])}", flush=True)
        stage.finish(len(work))
    if stage.values["status"] != "ok":
        sys.exit(1)


def summary(row: dict[str, Any]) -> str:
    if "kernels" in row:
        text = f"{row['kernels']} kernels, {row['problems']} problems"
    else:
        text = f"{row.get('passed', 0)} passed, {row.get('skipped', 0)} skipped"
    text += f", {row.get('seconds', 0):.0f} s"
    if "failed" in row:
        text += "".join(f"\n    {line}" for line in [row["failed"], *row.get("failures", ())])
    return text


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"gpu_check: {error}")
