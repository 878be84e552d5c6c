"""One loop for every training: mixed precision, several devices, averaging, exact resume.

Everything random is a pure function of (seed, step, rank), and so is the learning rate of the step.
A training that was killed and resumed therefore equals one that was not, to the bit on a CPU with
the same number of threads.
"""

from __future__ import annotations

import contextlib
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fastscore.config import to_dict
from fastscore.train.ema import Ema
from fastscore.train.launch import StopSignals, cpu_settings, launch, stream_seed
from fastscore.train.logs import Events, Means, MetricsTable, progress_bar
from fastscore.train.record import RunRecord, write_record
from fastscore.train.state import check_state, read_state, write_state

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
# a new loss scale takes some twenty bad steps to settle in 16-mixed; anything beyond is divergence
MAX_BAD_STEPS = 50
# how often several processes agree on a stop signal, which costs them a synchronisation
_AGREE_EVERY = 10


class DivergenceError(RuntimeError):
    """The loss or its gradients were not finite for many steps in a row."""


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the training loop.

    ``batch_size`` is per process; ``clip_norm`` None switches clipping off; ``devices`` counts
    processes on this machine (torchrun overrides it); ``num_threads`` None keeps PyTorch's own.
    """

    steps: int = 10000
    batch_size: int = 64
    lr: float = 1e-3
    warmup_steps: int = 200
    final_lr_ratio: float = 0.01
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    ema_decay: float = 0.999
    clip_norm: float | None = 1.0
    precision: str = "32-true"
    seed: int = 0
    log_every: int = 50
    validate_every: int = 1000
    checkpoint_minutes: float = 10.0
    accelerator: str = "auto"
    devices: int = 1
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "validate_every", "devices"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "checkpoint_minutes"):
            self._require(name, getattr(self, name) > 0, "positive")
        for name in ("warmup_steps", "weight_decay", "seed"):
            self._require(name, getattr(self, name) >= 0, "zero or more")
        self._require("final_lr_ratio", 0 <= self.final_lr_ratio <= 1, "between 0 and 1")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "at least 0 and below 1")
        betas = self.betas
        self._require("betas", len(betas) == 2 and all(0 <= b < 1 for b in betas), "two in [0, 1)")
        clip = self.clip_norm
        self._require("clip_norm", clip is None or 0 < clip < math.inf, "positive or None")
        threads = self.num_threads
        self._require("num_threads", threads is None or threads >= 1, "at least 1 or None")
        self._require("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        kinds = ("auto", "cpu", "cuda")
        self._require("accelerator", self.accelerator in kinds, f"one of {', '.join(kinds)}")

    def _require(self, name: str, ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"LoopConfig: {name} {getattr(self, name)!r} must be {what}")


class Task(Protocol):
    """What is trained: modules, batches, losses, validation and export.

    A task may also have ``setup(device, autocast) -> None``, called once before the first step, to
    move what is not trained (a frozen classifier) to the device; ``autocast()`` returns the
    training's precision context for calls of such modules.
    """

    name: str
    # one optimizer a module, stepped in this order
    trained: dict[str, nn.Module]
    # which of them get an exponential moving average
    ema: tuple[str, ...]
    # JSON-ready; stored in the resume state and compared on resume
    config: dict[str, Any]

    def batch(self, step: int, rng: torch.Generator, rank: int, world: int) -> dict[str, Any]:
        """Batch of a step, on the CPU; a pure function of its arguments (``rng`` is seeded from them).

        On a GPU it runs in a background thread, one step ahead.
        """
        ...

    def loss(
        self, name: str, modules: dict[str, nn.Module], batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of module ``name`` and further scalars to report.

        Modules must be called (not their methods), so that several processes stay in step. ``batch``
        may carry tensors, graphs included, to the calls for modules later in the order.
        """
        ...

    def validate(self, modules: dict[str, nn.Module]) -> dict[str, float]:
        """Metrics of the averaged weights; modules are in evaluation mode, gradients are off."""
        ...

    def export(self, modules: dict[str, nn.Module], path: Path) -> None:
        """Write the averaged weights as a fastscore checkpoint at ``path``."""
        ...


def learning_rate(config: LoopConfig, step: int) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then half a cosine to the final ratio."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


