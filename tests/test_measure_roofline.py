"""Bounds by hand, and peaks against what numpy takes for the same work."""

import json
import time

import numpy as np
import pytest
import torch

from fastscore.measure import roofline
from fastscore.measure.roofline import Level, Peaks, bound, share

CPU = torch.device("cpu")
PEAKS = Peaks(
    device="cpu",
    threads=2,
    levels=(
        Level("L2", 2**20, 2**19, copy=80e9, read=100e9),
        Level("L3", 2**25, 2**24, copy=60e9, read=50e9),
        Level("memory", None, 2**27, copy=20e9, read=10e9),
    ),
    macs={"fp32": 1e11, "bf16": 2e11},
)


def test_what_binds():
    # 1e9 products take 10 ms, a gigabyte from memory 50 ms
    assert bound(10**9, 10**9, "fp32", PEAKS) == {"name": "bandwidth memory", "seconds": 0.05}
    assert bound(10**10, 10**9, "fp32", PEAKS) == {"name": "compute fp32", "seconds": 0.1}
    assert bound(10**10, 10**9, "bf16", PEAKS) == {"name": "compute bf16", "seconds": 0.05}
    assert bound(0, 6 * 10**6, "none", PEAKS) == {"name": "bandwidth L3", "seconds": 1e-4}
    # a million bytes of a model that fits no cache
    found = bound(0, 10**6, "fp32", PEAKS, working_set=10**9)
    assert found == {"name": "bandwidth memory", "seconds": 5e-5}
    assert share(found, 1e-4) == {**found, "share": 0.5}
    with pytest.raises(ValueError, match="'fp8' on cpu; choose one of fp32, bf16"):
        bound(1, 1, "fp8", PEAKS)


def test_a_level_that_measured_slower_than_one_farther_out():
    slow = Level("L2", 2**20, 2**19, copy=1e9, read=1e9)
    peaks = Peaks("cpu", 2, (slow, *PEAKS.levels[1:]), PEAKS.macs)
    assert peaks.bandwidth(1000) == ("L2", 60e9)
    assert peaks.level(2**20).name == "L2"
    assert peaks.level(2**20 + 1).name == "L3"


def test_caches_are_those_that_the_threads_reach(tmp_path, monkeypatch):
    rows = [
        ("1", "Data", "32K", "0"),
        ("1", "Instruction", "32K", "0"),
        ("2", "Unified", "1024K", "0,64"),
        ("3", "Unified", "32768K", "0-7,64-71"),
    ]
    for i, row in enumerate(rows):
        cache = tmp_path / "cpu0" / "cache" / f"index{i}"
        cache.mkdir(parents=True)
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), row, strict=True):
            (cache / name).write_text(f"{value}\n")
    monkeypatch.setattr(roofline, "_CACHES", tmp_path)
    monkeypatch.setattr(roofline.os, "cpu_count", lambda: 128)
    assert roofline.caches(CPU, 1) == {"L2": 2**20, "L3": 2**25}
    assert roofline.caches(CPU, 8) == {"L2": 4 * 2**20, "L3": 2**25}
    assert [level[0] for level in roofline._levels(CPU, 1)] == ["L2", "L3", "memory"]
    # a machine that tells nothing has its memory all the same
    monkeypatch.setattr(roofline, "_CACHES", tmp_path / "absent")
    assert list(roofline._levels(CPU, 1)) == [("memory", None, 2**26)]


def quickest(run) -> float:
    """Seconds by a clock of this test's own."""
    found = []
    for _ in range(8):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


# slow: not by how long they take, but a busy machine disturbs one clock and not the other
@pytest.mark.slow
def test_copies_beside_those_of_numpy():
    size = 2**24
    source, target = np.ones(size // 2, np.uint8), np.empty(size // 2, np.uint8)
    theirs = size / quickest(lambda: np.copyto(target, source))
    # kernels and threads differ, and the machine may be busy; units would differ by far more
    assert theirs / 6 < roofline.copy_rate(CPU, size, 0.02) < theirs * 6


@pytest.mark.slow
def test_products_beside_those_of_numpy():
    a = np.ones((256, 256), np.float32)
    theirs = 256**3 / quickest(lambda: a @ a)
    assert theirs / 8 < roofline.mac_rate(CPU, "fp32", 256, 0.02) < theirs * 8


def test_a_known_duration():
    def wait() -> None:
        until = time.perf_counter() + 2e-3
        while time.perf_counter() < until:
            pass

    assert roofline.fastest(wait, CPU, 0.01) == pytest.approx(2e-3, rel=0.02)


def test_peaks_are_measured_once(monkeypatch):
    monkeypatch.setattr(roofline, "_EDGES", {"cpu": (64,)})
    monkeypatch.setattr(roofline, "_levels", lambda device, threads: [("memory", None, 2**16)])
    roofline._peaks.cache_clear()
    try:
        found = roofline.peaks("cpu", seconds=0.001)
        assert roofline.peaks("cpu", seconds=0.001) is found
        assert found.threads == torch.get_num_threads()
        assert list(found.macs) == ["fp32", "bf16"]
        assert json.loads(json.dumps(found.describe()))["levels"][0]["name"] == "memory"
    finally:
        roofline._peaks.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cycles_and_peaks_of_a_gpu():
    """A kernel that waits for so many cycles takes twice as long for twice as many."""
    device = torch.device("cuda")
    # a GPU at rest raises its clock while the first of them runs
    roofline.fastest(lambda: torch.cuda._sleep(400_000), device, 0.3)
    one, two = (
        roofline.fastest(lambda n=n: torch.cuda._sleep(n), device, 0.2) for n in (200_000, 400_000)
    )
    assert two / one == pytest.approx(2, rel=0.05)
    # an SM's clock is between 0.2 and 3 GHz
    assert 200_000 / 3e9 < one < 200_000 / 0.2e9
    found = roofline.peaks(device, 0.05)
    assert found.macs["bf16"] > found.macs["tf32"] > found.macs["fp32"] > 1e12
    assert [level.name for level in found.levels] == ["L2", "memory"]
    assert found.levels[-1].bandwidth > 1e11
