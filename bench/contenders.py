"""Who takes part in a race of operations: our kernels and what PyTorch has to offer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import attention
import torch
from problems import Problem

from fastscore.measure.operations import Case
from fastscore.measure.timing import Run

EAGER, COMPILE = "eager", "compile"


@dataclass(frozen=True)
class Contender:
    """``build(case)`` is a call on the operands of a case; ``answer`` brings its output to ours.

    ``compiles``: it costs seconds a shape. ``around`` is entered where it runs or is captured.
    """

    build: Callable[[Case], Run]
    answer: Callable[[Case, Any], Any] = lambda case, output: output
    compiles: bool = False
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext


def contenders(problem: Problem, backend: str) -> dict[str, Contender]:
    """By name, ``backend`` of `fastscore_kernels` first."""
    found = {
        backend: Contender(lambda case: case.run(backend)),
        EAGER: Contender(lambda case: case.run(EAGER)),
        COMPILE: Contender(_compiled(lambda case: case.compiler(), _plain), compiles=True),
    }
    if problem.op.op == "norm_act_vjp":
        # ATen's own kernels on what the forward pass left, without autograd's threads
        found["aten"] = Contender(lambda case: case.run("reference"))
    if problem.op.spatial:
        found |= _attentions(problem.op.op)
    return found


def _attentions(op: str) -> dict[str, Contender]:
    """scaled_dot_product_attention by each of its fused kernels, and the whole path compiled."""
    build, answer = attention.path, Contender.answer
    if op == "tap_fuse":
        build, answer = attention.fuse, attention.fused
    found = {
        f"sdpa/{kernel}": Contender(build, answer, around=attention.allowed(kernel))
        for kernel in attention.KERNELS
    }
    if op == "tap_path":
        compiled = _compiled(lambda case: _compile(attention.tap_path), attention.path)
        around = attention.allowed("any")
        found["sdpa/compile"] = Contender(compiled, compiles=True, around=around)
    return found


def _plain(case: Case, function: Callable[..., Any]) -> Run:
    return functools.partial(function, *case.arguments)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def _compiled(
    make: Callable[[Case], Callable[..., Any]], call: Callable[[Case, Callable[..., Any]], Run]
) -> Callable[[Case], Run]:
    """A build that compiles once, for the first case, and serves all that follow."""
    made: list[Callable[..., Any]] = []

    def build(case: Case) -> Run:
        if not made:
            made.append(make(case))
        return call(case, made[0])

    return build
