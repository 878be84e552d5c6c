"""Checkpoints: safetensors files that carry the configuration of the model they hold."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.files import write_bytes

FORMAT = "fastscore"
VERSION = "1"
STORAGE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# what people hand over by mistake, by the first bytes of the file
_SIGNATURES = (
    (b"PK\x03\x04", "a PyTorch or zip archive"),
    (b"\x80", "a Python pickle"),
    (b"RIFF", "an audio file"),
    (b"version https://git-lfs", "a Git LFS pointer whose content was not fetched"),
    (b"<", "an HTML or XML page"),
    (b"\x89HDF", "an HDF5 file"),
)


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint: kind of model, its configuration, tensors on the CPU, and notes."""

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None


def save_checkpoint(
    path: str | os.PathLike[str],
    kind: str,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    extra: dict[str, Any] | None = None,
    dtype: str | None = None,
) -> None:
    """Write tensors and their JSON-ready configuration to a safetensors file, atomically.

    ``dtype`` ("float16", "bfloat16", "float32" or None to keep each tensor's own) is the storage
    type of floating-point tensors. Equal input gives equal bytes. Raises ValueError on an unknown
    dtype, a value that overflows it, a configuration JSON cannot hold, or a path that cannot be
    written.
    """
    import safetensors.torch

    if dtype is not None and dtype not in STORAGE_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(STORAGE_DTYPES)} or None")
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "config": _json(config, f"the configuration of {path}"),
    }
    if extra:
        metadata["extra"] = _json(extra, f"the extra notes of {path}")
    stored = {name: _stored(name, tensor, dtype, path) for name, tensor in tensors.items()}
    write_bytes(path, _canonical(safetensors.torch.save(stored, metadata)))


def load_checkpoint(
    path: str | os.PathLike[str], kind: str | None = None, upcast: bool = True
) -> Checkpoint:
    """Read a checkpoint; float16 and bfloat16 tensors become float32 unless ``upcast`` is off.

    Raises ValueError, in one sentence, when the file is missing, empty, truncated, not safetensors,
    not written by fastscore, of a newer version, or of another kind than ``kind``.
    """
    import safetensors.torch

    path = Path(path)
    header, data = _read(path)
    metadata = header.get("__metadata__", {})
    names = [name for name in header if name != "__metadata__"]
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file that fastscore did not write "
            f"({_describe(names, metadata)}); convert it or choose a fastscore checkpoint"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} has checkpoint version {metadata.get('version')}, this fastscore reads "
            f"version {VERSION}; update fastscore"
        )
    if kind is not None and metadata.get("kind") != kind:
        raise ValueError(
            f"{path} holds a {metadata.get('kind')!r} model, but a {kind!r} model is needed here"
        )
    try:
        tensors = safetensors.torch.load(data)
        config = json.loads(metadata["config"])
        extra = json.loads(metadata.get("extra", "{}"))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is corrupt: {error}; fetch or write it again") from error
    if upcast:
        half = (torch.float16, torch.bfloat16)
        tensors = {k: v.float() if v.dtype in half else v for k, v in tensors.items()}
    return Checkpoint(metadata["kind"], config, tensors, extra, path)