def run(
    task: Task, config: LoopConfig, out: Path, resume: bool = True, extend: bool = False
) -> dict[str, Any]:
    """Train ``task``, resuming what ``out`` holds, and return the run record (also ``out/run.json``).

    Writes state.ckpt, <task.name>.safetensors, metrics.csv, run.json and tensorboard/ into ``out``.
    SIGINT and SIGTERM stop after the step, with the state written, and raise KeyboardInterrupt or
    SystemExit. ``extend`` permits a resumed training a different ``steps``. Raises ValueError when
    ``out`` holds a training of other settings, or any with ``resume`` off, and DivergenceError when
    loss or gradients stay non-finite.
    """
    _check_task(task)
    out = Path(out)
    with cpu_settings(config.num_threads), ExitStack() as stack:
        fabric = launch(config.accelerator, config.devices, config.precision)
        if fabric.is_global_zero:
            out.mkdir(parents=True, exist_ok=True)
        fabric.barrier()
        training = _Training(task, config, out, fabric)
        training.restore(resume, extend)
        stop = stack.enter_context(StopSignals())
        stack.callback(training.close)
        return training.run(stop)


def _check_task(task: Task) -> None:
    if not task.trained:
        raise ValueError(f"task {task.name!r} trains no module; name at least one")
    for name in task.ema:
        if name not in task.trained:
            raise ValueError(
                f"task {task.name!r} averages {name!r}, which is not among its trained modules "
                f"{', '.join(task.trained)}"
            )
    for name, module in task.trained.items():
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"module {name!r} has no parameter to train; all are frozen")


