"""The manifest of an exported model: what it is, how it was made, and how it is sampled from."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastscore.checkpoint import first_difference
from fastscore.config import MelConfig, MelSpace, SigmaRange, from_dict, to_dict
from fastscore.presets import Defaults

FORMAT = "fastscore-export"
VERSION = 1
RUNTIMES = ("pt2", "onnx")

# instruction sets that compilers use where they find them: code for one that is absent is a crash
_INSTRUCTION_SETS = ("sse", "ssse", "avx", "fma", "f16c", "bmi", "amx", "gfni", "vaes", "vpclmul")


@dataclass(frozen=True)
class Manifest:
    """What travels with the graphs.

    ``runtime`` runs them, on ``device`` ("cpu" or "cuda"), for batches of 1 to ``max_batch``, in
    ``dtype``. ``hashes`` are of the weights, by part (`fastscore.checkpoint.weights_hash`);
    ``versions`` of the packages that made it; ``digests`` SHA-256 of the files beside it.
    ``processor`` lists instruction sets that compiled code may use.
    """

    runtime: str
    name: str
    labels: tuple[str, ...]
    mel: MelConfig
    space: MelSpace
    sigma: SigmaRange
    defaults: Defaults
    device: str
    dtype: str
    max_batch: int
    hashes: dict[str, str]
    versions: dict[str, str]
    machine: str
    processor: tuple[str, ...] = ()
    digests: dict[str, str] | None = None

    def text(self) -> str:
        """JSON of it, with the format's name and version."""
        values = {"format": FORMAT, "version": VERSION, **to_dict(self)}
        return json.dumps(values, indent=1, sort_keys=True, allow_nan=False)


def read_manifest(text: str | bytes, where: str | Path) -> Manifest:
    """Manifest from its JSON; ValueError in one sentence for another format or version."""
    try:
        values = json.loads(text)
    except ValueError:
        raise ValueError(f"{where} has a damaged manifest; export the model again") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"{where} was not written by fastscore export; choose a file that was")
    version = values.pop("version", None)
    if version != VERSION:
        raise ValueError(
            f"{where} has export format {version}, this fastscore reads format {VERSION}; export "
            "the model again"
        )
    try:
        return from_dict(Manifest, values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; export the model again") from None


def require_weights(manifest: Manifest, hashes: Mapping[str, str], preset: str, where: str) -> None:
    """ValueError unless the exported weights are those of a preset."""
    found = first_difference(manifest.hashes, dict(hashes))
    if found is not None:
        part, exported, wanted = found
        raise ValueError(
            f"{where} was exported from other weights than preset {preset} has: its {part} is "
            f"{exported[1:13]}, the preset's {wanted[1:13]}; export the preset again"
        )


def require_machine(manifest: Manifest, where: str) -> None:
    """ValueError where this processor lacks instructions that the compiled code may use."""
    if manifest.machine != platform.machine():
        raise ValueError(
            f"{where} was compiled for {manifest.machine}, this machine is {platform.machine()}; "
            "export the model on it"
        )
    missing = sorted(set(manifest.processor) - set(instruction_sets()))
    if missing:
        raise ValueError(
            f"{where} was compiled for a processor with {', '.join(missing)}, which this one "
            "lacks; export the model on this machine"
        )


def instruction_sets() -> tuple[str, ...]:
    """Vector instruction sets of this processor, as Linux names them; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return tuple(sorted(f for f in set(flags.split()) if f.startswith(_INSTRUCTION_SETS)))


def digest(data: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def make_manifest(
    runtime: str, model: Any, max_batch: int, versions: Mapping[str, str], **rest: Any
) -> Manifest:
    """Manifest of a `fastscore.export.graphs.Model`."""
    parts = model.parts
    return Manifest(
        runtime=runtime,
        name=model.name,
        labels=parts.classifier.config.labels,
        mel=parts.mel,
        space=parts.space,
        sigma=parts.sigma,
        defaults=parts.defaults,
        device=model.device.type,
        dtype="float32",
        max_batch=max_batch,
        hashes=dict(model.hashes),
        versions=dict(versions),
        machine=platform.machine(),
        **rest,
    )
