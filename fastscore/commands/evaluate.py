"""``fastscore evaluate``: judge a preset's samples beside recordings."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fastscore.commands.common import (
    DEFAULT_PRESET,
    add_backend,
    add_engine,
    add_machine,
    load_pipeline,
)

DATA_VARIABLE = "FASTSCORE_DATA"


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "evaluate",
        help="judge a preset's samples beside recordings",
        description="Draw N guided samples at several numbers of evaluations and N without "
        "guidance, and judge them by a recogniser that the guiding classifier knows nothing of, "
        "beside held-out recordings and their copy-synthesis.",
    )
    parser.add_argument(
        "preset", nargs="?", default=DEFAULT_PRESET, help="name or folder (default: %(default)s)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="ROOT",
        help="folders LABEL/SPEAKER_nohash_TAKE.EXT whose test splits are the recordings "
        f"(default: those in ${DATA_VARIABLE}, separated as in $PATH)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the report there")
    parser.add_argument("--n", type=int, default=500, help="samples a row (default: 500)")
    parser.add_argument(
        "--nfe",
        type=int,
        nargs="*",
        default=[12, 25],
        help="evaluations to judge beside the preset's default (default: 12 25)",
    )
    parser.add_argument(
        "--guidance", type=float, metavar="GAMMA", help="strength (default: the preset's)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=50, metavar="N")
    parser.add_argument("--dnsmos-clips", type=int, default=100, metavar="N", help="0: no DNSMOS")
    parser.add_argument("--asr", metavar="MODEL", help="a Whisper model as a second opinion")
    parser.add_argument("--asr-clips", type=int, default=200, metavar="N")
    parser.add_argument("--cache-dir", type=Path, metavar="FOLDER", help="cache of recordings")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_machine(parser)
    add_backend(parser)
    add_engine(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate, print the tables, and write the report where asked to."""
    from fastscore.metrics.evaluate import Settings, evaluate

    settings = Settings(
        n=args.n,
        nfes=(*args.nfe, None),
        gamma=args.guidance,
        seed=args.seed,
        batch_size=args.batch_size,
        dnsmos_clips=args.dnsmos_clips,
        asr=args.asr,
        asr_clips=args.asr_clips,
        progress=not args.quiet,
    )
    roots = args.data or _named_by_environment()
    pipeline = load_pipeline(args, args.batch_size)
    pipeline.warmup()
    report = evaluate(pipeline, roots, settings, args.out, args.cache_dir)
    print(report.to_text())
    if args.out is not None:
        print(f"\nwritten to {args.out}")


def _named_by_environment() -> list[Path]:
    roots = [Path(root) for root in os.environ.get(DATA_VARIABLE, "").split(os.pathsep) if root]
    if not roots:
        raise ValueError(
            f"no recordings were named; give --data ROOT, or set {DATA_VARIABLE} to such folders"
        )
    return roots
