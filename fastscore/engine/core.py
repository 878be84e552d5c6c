"""The engine: draws batches of clips, eager, compiled or by replayed CUDA graphs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastscore.devices import Clock, DeviceLostError, device_lost, one_order, out_of_memory
from fastscore.engine.batches import Clips, bucket_for, check_buckets
from fastscore.engine.compiled import CompiledDenoiser
from fastscore.engine.programs import ProgramCache
from fastscore.engine.recorders import CudaGraphs, GraphPool, Recorder
from fastscore.engine.runners import Direct, Model, Recording, Task

MODES = ("eager", "compile", "graphs", "compiled-graphs")
BUCKETS = (1, 2, 4, 8, 16, 32, 64)

# called with (number of the first clip, clips, step, x, x0) after each step of a batch
BatchWatcher = Callable[[int, int, int, Tensor, Tensor], Any]


class Drawn(NamedTuple):
    """What was made of each clip, x0 first, all on the CPU; seconds of both stages."""

    outputs: tuple[Tensor, ...]
    nfe: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Options:
    """How an engine runs.

    ``mode`` is "eager", "compile" (the denoiser by torch.compile), "graphs" (CUDA graphs of whole
    trajectories) or "compiled-graphs" (CUDA graphs of trajectories of the compiled denoiser).
    ``deterministic`` computes clips one by one, so that their bits depend on nothing but
    themselves. ``buckets`` are the batch sizes that compiled or recorded programs are made for;
    ``max_graphs`` bounds recorded programs, those used last are kept.
    """

    mode: str = "eager"
    deterministic: bool = False
    buckets: tuple[int, ...] = BUCKETS
    max_graphs: int = 32

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        object.__setattr__(self, "buckets", check_buckets(self.buckets))

    @property
    def compiled(self) -> bool:
        """Whether the denoiser is compiled."""
        return self.mode in ("compile", "compiled-graphs")

    @property
    def recorded(self) -> bool:
        """Whether whole trajectories are recorded as CUDA graphs."""
        return self.mode in ("graphs", "compiled-graphs")


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made; seconds and bytes are of compiling and recording.

    Where a program is recorded of what is compiled, the compiler runs while it is recorded, and its
    seconds are in both.

    ``recompilations`` are runs of the compiler beyond one a batch size, guided and not; ``splits``
    counts batches halved because the device's memory did not hold them.
    """

    batches: int
    clips: int
    evaluations: int
    programs: int
    recorded: int
    replays: int
    evicted: int
    compilations: int
    recompilations: int
    splits: int
    compile_seconds: float
    record_seconds: float
    graph_memory: int


