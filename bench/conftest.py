"""Options and fixtures of the benchmarks, provenance in every JSON, and their table at the end."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from fastscore_kernels import available
from fastscore_kernels.traffic import Traffic

from fastscore.devices import fp32_products
from fastscore.measure import subjects
from fastscore.measure.provenance import Watch
from fastscore.measure.suites import obstacle
from fastscore.measure.timing import (
    Run,
    Stopwatch,
    check_equal,
    interleaved,
    ratios,
    reference_work,
)
from fastscore.measure.workloads import COMPILED, Workload

ROWS = pytest.StashKey[list[dict[str, Any]]]()
WATCH = pytest.StashKey[Watch]()


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the benchmarks run"
    )
    parser.addoption("--threads", type=int, default=1, help="threads of PyTorch's CPU operators")
    parser.addoption("--rounds", type=int, default=31, help="rounds of every comparison")
    parser.addoption("--only", default="", help="workloads whose names contain this")
    parser.addoption(
        "--no-compile", action="store_true", help="leave torch.compile out: it takes long to start"
    )


def pytest_configure(config):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch finds no GPU here; leave it at cpu")
    for name in ("threads", "rounds"):
        if config.getoption(name) < 1:
            raise pytest.UsageError(f"--{name} {config.getoption(name)} must be 1 or more")
    torch.set_num_threads(config.getoption("--threads"))
    config.stash[ROWS] = []
    config.stash[WATCH] = Watch(torch.device(config.getoption("--device")))


def pytest_benchmark_update_machine_info(config, machine_info):
    config.stash[WATCH].end()
    machine_info["fastscore"] = config.stash[WATCH].record


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if rows:
        _print_table(terminalreporter, rows)
    for sentence in config.stash[WATCH].warnings:
        terminalreporter.write_line(f"warning: {sentence}")


def _print_table(reporter, rows: list[dict[str, Any]]) -> None:
    _print_groups(reporter, [row for row in rows if "faster" not in row])
    rows = [row for row in rows if "faster" in row]
    if not rows:
        return
    names = ["eager", "compile", *sorted({n for r in rows for n in r["us"]} - {"eager", "compile"})]
    reporter.write_line("")
    reporter.write_line(
        "microseconds a call (median of rounds taken in turn), times faster than eager [p20, p80],"
    )
    reporter.write_line(
        "megabytes that must move, that eager moves, that the kernel moves, and launches"
    )
    head = f"{'problem':44}" + "".join(f"{n:>11}" for n in names)
    reporter.write_line(head + f"{'faster':>20}{'must/eager/kernel':>23}{'launches':>10}")
    for row in rows:
        times = "".join(f"{row['us'][n]:11.1f}" if n in row["us"] else f"{'':11}" for n in names)
        middle, low, high = row["faster"]
        faster = f"{middle:7.2f} [{low:.2f}, {high:.2f}]"
        moved = launches = ""
        if row["traffic"]:
            t = row["traffic"]
            moved = f"{t['MB_must']:.3f}/{t['MB_eager']:.3f}/{t['MB_fused']:.3f}"
            launches = f"{t['launches_eager']}/{t['launches_fused']}"
        reporter.write_line(f"{row['problem']:44}{times}{faster:>20}{moved:>23}{launches:>10}")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def with_compile(request) -> bool:
    return not request.config.getoption("--no-compile")


@pytest.fixture(scope="session")
def kernel(device) -> str:
    """The backend that is measured against eager PyTorch on this device."""
    name = "triton" if device.type == "cuda" else "native"
    if name not in available(device):
        pytest.skip(f"backend {name} is not here")
    return name


@pytest.fixture
def compare(request, benchmark, device, kernel) -> Callable[..., None]:
    """Check implementations against the first, "eager", time them in turn, and keep the row."""

    def run(
        problem: str,
        runs: dict[str, Run],
        tolerance: float,
        traffic: Traffic | None,
        round_seconds: float = 2e-3,
        cold: bool = True,
    ) -> None:
        # as workloads are timed: PyTorch by itself lets convolutions on a GPU use TF32
        with torch.no_grad(), fp32_products(device, tf32=False):
            check = check_equal({name: f() for name, f in runs.items()}, tolerance)
            timings = interleaved(
                runs,
                request.config.getoption("--rounds"),
                round_seconds,
                watch=Stopwatch(device, flush=cold),
                reference=reference_work(device),
            )
            row = {
                "problem": problem,
                "us": {name: 1e6 * t.median for name, t in timings.items()},
                "faster": ratios(timings, "eager", kernel),
                "traffic": traffic.describe() if traffic else None,
                "check": asdict(check),
            }
            _keep(request, benchmark, row, timings)
            benchmark.pedantic(
                _synchronised(runs[kernel], device), rounds=20, warmup_rounds=3, iterations=5
            )

    return run


@pytest.fixture
def measure(request, benchmark, device, with_compile) -> Callable[..., None]:
    """Check a group of workloads, time those that can run here in turn, and keep the row."""

    def run(workloads: list[Workload]) -> None:
        part = request.config.getoption("--only")
        chosen = [w for w in workloads if part in w.name]
        chosen = [w for w in chosen if with_compile or getattr(w, "mode", "") not in COMPILED]
        reasons = {w.name: obstacle(w, device) for w in chosen}
        chosen = [w for w in chosen if not reasons[w.name]]
        if not chosen:
            pytest.skip("; ".join(sorted(set(reasons.values()))) or f"none is named {part}")
        with torch.no_grad():
            expected = {w.problem: subjects.expected(w, device) for w in chosen}
            built = {w.name: subjects.build(w, device) for w in chosen}
            checks = {}
            for w in chosen:
                against, answer = expected[w.problem]
                outputs = {against: answer, w.name: built[w.name].answer(built[w.name].run())}
                checks[w.name] = asdict(check_equal(outputs, subjects.tolerance(w, device)))
            first = built[chosen[0].name]
            timings = interleaved(
                {name: b.run for name, b in built.items()},
                request.config.getoption("--rounds"),
                watch=Stopwatch(device, wall=first.wall, flush=first.flush),
                reference=reference_work(device),
            )
            row = {
                "problem": chosen[0].group,
                "us": {name: 1e6 * t.median for name, t in timings.items()},
                "checks": checks,
                "workloads": {w.name: w.describe() for w in chosen},
                "skipped": {name: why for name, why in reasons.items() if why},
            }
            _keep(request, benchmark, row, timings)
            benchmark.pedantic(_synchronised(first.run, device), rounds=5, warmup_rounds=1)

    return run


def _keep(request, benchmark, row: dict[str, Any], timings: dict[str, Any]) -> None:
    """Raw samples into the JSON, the row into the table."""
    benchmark.extra_info.update(
        row,
        seconds={name: t.seconds for name, t in timings.items()},
        reference={name: t.reference for name, t in timings.items()},
    )
    request.config.stash[ROWS].append(row)
    request.config.stash[WATCH].sample(f"after {row['problem']}")


def _print_groups(reporter, rows: list[dict[str, Any]]) -> None:
    if rows:
        reporter.write_line("")
        reporter.write_line("milliseconds a call (median of rounds taken in turn)")
    for row in rows:
        for name, us in row["us"].items():
            reporter.write_line(f"{name:64}{us / 1e3:12.3f}")
        for why in sorted(set(row["skipped"].values())):
            names = [name for name, reason in row["skipped"].items() if reason == why]
            reporter.write_line(f"skipped: {', '.join(names)}: {why}")


def _synchronised(run: Run, device: torch.device) -> Run:
    if device.type == "cpu":
        return run

    def wait() -> Any:
        out = run()
        torch.cuda.synchronize(device)
        return out

    return wait
