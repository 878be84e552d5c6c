"""What turns a function over fixed buffers into one that is replayed: CUDA graphs, or running it.

A function to record takes no arguments: it reads buffers that stay where they are and returns
tensors, which every replay fills anew.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Function = Callable[[], tuple[Tensor, ...]]

# runs before a capture: kernels are compiled, workspaces and libraries set up in the first of them
_WARM_UPS = 3


@dataclass
class Recorded:
    """A recorded function: ``replay()`` fills ``outputs``; what recording took, in seconds, bytes.

    The device memory is what the recording reserved beyond what it found in its pool.
    """

    replay: Callable[[], Any]
    outputs: tuple[Tensor, ...]
    seconds: float
    memory: int


class Recorder(Protocol):
    """Records functions over fixed buffers."""

    def record(self, function: Function) -> Recorded:
        """Run ``function`` as often as it takes to replay it."""
        ...


class Rerun:
    """Replays by running the function again, with the buffers and outputs of a graph.

    It is what a device without graphs can offer: everything but the capture itself.
    """

    def record(self, function: Function) -> Recorded:
        """Run ``function`` once and keep its outputs where they are."""
        start = time.perf_counter()
        outputs = tuple(output.clone() for output in function())

        def replay() -> None:
            for output, found in zip(outputs, function(), strict=True):
                output.copy_(found)

        return Recorded(replay, outputs, time.perf_counter() - start, 0)


class GraphPool:
    """Memory that the graphs of one engine share.

    Replays of two engines on one pool would write over each other's intermediates, so a pool
    belongs to the first engine that claims it, as long as that is open.
    """

    def __init__(self) -> None:
        self._owner: weakref.ref[Any] | None = None
        self._lock = threading.Lock()
        self._handle: Any = None

    def claim(self, owner: Any) -> None:
        """Take the pool for ``owner``; ValueError where another one has it."""
        with self._lock:
            holder = self._owner and self._owner()
            if holder is not None and holder is not owner:
                raise ValueError(
                    "this graph pool belongs to another engine, whose replays would be written "
                    "over; close that engine or make a pool for each"
                )
            self._owner = weakref.ref(owner)

    def release(self, owner: Any) -> None:
        """Give the pool back where ``owner`` has it."""
        with self._lock:
            if self._owner is not None and self._owner() is owner:
                self._owner = None

    @property
    def handle(self) -> Any:
        """The pool as `torch.cuda.graph` takes it."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    @property
    def reserved(self) -> int:
        """Bytes of device memory that its graphs hold."""
        # the device's total would not tell: what else lies idle is given back before a capture
        own, held = tuple(self.handle), torch.cuda.memory_snapshot(include_traces=False)
        return sum(s["total_size"] for s in held if tuple(s["segment_pool_id"]) == own)


class CudaGraphs:
    """Captures functions as CUDA graphs that share one pool.

    Warm-up and capture run on a side stream; other threads may go on using the device.
    """

    def __init__(self, device: torch.device, pool: GraphPool) -> None:
        self._device, self._pool = device, pool
        self._stream = torch.cuda.Stream(device)

    def record(self, function: Function) -> Recorded:
        """Warm up, then capture."""
        start = time.perf_counter()
        with torch.cuda.device(self._device):
            before = self._pool.reserved
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    function()
            current.wait_stream(self._stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph,
                pool=self._pool.handle,
                stream=self._stream,
                capture_error_mode="thread_local",
            ):
                outputs = function()
            memory = self._pool.reserved - before
        return Recorded(graph.replay, outputs, time.perf_counter() - start, memory)
