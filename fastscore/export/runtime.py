"""Running an exported model from Python: a denoiser and a vocoder, as samplers and pipelines take.

The graphs are pure functions of tensors. Everything around them, samplers, schedules and noise, is
the same code that drives the networks themselves.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastscore.config import MelConfig, MelSpace, SigmaRange
from fastscore.devices import usable_device
from fastscore.export.graphs import GRAPHS, GUIDED, UNGUIDED, VOCODER, part_hashes
from fastscore.export.manifest import (
    RUNTIMES,
    Manifest,
    digest,
    read_manifest,
    require_machine,
    require_weights,
)
from fastscore.export.onnx import MANIFEST_FILE as ONNX_MANIFEST
from fastscore.export.onnx import graph_file, open_graphs
from fastscore.export.pt2 import MANIFEST_FILE, release
from fastscore.presets import Defaults, load_parts

# tensors of a batch to the one that a graph makes of them
Graph = Callable[..., Tensor]


class ExportedDenoiser:
    """Denoiser by exported graphs, with the signature that samplers ask for."""

    def __init__(self, manifest: Manifest, graphs: dict[str, Graph], where: str) -> None:
        self.sigma_range: SigmaRange = manifest.sigma
        self.labels: tuple[str, ...] = manifest.labels
        self.space: MelSpace = manifest.space
        self._guided, self._unguided = graphs[GUIDED], graphs[UNGUIDED]
        self._shape = (1, manifest.mel.n_mels, manifest.space.frames)
        self._most, self._where = manifest.max_batch, where
        self._checked: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        label: Tensor | None = None,
        gamma: Tensor | None = None,
    ) -> Tensor:
        """Clean estimate x0 of x [B, 1, n_mels, frames] fp32 at sigma [B] fp32.

        label [B] int64 (-1: unguided) and gamma [B] fp32, both or neither. ValueError for another
        shape or dtype, a batch larger than exported, and a label that there is not.
        """
        if (label is None) != (gamma is None):
            raise ValueError("denoise: give label and gamma together, or neither of them")
        if tuple(x.shape[1:]) != self._shape or x.dtype != torch.float32:
            raise ValueError(
                f"x is {x.dtype} of shape {tuple(x.shape)}; {self._where} takes float32 "
                f"[batch, {', '.join(map(str, self._shape))}]"
            )
        check_batch(x, self._most, self._where)
        if label is None:
            return self._unguided(x, sigma)
        self._check_label(label)
        return self._guided(x, sigma, label, gamma)

    def class_logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Refused with ValueError: the graphs give no logits."""
        raise ValueError(
            f"{self._where} draws and does not classify; classify with the preset it was made from"
        )

    def _check_label(self, label: Tensor) -> None:
        # looked at once: samplers pass the same tensor at every step, and reading it waits
        if label is self._checked:
            return
        low, high = int(label.min()), int(label.max())
        if low < -1 or high >= len(self.labels):
            wrong = low if low < -1 else high
            raise ValueError(
                f"label {wrong} is out of range: {self._where} knows 0 to {len(self.labels) - 1} "
                f"({', '.join(self.labels)}), and -1 for none"
            )
        self._checked = label


class ExportedVocoder:
    """Waves [B, frames * hop] fp32 of natural-log Mels [B, n_mels, frames], by a graph."""

    def __init__(self, manifest: Manifest, graph: Graph, where: str) -> None:
        self.mel_config: MelConfig = manifest.mel
        self._graph, self._where = graph, where
        self._most = manifest.max_batch
        self._shape = (manifest.mel.n_mels, manifest.space.frames)

    def __call__(self, mels: Tensor) -> Tensor:
        """Vocode; ValueError for another shape or a batch larger than exported."""
        if tuple(mels.shape[1:]) != self._shape:
            raise ValueError(
                f"the Mels have shape {tuple(mels.shape)}; {self._where} takes "
                f"[batch, {', '.join(map(str, self._shape))}]"
            )
        check_batch(mels, self._most, self._where)
        return self._graph(mels.float())


@dataclass(frozen=True)
class ExportedModel:
    """An export, opened: ``denoise(x, sigma, label, gamma) -> x0``, ``vocode(mels) -> waves``."""

    manifest: Manifest
    denoise: ExportedDenoiser
    vocode: ExportedVocoder
    device: torch.device
    path: Path

    @property
    def name(self) -> str:
        """Name of the preset that was exported."""
        return self.manifest.name

    @property
    def labels(self) -> tuple[str, ...]:
        """What can be asked for."""
        return self.manifest.labels

    @property
    def mel_config(self) -> MelConfig:
        """Mel front end of the model."""
        return self.manifest.mel

    @property
    def space(self) -> MelSpace:
        """Where the diffusion lives."""
        return self.manifest.space

    @property
    def sigma_range(self) -> SigmaRange:
        """Noise levels that the networks were trained on."""
        return self.manifest.sigma

    @property
    def defaults(self) -> Defaults:
        """How the preset samples."""
        return self.manifest.defaults


