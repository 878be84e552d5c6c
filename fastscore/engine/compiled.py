"""A denoiser compiled by torch.compile, once for every batch size, guided and not."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fastscore.trajectory import Parts, PartsDenoiser

# of Inductor: graphs of its own would be captured within the engine's, and a measurement that
# decided what changes the last bits (padded matrix products, how a sum is split) would let them
# differ between processes
_SETTINGS = {"triton.cudagraphs": False, "deterministic": True}
# what several kernels read is written once: into kernels of ours nothing can be fused, and the sum
# of a convolution and its bias would be computed anew for every one of them
_ON_GPU = {"realize_reads_threshold": 1}


class CompiledDenoiser:
    """``denoiser`` with its parts compiled as one graph (fullgraph) a shape.

    Labels, strengths and levels are tensors, so none of them compiles anything anew;
    ``compilations`` counts how often the compiler ran and ``seconds`` the calls in which it did,
    ``expected`` how often it had to. Once a shape is compiled and has run, a call of that shape may
    be captured: it waits for nothing. Raises ValueError where PyTorch finds no C++ compiler for a
    CPU.
    """

    def __init__(self, denoiser: PartsDenoiser, device: torch.device) -> None:
        self.denoiser = denoiser
        self.sigma_range = getattr(denoiser, "sigma_range", None)
        self.compilations = 0
        self.seconds = 0.0
        self._settings = _SETTINGS | (_ON_GPU if device.type == "cuda" else {})
        self._functions: dict[tuple[int, bool], Callable[..., Parts]] = {}
        if device.type == "cpu":
            _require_compiler()

    @property
    def expected(self) -> int:
        """Compilations that the shapes seen so far take."""
        return len(self._functions)

    def parts(self, x: Tensor, sigma: Tensor, label: Tensor | None, gamma: Tensor | None) -> Parts:
        """What the answer at (x, sigma) is made of."""
        key = (len(x), label is not None)
        if key not in self._functions:
            self._functions[key] = torch.compile(
                _own_code(self._forward), backend=self._compile, fullgraph=True, dynamic=False
            )
        before, start = self.compilations, time.perf_counter()
        found = self._functions[key](self.denoiser, x, sigma, label, gamma)
        if self.compilations > before:
            self.seconds += time.perf_counter() - start
        return found

    def __call__(
        self, x: Tensor, sigma: Tensor, label: Tensor | None, gamma: Tensor | None
    ) -> Tensor:
        """Denoised x0 of x at sigma."""
        return self.parts(x, sigma, label, gamma).total(x)

    @staticmethod
    def _forward(
        denoiser: PartsDenoiser,
        x: Tensor,
        sigma: Tensor,
        label: Tensor | None,
        gamma: Tensor | None,
    ) -> Parts:
        return denoiser.parts(x, sigma, label, gamma)

    def _compile(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.compilations += 1
        return compile_fx(graph, inputs, config_patches=self._settings)


def _own_code(function: Callable) -> Callable:
    """``function`` with a code object of its own: the compiler keeps its cache, of limited size, in
    the code object."""
    return FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise ValueError(
            "torch.compile needs a C++ compiler on a CPU and PyTorch finds none; install g++ or "
            'clang, or use mode "eager"'
        ) from error
