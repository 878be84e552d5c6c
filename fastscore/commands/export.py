"""``fastscore export``: write a preset as programs that run without the networks' code."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastscore.commands.common import DEFAULT_PRESET, set_threads

if TYPE_CHECKING:
    from fastscore.export.pipeline import ExportedPipeline

RUNTIMES = ("pt2", "onnx")


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "export",
        help="write a preset for other runtimes",
        description="Write the guided step, the unguided step and the vocoder of a preset: "
        "compiled for PyTorch's C++ library into one .pt2 file, which takes a minute or more, or "
        "for onnxruntime into a folder of .onnx files. fastscore sample --runtime draws from both.",
    )
    parser.add_argument(
        "preset",
        nargs="?",
        default=DEFAULT_PRESET,
        metavar="NAME|FOLDER",
        help="a preset in the package, or the folder of one (default: %(default)s)",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="FILE.pt2", help="the AOTInductor package")
    target.add_argument("--onnx", type=Path, metavar="FOLDER", help="the folder for ONNX")
    parser.add_argument(
        "--device", default="cpu", help="where a .pt2 will run: cpu or cuda (default: cpu)"
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        default=64,
        metavar="N",
        help="largest batch, from 3 (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads for the export")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export, and say what it took."""
    set_threads(args.threads)
    if args.onnx is not None and args.device != "cpu":
        raise ValueError(
            f"--device {args.device} goes with --out: ONNX files run wherever onnxruntime does; "
            "leave it out"
        )
    from fastscore.export import export_onnx, export_pt2

    if args.onnx is not None:
        done = export_onnx(args.preset, args.onnx, max_batch=args.max_batch, report=_report)
    else:
        done = export_pt2(
            args.preset, args.out, device=args.device, max_batch=args.max_batch, report=_report
        )
    print(f"{done.path}: {done.size / 1e6:.1f} MB in {sum(done.seconds.values()):.0f} s")


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """--runtime and --model, for commands that draw."""
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        help="draw with the exported --model: pt2 (PyTorch's C++ library) or onnx (onnxruntime)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FILE.pt2|FOLDER",
        help="what fastscore export wrote; with --preset, its weights must be that preset's",
    )


def load_runtime(args: argparse.Namespace, preset: str | None) -> ExportedPipeline:
    """Pipeline of --model on --device, with the other arguments of ``fastscore sample``."""
    if args.model is None or args.runtime is None:
        given, absent = ("runtime", "model") if args.model is None else ("model", "runtime")
        raise ValueError(f"--{given} was given without --{absent}; give both")
    if args.precision != "fp32":
        raise ValueError(f"--precision {args.precision}: exported models compute in fp32; leave it")
    set_threads(args.threads)
    from fastscore.engine import Options
    from fastscore.export.pipeline import ExportedPipeline
    from fastscore.export.runtime import load_exported

    model = load_exported(args.model, args.runtime, device=args.device, preset=preset)
    options = Options(mode=args.mode, deterministic=args.deterministic)
    return ExportedPipeline(model, batch_size=args.batch_size, backend=args.backend, engine=options)


def _report(name: str, traced: float, compiled: float) -> None:
    print(f"{name}: traced in {traced:.1f} s, compiled in {compiled:.1f} s", flush=True)