def _optimizer(module: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    """AdamW that decays matrices and kernels, not gains and biases."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # the fused step is the fastest on CPU and GPU and deterministic, but unscales gradients by
    # itself, which rules out clipping them under a loss scale
    fused = config.precision != "16-mixed"
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


class _Batches:
    """Batches of a task by step; with ``ahead``, the next one is made while this one is used."""

    def __init__(self, task: Task, config: LoopConfig, fabric: Fabric) -> None:
        self._task, self._config, self._fabric = task, config, fabric
        self._ahead = fabric.device.type != "cpu"
        self._pool = ThreadPoolExecutor(1) if self._ahead else None
        self._next: tuple[int, Future[dict[str, Any]]] | None = None

    def get(self, step: int) -> dict[str, Any]:
        """Batch of ``step`` on the training device."""
        if self._next is not None and self._next[0] == step:
            batch = self._next[1].result()
        else:
            batch = self._make(step)
        if self._pool is not None and step + 1 < self._config.steps:
            self._next = (step + 1, self._pool.submit(self._make, step + 1))
        return self._fabric.to_device(batch)

    def close(self) -> None:
        """Wait for the background thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _make(self, step: int) -> dict[str, Any]:
        rank, world = self._fabric.global_rank, self._fabric.world_size
        rng = torch.Generator().manual_seed(stream_seed(self._config.seed, step, rank, "batch"))
        return self._task.batch(step, rng, rank, world)


class _Training:
    """A training in progress: modules, optimizers, averages, and where it stands."""

    def __init__(self, task: Task, config: LoopConfig, out: Path, fabric: Fabric) -> None:
        self.task, self.config, self.out, self.fabric = task, config, out, fabric
        self.raw = dict(task.trained)
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        self.trainable: dict[str, list[nn.Parameter]] = {}
        for name, module in self.raw.items():
            module.train()
            self.modules[name] = fabric.setup_module(module)
            self.trainable[name] = [p for p in module.parameters() if p.requires_grad]
            self.optimizers[name] = fabric.setup_optimizers(_optimizer(module, config))
        self.emas = {name: Ema(self.raw[name], config.ema_decay) for name in task.ema}
        if hasattr(task, "setup"):
            task.setup(fabric.device, fabric.autocast)
        self.step = 0
        self.skipped = 0
        self.bad_steps = 0
        self.means = Means()
        self.validation: dict[str, float] = {}
        self.earlier: dict[str, Any] = {}
        self.batches = _Batches(task, config, fabric)
        self._closing: list[Any] = [self.batches.close]

    # where it stands, and back

    def restore(self, resume: bool, extend: bool) -> None:
        """Load the state in the output folder, if there is one."""
        path = self.out / "state.ckpt"
        state = read_state(path)
        if state is None:
            return
        if not resume:
            raise ValueError(
                f"{self.out} already holds a training at step {state['step']}; resume it, delete it, "
                "or choose another folder"
            )
        check_state(state, self._identity(), path, extend)
        for name, module in self.raw.items():
            module.load_state_dict(state["modules"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        for name, ema in self.emas.items():
            ema.load(state["ema"][name])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.bad_steps = state["bad_steps"]
        self.means = Means(state["means"])
        self.validation = state["validation"]
        self.earlier = state["record"]

    def save(self) -> None:
        """Write the resume state and the run record; the first process does."""
        if not self.fabric.is_global_zero:
            return
        record = self._write_record()
        state = {
            **self._identity(),
            "step": self.step,
            "skipped": self.skipped,
            "bad_steps": self.bad_steps,
            "means": self.means.state,
            "validation": self.validation,
            "record": record,
            "modules": {name: dict(module.state_dict()) for name, module in self.raw.items()},
            "optimizers": {name: opt.state_dict() for name, opt in self.optimizers.items()},
            "ema": {name: ema.average for name, ema in self.emas.items()},
            "precision": self.fabric.strategy.precision.state_dict(),
        }
        self.events.flush()
        write_state(self.out / "state.ckpt", state)

    def _identity(self) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "task_config": self.task.config,
            "loop": to_dict(self.config),
            "world_size": self.fabric.world_size,
        }

    # the loop

    def run(self, stop: StopSignals) -> dict[str, Any]:
        """All remaining steps."""
        self._open()
        saved = time.monotonic()
        while self.step < self.config.steps:
            self._train_step()
            row: dict[str, float] = {}
            last = self.step == self.config.steps
            validate = last or self.step % self.config.validate_every == 0
            if self.step % self.config.log_every == 0 or last:
                row = self._report()
            if validate:
                row |= self._validate()
            if row and self.fabric.is_global_zero:
                self.table.append(self.step, row)
                self.events.append(self.step, row)
            stopping = self._agree(stop.received is not None)
            minutes = (time.monotonic() - saved) / 60
            if last or stopping or minutes >= self.config.checkpoint_minutes:
                self.save()
                saved = time.monotonic()
            if stopping and not last:
                stop.stop()
        export = self.out / f"{self.task.name}.safetensors"
        if self.fabric.is_global_zero and not export.exists():
            self._with_averages(lambda: self.task.export(self.raw, export))
        self.fabric.barrier()
        return self._write_record()

    def _open(self) -> None:
        devices = getattr(self.fabric.strategy, "parallel_devices", None) or [self.fabric.device]
        self.record = RunRecord(list(devices), self.earlier)
        self.bar = progress_bar(
            self.task.name, self.step, self.config.steps, self.fabric.is_global_zero
        )
        self._closing.append(self.bar.close)
        if self.fabric.is_global_zero:
            self.table = MetricsTable(self.out / "metrics.csv", self.step)
            self.events = Events(self.out / "tensorboard", self.step)
            self._closing.append(self.events.close)

    def close(self) -> None:
        """Close the progress bar, the event files and the background thread."""
        with ExitStack() as stack:
            for close in self._closing:
                stack.callback(close)

    def _train_step(self) -> None:
        """One step of every module in order; advances ``self.step``."""
        config, rank = self.config, self.fabric.global_rank
        batch = self.batches.get(self.step)
        torch.manual_seed(stream_seed(config.seed, self.step, rank, "step"))
        rate = learning_rate(config, self.step)
        bad = False
        values: dict[str, float] = {}
        for name in self.modules:
            new, finite = self._step_module(name, batch, rate)
            values |= new
            bad = bad or not finite
        self.means.add(values)
        for ema in self.emas.values():
            ema.update(self.step)
        self.step += 1
        self.bad_steps = self.bad_steps + 1 if bad else 0
        if self.bad_steps >= MAX_BAD_STEPS:
            raise DivergenceError(
                f"training of {self.task.name!r} diverged: loss or gradients were not finite in the "
                f"last {MAX_BAD_STEPS} steps up to step {self.step}; lower lr {config.lr:g} or "
                f"clip_norm {config.clip_norm}, or use precision '32-true' or 'bf16-mixed'"
            )
        self._show_progress(values)

    def _step_module(
        self, name: str, batch: dict[str, Any], rate: float
    ) -> tuple[dict[str, float], bool]:
        """Loss, gradients and update of one module; returns values to report and whether all is finite."""
        optimizer, parameters = self.optimizers[name], self.trainable[name]
        for group in optimizer.param_groups:
            group["lr"] = rate
        with self._only_later_modules(name):
            loss, metrics = self.task.loss(name, self.modules, batch)
            # the gradients of other modules are neither computed nor accumulated
            self.fabric.backward(loss, inputs=parameters)
        norm = self._clip(name)
        scalars = {"loss": loss, "grad_norm": norm, **metrics}
        stacked = torch.stack(
            [v.detach().float().reshape(()).to(loss.device) for v in scalars.values()]
        )
        # one synchronisation with the device a module
        values = {f"{name}/{k}": v for k, v in zip(scalars, stacked.tolist(), strict=True)}
        norm_finite = math.isfinite(values[f"{name}/grad_norm"])
        if norm_finite or self.config.precision == "16-mixed":
            # a loss scaler must see bad gradients: it leaves the weights alone and lowers its scale
            optimizer.step()
        if not norm_finite:
            self.skipped += 1
        optimizer.zero_grad(set_to_none=True)
        return values, norm_finite and math.isfinite(values[f"{name}/loss"])

    @contextlib.contextmanager
    def _only_later_modules(self, name: str) -> Any:
        """Gradients off for modules before ``name`` in the order: nothing of this step needs theirs.

        Later modules keep theirs on, so that a graph carried in the batch can be used when their turn
        comes.
        """
        names = list(self.modules)
        earlier = [p for n in names[: names.index(name)] for p in self.trainable[n]]
        for parameter in earlier:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in earlier:
                parameter.requires_grad_(True)

    def _clip(self, name: str) -> Tensor:
        """Clip the gradients and return their norm before."""
        # an infinite limit leaves finite gradients alone, and still unscales and measures them
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        return self.fabric.clip_gradients(
            self.modules[name], self.optimizers[name], max_norm=limit, error_if_nonfinite=False
        )

    def _agree(self, stopping: bool) -> bool:
        if self.fabric.world_size == 1:
            return stopping
        if self.step % _AGREE_EVERY and self.step != self.config.steps:
            return False
        flag = torch.tensor(float(stopping), device=self.fabric.device)
        return bool(self.fabric.all_reduce(flag, reduce_op="sum") > 0)

    # reports

    def _show_progress(self, values: dict[str, float]) -> None:
        if self.bar.disable:
            return
        rate = self.bar.format_dict["rate"]
        losses = {
            k.removesuffix("/loss"): f"{v:.4g}" for k, v in values.items() if k.endswith("/loss")
        }
        if rate:
            samples = rate * self.config.batch_size * self.fabric.world_size
            losses["samples/s"] = f"{samples:.0f}"
        self.bar.set_postfix(losses, refresh=False)
        self.bar.update()

    def _report(self) -> dict[str, float]:
        """Mean of each value since the last report, over all processes."""
        self.record.poll()
        row = {"lr": learning_rate(self.config, self.step - 1), **self.means.take()}
        if self.fabric.world_size > 1:
            stacked = torch.tensor(list(row.values()), device=self.fabric.device)
            row = dict(zip(row, self.fabric.all_reduce(stacked).tolist(), strict=True))
        return row | {"skipped": float(self.skipped)}

    def _validate(self) -> dict[str, float]:
        """Metrics of the averaged weights, and their export; the first process does both."""
        if self.fabric.is_global_zero:
            start = time.perf_counter()
            torch.manual_seed(stream_seed(self.config.seed, self.step, 0, "validate"))
            self.validation = self._with_averages(self._validate_and_export)
            self.record.add_validation(time.perf_counter() - start)
            self._write_record()
        self.fabric.barrier()
        return {f"validation/{k}": v for k, v in self.validation.items()}

    def _validate_and_export(self) -> dict[str, float]:
        metrics = {k: float(v) for k, v in self.task.validate(self.raw).items()}
        self.task.export(self.raw, self.out / f"{self.task.name}.safetensors")
        return metrics

    def _with_averages(self, action: Any) -> Any:
        with ExitStack() as stack:
            for ema in self.emas.values():
                stack.enter_context(ema.applied())
            stack.enter_context(torch.no_grad())
            for module in self.raw.values():
                module.eval()
                stack.callback(module.train)
            return action()

    def _write_record(self) -> dict[str, Any]:
        """The run record, written by the first process."""
        config, fabric = self.config, self.fabric
        device = fabric.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
        record = {
            "task": self.task.name,
            "steps": self.step,
            "samples": self.step * config.batch_size * fabric.world_size,
            "finished": self.step == config.steps,
            **self.record.totals(),
            "skipped_steps": self.skipped,
            "validation": self.validation,
            "device": device.type,
            "device_name": name,
            "world_size": fabric.world_size,
            "threads": torch.get_num_threads(),
            "precision": config.precision,
            "torch": str(torch.__version__),
            "parameters": {n: sum(p.numel() for p in ps) for n, ps in self.trainable.items()},
            "loop": to_dict(config),
            "task_config": self.task.config,
        }
        if fabric.is_global_zero:
            write_record(self.out / "run.json", record)
        return record


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"
