"""Weights out of a TorchScript archive, without running the program it holds.

torch.jit.load would restore and run code chosen by whoever wrote the file. Here the archive is only
taken apart: the pickled module tree is rebuilt from inert nodes, tensors from their raw bytes, and
the strides and dilations of convolutions from the text of their forward methods.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "DoubleStorage": np.float64}
_CONVOLUTION = re.compile(
    r"torch\._convolution\(\w+, (?:self\.)?weight, \w+, \[(\d+)\], \[(\d+)\], \[(\d+)\],"
)
# what damaged or hostile archives make zipfile, pickle and NumPy raise
_DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    MemoryError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)
# far above any vocoder, and small enough to refuse a decompression bomb
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Convolution:
    """Stride, padding and dilation that a traced convolution was recorded with."""

    stride: int
    padding: int
    dilation: int


@dataclass(frozen=True)
class ScriptContent:
    """Parameters by dotted name, and the settings of convolutions by the name of their module."""

    tensors: dict[str, Tensor]
    convolutions: dict[str, Convolution] = field(default_factory=dict)


class _Node:
    """Stands for a scripted module: holds what the pickle assigned to it and does nothing."""

    kind = ""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"module state of type {type(state).__name__}")
        self.children = state


class _Reader(pickle.Unpickler):
    """Unpickler that knows tensors and inert modules, and refuses every other name."""

    def __init__(self, data: bytes, archive: _Archive) -> None:
        super().__init__(io.BytesIO(data))
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type("Node", (_Node,), {"kind": f"{module}.{name}"})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._archive.tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a model of plain weights")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _device, count = pid
        if kind != "storage" or not isinstance(key, str) or not key.isalnum():
            raise pickle.UnpicklingError(f"persistent id {pid!r}")
        values = np.frombuffer(self._archive.read(f"data/{key}"), dtype=dtype)
        if len(values) < count:
            raise pickle.UnpicklingError(f"storage {key} holds {len(values)} of {count} values")
        return values


class _Archive:
    """Members of the zip file below its single top folder."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        roots = {name.split("/", 1)[0] for name in file.namelist()}
        if len(roots) != 1:
            raise ValueError(f"it has {len(roots)} top folders instead of one")
        (self._root,) = roots
        if sum(info.file_size for info in file.infolist()) > _MAX_BYTES:
            raise ValueError(f"it unpacks to more than {_MAX_BYTES} bytes")

    def read(self, name: str) -> bytes:
        return self._file.read(f"{self._root}/{name}")

    def names(self) -> list[str]:
        return [name.split("/", 1)[1] for name in self._file.namelist() if "/" in name]

    @staticmethod
    def tensor(
        storage: np.ndarray, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        """Copy of a strided view; as_strided checks nothing, so the bounds are checked here."""
        sizes = (*shape, *stride, offset)
        if len(shape) != len(stride) or not all(isinstance(s, int) and s >= 0 for s in sizes):
            raise pickle.UnpicklingError(f"tensor of shape {shape} and stride {stride}")
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        # a stride of 0 could blow a small storage up without bound
        if 0 in shape or last >= len(storage) or math.prod(shape) > len(storage):
            raise pickle.UnpicklingError(f"tensor of shape {shape} exceeds its storage")
        step = storage.itemsize
        view = np.lib.stride_tricks.as_strided(
            storage[offset:], shape, tuple(s * step for s in stride), writeable=False
        )
        return torch.from_numpy(np.array(view))


def is_torchscript(path: Path) -> bool:
    """Whether ``path`` is a zip archive with TorchScript code in it."""
    try:
        with zipfile.ZipFile(path) as file:
            return any("/code/" in name for name in file.namelist())
    except _DAMAGE:
        return False


def read_torchscript_weights(path: Path) -> ScriptContent:
    """Parameters and convolution settings of a traced module; nothing in the file is executed.

    Raises ValueError when the file is not such an archive, is damaged, or holds other objects.
    """
    try:
        with zipfile.ZipFile(path) as file:
            archive = _Archive(file)
            tree = _Reader(archive.read("data.pkl"), archive).load()
            if not isinstance(tree, _Node):
                raise ValueError(f"its content is a {type(tree).__name__}, not a module")
            content = ScriptContent({})
            _collect(tree, "", content, _convolution_texts(archive))
    except _DAMAGE as error:
        raise ValueError(f"{path} is not a readable TorchScript vocoder: {error}") from None
    return content


def _convolution_texts(archive: _Archive) -> dict[str, Convolution]:
    """Settings of convolutions by the qualified name of their class, from the source text."""
    found = {}
    for name in archive.names():
        if not (name.startswith("code/") and name.endswith(".py")):
            continue
        module = name[len("code/") : -len(".py")].replace("/", ".")
        text = archive.read(name).decode("utf-8", errors="replace")
        # one class after the other: everything up to the next belongs to the one before
        for part in re.split(r"^class ", text, flags=re.MULTILINE)[1:]:
            match = _CONVOLUTION.search(part)
            if match:
                owner = re.match(r"\w+", part)
                numbers = (int(n) for n in match.groups())
                found[f"{module}.{owner.group() if owner else ''}"] = Convolution(*numbers)
    return found


def _collect(
    node: _Node, prefix: str, content: ScriptContent, settings: dict[str, Convolution]
) -> None:
    if node.kind in settings:
        content.convolutions[prefix] = settings[node.kind]
    for name, child in getattr(node, "children", {}).items():
        full = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(child, _Node):
            _collect(child, full, content, settings)
        elif isinstance(child, Tensor):
            content.tensors[full] = child