def load_into(
    module: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Copy tensors into ``module``, whose state must have exactly these names and shapes.

    Raises ValueError naming the first missing, unexpected or mis-shaped tensor; the module is then
    unchanged.
    """
    state = module.state_dict()
    owner = type(module).__name__
    for name, tensor in state.items():
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name!r} that {owner} needs")
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {tuple(tensors[name].shape)}, but {owner} "
                f"needs {tuple(tensor.shape)}"
            )
    for name in tensors:
        if name not in state:
            raise ValueError(f"{path} holds the tensor {name!r} that {owner} does not have")
    module.load_state_dict(dict(tensors), strict=True)


def require_config(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    """Raise ValueError naming the first key at which the checkpoint's configuration differs."""
    difference = first_difference(checkpoint.config, expected)
    if difference is not None:
        key, stored, wanted = difference
        raise ValueError(
            f"{checkpoint.path or 'checkpoint'}: {key} is {stored} in the file, but {wanted} is "
            "needed"
        )


def first_difference(stored: Any, expected: Any, key: str = "") -> tuple[str, str, str] | None:
    """First dotted key at which two JSON-like values differ, with both values as text, or None."""
    if isinstance(stored, dict) and isinstance(expected, dict):
        for name in [*stored, *(k for k in expected if k not in stored)]:
            where = f"{key}.{name}" if key else str(name)
            if name not in stored or name not in expected:
                both = ["absent" if name not in d else repr(d[name]) for d in (stored, expected)]
                return where, both[0], both[1]
            found = first_difference(stored[name], expected[name], where)
            if found:
                return found
        return None
    if isinstance(stored, tuple | list) and isinstance(expected, tuple | list):
        same = len(stored) == len(expected) and all(
            first_difference(a, b) is None for a, b in zip(stored, expected, strict=True)
        )
    else:
        same = type(stored) is type(expected) and stored == expected
    return None if same else (key or "value", repr(stored), repr(expected))


def weights_hash(module: nn.Module) -> str:
    """SHA-256, hexadecimal, of the names, shapes and values of a module's state.

    Floating-point values enter rounded to float16, so weights stored in float16 keep their hash.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().to("cpu")
        if value.is_floating_point():
            value = value.to(torch.float16)
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _json(values: dict[str, Any], what: str) -> str:
    try:
        return json.dumps(values, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from error


def _stored(name: str, tensor: Tensor, dtype: str | None, path: Any) -> Tensor:
    # a clone of each, because safetensors refuses tensors that share storage
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    if dtype is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(STORAGE_DTYPES[dtype])
    if bool((cast.isinf() & tensor.isfinite()).any()):
        raise ValueError(
            f"cannot write {path}: tensor {name!r} reaches {tensor.abs().max():.3g}, which "
            f"overflows {dtype}; store it as float32"
        )
    return cast


def _canonical(data: bytes) -> bytes:
    """The same safetensors file with a sorted header: the library's order varies between runs."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.dumps(
        json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and bytes of a safetensors file whose length is what its header promises."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a checkpoint file in it")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; check the path or train the model first"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not data:
        raise ValueError(f"{path} is empty; fetch or write it again")
    for signature, what in _SIGNATURES:
        # the ninth byte of a safetensors file opens its JSON header, the first eight are a length
        if data.startswith(signature) and data[8:9] != b"{":
            raise ValueError(
                f"{path} is {what}, not a safetensors file; choose a .safetensors file"
            )
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else len(data)
    if len(data) < 9 or data[8:9] != b"{":
        raise ValueError(f"{path} is not a safetensors file; choose a .safetensors file")
    try:
        if 8 + size > len(data):
            raise EOFError
        header = json.loads(data[8 : 8 + size])
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        expected = 8 + size + max(ends, default=0)
    except EOFError:
        raise ValueError(
            f"{path} is truncated within its header; fetch or write it again"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{path} has a corrupt header; fetch or write it again") from None
    if len(data) < expected:
        raise ValueError(
            f"{path} is truncated: {len(data)} bytes of {expected}; fetch or write it again"
        )
    if len(data) > expected:
        raise ValueError(
            f"{path} is corrupt: {len(data)} bytes where its header promises {expected}; "
            "fetch or write it again"
        )
    return header, data


def _describe(names: list[str], metadata: dict[str, str]) -> str:
    """What foreign safetensors may hold, from the names of their tensors."""
    joined = " ".join(names)
    if "resblocks." in joined and ("ups." in joined or "upsampler." in joined):
        guess = "its tensors look like a HiFi-GAN generator"
    elif "embed_tokens" in joined or "self_attn" in joined or "attention.self" in joined:
        guess = "its tensors look like a transformer"
    elif "down_blocks" in joined or "up_blocks" in joined:
        guess = "its tensors look like a diffusers U-Net"
    else:
        guess = f"{len(names)} tensors, the first {names[0]!r}" if names else "no tensors"
    if metadata.get("format"):
        guess += f", format {metadata['format']!r}"
    return guess
