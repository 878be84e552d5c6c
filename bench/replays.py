"""Calls that follow one another as one replayed graph: gaps between a host's launches do not count.

Warm, all calls work on one set of operands, which a cache may hold; cold, each on a set of its own,
and the cache is overwritten before. A CPU runs the calls in a loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastscore.devices import device_lost, fp32_products
from fastscore.measure.timing import Run, Stopwatch, Timing, interleaved

STATES = ("warm", "cold")
# sets of operands: so many that the launch of a graph is lost among them, few enough to be built
FEWEST, MOST = 4, 64
# sets on a CPU, and runs that compile, choose algorithms and set up workspaces before a capture
_LOOPED, _WARM_UPS = 2, 3


@dataclass
class Replay:
    """``run()`` makes all calls; ``answer()`` is what the first of them returned in that run."""

    run: Run
    answer: Callable[[], Any]


@contextlib.contextmanager
def lane(device: torch.device) -> Iterator[None]:
    """One stream to build, capture, replay and time on, and products of fp32 numbers without TF32.

    A derivative is computed on the stream of its forward pass: a capture cannot hold another one.
    """
    with fp32_products(device, tf32=False):
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
        torch.cuda.synchronize(device)


def sets(arguments: Sequence[Any], device: torch.device) -> int:
    """How many sets of operands like ``arguments`` a replay takes: twice the cache, within bounds.

    Small ones are cold all the same: the cache is overwritten before every replay.
    """
    if device.type != "cuda":
        return _LOOPED
    size = sum(t.nbytes for t in tree_leaves(arguments) if isinstance(t, Tensor))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(FEWEST, min(MOST, -(-2 * cache // max(1, size))))


def replay(
    calls: Sequence[Run],
    device: torch.device,
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> Replay:
    """Record ``calls``, in a `lane`; ``around`` is entered about warm-ups and capture, or a loop.

    What the calls raise comes through.
    """
    return _captured(calls, around) if device.type == "cuda" else _looped(calls, around)


def _captured(calls: Sequence[Run], around: Callable[[], AbstractContextManager]) -> Replay:
    with around():
        for _ in range(_WARM_UPS):
            calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # threads of autograd allocate while they are captured
        with torch.cuda.graph(
            graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            # this one's place is not given to the calls after it
            first = calls[0]()
            for call in calls[1:]:
                call()
    return Replay(graph.replay, lambda: first)


def _looped(calls: Sequence[Run], around: Callable[[], AbstractContextManager]) -> Replay:
    latest: list[Any] = [None]

    def run() -> None:
        with around():
            latest[0] = calls[0]()
            for call in calls[1:]:
                call()

    # as a capture does: what cannot run is found out here
    with around():
        calls[0]()
    return Replay(run, lambda: latest[0])


def timed(
    replays: dict[str, Replay],
    count: int,
    device: torch.device,
    state: str,
    rounds: int,
    round_seconds: float = 2e-3,
) -> dict[str, Timing]:
    """Seconds a call of each, in turn; ``count`` are the calls of a replay."""
    watch = Stopwatch(device, flush=state == "cold")
    runs = {name: one.run for name, one in replays.items()}
    found = interleaved(runs, rounds, round_seconds, watch=watch)
    return {name: Timing(tuple(s / count for s in t.seconds)) for name, t in found.items()}


def sentence(error: Exception) -> str:
    """An error in one line; raised again where the device is lost with it."""
    if device_lost(error):
        raise error
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
