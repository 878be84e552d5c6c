"""What a stream has done so far: latencies, counts and memory, in a size that never grows."""

from __future__ import annotations

import dataclasses
import math
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# a latency is told within 1 %: the middle of a bucket is sqrt(_RATIO) from its ends
RELATIVE_ERROR = 0.01
_RATIO = (1 + RELATIVE_ERROR) ** 2
# seconds from which buckets are laid; shorter latencies count as this long, and the clock is no
# finer. the last bucket, and all that is longer, begins at about three years
_SHORTEST = 1e-7
_BUCKETS = 1 + math.ceil(math.log(1e8 / _SHORTEST) / math.log(_RATIO))

OUTCOMES = ("clips", "cancelled", "expired", "failed")


@dataclass(frozen=True)
class Latency:
    """``count`` latencies in seconds: quantiles within 1 %; ``mean`` and ``max`` exact; 0 of none.

    A quantile q is the smallest latency that at least q of all do not exceed.
    """

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    p999: float = 0.0
    max: float = 0.0

    def __str__(self) -> str:
        if not self.count:
            return "none yet"
        names = ("p50", "p90", "p99", "p999", "max", "mean")
        return ", ".join(f"{name} {_readable(getattr(self, name))}" for name in names)


class Latencies:
    """Any number of latencies in some 1700 buckets, each 2 % wider than the one before.

    The idea is HdrHistogram's. A window of the last N would be exact, but it would forget what was
    slow an hour ago, and its 99.9 % quantile would rest on N / 1000 latencies. Not locked.
    """

    def __init__(self) -> None:
        self._buckets = [0] * (_BUCKETS + 1)
        self._count, self._sum, self._max = 0, 0.0, 0.0
        self._min = math.inf

    def add(self, seconds: float) -> None:
        """Count one latency; ValueError for one that is negative, infinite or NaN."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"latency {seconds!r} must be a finite number of seconds, 0 or more")
        self._buckets[_bucket(seconds)] += 1
        self._count += 1
        self._sum += seconds
        self._max = max(self._max, seconds)
        self._min = min(self._min, seconds)

    def summary(self) -> Latency:
        """What there is to say about them."""
        if not self._count:
            return Latency()
        # whole numbers: 0.999 * 1000 is a little more than 999
        ranks = [-(-self._count * part // 1000) for part in (500, 900, 990, 999)]
        return Latency(self._count, self._sum / self._count, *self._at(ranks), self._max)

    def _at(self, ranks: list[int]) -> list[float]:
        """Latencies of these ranks, ascending, the smallest being number 1."""
        found, seen, buckets = [], 0, iter(enumerate(self._buckets))
        value = 0.0
        for rank in ranks:
            while seen < rank:
                index, count = next(buckets)
                seen += count
                value = _SHORTEST * _RATIO ** (index - 0.5)
            found.append(min(max(value, self._min), self._max))
        return found


@dataclass(frozen=True)
class Memory:
    """Bytes this process holds now and held at most; of the device, None where there is none.

    ``rss`` is None where the system has no /proc. ``allocated`` counts tensors on a CUDA device,
    ``reserved`` what PyTorch holds for them there, graphs included.
    """

    rss: int | None
    rss_peak: int | None
    allocated: int | None = None
    allocated_peak: int | None = None
    reserved: int | None = None
    reserved_peak: int | None = None

    def __str__(self) -> str:
        fields = [
            (f.name.replace("_", " "), getattr(self, f.name)) for f in dataclasses.fields(self)
        ]
        known = [f"{name} {value / 2**20:.1f} MiB" for name, value in fields if value is not None]
        return ", ".join(known) or "unknown"


@dataclass(frozen=True)
class StreamStats:
    """What became of the ``requests`` a stream has accepted, and how long the clips took.

    ``requests`` = ``clips`` (delivered) + ``cancelled`` + ``expired`` (past their deadline) +
    ``failed`` + ``waiting`` + ``running``; ``refused`` never got in, because the queue was full.
    ``batches`` counts calls of the drawing function, ``batch_sizes`` how many there were of each
    size, ``redone`` those of one clip that followed an error in a batch of several.

    Of delivered clips: ``queueing``, from the request to the start of its batch; ``computing``,
    from there to its clip; ``total``, both.
    """

    requests: int
    clips: int
    cancelled: int
    expired: int
    failed: int
    refused: int
    waiting: int
    running: int
    batches: int
    redone: int
    batch_sizes: Mapping[int, int]
    queueing: Latency
    computing: Latency
    total: Latency
    memory: Memory

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: batch sizes become strings."""
        sizes = {str(size): n for size, n in self.batch_sizes.items()}
        return {**dataclasses.asdict(self), "batch_sizes": sizes}

    def __str__(self) -> str:
        ends = ", ".join(f"{getattr(self, name)} {name}" for name in (*OUTCOMES, "refused"))
        sizes = ", ".join(f"{n} of {size}" for size, n in self.batch_sizes.items()) or "none yet"
        return "\n".join(
            (
                f"requests   {self.requests}: {ends}; {self.waiting} waiting, "
                f"{self.running} running",
                f"batches    {self.batches}: {sizes}; {self.redone} redone",
                f"queueing   {self.queueing}",
                f"computing  {self.computing}",
                f"total      {self.total}",
                f"memory     {self.memory}",
            )
        )


