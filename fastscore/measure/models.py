"""Models that are measured, by name: the shipped one, the published size, and their baselines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastscore.classifier import Classifier
from fastscore.config import CLASSIFIERS, SUBNETS, UNETS, MelSpace, SigmaRange
from fastscore.denoiser import Denoiser, GuidedUNet, TapDenoiser, set_precision
from fastscore.layers import set_backend
from fastscore.measure import nodes
from fastscore.packed import obstacle, pack
from fastscore.presets import load_parts
from fastscore.stacked import stack
from fastscore.subnet import ScoreSubnet
from fastscore.unet import UNet
from fastscore.vocoder import PRESETS, Generator, HifiGanGenerator


def _digits() -> Denoiser:
    return load_parts("digits").denoiser()


def _taps(size: str) -> Denoiser:
    config = CLASSIFIERS[size]
    return _random(
        lambda: TapDenoiser(
            Classifier(config), ScoreSubnet(SUBNETS[size], config), MelSpace(), SigmaRange()
        )
    )


def _pair(name: str) -> Denoiser:
    config = CLASSIFIERS[name.partition("-")[0]]
    return _random(
        lambda: GuidedUNet(UNet(UNETS[name]), Classifier(config), MelSpace(), SigmaRange())
    )


def _random(make: Callable[[], nn.Module]) -> nn.Module:
    """Random weights, none of them at the zero it starts from: they cost what trained ones cost."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make()
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.02 * torch.randn_like(p))
    return module


MODELS: dict[str, Callable[[], Denoiser]] = {
    "digits": _digits,
    "paper": lambda: _taps("paper"),
    **{f"unet-{name}": (lambda name=name: _pair(name)) for name in UNETS},
}
VOCODERS: dict[str, Callable[[], Generator]] = {
    "digits": lambda: load_parts("digits").vocoder,
    "hifigan-v1": lambda: _random(lambda: HifiGanGenerator(PRESETS["v1"])),
}


def prepared(
    model: str, device: torch.device, backend: str, precision: str, packed: bool = True
) -> Denoiser:
    """A denoiser, built anew, as a pipeline prepares it: frozen, placed, rounded, packed, stacked.

    ``packed`` False leaves its layers as they are, for use as a yardstick.
    """
    denoiser = MODELS[model]().eval().requires_grad_(False)
    denoiser = denoiser.to(device, memory_format=torch.channels_last)
    set_precision(denoiser, precision)
    set_backend(denoiser, backend)
    if packed and backend == "native" and not obstacle(denoiser):
        pack(denoiser)
    if packed and backend == "triton":
        stack(denoiser)
    return denoiser


def imagined(denoiser: Denoiser, backend: str = "triton") -> Denoiser:
    """``denoiser``, rounded already, as a pipeline prepares it on a GPU; in `nodes.imagined`."""
    nodes.move(denoiser)
    set_backend(denoiser, backend)
    if backend == "triton":
        stack(denoiser)
    return denoiser


def prepared_vocoder(model: str, device: torch.device) -> Generator:
    """A vocoder, built anew, as a pipeline prepares it."""
    return VOCODERS[model]().eval().requires_grad_(False).to(device)


def score_network(denoiser: Denoiser) -> nn.Module:
    """What predicts the score: ScoreSubnet or the U-Net."""
    return denoiser.subnet if isinstance(denoiser, TapDenoiser) else denoiser.unet


def size(denoiser: Denoiser) -> dict[str, int]:
    """Parameters in all, and of what training the score network trains."""
    count = {
        "parameters": denoiser.parameters(),
        "trainable": score_network(denoiser).parameters(),
    }
    return {name: sum(p.numel() for p in ps) for name, ps in count.items()}
