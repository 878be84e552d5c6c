"""Does --compare find a slow-down of 10 % in one operation, and none where nothing changed?

python bench/planted.py [--repetitions 10] [--seconds 200] [--threads 1] [--work FOLDER]

Runs of ``fastscore bench ops``, each a process of its own, follow each other: as it is, planted, as
it is, planted and so on. Planted is a busy wait after each call of one operation, another one each
time, as long as a tenth of what the call took in the run before. A repetition compares a run with
the planted one after it, and with the next one of the same code, by what ``fastscore bench
--compare`` calls. Finished runs stay in the work folder: where --seconds are up, the same command
goes on. Ends with status 1 where a planted slow-down is missed or another row is called changed.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastscore.files import write_bytes
from fastscore.measure.provenance import ROOT, commit
from fastscore.measure.results import ResultFile, read_results
from fastscore.measure.verdict import Verdict, compare_files, interval

# rows, and where the operation's name stands in fastscore.measure.operations
ROWS = {
    "ops/norm_act/8x32x40x32/native": "norm_act",
    "ops/tap_norm/1x32x40x32/native": "tap_norm",
    "ops/tap_fuse/8x128x10x8-128-spatial/native": "tap_fuse",
    "ops/tap_path/1x64x20x16-80-own/native": "tap_path",
    "ops/solver_step/1x1x80x64/native": "solver_step",
}
SLOWER = 0.1
# before the command line of a run
CHILD = "--child"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=200, help="start no run after (200)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "out" / "planted", help="where runs are kept"
    )
    parser.add_argument("--note", default="", help="a sentence for the result")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/cpu/planted.json")
    return parser.parse_args()


def slowed(function: Any, delay: float) -> Any:
    """The same, and then ``delay`` seconds of waiting that keep the core busy."""

    def call(*args: Any, **named: Any) -> Any:
        out = function(*args, **named)
        # one that is not slowed looks at the clock as well
        end = time.perf_counter() + delay
        while time.perf_counter() < end:
            pass
        return out

    return call


def child(operation: str, delay: float, command: list[str]) -> int:
    """``fastscore`` with one operation slowed."""
    from fastscore.cli import main
    from fastscore.measure import operations, suites  # noqa: F401

    # what was imported is not looked through at each sitting
    gc.freeze()

    setattr(operations, operation, slowed(getattr(operations, operation), delay))
    return main(command)


def measure(path: Path, operation: str, delay: float, threads: int) -> ResultFile:
    """One run in a process of its own; the one there is, if it is finished."""
    if path.exists() and read_results(path).finished:
        return read_results(path)
    command = ["bench", "ops", "--threads", str(threads), "--out", str(path), "--rounds", "100"]
    command += ["--time-only", "--quiet"]
    for row in ROWS:
        command += ["--only", row]
    start = [sys.executable, __file__, CHILD, operation, repr(delay), *command]
    run = subprocess.run(start, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {run.stderr.strip()}")
    return read_results(path)


def repetition(number: int, args: argparse.Namespace, left: Any) -> dict[str, Any] | None:
    """What one repetition found, None where the time is up."""
    row, operation = list(ROWS.items())[number % len(ROWS)]
    first, second, same = (
        args.work / name
        for name in (f"{number:02d}.json", f"{number:02d}-planted.json", f"{number + 1:02d}.json")
    )
    delay = 0.0
    for path in (first, second, same):
        if not path.exists() and not left():
            return None
        found = measure(path, operation, delay if path == second else 0.0, args.threads)
        if path == first:
            delay = SLOWER * found.row(row).time.median
    identical, planted = compare_files(first, same), compare_files(first, second)
    return {
        "row": row,
        "delay_seconds": delay,
        "found": row in planted.named("slower"),
        "others_called_changed": changed(planted, row),
        "false_alarms": changed(identical),
        "change_seen": planted_change(planted, row),
        "resolves": {"identical": identical.resolves, "planted": planted.resolves},
        "rows": {"identical": brief(identical), "planted": brief(planted)},
        "disjoint_intervals": outside(first, same),
    }


def changed(verdict: Verdict, planted: str | None = None) -> list[str]:
    return [n for v in ("slower", "faster") for n in verdict.named(v) if n != planted]


def planted_change(verdict: Verdict, row: str) -> float | None:
    return next(r.change.change for r in verdict.rows if r.name == row and r.change is not None)


def brief(verdict: Verdict) -> dict[str, Any]:
    """Change, its interval and what was resolved, by row."""
    return {
        r.name: {
            "verdict": r.verdict,
            "change": r.change and r.change.change,
            "interval": r.change and [r.change.low, r.change.high],
            "resolves": r.change and r.change.resolves,
        }
        for r in verdict.rows
    }


def outside(a: Path, b: Path) -> list[str]:
    """Rows of two runs of the same code whose stated intervals of the median do not overlap."""
    found = []
    first, second = read_results(a), read_results(b)
    for row in first.rows:
        x, y = interval(row.rounds), interval(second.row(row.name).rounds)
        if x.low > y.high or y.low > x.high:
            found.append(row.name)
    return found


def report(repetitions: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    rows = len(ROWS) * len(repetitions)
    runs = [read_results(path) for path in sorted(args.work.glob("*.json"))]
    return {
        # of the runs; they may have been made before they are compared
        "provenance": {k: v for k, v in runs[0].provenance.items() if k != "seen"},
        "commits": sorted({str(run.provenance["commit"]["id"]) for run in runs}),
        "compared_by": commit(),
        "note": args.note,
        "command": f"python bench/planted.py --repetitions {args.repetitions} "
        f"--threads {args.threads}",
        "planted": SLOWER,
        "found": sum(r["found"] for r in repetitions),
        "missed": sum(not r["found"] for r in repetitions),
        "pairs_with_false_alarms": sum(bool(r["false_alarms"]) for r in repetitions),
        "planted_pairs_with_other_rows_called_changed": sum(
            bool(r["others_called_changed"]) for r in repetitions
        ),
        "disjoint_intervals": sum(len(r["disjoint_intervals"]) for r in repetitions),
        "rows_in_identical_pairs": rows,
        "repetitions": repetitions,
    }


def main() -> int:
    if sys.argv[1:2] == [CHILD]:
        return child(sys.argv[2], float(sys.argv[3]), sys.argv[4:])
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    done = []
    for number in tqdm(range(args.repetitions), unit="repetition"):
        found = repetition(number, args, lambda: time.monotonic() - start < args.seconds)
        if found is None:
            print(f"{number} of {args.repetitions} repetitions done; the same command goes on")
            return 0
        done.append(found)
        print(
            f"{found['row']}: {'found' if found['found'] else 'MISSED'} at "
            f"{100 * found['change_seen']:+.1f} %; other rows called changed: "
            f"{', '.join(found['others_called_changed']) or 'none'}; in the identical pair: "
            f"{', '.join(found['false_alarms']) or 'none'}"
        )
    result = report(done, args)
    write_bytes(args.out, (json.dumps(result, indent=1) + "\n").encode())
    wrong = ("missed", "pairs_with_false_alarms", "planted_pairs_with_other_rows_called_changed")
    print({key: result[key] for key in ("found", *wrong, "disjoint_intervals")})
    return 1 if any(result[key] for key in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