class StreamRecord:
    """Counts and latencies of a stream, to be written and read by any thread.

    ``device`` is the one whose memory a snapshot tells; None, PyTorch's present CUDA device.
    """

    def __init__(self, device: Any = None) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._counts = Counter[str]()
        self._sizes = Counter[int]()
        self._latencies = {name: Latencies() for name in ("queueing", "computing", "total")}

    def accepted(self) -> None:
        """A request got into the queue."""
        with self._lock:
            self._counts["requests"] += 1

    def refused(self) -> None:
        """A request met a full queue."""
        with self._lock:
            self._counts["refused"] += 1

    def batch(self, size: int, redone: bool = False) -> None:
        """The drawing function is called for ``size`` clips."""
        with self._lock:
            self._sizes[size] += 1
            self._counts["redone"] += redone

    def ended(self, outcome: str) -> None:
        """A request came to one of `OUTCOMES`."""
        with self._lock:
            self._counts[outcome] += 1

    def delivered(self, submitted: float, started: float, done: float) -> None:
        """A request became a clip; the times are those of one monotonic clock, in seconds."""
        with self._lock:
            self._counts["clips"] += 1
            self._latencies["queueing"].add(started - submitted)
            self._latencies["computing"].add(done - started)
            self._latencies["total"].add(done - submitted)

    def snapshot(self, waiting: int = 0, running: int = 0) -> StreamStats:
        """Everything so far, with the numbers of requests that ``waiting`` and ``running`` are."""
        memory = process_memory(self._device)
        with self._lock:
            return StreamStats(
                requests=self._counts["requests"],
                refused=self._counts["refused"],
                redone=self._counts["redone"],
                batches=self._sizes.total(),
                batch_sizes=dict(sorted(self._sizes.items())),
                waiting=waiting,
                running=running,
                memory=memory,
                **{name: self._counts[name] for name in OUTCOMES},
                **{name: found.summary() for name, found in self._latencies.items()},
            )


def process_memory(device: Any = None) -> Memory:
    """Memory of this process and, where CUDA is in use, of PyTorch on ``device`` (None: present).

    ``device`` is whatever PyTorch takes for one; on a CPU there is no device memory to tell.
    """
    return Memory(*_resident(), **_on_device(device))


def _resident() -> tuple[int | None, int | None]:
    """Resident bytes now and at their peak."""
    try:
        status = Path("/proc/self/status").read_text()
        # not getrusage's peak, which a process inherits from the one that started it
        now, peak = (int(status.partition(f"{name}:")[2].split()[0]) for name in ("VmRSS", "VmHWM"))
    except (OSError, IndexError, ValueError):
        return None, _peak_elsewhere()
    return now * 1024, peak * 1024


def _peak_elsewhere() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _on_device(device: Any) -> dict[str, int]:
    # a process that has not brought CUDA up must not do so to be counted
    if "torch" not in sys.modules:
        return {}
    import torch

    if not torch.cuda.is_initialized() or (device and torch.device(device).type != "cuda"):
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "allocated_peak": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "reserved_peak": torch.cuda.max_memory_reserved(device),
    }


def _bucket(seconds: float) -> int:
    if seconds <= _SHORTEST:
        return 0
    return min(_BUCKETS, 1 + int(math.log(seconds / _SHORTEST) / math.log(_RATIO)))


def _readable(seconds: float) -> str:
    """Three digits with the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
