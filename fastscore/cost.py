"""What a model costs: parameters, tap shapes, and multiply-accumulates counted by PyTorch."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastscore.denoiser import Denoiser
from fastscore.layers import set_backend

M = TypeVar("M", bound=nn.Module)

# Makarov and Gerkmann 2026 (arXiv 2606.20457): a step at 80 x 64, and millions of parameters
PUBLISHED = {"unguided": 12.07e9, "guided": 16.44e9, "trainable": 4.4e6, "total": 12.3e6}


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def tap_shapes(denoiser: Denoiser) -> dict[str, tuple[int, int, int]]:
    """Shape (channels, height, width) of every tap by name; gradient taps have the same."""
    model = on_meta(denoiser)
    x, sigma = inputs(model, 1)
    emb = model.classifier.embed(sigma)
    _, taps = model.classifier.upper(model.classifier.lower(x, emb), emb)
    names = model.classifier.config.tap_names
    return {name: tuple(tap.shape[1:]) for name, tap in zip(names, taps, strict=True)}


def step_macs(denoiser: Denoiser, batch: int = 1) -> dict[str, int]:
    """Multiply-accumulates of an unguided and a guided evaluation of ``batch`` samples.

    Half the floating-point operations that torch.utils.flop_counter counts: convolutions and matrix
    products with their backward passes, nothing else. The model runs on the meta device, so nothing
    is computed.
    """
    # imported here: it brings parts of the compiler that sampling does not need
    from torch.utils.flop_counter import FlopCounterMode

    model = on_meta(denoiser)
    x, sigma = inputs(model, batch)
    label = torch.zeros(batch, dtype=torch.int64, device="meta")
    found = {}
    for name, guidance in (("unguided", (None, None)), ("guided", (label, sigma))):
        if name == "guided" and model.classifier is None:
            continue
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x, sigma, *guidance)
        found[name] = counter.get_total_flops() // 2
    return found


def on_meta(module: M) -> M:
    """A copy of ``module`` that has shapes and no values, with the fused operations undone."""
    model = copy.deepcopy(module).to("meta")
    # nothing is computed there, whatever the model's own backend is
    set_backend(model, None)
    return model


def inputs(denoiser: Denoiser, batch: int) -> tuple[Tensor, Tensor]:
    """x and sigma of a step on the meta device."""
    x = torch.empty(batch, 1, *denoiser.shape, device="meta")
    return x, torch.ones(batch, device="meta")
