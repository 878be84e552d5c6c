"""``fastscore bench``: measure named workloads, and compare measurements."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from fastscore.commands.common import add_machine, set_threads
from fastscore.measure.workloads import SUITES, Workload, chosen


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "bench",
        help="measure named workloads, and compare measurements",
        description="Time the workloads of a suite in turn, each after its answer has been "
        "checked, with memory, multiply-accumulates and the share of the machine's bound; or "
        "say what changed between two result files, or since a commit.",
    )
    parser.add_argument("suite", nargs="?", metavar="SUITE", help=f"one of {', '.join(SUITES)}")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="rows of that name, of a pattern with *, or with that part; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="print the names of rows and stop")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds a row (default: some seconds' worth)"
    )
    parser.add_argument(
        "--energy",
        type=float,
        metavar="SECONDS",
        help="measure joules too, repeating each row so long",
    )
    parser.add_argument(
        "--time-only", action="store_true", help="leave memory, costs and bounds out"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="result file (default: bench-SUITE-DEVICE.json in this folder)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="what changed from A to B beyond noise; measures nothing",
    )
    what.add_argument(
        "--against",
        metavar="REF",
        help="run the suite at a git commit too, in turn with this one, and compare",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_machine(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int | None:
    """Measure or compare, and print."""
    if args.compare is not None:
        return _compare(args)
    if args.suite is None:
        raise ValueError(f"no suite was named; choose one of {', '.join(SUITES)}")
    workloads = chosen(args.suite, args.only)
    if args.list:
        print("\n".join(workload.name for workload in workloads))
        return None
    set_threads(args.threads)
    if args.against is not None:
        return _against(args)
    return _measure(args, workloads)


def _measure(args: argparse.Namespace, workloads: tuple[Workload, ...]) -> int:
    from fastscore.devices import usable_device
    from fastscore.measure.results import read_results
    from fastscore.measure.suites import Settings, run
    from fastscore.measure.tables import table

    device = usable_device(args.device)
    settings = Settings(device, args.rounds, not args.time_only, args.energy)
    out, measured = _out(args), False
    try:
        with _Bar(len(workloads), args.quiet) as bar:
            run(args.suite, workloads, settings, out, _command(args), bar.show)
        measured = True
    except KeyboardInterrupt:
        # rows that are finished are in the file
        measured = out.is_file()
        raise
    finally:
        if measured:
            found = read_results(out)
            print(table(found))
            print(f"written to {out}")
    return int(any(row.status == "failed" for row in found.rows))


def _compare(args: argparse.Namespace) -> None:
    from fastscore.measure.verdict import compare_files

    print(compare_files(*args.compare).text())


def _against(args: argparse.Namespace) -> None:
    for option in ("rounds", "energy"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} does not go with --against; leave it out")
    from fastscore.measure.against import Options, against

    here = _out(args)
    there = here.with_name(f"{here.stem}-{re.sub(r'[^A-Za-z0-9.]+', '-', args.against)}.json")
    options = Options(args.device, args.threads, tuple(args.only))
    command = f"{_command(args)} --against {shlex.quote(args.against)}"
    # rows that both have are counted when both have started
    with _Bar(1, args.quiet) as bar:
        found = against(
            args.suite,
            args.against,
            (there, here),
            options,
            command,
            say=lambda sentence: print(sentence, file=sys.stderr),
            progress=bar.of,
        )
    print(found.text())
    print(f"written to {there} and {here}")


def _out(args: argparse.Namespace) -> Path:
    return args.out or Path(f"bench-{args.suite}-{args.device.partition(':')[0]}.json")


def _command(args: argparse.Namespace) -> str:
    """The command line as it stands for this run, with what was chosen by default."""
    words = ["fastscore", "bench", args.suite]
    for pattern in args.only:
        words += ["--only", pattern]
    words += ["--device", args.device]
    for option in ("threads", "rounds", "energy"):
        if getattr(args, option) is not None:
            words += [f"--{option}", str(getattr(args, option))]
    return shlex.join([*words, *(["--time-only"] if args.time_only else [])])


class _Bar:
    """Progress bar over rows on stderr, with the name of those at work."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet = total, quiet

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        self._tqdm = tqdm(
            total=self._total,
            disable=self._quiet,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n:.0f}/{total} rows [{elapsed}<{remaining}]",
            # a log file gets a line now and then
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._tqdm.close()

    def show(self, done: float, name: str) -> None:
        """So many rows are done, a fraction included, and these are at work."""
        self._tqdm.set_description(name, refresh=False)
        self._tqdm.update(done - self._tqdm.n)

    def of(self, done: int, total: int, name: str) -> None:
        """Show them with their number."""
        self._tqdm.total = total
        self.show(done, name)
