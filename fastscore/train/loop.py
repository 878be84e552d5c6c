"""One loop for every training: mixed precision, several devices, averaging, exact resume.

Everything random is a pure function of (seed, step, rank), and so is the learning rate. A training
that was killed and resumed therefore equals one that was not, to the bit on a CPU with the same
number of threads.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastscore.train.launch import (
    StopSignals,
    cpu_settings,
    gpu_settings,
    launch,
    seed_device,
    sole_writer,
    stream_seed,
)
from fastscore.train.logs import Events, Means, MetricsTable, Progress
from fastscore.train.record import RunRecord, device_name, write_record
from fastscore.train.state import check_state, identity, read_state, write_state
from fastscore.train.step import Batches, Stepper
from fastscore.train.task import DivergenceError, LoopConfig, Task, check_task, learning_rate

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["DivergenceError", "LoopConfig", "Task", "learning_rate", "run"]

# how often several processes agree on whether to stop, which costs them a synchronisation
_AGREE_EVERY = 10
# why to stop; of several processes the largest holds
_GO_ON, _TIME_IS_UP, _TOLD_TO = 0, 1, 2


def run(
    task: Task,
    config: LoopConfig,
    out: Path,
    resume: bool = True,
    extend: bool = False,
    until: float = math.inf,
) -> dict[str, Any]:
    """Train ``task``, resuming what ``out`` holds, and return the run record (``out/run.json``).

    Writes state.ckpt, <task.name>.safetensors, metrics.csv, run.json and tensorboard/ into ``out``.
    SIGINT and SIGTERM stop after the step, with the state written, and raise KeyboardInterrupt or
    SystemExit. ``extend`` permits a resumed training a different ``steps``. After the step in which
    time.monotonic() reaches ``until`` the state is written and the record of an unfinished training
    returned. Raises ValueError when ``out`` holds a training of other settings, or any with
    ``resume`` off, and DivergenceError when loss or gradients stay non-finite.
    """
    check_task(task)
    with cpu_settings(config.num_threads), ExitStack() as stack:
        fabric = launch(config.accelerator, config.devices, config.precision)
        if fabric.is_global_zero:
            stack.enter_context(sole_writer(Path(out)))
        fabric.barrier()
        stack.enter_context(gpu_settings(fabric.device))
        training = _Training(task, config, Path(out), fabric)
        stack.callback(training.close)
        training.restore(resume, extend)
        return training.run(stack.enter_context(StopSignals()), until)


class _Training:
    """A training in progress: where it stands, what it writes, and when."""

    def __init__(self, task: Task, config: LoopConfig, out: Path, fabric: Fabric) -> None:
        self.task, self.config, self.out, self.fabric = task, config, out, fabric
        self.first = fabric.is_global_zero
        self.identity = identity(task, config, fabric.world_size)
        self.step = 0
        self.means = Means()
        self.validation: dict[str, float] = {}
        self.earlier: dict[str, Any] = {}
        self.stepper = Stepper(task, config, fabric)
        self.batches = Batches(task, config, fabric)
        self._closing: list[Callable[[], None]] = [self.batches.close]
        if hasattr(task, "setup"):
            task.setup(fabric.device, fabric.autocast)

    def close(self) -> None:
        """Close the progress bar, the event files and the background thread."""
        with ExitStack() as stack:
            for close in self._closing:
                stack.callback(close)

    def restore(self, resume: bool, extend: bool) -> None:
        """Load the state in the output folder, if there is one."""
        path = self.out / "state.ckpt"
        state = read_state(path)
        if state is None:
            return
        if not resume:
            raise ValueError(
                f"{self.out} already holds a training at step {state['step']}; resume it, delete "
                "it, or choose another folder"
            )
        check_state(state, self.identity, path, extend)
        self.stepper.load(state["stepper"])
        self.step, self.means = state["step"], Means(state["means"])
        self.validation, self.earlier = state["validation"], state["record"]

    def save(self) -> None:
        """Write the resume state and the run record."""
        if not self.first:
            return
        # the tables first: rows beyond the state are dropped on resume, missing ones would be lost
        self.events.flush()
        record = self._write_record()
        state = {
            "step": self.step,
            "means": self.means.state,
            "validation": self.validation,
            "record": record,
            "stepper": self.stepper.state(),
        }
        write_state(self.out / "state.ckpt", self.identity | state)

    def run(self, stop: StopSignals, until: float = math.inf) -> dict[str, Any]:
        """Take all remaining steps that there is time for; returns the run record."""
        self._open()
        saved = time.monotonic()
        while self.step < self.config.steps:
            values = self.stepper.step(self.step, self.batches.get(self.step))
            self.step += 1
            self.means.add(values)
            self.progress.update(values)
            self._report()
            now = time.monotonic()
            reason = _TIME_IS_UP if now >= until else _GO_ON
            reason = self._agree(_TOLD_TO if stop.received is not None else reason)
            last = self.step == self.config.steps
            if last or reason or now - saved >= 60 * self.config.checkpoint_minutes:
                self.save()
                saved = time.monotonic()
            if reason == _TOLD_TO and not last:
                stop.stop()
            if reason and not last:
                return self._record()
        return self._finish()

    def _open(self) -> None:
        devices = getattr(self.fabric.strategy, "parallel_devices", None) or [self.fabric.device]
        self.record = RunRecord(list(devices), self.earlier)
        samples = self.config.batch_size * self.fabric.world_size
        self.progress = Progress(
            self.task.name, self.step, self.config.steps, samples, enabled=self.first
        )
        self._closing.append(self.progress.close)
        if self.first:
            self.table = MetricsTable(self.out / "metrics.csv", self.step)
            self.events = Events(self.out / "tensorboard", self.step)
            self._closing.append(self.events.close)

    def _finish(self) -> dict[str, Any]:
        """Record of a finished training; a lost export is written again, a kept record read."""
        export, record = self.out / f"{self.task.name}.safetensors", self.out / "run.json"
        if self.first and not export.exists():
            with self.stepper.averaged() as modules:
                self.task.export(modules, export)
        if self.first and not record.exists():
            self._write_record()
        return self._record()

    def _record(self) -> dict[str, Any]:
        """The record as it was written, for every process."""
        written = json.loads((self.out / "run.json").read_text()) if self.first else None
        return self.fabric.broadcast(written)

    def _agree(self, reason: int) -> int:
        """Why to stop, if any process has a reason; several ask each other now and then."""
        if self.fabric.world_size == 1:
            return reason
        if self.step % _AGREE_EVERY and self.step != self.config.steps:
            return _GO_ON
        flag = torch.tensor(float(reason), device=self.fabric.device)
        return int(self.fabric.all_reduce(flag, reduce_op="max"))

    def _report(self) -> None:
        """Means, and metrics of the averaged weights, where this step is due to report them."""
        config, last = self.config, self.step == self.config.steps
        row: dict[str, float] = {}
        if last or self.step % config.log_every == 0:
            self.record.poll()
            row = self._take_means()
        if last or self.step % config.validate_every == 0:
            if self.first:
                self._validate()
            self.fabric.barrier()
            row |= {f"validation/{name}": value for name, value in self.validation.items()}
        if row and self.first:
            self.table.append(self.step, row)
            self.events.append(self.step, row)

    def _take_means(self) -> dict[str, float]:
        """Mean of each value since the last report, over all processes."""
        means = self.means.take()
        if self.fabric.world_size > 1:
            stacked = torch.tensor(list(means.values()), device=self.fabric.device)
            means = dict(zip(means, self.fabric.all_reduce(stacked).tolist(), strict=True))
        rate = learning_rate(self.config, self.step - 1)
        return {"lr": rate, **means, "skipped": float(self.stepper.skipped)}

    def _validate(self) -> None:
        """Metrics of the averaged weights, and their export."""
        start = time.perf_counter()
        seed = stream_seed(self.config.seed, self.step, 0, "validate")
        seed_device(seed, self.fabric.device)
        with self.stepper.averaged() as modules:
            metrics = self.task.validate(modules)
            self.task.export(modules, self.out / f"{self.task.name}.safetensors")
        self.validation = {name: float(value) for name, value in metrics.items()}
        self.record.add_validation(time.perf_counter() - start)
        self._write_record()

    def _write_record(self) -> dict[str, Any]:
        """Write run.json: what was trained, how far, on what, and what it cost."""
        config, fabric, trainable = self.config, self.fabric, self.stepper.trainable
        record = {
            "task": self.task.name,
            "steps": self.step,
            "samples": self.step * config.batch_size * fabric.world_size,
            "finished": self.step == config.steps,
            **self.record.totals(),
            "skipped_steps": self.stepper.skipped,
            "validation": self.validation,
            "device": fabric.device.type,
            "device_name": device_name(fabric.device),
            "world_size": fabric.world_size,
            "threads": torch.get_num_threads(),
            "precision": config.precision,
            "torch": str(torch.__version__),
            "parameters": {n: sum(p.numel() for p in ps) for n, ps in trainable.items()},
            "loop": self.identity["loop"],
            "task_config": self.identity["task_config"],
        }
        write_record(self.out / "run.json", record)
        return record
