"""One step of a training: its batch, and the update of each module in order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastscore.train.ema import Ema
from fastscore.train.launch import seed_device, stream_seed
from fastscore.train.task import DivergenceError, LoopConfig, Task, learning_rate

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# a new loss scale takes some twenty bad steps to settle in 16-mixed; anything beyond is divergence
MAX_BAD_STEPS = 50


def make_optimizer(module: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    """AdamW over what the module trains; decays matrices and kernels, not gains and biases."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # the fused step is the fastest on CPU and GPU and deterministic, but unscales gradients by
    # itself, which rules out clipping them under a loss scale
    fused = config.precision != "16-mixed"
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


class Batches:
    """Batches of a task by step; on a GPU the next one is made while this one is used."""

    def __init__(self, task: Task, config: LoopConfig, fabric: Fabric) -> None:
        self._task, self._config, self._fabric = task, config, fabric
        # on a CPU a second thread would only take cores from the training
        self._pool: ThreadPoolExecutor | None = None
        if fabric.device.type == "cuda":
            # pinning belongs to the thread's own device
            self._pool = ThreadPoolExecutor(1, None, torch.cuda.set_device, (fabric.device,))
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
        batch = self._task.batch(step, rng, rank, world)
        if self._pool is None:
            return batch
        # a copy from pinned memory does not keep the host from starting the step
        return {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}


class Stepper:
    """Modules of a task with their optimizers and averages; ``step`` updates each module once."""

    def __init__(self, task: Task, config: LoopConfig, fabric: Fabric) -> None:
        self._task, self._config, self._fabric = task, config, fabric
        self.raw = dict(task.trained)
        self.trainable: dict[str, list[nn.Parameter]] = {}
        self.skipped = 0
        self._bad_in_row = 0
        self._modules: dict[str, nn.Module] = {}
        self._optimizers: dict[str, Any] = {}
        for name, module in self.raw.items():
            module.train()
            self._modules[name] = fabric.setup_module(module)
            self.trainable[name] = [p for p in module.parameters() if p.requires_grad]
            self._optimizers[name] = fabric.setup_optimizers(make_optimizer(module, config))
        self._emas = {name: Ema(self.raw[name], config.ema_decay) for name in task.ema}

    def step(self, step: int, batch: dict[str, Any]) -> dict[str, float]:
        """Update every module with the batch of ``step`` (from 0); values to report, by name.

        Raises DivergenceError when something was not finite MAX_BAD_STEPS times in a row.
        """
        config, fabric = self._config, self._fabric
        seed_device(stream_seed(config.seed, step, fabric.global_rank, "step"), fabric.device)
        values: dict[str, float] = {}
        for name in self._modules:
            values |= self._update(name, batch, learning_rate(config, step))
        for ema in self._emas.values():
            ema.update(step)
        decisive = [v for k, v in values.items() if k.endswith(("/loss", "/grad_norm"))]
        self._bad_in_row = 0 if all(map(math.isfinite, decisive)) else self._bad_in_row + 1
        if self._bad_in_row >= MAX_BAD_STEPS:
            raise DivergenceError(
                f"training of {self._task.name!r} diverged: loss or gradients were not finite in "
                f"the last {MAX_BAD_STEPS} steps, up to step {step + 1}; lower lr {config.lr:g} or "
                f"clip_norm {config.clip_norm}, or use precision '32-true' or 'bf16-mixed'"
            )
        return values

    @contextmanager
    def averaged(self) -> Iterator[dict[str, nn.Module]]:
        """The bare modules with averaged weights, in evaluation mode and with gradients off."""
        with ExitStack() as stack:
            for ema in self._emas.values():
                stack.enter_context(ema.applied())
            stack.enter_context(torch.no_grad())
            for module in self.raw.values():
                module.eval()
                stack.callback(module.train)
            yield self.raw

    def state(self) -> dict[str, Any]:
        """Everything a later ``load`` needs to continue to the same bits."""
        return {
            "modules": {name: dict(module.state_dict()) for name, module in self.raw.items()},
            "optimizers": {name: o.state_dict() for name, o in self._optimizers.items()},
            "ema": {name: ema.average for name, ema in self._emas.items()},
            "precision": self._fabric.strategy.precision.state_dict(),
            "skipped": self.skipped,
            "bad_steps": self._bad_in_row,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what ``state`` returned."""
        for name, module in self.raw.items():
            module.load_state_dict(state["modules"][name])
            self._optimizers[name].load_state_dict(state["optimizers"][name])
        for name, ema in self._emas.items():
            ema.load(state["ema"][name])
        self._fabric.strategy.precision.load_state_dict(state["precision"])
        self.skipped, self._bad_in_row = state["skipped"], state["bad_steps"]

    def _update(self, name: str, batch: dict[str, Any], rate: float) -> dict[str, float]:
        """Loss, gradients and weights of one module; non-finite gradients change nothing."""
        optimizer = self._optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = rate
        with self._earlier_modules_fixed(name):
            loss, metrics = self._task.loss(name, self._modules, batch)
            # gradients of other modules are neither computed nor accumulated
            self._fabric.backward(loss, inputs=self.trainable[name])
        scalars = {"loss": loss, "grad_norm": self._clip(name)}
        scalars |= {key: value for key, value in metrics.items() if key not in scalars}
        # one synchronisation with the device a module
        packed = torch.stack([v.detach().float().reshape(()) for v in scalars.values()])
        values = dict(zip(scalars, packed.tolist(), strict=True))
        finite = math.isfinite(values["grad_norm"])
        if finite or self._config.precision == "16-mixed":
            # a loss scaler must see bad gradients: it leaves the weights alone and lowers its scale
            optimizer.step()
        if not finite:
            self.skipped += 1
        optimizer.zero_grad(set_to_none=True)
        return {f"{name}/{key}": value for key, value in values.items()}

    def _clip(self, name: str) -> Tensor:
        """Clip the gradients of a module and return their norm before."""
        # an infinite limit leaves finite gradients alone, and still unscales and measures them
        limit = math.inf if self._config.clip_norm is None else self._config.clip_norm
        return self._fabric.clip_gradients(
            self._modules[name], self._optimizers[name], max_norm=limit, error_if_nonfinite=False
        )

    @contextmanager
    def _earlier_modules_fixed(self, name: str) -> Iterator[None]:
        """Gradients off for modules before ``name``: nothing in the rest of the step needs theirs.

        Later modules keep theirs on, so that a graph carried in the batch serves when their turn
        comes.
        """
        names = list(self._modules)
        earlier = [p for n in names[: names.index(name)] for p in self.trainable[n]]
        for parameter in earlier:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in earlier:
                parameter.requires_grad_(True)
