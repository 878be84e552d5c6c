"""Multiply-accumulates layer by layer, with vector-Jacobian products counted and told apart.

Formulas are those of torch.utils.flop_counter, halved: convolutions, matrix products, attention and
their backward passes; padding counts as if it were data. Nothing else counts: norms, activations,
softmax, Fourier transforms. Models run on the meta device, so nothing is computed.

Our classifier pulls cotangents back by itself, outside of any module's forward, where counters by
module lose them. Here an operation belongs to the layer whose weight it reads, and is of the
forward pass while that layer, or one around it, runs its forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.cost import inputs, on_meta
from fastscore.denoiser import Denoiser

FORWARD, VJP = "forward", "vjp"
# parts of a step: the classifier's forward pass, both of its VJPs, and the score network
PARTS = ("forward", "jem_vjp", "class_vjp", "subnet", "unet")


@dataclass(frozen=True)
class Row:
    """Multiply-accumulates of one layer, by its name in the model, in one part."""

    module: str
    part: str
    macs: int


@dataclass(frozen=True)
class Count:
    """Multiply-accumulates by layer and part, in the order they first ran."""

    rows: tuple[Row, ...]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(row.macs for row in self.rows)

    def parts(self) -> dict[str, int]:
        """Sums by part."""
        return _sums((row.part, row.macs) for row in self.rows)

    def modules(self, depth: int | None = None) -> dict[str, int]:
        """Sums by layer, or by the first ``depth`` words of its name; parts are added up."""
        return _sums((".".join(row.module.split(".")[:depth]), row.macs) for row in self.rows)

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the total, sums by part, and rows of layer, part, multiply-accumulates."""
        rows = [[row.module, row.part, row.macs] for row in self.rows]
        return {"total": self.total, "parts": self.parts(), "rows": rows}


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for key, macs in pairs:
        found[key] += macs
    return dict(found)


def step(denoiser: Denoiser, batch: int = 1) -> dict[str, Count]:
    """An "unguided" and, where there is a classifier, a "guided" evaluation of ``batch`` samples.

    Parts are those of `PARTS`. Both cotangents of a guided step go back through one batched pass,
    which costs each its rows: what an unguided step pulls back is the JEM's part, and what a guided
    one pulls back beyond it is the class's.
    """
    model = on_meta(denoiser)
    x, sigma = inputs(model, batch)
    unguided = count(model, lambda: model(x, sigma))
    jem = {row.module: row.macs for row in unguided.rows if row.part == VJP}
    found = {"unguided": _parted(unguided, jem)}
    if model.classifier is not None:
        label = torch.zeros(batch, dtype=torch.int64, device="meta")
        found["guided"] = _parted(count(model, lambda: model(x, sigma, label, sigma)), jem)
    return found


def _parted(counted: Count, jem: dict[str, int]) -> Count:
    rows = []
    for row in counted.rows:
        network = row.module.partition(".")[0]
        if network != "classifier":
            rows.append(Row(row.module, network, row.macs))
        elif row.part == FORWARD:
            rows.append(row)
        else:
            shared = jem.get(row.module, 0)
            rows.append(Row(row.module, "jem_vjp", shared))
            rows.append(Row(row.module, "class_vjp", row.macs - shared))
    return Count(tuple(row for row in rows if row.macs))


def of(module: nn.Module, *arguments: Tensor) -> Count:
    """A call of any module, as of a vocoder; ``arguments`` are taken by shape and type."""
    model = on_meta(module)
    moved = [a.to("meta") for a in arguments]
    return count(model, lambda: model(*moved))


def count(model: nn.Module, run: Callable[[], Any]) -> Count:
    """What ``run()`` multiplies with weights of ``model``, by layer, parts "forward" and "vjp".

    A product of two activations, as in attention, belongs to the innermost module at work.
    """
    found: dict[tuple[str, str], int] = defaultdict(int)

    def note(product: Product) -> None:
        found[product.module, product.part] += product.macs

    watch(model, run, note)
    return Count(tuple(Row(*key, products) for key, products in found.items()))


@dataclass(frozen=True)
class Product:
    """One convolution or matrix product as it runs: where it belongs, its size, its operands."""

    module: str
    part: str
    macs: int
    operands: tuple[Tensor, ...]
    result: Any


def watch(model: nn.Module, run: Callable[[], Any], note: Callable[[Product], Any]) -> None:
    """Run ``run()`` and tell ``note`` of every product in it."""
    # imported here: it brings parts of the compiler that sampling does not need
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    ledger = _Ledger(model, note)
    mapping = {op: ledger.watching(formula) for op, formula in flop_registry.items()}
    hooks = ledger.follow()
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping):
            run()
    finally:
        for hook in hooks:
            hook.remove()


class _Ledger:
    """Finds the layer and the part of every product while modules of ``model`` run."""

    def __init__(self, model: nn.Module, note: Callable[[Product], Any]) -> None:
        self._model, self._note = model, note
        self._running: list[str] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._owners = {
            _memory(p): name.rpartition(".")[0]
            for name, p in model.named_parameters()
            if p.ndim >= 2
        }

    def follow(self) -> list[Any]:
        """Hooks that keep the list of modules at work."""

        def enter(module: nn.Module, args: Any) -> None:
            self._running.append(self._names[module])

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._running.pop()

        hooks = []
        for module in self._model.modules():
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        return hooks

    def watching(self, formula: Callable[..., int]) -> Callable[..., int]:
        """``formula`` of an operation, told of beside."""

        def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            found = formula(*args, out_val=out_val, **kwargs)
            operands = tuple(a for a in args if isinstance(a, Tensor))
            self._note(Product(*self._place(operands), found // 2, operands, out_val))
            return found

        # operands themselves are wanted, not their shapes
        flops._get_raw = True  # type: ignore[attr-defined]
        return flops

    def _place(self, operands: tuple[Tensor, ...]) -> tuple[str, str]:
        for operand in operands:
            owner = self._owners.get(_memory(operand))
            if owner is not None:
                return owner, FORWARD if self._forward(owner) else VJP
        return (self._running[-1], FORWARD) if self._running else ("", VJP)

    def _forward(self, owner: str) -> bool:
        # a denoiser pulls cotangents back in its own forward
        whole = "" if isinstance(self._model, Denoiser) else None
        around = (name for name in self._running if name != whole)
        return any(not name or f"{owner}.".startswith(f"{name}.") for name in around)


def _memory(t: Tensor) -> int:
    """What a tensor and its views have in common."""
    return t.untyped_storage()._cdata
