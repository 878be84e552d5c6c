"""What is exported: the guided step, the unguided step and the vocoder, as traced programs.

Each is traced from the very modules that a pipeline runs, with the reference operations: plain ATen
that every compiler knows, no autograd, and no operator that would have to be loaded first.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastscore.checkpoint import weights_hash
from fastscore.config import SpectralVocoderConfig
from fastscore.denoiser import Denoiser
from fastscore.layers import set_backend
from fastscore.presets import Parts, load_parts
from fastscore.vocoder import Generator, SpectralGenerator
from fastscore.vocoder.spectral import Spectrum

GUIDED, UNGUIDED, VOCODER = "guided", "unguided", "vocoder"
GRAPHS = (GUIDED, UNGUIDED, VOCODER)
INPUTS = {GUIDED: ("x", "sigma", "label", "gamma"), UNGUIDED: ("x", "sigma"), VOCODER: ("mels",)}
OUTPUTS = {GUIDED: "x0", UNGUIDED: "x0", VOCODER: "waves"}

# three samples: a batch of one would be taken for a constant, and two for the number of cotangents
TRACED_BATCH = 3


class Guided(nn.Module):
    """x0 [B, 1, n_mels, frames] of (x, sigma [B], label [B] int64, -1: none, gamma [B])."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor, gamma: Tensor) -> Tensor:
        """Denoise with guidance."""
        return self.denoiser(x, sigma, label, gamma)


class Unguided(nn.Module):
    """x0 [B, 1, n_mels, frames] of (x, sigma [B]): nothing below the shallowest tap is computed."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoise without guidance."""
        return self.denoiser(x, sigma)


class MatrixSpectralGenerator(SpectralGenerator):
    """The compact generator with Fourier transforms and interpolation as products with matrices.

    ONNX has no complex numbers and its runtime no interpolation in fp64, and AOTInductor leaves
    transforms to slow fallbacks; at 512 points the products cost little. They differ by rounding.
    """

    def __init__(self, config: SpectralVocoderConfig) -> None:
        super().__init__(config)
        forward, back = _fourier_matrices(config.n_fft)
        self.register_buffer("fourier", forward, persistent=False)
        self.register_buffer("fourier_back", back, persistent=False)
        self.register_buffer("shares", _shares(config.mel.hop_length), persistent=False)

    def _transform(self, frames: Tensor) -> Spectrum:
        real, imag = (frames @ self.fourier).chunk(2, dim=-1)
        return Spectrum(real, imag)

    def _transform_back(self, spectrum: Spectrum) -> Tensor:
        return torch.cat(spectrum, dim=-1) @ self.fourier_back

    def _stretch(self, f0: Tensor) -> Tensor:
        before = torch.cat((f0[:, :1], f0[:, :-1]), dim=1)
        after = torch.cat((f0[:, 1:], f0[:, -1:]), dim=1)
        return (torch.stack((before, f0, after), dim=-1) @ self.shares).flatten(1)


@dataclass(frozen=True)
class Model:
    """A preset's parts, ready to be traced on ``device``, and the hashes of their weights."""

    parts: Parts
    graphs: dict[str, nn.Module]
    hashes: dict[str, str]
    device: torch.device

    @property
    def name(self) -> str:
        """The preset's name."""
        return self.parts.folder.name


def load_model(preset: str | os.PathLike[str], device: torch.device) -> Model:
    """The graphs of a preset; ValueError as `fastscore.presets.load_parts` raises it."""
    parts = load_parts(preset)
    hashes = part_hashes(parts)
    denoiser = parts.denoiser().to(device, memory_format=torch.channels_last)
    set_backend(denoiser, "reference")
    modules = {
        GUIDED: Guided(denoiser),
        UNGUIDED: Unguided(denoiser),
        VOCODER: plain_vocoder(parts.vocoder).to(device),
    }
    graphs = {name: modules[name].eval().requires_grad_(False) for name in GRAPHS}
    return Model(parts, graphs, hashes, device)


def part_hashes(parts: Parts) -> dict[str, str]:
    """Hashes of the weights of a preset's parts."""
    modules = {**parts.denoiser().networks, "vocoder": parts.vocoder}
    return {name: weights_hash(module) for name, module in modules.items()}


def plain_vocoder(vocoder: Generator) -> Generator:
    """The generator without complex numbers, where it uses them."""
    if not isinstance(vocoder, SpectralGenerator):
        return vocoder
    plain = MatrixSpectralGenerator(vocoder.config)
    plain.load_state_dict(vocoder.state_dict())
    return plain


def example_inputs(model: Model, name: str, batch: int = TRACED_BATCH) -> tuple[Tensor, ...]:
    """Inputs of a graph for ``batch`` samples, of the shapes and dtypes that it takes."""
    rng = torch.Generator().manual_seed(0)
    mel, space = model.parts.mel, model.parts.space
    shape = (batch, mel.n_mels, space.frames)
    mels = torch.randn(shape, generator=rng) * space.std + space.mean
    sigma = torch.linspace(0.5, 2.0, batch)
    label = torch.arange(batch) % len(model.parts.classifier.config.labels)
    given = {
        "x": torch.randn(shape, generator=rng)[:, None] * sigma[:, None, None, None],
        "sigma": sigma,
        "label": label,
        "gamma": torch.full((batch,), 3.0),
        "mels": mels,
    }
    return tuple(given[key].to(model.device) for key in INPUTS[name])


@torch.no_grad()
def trace(model: Model, name: str, max_batch: int) -> torch.export.ExportedProgram:
    """Program of one graph for batches of 1 to ``max_batch``, free of autograd and custom ops."""
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    args = example_inputs(model, name)
    program = torch.export.export(
        model.graphs[name], args, dynamic_shapes=({0: batch},) * len(args)
    )
    foreign = foreign_operations(program)
    if foreign:
        raise RuntimeError(f"the graph {name} holds {', '.join(foreign)}, which no runtime knows")
    return program


def foreign_operations(program: torch.export.ExportedProgram) -> list[str]:
    """Operators of a program that are not ATen's: a C++ program could not run them."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    overloads = (t for t in targets if isinstance(t, torch._ops.OpOverload))
    return sorted(str(t) for t in overloads if t.namespace not in ("aten", "prims"))


def _fourier_matrices(n: int) -> tuple[Tensor, Tensor]:
    """Real transform [n, 2 bins] / sqrt(n) (cosine half, then sine) and its inverse [2 bins, n]."""
    bins = n // 2 + 1
    # whole multiples of the angle, reduced before they are rounded
    turns = torch.arange(n)[:, None] * torch.arange(bins) % n
    angle = turns.double() * (2 * math.pi / n)
    parts = torch.cat((angle.cos(), -angle.sin()), dim=1)
    # every bin but the first and the last stands for its mirror image as well
    weight = torch.full((bins,), 2.0, dtype=torch.float64)
    weight[[0, -1]] = 1.0
    back = (parts * weight.repeat(2)).T / n
    return (parts / math.sqrt(n)).float(), back.float()


def _shares(hop: int) -> Tensor:
    """Weights [3, hop] fp64 of the frame before, the frame itself and the next in its samples."""
    place = (torch.arange(hop, dtype=torch.float64) + 0.5) / hop - 0.5
    return torch.stack(((-place).clamp_min(0), 1 - place.abs(), place.clamp_min(0)))
