"""Marks in a trace: phases and layers, put on a pipeline from outside while it is profiled.

The plain path knows nothing of them: methods of instances are wrapped for as long as `Marks.on`
lasts, and what a wrapped method computes is what it computed before, to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from fastscore_kernels import cpu
from torch import Tensor, nn
from torch.profiler import record_function

import fastscore.trajectory as trajectory
from fastscore.classifier import Classifier
from fastscore.denoiser import GuidedUNet, TapDenoiser
from fastscore.engine import Task
from fastscore.layers import Conv2d, Linear, NormAct
from fastscore.measure import macs
from fastscore.pipeline import Pipeline
from fastscore.profiler.phases import (
    BOTH,
    CLASS,
    EVALUATION,
    FORWARD,
    JEM,
    NATIVE,
    PHASE,
    PRECONDITIONING,
    SOLVER,
    SUBNET,
    TAPS,
    UNDIVIDED,
    UNET,
    VOCODER,
    WHOLE,
)
from fastscore.profiler.work import Work, layer_work, program_work, solver_work
from fastscore.subnet import TapFusion
from fastscore.unet import SelfAttention

# a fifth of what record_function costs, which matters for some hundred layers an evaluation
_Mark = torch._C._profiler._RecordFunctionFast
_MISSING = object()


class Ledger(dict[str, Work]):
    """Work by the name of its mark."""

    def __init__(self) -> None:
        super().__init__()
        # whether a GPU computes products of fp32 numbers in it
        self.tf32 = False
        self._names: dict[tuple, str] = {}

    def layer(
        self, module: nn.Module, path: str, direction: str, x: Tensor, y: Any, like: Tensor
    ) -> str:
        """Name of the mark of a layer's call."""
        key = path, direction, tuple(x), tuple(y), like.shape[0]
        name = self._names.get(key)
        if name is None:
            work = layer_work(module, path, direction, x, y, like)
            if self.tf32 and work.macs and work.dtype == "fp32":
                work = replace(work, dtype="tf32")
            name = self._names[key] = work.name
            self[name] = work
        return name