class Engine:
    """Draws clips with a `Model`; safe to call from several threads, which take turns.

    ``recorder`` takes the place of CUDA graphs; ``pool`` is memory for them, one of its own unless
    given. Raises ValueError for graphs on a device that has none, and for another engine's pool.
    """

    def __init__(
        self,
        model: Model,
        options: Options = Options(),
        *,
        recorder: Recorder | None = None,
        pool: GraphPool | None = None,
    ) -> None:
        self.options = options
        self._pool = pool or GraphPool()
        self._pool.claim(self)
        self._lock = threading.RLock()
        self._closed = False
        self._lost: str | None = None
        self._process = os.getpid()
        self._compiled = None
        if options.compiled:
            self._compiled = CompiledDenoiser(model.denoise, model.device)
            model = replace(model, denoise=self._compiled)
        self._model = model
        self._programs = ProgramCache(options.max_graphs)
        if options.recorded and recorder is None:
            if model.device.type != "cuda":
                raise ValueError(
                    f'mode "{options.mode}" needs a CUDA device, not {model.device}; choose '
                    '"eager" or "compile"'
                )
            recorder = CudaGraphs(model.device, self._pool)
        self._runner = (
            Direct(model) if recorder is None else Recording(model, recorder, self._programs)
        )
        # a deterministic clip is computed alone, never in a batch that was filled up
        fixed = recorder is not None or options.compiled
        self._fixed_sizes = fixed and not options.deterministic
        self._largest = 1 if options.deterministic else options.buckets[-1]
        self._counts = {"batches": 0, "clips": 0, "evaluations": 0, "splits": 0}

    # what a caller's inference mode made could be neither written to nor replayed outside of it
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def draw(
        self,
        task: Task,
        clips: Clips,
        *,
        max_batch: int | None = None,
        watch: BatchWatcher | None = None,
    ) -> Drawn:
        """Draw ``clips``, at most ``max_batch`` at a time (None: as many as buckets allow).

        ``watch`` is called after each step; what it raises ends the drawing. Raises RuntimeError
        after close and in a forked process, DeviceLostError once the device is gone, and
        MemoryError where not even one clip fits.
        """
        with self._lock, one_order(self._model.device, self.options.deterministic):
            self._check_usable()
            limit = max_batch or self.options.buckets[-1]
            found, seconds = [], {"sampling": 0.0, "vocoder": 0.0}
            start = 0
            while start < len(clips):
                part = clips[start : start + min(limit, self._largest)]
                outputs = self._fitting(task, part, start, watch, seconds)
                if outputs is not None:
                    found.append(outputs)
                    start += len(part)
            joined = tuple(torch.cat(column) for column in zip(*found, strict=True))
            return Drawn(joined, task.nfe, seconds)

    def warm_up(
        self, task: Task, sizes: Sequence[int], guided: Sequence[bool] = (True, False)
    ) -> dict[str, float]:
        """Draw batches of all ``sizes``, guided and not, the largest first; what it took.

        Seconds in all, of compiling and of recording, and bytes that graphs hold. Graphs share a
        pool in which a smaller one finds room that a larger one has left.
        """
        before, start = self.stats(), time.perf_counter()
        for size in sorted(sizes, reverse=True):
            for label in (0 if one else -1 for one in guided):
                clips = Clips([label] * size, [1.0] * size, [0] * size, list(range(size)))
                self.draw(task, clips, max_batch=size)
        after = self.stats()
        return {
            "seconds": time.perf_counter() - start,
            "compile_seconds": after.compile_seconds - before.compile_seconds,
            "record_seconds": after.record_seconds - before.record_seconds,
            "graph_memory": after.graph_memory - before.graph_memory,
            "programs": after.recorded - before.recorded,
        }

    def stats(self) -> EngineStats:
        """What has been done so far."""
        counts, compiled = self._programs.counts, self._compiled
        ran = compiled.compilations if compiled else 0
        return EngineStats(
            **self._counts,
            programs=len(self._programs),
            recorded=counts.recorded,
            replays=counts.replayed,
            evicted=counts.evicted,
            compilations=ran,
            recompilations=ran - (compiled.expected if compiled else 0),
            compile_seconds=compiled.seconds if compiled else 0.0,
            record_seconds=counts.seconds,
            graph_memory=counts.memory,
        )

    def close(self) -> None:
        """Let go of all programs and the pool; drawing is over."""
        with self._lock:
            self._closed = True
            self._programs.clear()
            self._pool.release(self)

    def _fitting(
        self,
        task: Task,
        part: Clips,
        start: int,
        watch: BatchWatcher | None,
        seconds: dict[str, float],
    ) -> tuple[Tensor, ...] | None:
        """Outputs of one batch; None where the device could not hold it, and less is tried next."""
        try:
            outputs = self._batch(task, part, start, watch, seconds)
        except RuntimeError as error:
            if device_lost(error):
                self._lost = str(error).splitlines()[0]
                raise DeviceLostError(self._lost_sentence()) from error
            if not out_of_memory(error):
                raise
            if len(part) == 1:
                raise MemoryError(
                    f"{self._model.device} has not memory enough for one clip; free some of it, or "
                    "use another device"
                ) from error
            # programs hold memory too; they are made again in smaller sizes
            self._programs.clear()
            self._largest = len(part) // 2
            self._counts["splits"] += 1
            return None
        self._counts["batches"] += 1
        self._counts["clips"] += len(part)
        self._counts["evaluations"] += task.nfe * len(part)
        return outputs

    def _batch(
        self,
        task: Task,
        part: Clips,
        start: int,
        watch: BatchWatcher | None,
        seconds: dict[str, float],
    ) -> tuple[Tensor, ...]:
        size, clock = len(part), Clock(self._model.device)
        room = bucket_for(size, self.options.buckets) if self._fixed_sizes else size

        def report(step: int, x: Tensor, x0: Tensor) -> None:
            assert watch is not None
            watch(start, size, step, x[:size], x0[:size])

        x0 = self._runner.draw(task, part.tensors(room), part.guided, watch and report)
        seconds["sampling"] += clock.lap()
        outputs = (x0, *self._runner.finish(x0))
        found = tuple(output[:size].cpu() for output in outputs)
        seconds["vocoder"] += clock.lap()
        return found

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("this engine is closed; make another one")
        if self._lost is not None:
            raise DeviceLostError(self._lost_sentence())
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this engine was made in process {self._process} and this is its fork "
                f"{os.getpid()}, in which threads and devices do not work; load the model in the "
                'new process, or start it with multiprocessing\'s "spawn"'
            )

    def _lost_sentence(self) -> str:
        return (
            f"{self._model.device} was lost ({self._lost}); nothing on it can be used any more: "
            "start a new process"
        )