def load_exported(
    path: str | os.PathLike[str],
    runtime: str | None = None,
    *,
    device: str | torch.device = "cpu",
    preset: str | os.PathLike[str] | None = None,
    threads: int | None = None,
) -> ExportedModel:
    """An exported model, ready to run on ``device``.

    ``runtime`` "pt2" or "onnx" is what it must be, None is whatever it is; with ``preset`` its
    weights must be that preset's. ``threads`` are onnxruntime's (None: PyTorch's number); a .pt2
    shares PyTorch's. A .pt2 holds compiled code, which runs: load only files you trust. Raises
    ValueError in one sentence for a file that is missing, damaged, of another kind, version,
    machine, device or of other weights, and ImportError where onnxruntime is missing.
    """
    if runtime is not None and runtime not in RUNTIMES:
        raise ValueError(f"runtime {runtime!r} is unknown; choose one of {', '.join(RUNTIMES)}")
    path, device = Path(path), usable_device(device)
    found = _runtime_of(path)
    if runtime is not None and found != runtime:
        raise ValueError(
            f"{path} is an export for the runtime {found}, but {runtime} was asked for; choose "
            f"--runtime {found} or another file"
        )
    manifest = _pt2_manifest(path) if found == "pt2" else _onnx_manifest(path)
    if preset is not None:
        hashes = part_hashes(load_parts(preset))
        require_weights(manifest, hashes, os.fspath(preset), str(path))
    graphs = _pt2_graphs(path, manifest, device) if found == "pt2" else None
    if graphs is None:
        graphs = open_graphs(path, device, threads)
    denoise = ExportedDenoiser(manifest, graphs, str(path))
    vocode = ExportedVocoder(manifest, graphs[VOCODER], str(path))
    return ExportedModel(manifest, denoise, vocode, device, path)


def check_batch(batch: Tensor, most: int, where: str) -> None:
    """ValueError for a batch that the graphs were not exported for."""
    if not 1 <= len(batch) <= most:
        raise ValueError(
            f"a batch of {len(batch)} was given, but {where} takes 1 to {most}; choose a smaller "
            "batch size or export again with a larger --max-batch"
        )


def _runtime_of(path: Path) -> str:
    """What a path holds, by its content; ValueError where it is neither."""
    if path.is_dir():
        if not (path / ONNX_MANIFEST).is_file():
            raise ValueError(
                f"{path} is a folder without {ONNX_MANIFEST}; name one that fastscore export "
                "--onnx wrote"
            )
        return "onnx"
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; write it with fastscore export") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if head == b"PK\x03\x04":
        return "pt2"
    if path.suffix == ".onnx":
        raise ValueError(
            f"{path} is one graph of an ONNX export, whose guided step, unguided step and vocoder "
            "lie in one folder; name that folder"
        )
    raise ValueError(f"{path} is not an exported model; write one with fastscore export")


def _pt2_manifest(path: Path) -> Manifest:
    """Manifest of a .pt2 whose content is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inside = [name for name in names if name.endswith(f"/extra/{MANIFEST_FILE}")]
            if not inside:
                raise ValueError(
                    f"{path} is an archive that fastscore export did not write; choose one that "
                    "it did"
                )
            broken = archive.testzip()
            text = archive.read(inside[0])
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or damaged ({error}); export the model again"
        ) from None
    if broken is not None:
        raise ValueError(f"{path} is damaged in {broken}; export the model again")
    manifest = read_manifest(text, path)
    absent = [g for g in GRAPHS if not any(f"/aotinductor/{g}/" in name for name in names)]
    if absent:
        raise ValueError(f"{path} lacks the graph {absent[0]}; export the model again")
    return manifest


def _pt2_graphs(path: Path, manifest: Manifest, device: torch.device) -> dict[str, Graph]:
    ours, theirs = release(torch.__version__), release(manifest.versions.get("torch", "unknown"))
    if ours != theirs:
        raise ValueError(
            f"{path} was compiled for torch {theirs}, and this is torch {ours}; export the model "
            "again"
        )
    if manifest.device != device.type:
        raise ValueError(
            f"{path} was exported for {manifest.device}, not for {device}; choose --device "
            f"{manifest.device}, or export with --device {device.type}"
        )
    require_machine(manifest, str(path))
    return {name: _pt2_graph(path, name, device) for name in GRAPHS}


def _pt2_graph(path: Path, name: str, device: torch.device) -> Graph:
    # the loader itself: torch._inductor's loads every graph for each one asked for and compiles
    # programs to find out what the processor can do, 13 s without which it works as well
    index = -1 if device.type == "cpu" or device.index is None else device.index
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), name, False, 1, index)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be loaded ({reason}); export the model again") from error

    def run(*inputs: Tensor) -> Tensor:
        return loader.run([t.contiguous() for t in inputs])[0]

    return run


def _onnx_manifest(folder: Path) -> Manifest:
    """Manifest of a folder whose graphs are those it was written with."""
    manifest = read_manifest((folder / ONNX_MANIFEST).read_bytes(), folder)
    for name in GRAPHS:
        file = folder / graph_file(name)
        if not file.is_file():
            raise ValueError(f"{folder} lacks {file.name}; export the model again")
        if digest(file.read_bytes()) != (manifest.digests or {}).get(file.name):
            raise ValueError(
                f"{file} is damaged or from another export than {ONNX_MANIFEST} beside it; export "
                "the model again"
            )
    return manifest
