"""Steps of every training as a GPU would take them, on tensors without memory; prints JSON.

A process of its own, as `imagined` is: no interpreter of Triton kernels, and a GPU's operations.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastscore_kernels.gpu import launch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastscore.classifier import Classifier
from fastscore.config import CLASSIFIERS, DIGITS, SUBNETS, UNETS, MelConfig, MelSpace, SigmaRange
from fastscore.data import MelSet, WaveSet
from fastscore.layers import set_backend
from fastscore.measure import nodes
from fastscore.train.classifier import ClassifierTask
from fastscore.train.ema import Ema
from fastscore.train.score import ScoreTask
from fastscore.train.step import make_optimizer
from fastscore.train.task import LoopConfig, Task
from fastscore.train.unet import UNetTask
from fastscore.train.vocoder import PRESETS, VocoderTask

LOOP = LoopConfig(precision="bf16-mixed")
BATCH = 2


def mels() -> MelSet:
    values = np.random.default_rng(0).normal(-5.0, 2.0, (20, 80, 64)).astype(np.float32)
    labels = np.arange(20) % 10
    return MelSet(values, labels, ["a"] * 20, [Path("a")] * 20, DIGITS, MelConfig())


def waves() -> WaveSet:
    samples = np.random.default_rng(0).integers(-9999, 9999, 3 * 16000).astype(np.int16)
    offsets, labels = np.arange(4) * 16000, np.arange(3)
    return WaveSet(samples, offsets, labels, ["a"] * 3, [Path("a")] * 3, DIGITS, 16000)


def tasks() -> Iterator[tuple[str, Task]]:
    """All trainings of the published sizes, as `fastscore train` sets them up."""
    common = (mels(), mels(), MelSpace(mean=-5.0, std=2.0), SigmaRange(), BATCH)
    config = CLASSIFIERS["paper"]
    yield "classifier", ClassifierTask(config, *common)
    score = ScoreTask(SUBNETS["paper"], Classifier(config), *common, tap_dtype=torch.bfloat16)
    yield "score", score
    yield "unet", UNetTask(UNETS["paper-equal-total"], *common)
    for name in ("hifigan-v1", "digits"):
        preset = PRESETS[name]
        task = VocoderTask(preset.generator, waves(), waves(), BATCH, preset.settings)
        yield f"vocoder/{name}", task


def move(module: nn.Module) -> nn.Module:
    """``module`` on the imagined GPU, in place, with its layouts, and trained as before."""
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None:
                part._parameters[name] = nn.Parameter(_moved(p), requires_grad=p.requires_grad)
        for name, b in list(part._buffers.items()):
            if b is not None:
                part._buffers[name] = _moved(b)
    return module


def _moved(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=nodes.DEVICE)


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    """bf16 autocast of a GPU; torch.autocast switches itself off where there is none."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class Cast(nn.Module):
    """A module as Fabric wraps it: called under autocast, with outputs in fp32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object) -> object:
        """What the module returns, floating-point tensors in fp32."""
        with autocast():
            out = self.module(*args)
        return _wide(out)


def _wide(value: object) -> object:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    return type(value)(map(_wide, value)) if isinstance(value, (list, tuple)) else value


def step(task: Task, backend: str = "reference") -> dict[str, object]:
    """What `fastscore.train.step.Stepper` does in a step, up to where it reads its values."""
    made = task.batch(0, torch.Generator().manual_seed(0), 0, 1)
    if hasattr(task, "setup"):
        # what it moves is moved below: parameters without memory cannot be replaced in place
        task.setup(torch.device("cpu"), autocast)
    with FakeTensorMode():
        batch = {
            k: torch.empty(v.shape, dtype=v.dtype, device=nodes.DEVICE)
            if isinstance(v, Tensor)
            else v
            for k, v in made.items()
        }
        held = [v for v in vars(task).values() if isinstance(v, nn.Module)]
        for module in (*task.trained.values(), *held):
            set_backend(move(module), backend)
        modules = {name: Cast(module.train()) for name, module in task.trained.items()}
        optimizers = {name: make_optimizer(m, LOOP) for name, m in task.trained.items()}
        averages = [Ema(task.trained[name], 0.9) for name in task.ema]
        found = nodes.predicted(lambda: _update(task, modules, optimizers, averages, batch))
    return {"total": found.total, "transfers": found.transfers, "kernels": dict(found.kernels)}


def backward(loss: Tensor, wanted: list[Tensor]) -> None:
    """``loss.backward(inputs=wanted)`` by the graph's own nodes.

    PyTorch's engine asks the driver for streams, and no driver is there.
    """
    leaves = {id(p) for p in wanted}
    grads: dict[Any, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    for node in _order(loss.grad_fn):
        given = grads.pop(node, None)
        if given is None:
            continue
        variable = getattr(node, "variable", None)
        if variable is not None:
            if id(variable) in leaves:
                variable.grad = given[0]
            continue
        for (after, place), grad in _pulled(node, given):
            if grad is None:
                continue
            about = after._input_metadata[place]
            slots = grads.setdefault(after, [None] * len(after._input_metadata))
            with torch.no_grad():
                # as the engine makes gradients fit what they are of
                grad = grad.sum_to_size(about.shape).to(about.dtype)
                slots[place] = grad if slots[place] is None else slots[place] + grad


def _pulled(node: Any, given: list[Tensor | None]) -> list[tuple[tuple[Any, int], Any]]:
    """Where a node's gradients go, and they."""
    ours = isinstance(node, torch.autograd.function.BackwardCFunction)
    with torch.no_grad():
        found = node.apply(*given) if ours else node(*given)
    found = found if isinstance(found, tuple) else (found,)
    if ours:
        # one gradient an argument, whatever it is: those of tensors that want one are kept
        found = tuple(g for g, wanted in zip(found, node.needs_input_grad, strict=True) if wanted)
        return list(zip((to for to in node.next_functions if to[0]), found, strict=True))
    return [(to, g) for to, g in zip(node.next_functions, found, strict=True) if to[0]]


def _order(root: Any) -> list[Any]:
    """Nodes of a graph, each before those that its gradients go to."""
    done: list[Any] = []
    seen: set[Any] = set()
    waiting = [(root, False)]
    while waiting:
        node, left = waiting.pop()
        if left:
            done.append(node)
        elif node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting += [(after, False) for after, _ in node.next_functions if after is not None]
    return done[::-1]


def _update(task: Task, modules: dict, optimizers: dict, averages: list, batch: dict) -> None:
    for name in modules:
        trainable = [p for p in task.trained[name].parameters() if p.requires_grad]
        loss, metrics = task.loss(name, modules, batch)
        backward(loss, trainable)
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0, error_if_nonfinite=False)
        torch.stack([v.detach().float().reshape(()) for v in (loss, norm, *metrics.values())])
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
    for average in averages:
        average.update(0)


def main() -> None:
    warnings.simplefilter("ignore")
    # what a GPU that is not there would say of itself
    launch._cuda_device = lambda index: launch.DEVICES["sm_90"]
    found = {name: step(task) for name, task in tasks()}
    for name, task in tasks():
        if not name.startswith("vocoder"):
            found[f"{name}/triton"] = step(task, "triton")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
