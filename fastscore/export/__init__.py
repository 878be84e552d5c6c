"""Export of presets to programs that run without the networks' code: AOTInductor's and ONNX."""

from __future__ import annotations

from fastscore.export.onnx import export_onnx
from fastscore.export.pt2 import Exported, export_pt2
from fastscore.export.runtime import ExportedModel, load_exported

__all__ = ["Exported", "ExportedModel", "export_onnx", "export_pt2", "load_exported"]
