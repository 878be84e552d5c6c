"""Programs: recorded functions with their buffers, at most so many of them at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastscore.engine.recorders import Recorder

Buffers = Mapping[str, Tensor]


class Program:
    """A function of named tensors, recorded over buffers of their shapes.

    ``function(buffers) -> outputs`` must compute with tensors alone; ``inputs`` are examples, which
    give shapes and types. The buffers lie on ``device``.
    """

    def __init__(
        self,
        function: Callable[[Buffers], tuple[Tensor, ...]],
        inputs: Buffers,
        recorder: Recorder,
        device: torch.device,
    ) -> None:
        self.replays = 0
        self.buffers = {name: t.to(device, copy=True) for name, t in inputs.items()}
        self._staging: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            # from pageable memory a copy waits for the device
            self._staging = {
                name: torch.empty_like(t, device="cpu", pin_memory=True)
                for name, t in inputs.items()
                if t.device.type == "cpu"
            }
        if self._staging:
            self._copied = torch.cuda.Event()
        self.recorded = recorder.record(lambda: function(self.buffers))

    def __call__(self, inputs: Buffers) -> tuple[Tensor, ...]:
        """Outputs for new inputs, copied: the next replay fills the program's own anew."""
        if self._copied is not None:
            # the last call's copies must have left the staging memory
            self._copied.synchronize()
        for name, buffer in self.buffers.items():
            given = inputs[name]
            staged = self._staging.get(name)
            if staged is not None and given.device.type == "cpu":
                given = staged.copy_(given)
            buffer.copy_(given, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self.recorded.replay()
        self.replays += 1
        return tuple(output.clone() for output in self.recorded.outputs)


@dataclass
class Counts:
    """What a cache of programs has done so far; seconds and bytes are of recording."""

    recorded: int = 0
    replayed: int = 0
    evicted: int = 0
    seconds: float = 0.0
    memory: int = 0


class ProgramCache:
    """The programs used last, ``capacity`` of them."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"max_graphs {capacity} must be at least 1")
        self.capacity = capacity
        self.counts = Counts()
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()

    def __len__(self) -> int:
        return len(self._programs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._programs

    def run(
        self, key: Hashable, make: Callable[[], Program], inputs: Buffers
    ) -> tuple[Tensor, ...]:
        """Outputs of the program of ``key``, made where there is none."""
        program = self._programs.get(key)
        if program is None:
            program = make()
            self.counts.recorded += 1
            self.counts.seconds += program.recorded.seconds
            self.counts.memory += program.recorded.memory
            self._programs[key] = program
            while len(self._programs) > self.capacity:
                self._programs.popitem(last=False)
                self.counts.evicted += 1
        self._programs.move_to_end(key)
        outputs = program(inputs)
        self.counts.replayed += 1
        return outputs

    def clear(self) -> None:
        """Let go of all programs and their memory."""
        self._programs.clear()
