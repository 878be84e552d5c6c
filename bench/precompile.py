"""Triton kernels compiled ahead by several processes into Triton's cache, where launches find them.

A launch compiles what it does not find, one kernel after the other in the process that measures:
most of a GPU's time would go by in that. On a CPU there is nothing to compile.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Self

import torch
from fastscore_kernels.gpu.launch import SHARED_MEMORY, Device, Launch
from torch import Tensor

# cores that are left to the process that measures
_LEFT = 3


class Compilers:
    """Processes that compile launches for ``device``, to be closed; none where it is no GPU.

    ``workers`` None is as many as there are cores to spare.
    """

    def __init__(self, device: Device, workers: int | None = None) -> None:
        self._arch = device.arch
        self._pool: ProcessPoolExecutor | None = None
        self._found: dict[str, Future[str]] = {}
        if device.arch.startswith("sm_"):
            cores = len(os.sched_getaffinity(0))
            # no process inherits what this one has set up on a GPU
            context = multiprocessing.get_context("spawn")
            count = workers or max(1, cores - _LEFT)
            self._pool = ProcessPoolExecutor(count, mp_context=context)

    @property
    def active(self) -> bool:
        """Whether anything is compiled."""
        return self._pool is not None

    def start(self, launches: Iterable[Launch]) -> list[Future[str]]:
        """Begin to compile what has not been begun; each answers "" or why it cannot run."""
        return [self._begin(one) for one in launches] if self._pool is not None else []

    def _begin(self, one: Launch) -> Future[str]:
        from fastscore_kernels.gpu.aot import specialise

        assert self._pool is not None
        unit = specialise(_without_memory(one), self._arch, "")
        if unit.key not in self._found:
            module, name = unit.kernel.fn.__module__, unit.kernel.fn.__name__
            source = (unit.signature, unit.constants, unit.attributes, unit.options)
            self._found[unit.key] = self._pool.submit(_compile, self._arch, module, name, *source)
        return self._found[unit.key]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def obstacle(begun: Iterable[Future[str]]) -> str:
    """Wait; why one of them cannot run, or ""."""
    for future in concurrent.futures.as_completed(begun):
        if why := future.result():
            return why
    return ""


def _without_memory(one: Launch) -> Launch:
    """With tensors that only have a type: a compiler wants to know no more of them."""
    args = tuple(_typed(a.dtype) if isinstance(a, Tensor) else a for a in one.args)
    return Launch(one.kernel, one.grid, args, one.options)


@functools.cache
def _typed(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device="meta")


def _compile(
    arch: str,
    module: str,
    name: str,
    signature: dict[str, str],
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
    options: dict[str, Any],
) -> str:
    """In a process of the pool: compile as a launch would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(module), name)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    try:
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=target, options=options)
    # a compiler fails in many ways; the sentence goes where the launch would have been
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:300]}"
    most = SHARED_MEMORY.get(arch)
    if most is not None and compiled.metadata.shared > most:
        return f"{compiled.metadata.shared} bytes of shared memory are above {most}"
    return ""
