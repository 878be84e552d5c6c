"""The roofline of the machine at hand: measured peaks, and how near to them a time comes.

Peaks are measured, not looked up: bytes a second of copying and of reading at every level of the
memory hierarchy, and multiply-accumulates a second of matrix products in every type, with the
number of threads in use. A bound is the larger of what the arithmetic and what the bytes must take
(Williams, Waterman and Patterson 2009).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastscore.devices import fp32_products

_CACHES = Path("/sys/devices/system/cpu")
# edge of the square products timed; a peak is the best of them
_EDGES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
# memory is measured with so many times the largest cache, below a size: what a GPU's cache keeps
# from one copy to the next would count as bandwidth
_BEYOND = {"cpu": 4, "cuda": 16}
_LARGEST = {"cpu": 2**29, "cuda": 2**30}
_SMALLEST = 2**26
# copies recorded in one CUDA graph, so that launches do not count
_COPIES = 50


@dataclass(frozen=True)
class Level:
    """A level of the memory hierarchy: what it holds (None: all), and bytes a second.

    ``copy`` counts bytes read and bytes written, ``read`` a sum's bytes. ``size`` is the working
    set they were measured with.
    """

    name: str
    capacity: int | None
    size: int
    copy: float
    read: float

    @property
    def bandwidth(self) -> float:
        """The larger of both: nothing here has moved bytes faster."""
        return max(self.copy, self.read)


@dataclass(frozen=True)
class Peaks:
    """What a device does at best: levels, nearest first, and multiply-accumulates a second."""

    device: str
    threads: int
    levels: tuple[Level, ...]
    macs: dict[str, float]

    def level(self, working_set: int) -> Level:
        """The nearest level that holds ``working_set`` bytes."""
        return next(
            one for one in self.levels if one.capacity is None or working_set <= one.capacity
        )

    def bandwidth(self, working_set: int) -> tuple[str, float]:
        """Name and bytes a second of the level that serves ``working_set`` bytes.

        A level farther out that was faster stands in: what it can do, the nearer one can.
        """
        first = self.levels.index(self.level(working_set))
        best = max(self.levels[first:], key=lambda one: one.bandwidth)
        return self.levels[first].name, best.bandwidth

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def bound(
    macs: int, moved: int, dtype: str, peaks: Peaks, working_set: int | None = None
) -> dict[str, Any]:
    """Seconds that ``macs`` products in ``dtype`` and ``moved`` bytes take at least, and why.

    ``name`` is "compute fp32" or "bandwidth L3", with what binds. Bytes come from the nearest level
    that holds the ``working_set`` (as many bytes as are moved unless given): a small model that is
    run again and again is never fetched from memory. ValueError for a type without a peak.
    """
    if macs and dtype not in peaks.macs:
        raise ValueError(
            f"no peak was measured for {dtype!r} on {peaks.device}; choose one of "
            f"{', '.join(peaks.macs)}"
        )
    level, rate = peaks.bandwidth(moved if working_set is None else working_set)
    compute = macs / peaks.macs[dtype] if macs else 0.0
    bandwidth = moved / rate
    name = f"compute {dtype}" if compute >= bandwidth else f"bandwidth {level}"
    return {"name": name, "seconds": max(compute, bandwidth)}


def share(limit: dict[str, Any], seconds: float) -> dict[str, Any]:
    """``limit`` with the ``share`` of a measured time that it accounts for: 1 at the roofline."""
    return {**limit, "share": limit["seconds"] / seconds}


def peaks(device: str | torch.device = "cpu", seconds: float = 0.2) -> Peaks:
    """Peaks of ``device`` with the threads in use; ``seconds`` a figure, about a dozen times.

    Measured once a process, device and number of threads.
    """
    return _peaks(str(torch.device(device)), torch.get_num_threads(), seconds)


@functools.cache
def _peaks(device: str, threads: int, seconds: float) -> Peaks:
    kind = torch.device(device)
    levels = tuple(
        Level(name, capacity, size, copy_rate(kind, size, seconds), read_rate(kind, size, seconds))
        for name, capacity, size in _levels(kind, threads)
    )
    rates = {
        name: max(mac_rate(kind, name, edge, seconds) for edge in _EDGES[kind.type])
        for name in _types(kind)
    }
    return Peaks(device, threads, levels, rates)


def copy_rate(device: torch.device, size: int, seconds: float) -> float:
    """Bytes read and written a second by copies within ``size`` bytes, source and target."""
    source = torch.ones(size // 8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device, seconds)


def read_rate(device: torch.device, size: int, seconds: float) -> float:
    """Bytes read a second by sums over ``size`` bytes."""
    source = torch.ones(size // 4, device=device)
    return source.nbytes / fastest(lambda: source.sum(), device, seconds)


def mac_rate(device: torch.device, name: str, edge: int, seconds: float) -> float:
    """Multiply-accumulates a second of products of square matrices in a type.

    fp32, bf16, and on a GPU tf32 and fp16.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with fp32_products(device, name == "tf32"):
        return edge**3 / fastest(lambda: torch.mm(a, b, out=out), device, seconds)


def fastest(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of the calls of ``run`` within ``seconds``, and of three at least."""
    run()
    measure = _timed_on_gpu(run, device) if device.type == "cuda" else _timed(run)
    stop, found = time.perf_counter() + seconds, []
    while len(found) < 3 or time.perf_counter() < stop:
        found.append(next(measure))
    return min(found)


def _timed(run: Callable[[], Any]) -> Iterator[float]:
    once = min(_seconds(run, 1) for _ in range(5))
    # beside what is shorter, reading the clock would count
    repeats = max(1, int(1e-4 / max(once, 1e-7)))
    while True:
        yield _seconds(run, repeats) / repeats


def _seconds(run: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - start


def _timed_on_gpu(run: Callable[[], Any], device: torch.device) -> Iterator[float]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for _ in range(_COPIES):
            run()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while True:
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        yield first.elapsed_time(last) * 1e-3 / _COPIES


def _types(device: torch.device) -> Sequence[str]:
    return ("fp32", "bf16") if device.type == "cpu" else ("fp32", "tf32", "bf16", "fp16")


def _levels(device: torch.device, threads: int) -> Iterator[tuple[str, int | None, int]]:
    """Name, capacity and the working set to measure with, of every level, nearest first."""
    largest = 0
    for name, capacity in caches(device, threads).items():
        # half full: the other half is for what the machine does besides
        yield name, capacity, capacity // 2
        largest = max(largest, capacity)
    size = min(max(_BEYOND[device.type] * largest, _SMALLEST), _LARGEST[device.type])
    yield "memory", None, size


def caches(device: torch.device, threads: int) -> dict[str, int]:
    """Bytes of the caches that ``threads`` threads reach, from the second level on, by name.

    A cache that cores share counts once for all of them. Empty where the system does not tell.
    """
    if device.type == "cuda":
        return {"L2": torch.cuda.get_device_properties(device).L2_cache_size}
    found: dict[str, int] = {}
    for cache in sorted(_CACHES.glob("cpu0/cache/index*")):
        try:
            level = int((cache / "level").read_text())
            kind = (cache / "type").read_text().strip()
            size = int((cache / "size").read_text().strip().removesuffix("K")) * 1024
            sharing = len(_cores((cache / "shared_cpu_list").read_text()))
        except (OSError, ValueError):
            continue
        if level >= 2 and kind != "Instruction":
            copies = max(1, threads // sharing)
            found[f"L{level}"] = size * min(copies, os.cpu_count() or 1)
    return found


def _cores(text: str) -> list[int]:
    """Numbers in a list such as 0-3,8."""
    found = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
