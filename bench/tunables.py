"""What a launch table can hold: every choice of parameters that a call asks for, and who asks.

Calls run on tensors without memory, under the rules of the device that is to be tuned.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from fastscore_kernels.gpu import launch, shapes
from fastscore_kernels.gpu.launch import Choice, Device
from problems import Problem, problems

from fastscore.measure import nodes
from fastscore.measure.models import MODELS, imagined
from fastscore.measure.operations import case

MOMENTS = "tap_path_moments"


@dataclass(frozen=True)
class Tunable:
    """A choice, and a problem whose call asks for it."""

    problem: Problem
    choice: Choice

    @property
    def name(self) -> str:
        """Operation and problem as a table names them."""
        return f"{self.choice.op} {self.choice.key}"


def device_here(device: torch.device) -> Device:
    """What the rules of the kernels know of a device."""
    return launch.device_of(torch.empty(0, device=device))


def tunables(device: Device, dry: bool) -> list[Tunable]:
    """One for every entry that a table for the presets can have, in the order of `problems`."""
    found: dict[str, Tunable] = {}
    with nodes.imagined():
        for problem in _asking(dry):
            for choice in asked(problem, device):
                one = Tunable(problem, choice)
                found.setdefault(one.name, one)
    return list(found.values())


def _asking(dry: bool) -> Iterator[Problem]:
    """Registered problems, and pull-backs of two cotangents a sample, as guided steps have them."""
    pulled = {c for model in shapes.CLASSIFIERS.values() for c in model.channels}
    for problem in problems(dry):
        yield problem
        op = problem.op
        if op.op == "norm_act_vjp" and op.channels in pulled:
            # to a launch two cotangents of a sample are two samples
            yield replace(problem, op=replace(op, batch=2 * op.batch))


def asked(problem: Problem, device: Device) -> list[Choice]:
    """What a call of a problem asks for; inside `nodes.imagined`.

    Moments that the call finds on its way are no launch, and nothing to choose.
    """
    call = case(problem.op, nodes.DEVICE, problem.dtype).run("triton")
    with launch.choices() as found:
        names = nodes.predicted(call, device=device).kernels
    return [c for c in found if c.op != MOMENTS or "tap_moments_kernel" in names]


def launches(problem: Problem, device: Device, **plans: Mapping[str, int]) -> list[launch.Launch]:
    """What a call of a problem launches, with the parameters of ``plans`` by operation.

    ValueError where they do not fit.
    """
    with nodes.imagined(), contextlib.ExitStack() as stack:
        for op, plan in plans.items():
            stack.enter_context(launch.parameters(op, **plan))
        call = case(problem.op, nodes.DEVICE, problem.dtype).run("triton")
        return nodes.predicted(call, device=device).made


def guided_step(
    device: Device, model: str = "paper", batch: int = 1, dtype: str = "bfloat16"
) -> Counter[str]:
    """How often a guided step asks for each choice, by the names of tunables."""
    net = MODELS[model]().eval()
    with nodes.imagined():
        imagined(net)
        x = torch.empty(batch, 1, *net.shape, device=nodes.DEVICE)
        number = torch.empty(batch, device=nodes.DEVICE)
        label = torch.empty(batch, dtype=torch.int64, device=nodes.DEVICE)
        with launch.choices() as found:
            nodes.predicted(lambda: net(x, number, label, number), device=device)
    # it asks the same in fp32, for which PyTorch knows the layout of convolutions without a GPU
    return Counter(f"{c.op} {c.key.replace('dtype=float32', f'dtype={dtype}')}" for c in found)


def ordered(found: Iterable[Tunable], shares: dict[str, float]) -> list[Tunable]:
    """Those with the largest share first, all others as they come."""
    return sorted(found, key=lambda one: -shares.get(one.name, 0.0))
