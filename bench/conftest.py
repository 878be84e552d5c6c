"""Device of the benchmarks, and provenance in every JSON they write."""

import os

import pytest
import torch
from provenance import machine, processor


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the benchmarks run"
    )
    parser.addoption("--threads", type=int, default=1, help="threads of PyTorch's CPU operators")


def pytest_configure(config):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch finds no GPU here; leave it at cpu")
    if config.getoption("--threads") < 1:
        raise pytest.UsageError(f"--threads {config.getoption('--threads')} must be 1 or more")
    torch.set_num_threads(config.getoption("--threads"))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastscore"] = machine(torch.device(config.getoption("--device")))


def pytest_terminal_summary(terminalreporter):
    load, cores = os.getloadavg()[0], processor()["cores"]
    if load > cores:
        terminalreporter.write_line(
            f"the machine was busy: load {load:.1f} on {cores} cores; these timings mean little"
        )


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))
