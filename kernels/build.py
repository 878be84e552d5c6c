"""Build every GPU kernel ahead of time, for chips that need not be there.

``python -m fastscore_kernels.build --arch sm_90 --report`` compiles each kernel once for every
distinct form that the models' presets ask for and prints registers, spills, shared memory and
instruction mix. Compiled kernels stay in a folder, by content: a second run takes seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ARCHS = ("sm_80", "sm_90", "sm_100")
_COLUMNS = ("registers", "spills", "shared", "tensor", "loads", "wide_loads", "instructions")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastscore_kernels.build: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all kernels fit, 1 when one does not, 2 for bad arguments."""
    if importlib.util.find_spec("triton") is None:
        print(
            "fastscore_kernels.build: Triton is not installed; it comes with PyTorch on Linux: "
            "pip install triton",
            file=sys.stderr,
        )
        return 2
    parser = _parser()
    options = parser.parse_args(arguments)
    request = _request(parser, options)
    reports = build(request, options.jobs)
    failures = [problem for r in reports for problem in problems(r)]
    if options.json is not None:
        _write(options.json, json.dumps({"format": 1, "kernels": reports}, indent=1) + "\n")
    if options.report:
        print(table(reports))
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(reports)} kernels built, {len(failures)} problems")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    from fastscore_kernels.gpu import shapes

    parser = _Parser(prog="python -m fastscore_kernels.build", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="a chip (default: all)")
    parser.add_argument("--op", action="append", choices=_ops(), help="an operation (default: all)")
    parser.add_argument(
        "--preset", action="append", choices=tuple(shapes.CLASSIFIERS), help="(default: all)"
    )
    parser.add_argument("--dtype", action="append", choices=shapes.DTYPES, help="(default: all)")
    parser.add_argument(
        "--batch", action="append", type=_positive, help="a batch size (default: 1, 8, 64)"
    )
    parser.add_argument(
        "--early", action="store_true", help="as launched before the one ahead has ended; sm_90 on"
    )
    parser.add_argument("--report", action="store_true", help="print one line a kernel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--jobs", type=_positive, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    parser.add_argument(
        "--cache-dir", type=Path, default=_default_cache(), help="where built kernels stay"
    )
    return parser


def _ops() -> tuple[str, ...]:
    return (
        "norm_act",
        "bias_add",
        "tap_norm",
        "tap_fuse",
        "tap_path",
        "edm_inputs",
        "class_cotangents",
        "solver_step",
    )


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 0 < value <= 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 65536")
    return value


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastscore" / "kernels"


def _request(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    from fastscore_kernels.gpu import shapes
    from fastscore_kernels.gpu.launch import EARLY

    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json {options.json}: its folder does not exist; create it first")
    if options.json is not None and options.json.is_dir():
        parser.error(f"--json {options.json} is a folder; name a file")
    try:
        options.cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--cache-dir {options.cache_dir} cannot be made: {error.strerror}")
    if not os.access(options.cache_dir, os.W_OK):
        parser.error(f"--cache-dir {options.cache_dir} cannot be written to; choose another")
    able = [a for a in ARCHS if a in EARLY] if options.early else list(ARCHS)
    for arch in options.arch or ():
        if arch not in able:
            parser.error(f"--early: {arch} cannot launch kernels early; {' and '.join(able)} can")
    return {
        "archs": options.arch or able,
        "early": options.early,
        "ops": options.op or list(_ops()),
        "presets": options.preset or list(shapes.CLASSIFIERS),
        "dtypes": options.dtype or list(shapes.DTYPES),
        "batches": options.batch or list(shapes.BATCHES),
        "cache": str(options.cache_dir.resolve()),
    }


def build(request: dict[str, Any], jobs: int) -> list[dict[str, Any]]:
    """Build all that ``request`` names in ``jobs`` processes: a report a kernel, sorted.

    RuntimeError when a process ends without having done its share.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = request["cache"]
    workers = []
    for part in range(jobs):
        worker = subprocess.Popen(
            [sys.executable, "-m", "fastscore_kernels.gpu.aot"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert worker.stdin is not None
        worker.stdin.write(json.dumps({**request, "part": part, "parts": jobs}))
        worker.stdin.close()
        workers.append(worker)
    reports = []
    for worker in workers:
        assert worker.stdout is not None
        reports += [json.loads(line) for line in worker.stdout]
    if any(worker.wait() for worker in workers):
        raise RuntimeError("a build process failed; what it said is above")
    return sorted(reports, key=lambda r: (r["arch"], r["label"], r["kernel"], str(r)))


def problems(report: dict[str, Any]) -> list[str]:
    """What keeps a kernel from being accepted: an error, spills, shared memory, haste."""
    from fastscore_kernels.gpu.launch import SHARED_MEMORY

    name = f"{report['arch']} {report['kernel']} ({report['label']})"
    if "error" in report:
        return [f"{name}: does not compile: {report['error']}"]
    found = []
    if report["spills"]:
        found.append(f"{name}: {report['spills']} spill instructions")
    limit = SHARED_MEMORY[report["arch"]]
    if report["shared"] > limit:
        found.append(f"{name}: {report['shared']} bytes of shared memory, {limit} at most")
    if report["unwaited"]:
        found.append(f"{name}: {report['unwaited']} accesses before it waits for the one ahead")
    return found


def table(reports: Sequence[dict[str, Any]]) -> str:
    """The reports as aligned text, one line a kernel."""
    built = [r for r in reports if "error" not in r]
    rows = [("arch", "kernel", "warps", *_COLUMNS, "first problem")]
    for r in built:
        figures = (str(r[column]) for column in _COLUMNS)
        rows.append((r["arch"], r["kernel"], str(r["warps"]), *figures, r["label"]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 or i == len(widths) - 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.resolve().parent, delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


if __name__ == "__main__":
    raise SystemExit(main())
