"""Runs stages of the GPU campaign; bench/gpu_suite.sh calls it.

A stage is told to end by itself before its limit, interrupted at it, and killed soon after; its
result and log lie in GPU_WORK/results, and all of them are packed into GPU_OUT/results.tar.gz after
every stage.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import IO

from gpu_results import report
from gpu_stages import Place, Planned, chosen, listing
from stage import mark_failed

ROOT = Path(__file__).resolve().parents[1]
# seconds: to end by itself before the limit, to be interrupted before it is killed, to pack results
_EARLY, _GRACE, _PACKING = 15.0, 20.0, 10.0
# a stage that is given less is not begun
_FEWEST = 30.0
# lines of a stage's output that are shown again at its end
_SHOWN = 25


def run(stage: Planned, place: Place, seconds: float) -> int:
    """Run one stage for at most ``seconds``; its exit code, 124 where it had to be stopped."""
    result = place.results / f"{stage.name}.json"
    until = time.monotonic() + seconds
    environment = {**os.environ, **(stage.environment if place.dry else {})}
    print(f"== {stage.name} (at most {seconds / 60:.1f} minutes)", flush=True)
    log = place.results / f"{stage.name}.log"
    with log.open("w") as file:

        def do(words: list[str]) -> int:
            return _call(words, environment, file, until - time.monotonic())

        code = next(filter(None, map(do, stage.before(place))), 0)
        left = until - time.monotonic() - _EARLY
        code = code or do(stage.command(place, result, max(0.1, left / 60)))
        code = code or next(filter(None, map(do, stage.after(place))), 0)
    print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-_SHOWN:]), flush=True)
    if code:
        mark_failed(result, f"exit code {code}; see {log.name}")
    return code


def _call(words: list[str], environment: dict[str, str], log: IO[str], seconds: float) -> int:
    """One command into the log for at most so long, and whatever it started."""
    line = shlex.join(["python", *words])
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()
    # a group of its own, so that what it started ends with it
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return _stop(process)
    except BaseException:
        _stop(process)
        raise


def _stop(process: subprocess.Popen) -> int:
    """Interrupt a stage, then kill it and whatever it started."""
    for number, patience in ((signal.SIGINT, _GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    return 124


def pack(place: Place) -> None:
    """All results and logs as one file, whole at any moment."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in sorted(place.results.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                archive.add(path, path.relative_to(place.results))
    part = place.out / ".results.part"
    part.write_bytes(buffer.getvalue())
    os.replace(part, place.out / "results.tar.gz")


def resume(place: Place, archive: Path) -> None:
    """Put the results of an earlier machine where they are gone on with."""
    try:
        with tarfile.open(archive) as found:
            found.extractall(place.results, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"GPU_RESUME {archive} is no result of this script: {error}") from None


def recordings(work: Path) -> tuple[str, ...]:
    """Roots of recordings: GPU_DATA, or parcels that have all arrived."""
    if given := os.environ.get("GPU_DATA", "").split():
        return tuple(given)
    parcels = os.environ.get("GPU_PARCELS", "").split()
    if parcels:
        words = [
            sys.executable,
            "bench/parcels.py",
            "unpack",
            *parcels,
            "--out",
            str(work / "data"),
        ]
        if subprocess.run(words, cwd=ROOT, check=False).returncode:
            print("recordings are not complete yet: stages that need them will say so")
    folder = work / "data"
    found = sorted(p for p in folder.rglob("testing_list.txt")) if folder.is_dir() else []
    return tuple(str(p.parent) for p in found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_suite.sh", description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="*", metavar="STAGE|GROUP")
    parser.add_argument("--list", action="store_true", help="name stages and groups, run nothing")
    parser.add_argument("--dry", action="store_true", help="smallest sizes, on a CPU")
    args = parser.parse_args()
    if not args.stage and not args.list:
        parser.error("no stage was named; --list names them")
    return args


def main() -> int:
    args = arguments()
    if args.list:
        print(listing())
        return 0
    stages = chosen(args.stage)
    until = time.monotonic() + 60 * float(os.environ.get("GPU_MINUTES", "9.5"))
    work, out = Path(os.environ["GPU_WORK"]), Path(os.environ.get("GPU_OUT", "out"))
    for folder in (work / "results", out):
        folder.mkdir(parents=True, exist_ok=True)
    jobs = 1 if args.dry else int(os.environ.get("GPU_JOBS", "12"))
    place = Place(work.resolve(), out.resolve(), args.dry, recordings(work), jobs)
    if archive := os.environ.get("GPU_RESUME"):
        resume(place, Path(archive))
    failed = False
    for stage in stages:
        seconds = min(60 * stage.minutes, until - time.monotonic() - _PACKING)
        if seconds < _FEWEST:
            print(f"== {stage.name}: not begun, no time is left", flush=True)
            continue
        failed |= run(stage, place, seconds) != 0
        pack(place)
    print(report(place.results))
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        sys.exit(2)