class Marks:
    """Wraps methods of a pipeline's parts, and takes the wrapping off again.

    ``ledger`` is the work of every layer's mark. Shapes of outputs are only known after a call, so
    a layer's first call goes unmarked: draw once before what is to be profiled.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._stack = contextlib.ExitStack()
        self._shapes: dict[tuple, tuple[int, ...]] = {}
        self._counts: dict[str, macs.Count] | None = None

    @contextlib.contextmanager
    def on(self, pipeline: Pipeline) -> Iterator[None]:
        """Marks on ``pipeline`` while the block lasts.

        Nobody else may use a pipeline in this process meanwhile: the compiled library and the
        solver step are marked for all of them.
        """
        try:
            self._put(pipeline)
            yield
        finally:
            self._stack.close()

    def _put(self, pipeline: Pipeline) -> None:
        """Mark phases, and layers where the denoiser runs layer by layer."""
        engine = pipeline.engine
        self.ledger.tf32 = pipeline.precision == "tf32"
        self._phase(engine._runner, "draw", SOLVER)
        self._phase(engine._runner, "finish", VOCODER)
        self._layers(pipeline.vocoder, "vocoder")
        self._native()
        if engine.options.mode != "eager":
            # inside a compiled or recorded program a mark would be part of another program
            self._programs(pipeline)
            return
        self._wrap(trajectory, "solver_step", self._solver_step)
        denoiser = pipeline.denoiser
        self._evaluation(denoiser, PRECONDITIONING)
        if denoiser.classifier is not None:
            self._classifier(denoiser, denoiser.classifier)
        if isinstance(denoiser, TapDenoiser):
            self._phase(denoiser.subnet, "forward", SUBNET)
            for module in denoiser.subnet.fusion:
                self._phase(module, "forward", TAPS)
            self._layers(denoiser.subnet, "subnet")
        if isinstance(denoiser, GuidedUNet):
            self._phase(denoiser.unet, "forward", UNET)
            self._layers(denoiser.unet, "unet")

    def _wrap(self, owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
        """Replace an attribute of one object by ``make`` of it."""
        own = vars(owner).get(name, _MISSING)

        def restore() -> None:
            if own is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

        setattr(owner, name, make(getattr(owner, name)))
        self._stack.callback(restore)

    def _phase(self, owner: Any, method: str, phase: str) -> None:
        self._wrap(owner, method, lambda call: _within(phase, call))

    def _evaluation(self, owner: Any, phase: str) -> None:
        """A mark around every evaluation, which says whether it is guided."""

        def make(call: Callable) -> Callable:
            def parts(x: Tensor, sigma: Tensor, label: Any = None, gamma: Any = None) -> Any:
                guided = "unguided" if label is None else "guided"
                with _Mark(EVALUATION + guided), record_function(PHASE + phase):
                    return call(x, sigma, label, gamma)

            return parts

        self._wrap(owner, "parts", make)

    def _programs(self, pipeline: Pipeline) -> None:
        """Marks around what runs as one program: an evaluation, or a graph of a trajectory."""
        denoiser, compiled = pipeline.denoiser, pipeline.engine._compiled
        if self._counts is None:
            self._counts = macs.step(denoiser)

        def mark(guided: int, unguided: int, rows: int) -> Any:
            work = program_work(denoiser, self._counts, guided, unguided, rows)
            self.ledger[work.name] = work
            return _Mark(work.name)

        def evaluation(call: Callable) -> Callable:
            def parts(x: Tensor, sigma: Tensor, label: Any = None, gamma: Any = None) -> Any:
                guided = label is not None
                with mark(guided, not guided, len(x)):
                    return call(x, sigma, label, gamma)

            return parts

        def graph(call: Callable) -> Callable:
            def draw(task: Task, batch: Any, guided: bool, watch: Any) -> Any:
                route = task.course(guided)
                if route is None or watch is not None:
                    return call(task, batch, guided, watch)
                often = sum(kind.guided for kind in route.kinds)
                with mark(often, len(route.kinds) - often, len(batch["seeds"])):
                    return call(task, batch, guided, watch)

            return draw

        if pipeline.engine.options.recorded:
            # a compiled denoiser within a graph runs only while it is recorded
            self._wrap(pipeline.engine._runner, "draw", graph)
        else:
            self._wrap(compiled, "parts", evaluation)
            self._evaluation(compiled, WHOLE)

    def _classifier(self, denoiser: nn.Module, classifier: Classifier) -> None:
        if not isinstance(classifier, Classifier):
            self._phase(denoiser, "_read", UNDIVIDED)
            return
        for method in ("embed", "lower", "upper"):
            self._phase(classifier, method, FORWARD)
        alone = JEM if isinstance(denoiser, TapDenoiser) else CLASS
        self._wrap(classifier, "linearize_lower", lambda call: _linearized(call, lambda _: CLASS))
        self._wrap(
            classifier,
            "linearize_upper",
            lambda call: _linearized(call, lambda copies: BOTH if copies == 2 else alone),
        )
        self._layers(classifier, "classifier")

    def _layers(self, root: nn.Module, name: str) -> None:
        for path, module in root.named_modules(prefix=name):
            leaf = not any(True for _ in module.children())
            whole = leaf or isinstance(module, NormAct | TapFusion | SelfAttention)
            idle = isinstance(module, nn.Dropout | nn.Identity)
            if not whole or idle or _fused(root, path, name):
                continue
            self._wrap(module, "forward", lambda call, m=module, p=path: self._forward(m, p, call))
            if isinstance(module, Conv2d | NormAct):
                make = self._linearize_conv if isinstance(module, Conv2d) else self._linearize
                self._wrap(
                    module, "linearize", lambda call, m=module, p=path, k=make: k(m, p, call)
                )
            if isinstance(module, Conv2d) and module.deferred is not None:
                # with nothing left out it is ``forward``, which is marked
                self._wrap(
                    module, "product", lambda call, m=module, p=path: self._forward(m, p, call)
                )
            if isinstance(module, Linear):
                self._wrap(module, "pull", lambda call, m=module, p=path: self._pull(m, p, call))

    def _call(
        self, module: nn.Module, path: str, direction: str, call: Callable, x: Tensor, *rest: Any
    ) -> Any:
        """``call(x, *rest)`` under the mark of a layer's forward pass."""
        if not isinstance(x, Tensor):
            return call(x, *rest)
        key = path, x.shape
        shape = self._shapes.get(key)
        if shape is None:
            out = call(x, *rest)
            first = out[0] if isinstance(out, tuple) else out
            self._shapes[key] = tuple(first.shape)
            return out
        with _Mark(self.ledger.layer(module, path, direction, x.shape, shape, x)):
            return call(x, *rest)

    def _forward(self, module: nn.Module, path: str, call: Callable) -> Callable:
        return lambda x, *rest: self._call(module, path, "forward", call, x, *rest)

    def _linearize(self, module: nn.Module, path: str, call: Callable) -> Callable:
        def linearize(x: Tensor, *rest: Any) -> tuple[Tensor, Callable]:
            y, pull = self._call(module, path, "forward", call, x, *rest)
            return y, self._pulling(module, path, x.shape, y.shape, pull)

        return linearize

    def _linearize_conv(self, module: nn.Module, path: str, call: Callable) -> Callable:
        def linearize(x: Tensor) -> tuple[Tensor, Callable]:
            # the call within is that of ``product``, which is marked
            y, pull = call(x)
            return y, self._pulling(module, path, x.shape, y.shape, pull)

        return linearize

    def _pulling(
        self, module: nn.Module, path: str, x: Any, y: Any, pull: Callable[..., Tensor]
    ) -> Callable[..., Tensor]:
        def marked(grad: Tensor, *addend: Tensor) -> Tensor:
            with _Mark(self.ledger.layer(module, path, "pull-back", x, y, grad)):
                return pull(grad, *addend)

        return marked

    def _pull(self, module: nn.Linear, path: str, call: Callable) -> Callable:
        def pull(grad: Tensor) -> Tensor:
            x, y = (len(grad), module.in_features), grad.shape
            with _Mark(self.ledger.layer(module, path, "pull-back", x, y, grad)):
                return call(grad)

        return pull

    def _solver_step(self, call: Callable) -> Callable:
        def step(x: Tensor, coefficients: Tensor, **update: Any) -> Any:
            work = solver_work(x, update.get("raw"), update.get("guidance") is not None)
            self.ledger[work.name] = work
            with _Mark(work.name):
                return call(x, coefficients, **update)

        return step

    def _native(self) -> None:
        """Mark every call into the compiled library, which PyTorch's profiler does not see."""

        def make(find: Callable[[str], Callable]) -> Callable[[str], Callable]:
            def function(name: str) -> Callable:
                call, words = find(name), NATIVE + name.removeprefix("fs_")

                def marked(*args: Any) -> int:
                    with _Mark(words):
                        return call(*args)

                return marked

            return function

        self._wrap(cpu, "_function", make)


def _fused(root: nn.Module, path: str, name: str) -> bool:
    """Whether a layer is part of a fusion of taps, which is one operation."""
    parents = path.removeprefix(name).strip(".").split(".")[:-1]
    for i in range(1, len(parents) + 1):
        if isinstance(root.get_submodule(".".join(parents[:i])), TapFusion):
            return True
    return False


def _within(phase: str, call: Callable) -> Callable:
    def inner(*args: Any, **kwargs: Any) -> Any:
        with record_function(PHASE + phase):
            return call(*args, **kwargs)

    return inner


def _linearized(call: Callable, phase_of: Callable[[int], str]) -> Callable:
    """A ``linearize`` whose pull-back is a phase by how many cotangents each sample gets."""

    def linearize(x: Tensor, emb: Tensor) -> tuple:
        with record_function(PHASE + FORWARD):
            *found, pull = call(x, emb)

        def marked(grad: Tensor) -> Any:
            with record_function(PHASE + phase_of(len(grad) // len(x))):
                return pull(grad)

        return *found, marked

    return linearize
