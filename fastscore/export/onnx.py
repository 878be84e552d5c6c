"""Export to ONNX: a folder with one .onnx file a graph and a manifest; and running it.

A file each, because that is what onnxruntime opens: a session has one graph, and loops such as a
sampler's live in the program around it. Each file stands alone, weights included.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastscore
from fastscore.devices import usable_device
from fastscore.export.graphs import GRAPHS, INPUTS, OUTPUTS, Model, load_model, trace
from fastscore.export.manifest import Manifest, digest, make_manifest
from fastscore.export.pt2 import MAX_BATCH, Exported, Report, check_max_batch, quiet
from fastscore.results import staged_folder

MANIFEST_FILE = "manifest.json"
# the newest that onnxruntime 1.17 knows
_OPSET = 20
_KEY = "fastscore"


def graph_file(name: str) -> str:
    """File name of a graph."""
    return f"{name}.onnx"


def export_onnx(
    preset: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_batch: int = MAX_BATCH,
    report: Report | None = None,
) -> Exported:
    """Write guided.onnx, unguided.onnx, vocoder.onnx and manifest.json into the folder ``out``.

    Batches of 1 to ``max_batch``. All files appear or none. Raises ValueError for a name that is a
    file's and a preset that cannot be read, ImportError where onnx or onnxscript is missing.
    """
    out = Path(out)
    if out.suffix == ".onnx":
        raise ValueError(
            f"--onnx {out} names one file, but the guided step, the unguided step and the vocoder "
            "are a graph each; name a folder"
        )
    check_max_batch(max_batch)
    with staged_folder(out) as stage:
        versions = _versions()
        model = load_model(preset, usable_device("cpu"))
        manifest = make_manifest("onnx", model, max_batch, versions)
        seconds, digests = {}, {}
        for name in GRAPHS:
            took = _write(model, name, manifest, stage / graph_file(name))
            digests[graph_file(name)] = digest((stage / graph_file(name)).read_bytes())
            seconds[name] = sum(took)
            if report is not None:
                report(name, *took)
        text = replace(manifest, digests=digests).text()
        (stage / MANIFEST_FILE).write_text(text, encoding="utf-8")
    files = [out / MANIFEST_FILE, *(out / graph_file(name) for name in GRAPHS)]
    return Exported(out, sum(file.stat().st_size for file in files), seconds)


def open_graphs(
    folder: Path, device: torch.device, threads: int | None = None
) -> dict[str, Callable[..., Tensor]]:
    """The graphs of a folder in onnxruntime.

    ImportError where it is missing, ValueError where it has no part for the device or cannot read a
    file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            "--runtime onnx needs onnxruntime; install it: pip install 'fastscore[export]'"
        ) from None
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device.type]
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(
            f"this onnxruntime has no {provider} for device {device}; install onnxruntime-gpu in "
            "its place, or choose --device cpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    index = {"device_id": device.index or 0} if device.type == "cuda" else {}
    graphs = {}
    for name in GRAPHS:
        path = folder / graph_file(name)
        try:
            session = onnxruntime.InferenceSession(path, options, providers=[(provider, index)])
        except Exception as error:
            # of a class of its own for every reason
            reason = str(error).splitlines()[0]
            raise ValueError(f"onnxruntime cannot read {path} ({reason})") from error
        graphs[name] = _session_graph(session, name)
    return graphs


def _session_graph(session: Any, name: str) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        given = zip(INPUTS[name], inputs, strict=True)
        (found,) = session.run(
            [OUTPUTS[name]], {key: t.detach().cpu().contiguous().numpy() for key, t in given}
        )
        return torch.from_numpy(found).to(inputs[0].device)

    return run


def _write(model: Model, name: str, manifest: Manifest, path: Path) -> tuple[float, float]:
    """Write one graph; seconds of tracing and of converting."""
    start = time.perf_counter()
    with quiet(), torch.no_grad():
        program = trace(model, name, manifest.max_batch)
        traced = time.perf_counter()
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_OPSET,
            input_names=INPUTS[name],
            output_names=[OUTPUTS[name]],
            custom_translation_table={torch.ops.aten.silu_backward.default: _silu_backward()},
            verbose=False,
        )
        _name_batch(converted.model, name)
        converted.model.metadata_props[_KEY] = manifest.text()
        converted.save(path)
    return traced - start, time.perf_counter() - traced


def _silu_backward() -> Callable[..., Any]:
    """Derivative of SiLU, times a cotangent: an operation that ONNX has under no name."""
    from onnxscript import opset20 as op

    def silu_backward(grad: Any, x: Any) -> Any:
        one = op.Constant(value_float=1.0)
        gate = op.Sigmoid(x)
        return op.Mul(grad, op.Mul(gate, op.Add(one, op.Mul(x, op.Sub(one, gate)))))

    return silu_backward


def _name_batch(model: Any, name: str) -> None:
    """Call the free dimension batch instead of by the tracer's symbol."""
    symbol = str(model.graph.inputs[0].shape[0])
    values = [*model.graph.inputs]
    for node in model.graph:
        values += node.outputs
    for value in values:
        if value.shape is None:
            continue
        for i, size in enumerate(value.shape):
            if getattr(size, "value", None) is not None:
                value.shape[i] = re.sub(rf"\b{symbol}\b", "batch", str(size.value))


def _versions() -> dict[str, str]:
    try:
        import onnx
        import onnxscript
    except ImportError as error:
        raise ImportError(
            f"--onnx needs {error.name}; install it: pip install 'fastscore[export]'"
        ) from None
    return {
        "fastscore": fastscore.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
    }
