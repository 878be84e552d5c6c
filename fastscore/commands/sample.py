"""``fastscore sample``: draw speech and write wav files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastscore.commands.common import (
    DEFAULT_PRESET,
    Bar,
    Stopwatch,
    add_backend,
    add_engine,
    add_machine,
    add_preset,
    load_pipeline,
)
from fastscore.commands.export import add_runtime, load_runtime

if TYPE_CHECKING:
    from fastscore.pipeline import Pipeline
    from fastscore.results import Result

# more paths than this are not all listed
_MOST_PATHS = 12
_OTHER_AUDIO = (".mp3", ".flac", ".ogg", ".opus", ".m4a")


class _Unnamed(str):
    """The default preset where none was named: an exported model need not be of it."""


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "sample",
        help="draw speech",
        description="Draw N samples of each LABEL, or without guidance where none is named, and "
        "write them as LABEL_NUMBER.wav. The number and --seed fix a sample: --first NUMBER --n 1 "
        "draws it again.",
    )
    parser.add_argument("labels", nargs="*", metavar="LABEL", help="what to say; see info")
    add_preset(parser)
    parser.add_argument("--n", type=int, default=1, help="samples a label (default: 1)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("."),
        metavar="FOLDER|FILE.wav",
        help="folder for the files, made where needed, or the one wav file (default: here)",
    )
    parser.add_argument("--plot", action="store_true", help="write a picture of the log-Mels too")
    parser.add_argument(
        "--guidance", type=float, metavar="GAMMA", help="guidance strength (default: the preset's)"
    )
    parser.add_argument(
        "--interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide at noise levels between these only (default: the preset's)",
    )
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--steps", type=int, help="solver steps (default: the preset's)")
    effort.add_argument("--nfe", type=int, help="most evaluations of the denoiser a sample")
    parser.add_argument("--sampler", metavar="NAME", help="solver (default: the preset's)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a keyword of the solver, such as s_noise=0.8; may be repeated",
    )
    parser.add_argument(
        "--schedule", metavar="NAME", help="spacing of noise levels (default: the preset's)"
    )
    parser.add_argument(
        "--prefix",
        type=Path,
        metavar="FILE",
        help="a recording whose beginning is kept; the rest is drawn to it",
    )
    parser.add_argument(
        "--prefix-seconds", type=float, default=0.3, metavar="S", help="how much (default: 0.3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="0 to 2^63 - 1 (default: 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first sample")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="samples computed at once (default: 1 on a CPU, 16 on a GPU)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_machine(parser)
    add_backend(parser)
    add_engine(parser)
    add_runtime(parser)
    parser.set_defaults(run=run, preset=_Unnamed(DEFAULT_PRESET))


def run(args: argparse.Namespace) -> None:
    """Draw, write, and say what it took."""
    if args.n < 1:
        raise ValueError(f"n {args.n} must be at least 1 sample a label")
    labels = [label for label in args.labels or [None] for _ in range(args.n)]
    folder, stem = _target(args.out, len(labels))
    options = dict(_option(text) for text in args.option)
    watch = Stopwatch()
    from fastscore.results import staged_folder, write_result

    # made first: a place that cannot be written is known before any work
    with staged_folder(folder) as stage:
        watch.lap("import")
        pipeline = _load(args)
        watch.lap("load")
        pipeline.warmup()
        watch.lap("warm-up")
        known = mask = None
        if args.prefix is not None:
            known, mask = pipeline.beginning(args.prefix, args.prefix_seconds)
        with Bar("sampling", enabled=not args.quiet) as bar:
            result = pipeline.sample(
                labels,
                guidance=args.guidance,
                steps=args.steps,
                nfe=args.nfe,
                sampler=args.sampler,
                options=options,
                schedule=args.schedule,
                interval=args.interval and tuple(args.interval),
                seed=args.seed,
                first=args.first,
                known=known,
                mask=mask,
                callback=bar,
            )
        watch.add(result.seconds)
        names = write_result(result, stage, args.plot, stem)
    watch.lap("writing")
    _report(result, [str(folder / name) for name in names], watch)


def _load(args: argparse.Namespace) -> Pipeline:
    if args.runtime is not None or args.model is not None:
        return load_runtime(args, None if isinstance(args.preset, _Unnamed) else args.preset)
    return load_pipeline(args, args.batch_size)


def _option(text: str) -> tuple[str, float | str]:
    """A name and its value, a number where it is one."""
    name, found, value = text.partition("=")
    if not (name and found and value):
        raise ValueError(f"--option {text!r} is not of the form NAME=VALUE; such as s_noise=0.8")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def _target(out: Path, count: int) -> tuple[Path, str | None]:
    """Folder to write into, and the stem of the only file where --out names a wav file."""
    if out.suffix.lower() in _OTHER_AUDIO:
        raise ValueError(f"--out {out} is not a wav file; name a .wav file or a folder")
    if out.suffix.lower() != ".wav" or out.is_dir():
        return out, None
    if count != 1:
        raise ValueError(
            f"--out {out} names one file for {count} samples; name a folder, or draw one sample"
        )
    return out.parent, out.stem


def _report(result: Result, paths: list[str], watch: Stopwatch) -> None:
    shown = paths if len(paths) <= _MOST_PATHS else [*paths[:3], "...", paths[-1]]
    print("\n".join(shown))
    guided = sorted({g for g, k in zip(result.guidance, result.labels, strict=True) if k})
    strength = f"guidance {guided[0]:g}" if guided else "unguided"
    print(
        f"{len(result)} x {result.audio_seconds / len(result):.2f} s of speech, {result.nfe} "
        f"evaluations each ({result.sampler}, {strength}, seed {result.seed})"
    )
    print(f"RTF {result.rtf:.3f} (seconds of computing a second of speech, vocoder included)")
    print(f"{watch}")
