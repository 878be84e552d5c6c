"""The stages of the GPU campaign, and what runs them: bench/gpu_suite.sh calls this.

A stage is a command with a limit. It is told to end by itself before the limit, interrupted at it,
and killed soon after; its result and log lie in GPU_WORK/results, and all of them are packed into
GPU_OUT/results.tar.gz after every stage.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpu_results import report
from stage import mark_failed

ROOT = Path(__file__).resolve().parents[1]
# seconds: to end by itself before the limit, to be interrupted before it is killed, to pack results
_EARLY, _GRACE, _PACKING = 15.0, 20.0, 10.0
# a stage that is given less is not begun
_FEWEST = 30.0
# lines of a stage's output that are shown again at its end
_SHOWN = 25


@dataclass(frozen=True)
class Place:
    """Where and how stages run."""

    work: Path
    out: Path
    dry: bool
    data: tuple[str, ...] = ()
    jobs: int = 12

    @property
    def results(self) -> Path:
        """Folder of results and logs."""
        return self.work / "results"

    @property
    def device(self) -> str:
        """A dry run needs no GPU."""
        return "cpu" if self.dry else "cuda"


# (place, result file, minutes) to the arguments after "python"
Command = Callable[[Place, Path, float], list[str]]


@dataclass(frozen=True)
class Planned:
    """A stage: at most so many minutes, the command, and what comes back beside its result."""

    name: str
    minutes: float
    command: Command
    environment: dict[str, str] = field(default_factory=dict)


def script(path: str, *words: str, **dry_environment: str) -> tuple[Command, dict[str, str]]:
    """A script that takes the common arguments of `stage.parser`."""

    def command(place: Place, result: Path, minutes: float) -> list[str]:
        common = ["--out", str(result), "--device", place.device, "--minutes", f"{minutes:.2f}"]
        given = [w.format(jobs=place.jobs) for w in words]
        return [f"bench/{path}", *given, *common, *(["--dry"] if place.dry else [])]

    return command, dry_environment


def steps(batch: int, *options: str) -> Command:
    """Rows of `fastscore bench step` at one batch size, the baselines treated alike."""

    def command(place: Place, result: Path, minutes: float) -> list[str]:
        words = ["-m", "fastscore", "bench", "step", "--out", str(result), "--quiet"]
        words += ["--device", place.device, *options]
        if place.dry:
            only = [f"step/digits/b{min(batch, 8)}/guided/native"]
            words += ["--rounds", "2"]
        else:
            only = [f"step/*paper*/b{batch}/guided/{way}" for way in WAYS]
            only += [f"step/*paper*/b{batch}/unguided/triton/{way}" for way in UNGUIDED]
        return words + [w for pattern in only for w in ("--only", pattern)]

    return command


def costs(place: Place, result: Path, minutes: float) -> list[str]:
    """Parameters, memory and joules of ScoreSubnet and the baselines."""
    parts = ["static"] if place.dry else ["static", "memory", "energy"]
    size = "tiny" if place.dry else "paper"
    words = ["bench/headline.py", "--size", size, "--device", place.device, "--out", str(result)]
    return [*words, "--part", *parts]


def training(part: str) -> Command:
    """`bench/gpu_train.py` of one part; its run folder goes on where it is."""

    def command(place: Place, result: Path, minutes: float) -> list[str]:
        words, _ = script("gpu_train.py", part)
        found = [*words(place, result, minutes), "--runs", str(place.work / "train")]
        return found + (["--data", *place.data] if place.data else [])

    return command


def quality(place: Place, result: Path, minutes: float) -> list[str]:
    """How the trained models of the published size sound against evaluations."""
    size = "tiny" if place.dry else "paper"
    words = ["bench/headline_quality.py", "--size", size, "--device", place.device]
    words += ["--out", str(result.with_suffix(".jsonl")), "--minutes", f"{minutes:.2f}"]
    if place.dry:
        words += ["--only", "scoresubnet", "--nfe", "8", "--n", "20", "--dnsmos-clips", "0"]
    else:
        words += ["--precision", "bf16", "--runs", str(place.work / "train")]
    return [*words, "--data", *place.data]


# compilation takes half a minute a row: guided ones only
WAYS = (
    *("reference", "reference/compile", "reference/graphs"),
    *("triton/graphs", "triton/graphs/bf16", "triton/compiled-graphs/bf16"),
)
UNGUIDED = ("graphs", "graphs/bf16")
TRAINED = ("classifier", "score", "unet-equal-total", "unet-equal-trainable", "vocoder")
STAGES = {
    s.name: s
    for s in (
        Planned("check", 9.0, *script("gpu_check.py", "--jobs", "{jobs}")),
        Planned("sanitize", 6.0, *script("sanitize.py")),
        Planned("step-1", 9.0, steps(1, "--time-only")),
        Planned("step-64", 6.0, steps(64)),
        Planned("step-8", 5.0, steps(8, "--time-only")),
        Planned("step-256", 6.0, steps(256, "--time-only")),
        Planned("serving", 9.0, *script("serving.py", "--energy")),
        Planned("hot", 5.0, *script("hot_kernels.py", "--ncu")),
        Planned("ops", 9.0, *script("op_race.py", TRITON_INTERPRET="1")),
        Planned("experiments", 6.0, *script("experiments.py")),
        Planned("tune", 9.0, *script("tune.py", TRITON_INTERPRET="1")),
        Planned("costs", 9.0, costs),
        *(Planned(f"train-{part}", 9.0, training(part)) for part in TRAINED),
        Planned("quality", 9.0, quality),
    )
}
# calls of ten minutes in the order in which they are worth most
GROUPS = {
    "first": ("check", "sanitize"),
    "second": ("step-1", "serving"),
    "third": ("train-classifier", "train-score"),
    "fourth": ("hot", "experiments", "costs"),
    "fifth": ("ops", "step-64"),
    "sixth": ("tune",),
    "seventh": ("train-unet-equal-total", "quality"),
    "eighth": ("train-unet-equal-trainable", "step-8", "step-256"),
    "ninth": ("train-vocoder",),
    "all": tuple(STAGES),
}


def chosen(words: Sequence[str]) -> list[Planned]:
    """Stages of names and groups; ValueError for a word that is neither."""
    names = [name for word in words for name in GROUPS.get(word, (word,))]
    for name in names:
        if name not in STAGES:
            raise ValueError(
                f"{name!r} is no stage; choose from {', '.join(STAGES)}, or from the groups "
                f"{', '.join(GROUPS)}"
            )
    return [STAGES[name] for name in dict.fromkeys(names)]


def run(stage: Planned, place: Place, seconds: float) -> int:
    """Run one stage for at most ``seconds``; its exit code, 124 where it had to be stopped."""
    result = place.results / f"{stage.name}.json"
    words = stage.command(place, result, max(0.1, (seconds - _EARLY) / 60))
    environment = {**os.environ, **(stage.environment if place.dry else {})}
    line = shlex.join(["python", *words])
    print(f"== {stage.name} (at most {seconds / 60:.1f} minutes): {line}", flush=True)
    log = place.results / f"{stage.name}.log"
    with log.open("w") as file:
        file.write(line + "\n")
        file.flush()
        # a group of its own, so that what it started ends with it
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = _stop(process)
        except BaseException:
            _stop(process)
            raise
    print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-_SHOWN:]), flush=True)
    if code:
        mark_failed(result, f"exit code {code}; see {log.name}")
    return code


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
        for path in sorted(place.results.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                archive.add(path, path.name)
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


def listing() -> str:
    """Stages with their limits, and the groups."""
    lines = [f"{s.name:30} at most {s.minutes:g} minutes" for s in STAGES.values()]
    return "\n".join(lines + [f"{n:30} {' '.join(g)}" for n, g in GROUPS.items()])


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
