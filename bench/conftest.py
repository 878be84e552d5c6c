"""Options and fixtures of the benchmarks, provenance in every JSON, and their table at the end."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import Run, check_equal, interleaved, ratios
from fastscore_kernels import available
from fastscore_kernels.traffic import Traffic
from provenance import machine, processor

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the benchmarks run"
    )
    parser.addoption("--threads", type=int, default=1, help="threads of PyTorch's CPU operators")
    parser.addoption("--rounds", type=int, default=31, help="rounds of every comparison")
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


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastscore"] = machine(torch.device(config.getoption("--device")))


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if rows:
        _print_table(terminalreporter, rows)
    load, cores = os.getloadavg()[0], processor()["cores"]
    if load > cores:
        terminalreporter.write_line(
            f"the machine was busy: load {load:.1f} on {cores} cores; these timings mean little"
        )


def _print_table(reporter, rows: list[dict[str, Any]]) -> None:
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
    ) -> None:
        with torch.no_grad():
            check_equal({name: f() for name, f in runs.items()}, tolerance)
            if device.type == "cuda":
                runs = {name: _synchronised(f, device) for name, f in runs.items()}
            timings = interleaved(runs, request.config.getoption("--rounds"), round_seconds)
            row = {
                "problem": problem,
                "us": {name: 1e6 * t.median for name, t in timings.items()},
                "faster": ratios(timings, "eager", kernel),
                "traffic": traffic.describe() if traffic else None,
            }
            benchmark.extra_info.update(
                row, seconds={name: t.seconds for name, t in timings.items()}
            )
            request.config.stash[ROWS].append(row)
            benchmark.pedantic(runs[kernel], rounds=20, warmup_rounds=3, iterations=5)

    return run


def _synchronised(run: Run, device: torch.device) -> Run:
    def wait() -> Any:
        out = run()
        torch.cuda.synchronize(device)
        return out

    return wait
