"""Export to one .pt2 file: three AOTInductor programs, a manifest, and what C++ needs to draw.

The programs are compiled for the processor that compiles them. They need PyTorch's libraries at run
time and neither Python nor a compiler.
"""

from __future__ import annotations

import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastscore
from fastscore.devices import usable_device
from fastscore.export.draw import draw_text
from fastscore.export.graphs import GRAPHS, TRACED_BATCH, Model, load_model, trace
from fastscore.export.manifest import instruction_sets, make_manifest
from fastscore.files import atomic_write
from fastscore.request import whole

MANIFEST_FILE, DRAW_FILE = "fastscore.json", "fastscore_draw.txt"
MAX_BATCH = 64

# called with the graph's name and seconds of tracing and of compiling
Report = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Exported:
    """A file or folder that was written, its bytes, and seconds for each graph."""

    path: Path
    size: int
    seconds: dict[str, float]


def export_pt2(
    preset: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    max_batch: int = MAX_BATCH,
    options: dict[str, Any] | None = None,
    report: Report | None = None,
) -> Exported:
    """Compile a preset's guided step, unguided step and vocoder into the .pt2 file ``out``.

    Batches of 1 to ``max_batch``. ``options`` go to Inductor. Takes a minute or more. ``out``
    appears complete or not at all. Raises ValueError for a name that does not end in .pt2, a device
    that is not there, a preset that cannot be read, and where no C++ compiler is found.
    """
    out = Path(out)
    if out.suffix != ".pt2":
        raise ValueError(f"--out {out} does not end in .pt2; name a .pt2 file")
    device = usable_device(device)
    check_max_batch(max_batch)
    # written at the end, but a place that cannot be written is known before any work
    with atomic_write(out) as temporary:
        temporary.touch()
        require_compiler()
        model = load_model(preset, device)
        files, seconds = {}, {}
        for name in GRAPHS:
            files[name], *took = _compile(model, name, max_batch, options or {})
            seconds[name] = sum(took)
            if report is not None:
                report(name, *took)
        temporary.write_bytes(_archive(model, files, max_batch))
    return Exported(out, out.stat().st_size, seconds)


def check_max_batch(max_batch: int) -> None:
    """ValueError unless a batch of that size can be traced."""
    whole("max_batch", max_batch, TRACED_BATCH)


def require_compiler() -> None:
    """ValueError unless Inductor finds a C++ compiler."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise ValueError(
            "a .pt2 file is compiled, and no C++ compiler was found; install one (Debian, Ubuntu: "
            "apt install g++), name it in the variable CXX, or export with --onnx"
        ) from None


def _compile(
    model: Model, name: str, max_batch: int, options: dict[str, Any]
) -> tuple[list[str], float, float]:
    """Files of one compiled graph; seconds of tracing and of compiling."""
    start = time.perf_counter()
    with quiet(), torch.no_grad():
        program = trace(model, name, max_batch)
        traced = time.perf_counter()
        with _compiler_trouble(name):
            args, kwargs = program.example_inputs
            files = torch._inductor.aot_compile(
                program.module(), args, kwargs, options={**_OPTIONS, **options}
            )
    return files, traced - start, time.perf_counter() - traced


@contextmanager
def _compiler_trouble(name: str) -> Iterator[None]:
    """Turn a failure of the C++ compiler into a ValueError."""
    from torch._inductor.exc import CppCompileError, InductorError

    try:
        yield
    except (CppCompileError, InductorError) as error:
        text = str(error)
        if "C++ compile error" not in text:
            raise
        reason = text.strip().splitlines()[-1]
        raise ValueError(
            f"the C++ compiler failed on the graph {name} ({reason}); name another one in the "
            "variable CXX, or export with --onnx"
        ) from error


# as many threads as the process that runs it has, not the one that compiles it
_OPTIONS = {"aot_inductor.package": True, "cpp.dynamic_threads": True}


def release(version: str) -> str:
    """Major and minor number of a version."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _archive(model: Model, files: dict[str, list[str]], max_batch: int) -> bytes:
    from torch.export.pt2_archive._package import package_pt2

    parts, kind = model.parts, model.device.type
    versions = {"fastscore": fastscore.__version__, "torch": torch.__version__}
    processor = instruction_sets()
    manifest = make_manifest("pt2", model, max_batch, versions, processor=processor)
    labels = parts.classifier.config.labels
    text = draw_text(
        *(labels, parts.mel, parts.space, parts.sigma, parts.defaults),
        device=kind,
        torch=release(torch.__version__),
        processor=processor,
    )
    buffer = io.BytesIO()
    package_pt2(
        buffer, aoti_files=files, extra_files={MANIFEST_FILE: manifest.text(), DRAW_FILE: text}
    )
    return buffer.getvalue()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to themselves what PyTorch's exporters say of their own insides."""
    loggers = [logging.getLogger(f"torch.{name}") for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_TALKATIVE = (
    "utils.cpp_extension",
    "onnx._internal.exporter",
    "onnx._internal.exporter._registration",
)
