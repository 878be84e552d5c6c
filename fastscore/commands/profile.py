"""``fastscore profile``: what a sampling run spends its time on, and what to fix."""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastscore.commands.common import (
    add_backend,
    add_engine,
    add_machine,
    add_preset,
    load_pipeline,
)

if TYPE_CHECKING:
    from fastscore.pipeline import Pipeline
    from fastscore.profiler.collect import Recording
    from fastscore.profiler.report import Report


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "profile",
        help="report what a sampling run spends its time on",
        description="Draw clips under PyTorch's profiler and write a report as one HTML file, with "
        "the trace beside it (.trace.json.gz, for Perfetto). docs/profile.md says how to read it.",
    )
    add_preset(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--label", help="what to say (default: the preset's first label)")
    kind.add_argument("--unguided", action="store_true", help="draw without a label")
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="clips at once (default: 1)"
    )
    parser.add_argument("--nfe", type=int, help="evaluations a clip (default: the preset's)")
    parser.add_argument("--sampler", metavar="NAME", help="solver (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0, help="0 to 2^63 - 1 (default: 0)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs with and without the profiler (default: 3)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("profile.html"),
        metavar="FILE.html",
        help="where the report goes (default: profile.html)",
    )
    parser.add_argument("--quiet", action="store_true", help="do not say what is being done")
    add_machine(parser)
    add_backend(parser)
    add_engine(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Profile, write both files, and print what loses most."""
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {args.out} is not an HTML file; name one that ends in .html")
    if args.batch < 1 or args.rounds < 1:
        raise ValueError(f"batch {args.batch} and rounds {args.rounds} must be at least 1")
    from fastscore.files import atomic_write

    trace = args.out.with_suffix(".trace.json.gz")
    # opened first: a place that cannot be written is known before any work
    with atomic_write(trace) as trace_path, atomic_write(args.out) as page_path:
        trace_path.touch()
        page_path.touch()
        report, raw = _profile(args)
        from fastscore.profiler.page import to_html

        page_path.write_text(to_html(report), encoding="utf-8")
        text = json.dumps(raw, separators=(",", ":"))
        trace_path.write_bytes(gzip.compress(text.encode(), compresslevel=6, mtime=0))
    _print(report, args.out, trace)


def _profile(args: argparse.Namespace) -> tuple[Report, dict[str, Any]]:
    def tell(words: str) -> None:
        if not args.quiet:
            print(words, file=sys.stderr)

    tell("loading")
    pipeline = load_pipeline(args, args.batch)
    label = None if args.unguided else _label(args.label, pipeline)
    from fastscore.measure import roofline
    from fastscore.measure.provenance import Watch
    from fastscore.profiler.collect import record

    watch = Watch(pipeline.device)
    found = record(
        pipeline,
        [label] * args.batch,
        rounds=args.rounds,
        tell=tell,
        nfe=args.nfe,
        sampler=args.sampler,
        seed=args.seed,
    )
    tell("measuring what this machine can do")
    peaks = roofline.peaks(pipeline.device)
    watch.end()
    return _report(args, pipeline, label, found, peaks, watch), found.raw


def _label(asked: str | None, pipeline: Pipeline) -> str | None:
    if asked is None:
        return pipeline.labels[0] if pipeline.labels else None
    return asked


def _report(
    args: argparse.Namespace,
    pipeline: Pipeline,
    label: str | None,
    found: Recording,
    peaks: Any,
    watch: Any,
) -> Report:
    from fastscore.measure import macs, memory
    from fastscore.profiler import report
    from fastscore.stats import process_memory

    nfe, guided = found.result.nfe, _guided(args, pipeline, label, found)
    counts = macs.step(pipeline.denoiser)
    modules, parts = _macs(counts, guided, nfe)
    facts = report.Facts(
        command=shlex.join(["fastscore", *_arguments(args)]),
        preset=pipeline.name,
        label=label or "none, unguided",
        batch=args.batch,
        nfe=nfe,
        sampler=found.result.sampler,
        setup=_setup(pipeline),
        plain=found.plain,
        profiled=found.profiled,
        audio_seconds=found.result.audio_seconds,
        warm_up=found.warm_up,
        guided=guided,
    )
    return report.make(
        facts,
        found.trace,
        found.memory,
        found.ledger,
        peaks,
        macs=modules,
        macs_parts=parts,
        engine=_engine(pipeline, found),
        provenance={
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            **watch.record,
        },
        weights=memory.weights(pipeline.denoiser, pipeline.vocoder)["total"],
        resident=process_memory(pipeline.device).rss_peak,
        notes=[*_notes(pipeline), *map(_sentence, watch.warnings)],
    )


def _guided(
    args: argparse.Namespace, pipeline: Pipeline, label: str | None, found: Recording
) -> int:
    """Guided ones of a clip's evaluations: by their marks or, within a graph, by the plan."""
    marks = found.trace.evaluations
    if marks:
        share = sum(1 for span in marks if span.name.endswith(" guided")) / len(marks)
        return round(share * found.result.nfe)
    from fastscore.request import make_request

    asked = make_request(
        *(pipeline.defaults, pipeline.denoiser.sigma_range, pipeline.labels),
        labels=label,
        batch_size=1,
        nfe=args.nfe,
        sampler=args.sampler,
    )
    route = asked.task.course(label is not None)
    if route is None:
        return found.result.nfe if label is not None else 0
    return sum(kind.guided for kind in route.kinds)


def _macs(counts: dict[str, Any], guided: int, nfe: int) -> tuple[dict[str, int], dict[str, int]]:
    """Multiply-accumulates of a clip by module and by part."""
    modules: dict[str, int] = {}
    parts: dict[str, int] = {}
    for kind, times in (("guided", guided), ("unguided", nfe - guided)):
        if not times:
            continue
        for target, found in ((modules, counts[kind].modules(3)), (parts, counts[kind].parts())):
            for name, count in found.items():
                target[name] = target.get(name, 0) + times * count
    return modules, parts


def _setup(pipeline: Pipeline) -> dict[str, str]:
    import torch

    count = torch.get_num_threads()
    threads = "1 thread" if count == 1 else f"{count} threads"
    packed = ", weights packed" if pipeline.packed else ""
    return {
        "device": f"{pipeline.device}, {threads}" if pipeline.device.type == "cpu" else "GPU",
        "backend": f"{pipeline.backend} kernels{packed}",
        "precision": pipeline.precision,
        "mode": f"mode {pipeline.engine.options.mode}",
    }


def _engine(pipeline: Pipeline, found: Recording) -> dict[str, Any]:
    during = {
        f"{name}_during": found.after[name] - found.before[name]
        for name in ("compilations", "recorded", "replays")
    }
    return {"mode": pipeline.engine.options.mode, **found.after, **during}


def _notes(pipeline: Pipeline) -> list[str]:
    options = pipeline.engine.options
    if options.mode == "compile":
        return [
            "The denoiser runs as one compiled program. Marks inside it would make another program "
            "of it, so its phases and layers are not told apart."
        ]
    if options.recorded:
        return [
            "The trajectory runs as one CUDA graph. Its kernels are listed; their phases and "
            "layers are not told apart, since no Python runs between them."
        ]
    return []


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _arguments(args: argparse.Namespace) -> list[str]:
    """The command line again, without what is as it would be anyway."""
    words = ["profile", "--preset", args.preset if "/" not in args.preset else "FOLDER"]
    words += ["--unguided"] if args.unguided else (["--label", args.label] if args.label else [])
    words += ["--batch", str(args.batch)]
    named = {"nfe": None, "sampler": None, "seed": 0, "rounds": 3, "device": "cpu"}
    named |= {"threads": None, "backend": None, "precision": "fp32", "mode": "eager"}
    for name, usual in named.items():
        value = getattr(args, name)
        if value != usual:
            words += [f"--{name}", str(value)]
    return words + (["--deterministic"] if args.deterministic else [])


def _print(report: Report, page: Path, trace: Path) -> None:
    from fastscore.profiler.words import milliseconds, percent

    facts = report.facts
    print(
        f"{milliseconds(1e6 * facts.seconds)} a run, RTF {facts.rtf:.3f}, {facts.nfe} evaluations; "
        f"{milliseconds(report.us)} under the profiler"
    )
    if report.peaks is not None:
        print(f"{percent(report.bound_us / 1e6 / facts.seconds)} of its bound; what loses most:")
    for number, loss in enumerate(report.losses, 1):
        print(f"  {number}. {loss.sentence}")
    print(f"{page}\n{trace}")
