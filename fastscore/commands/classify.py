"""``fastscore classify``: what the guiding classifier hears in audio files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastscore.commands.common import add_backend, add_machine, add_preset, load_pipeline


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "classify",
        help="say which label is heard in audio files",
        description="Print the likeliest labels of wav, flac or ogg files of any sample rate, up "
        "to a minute long; of long files the loudest second is heard.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    add_preset(parser)
    parser.add_argument("--top", type=int, default=3, help="labels shown (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a file")
    add_machine(parser)
    add_backend(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Classify every file; files that cannot be heard are named, and the exit code is then 2."""
    if args.top < 1:
        raise ValueError(f"top {args.top} must be at least 1 label")
    pipeline = load_pipeline(args)
    code = 0
    for path in args.files:
        try:
            heard = pipeline.classify(path)
        except ValueError as error:
            print(f"fastscore: error: {error}", file=sys.stderr)
            code = 2
            continue
        if args.json:
            print(json.dumps({"file": str(path), "probabilities": heard}))
        else:
            likeliest = list(heard.items())[: args.top]
            print(f"{path}: " + ", ".join(f"{label} {100 * p:.1f} %" for label, p in likeliest))
    return code
