"""``fastscore vocode``: copy-synthesis of a recording."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastscore.commands.common import Stopwatch, add_machine, add_preset, set_threads


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "vocode",
        help="take a recording to its log-Mel and back",
        description="Compute the log-Mel of a wav, flac or ogg file, up to a minute long, and "
        "write what the vocoder makes of it: the best that sampling with it could sound like.",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.wav", help="16-bit wav file to write"
    )
    add_preset(parser)
    parser.add_argument(
        "--vocoder",
        type=Path,
        metavar="FILE",
        help="use this HiFi-GAN or fastscore checkpoint, and its Mel, instead of the preset's",
    )
    add_machine(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read, vocode, write."""
    from fastscore.results import staged_folder

    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; name a wav file in it")
    with staged_folder(args.out.parent) as stage:
        set_threads(args.threads)
        from fastscore.audio import LogMel, save_wav
        from fastscore.devices import usable_device
        from fastscore.hearing import copy_synthesis, read_wave
        from fastscore.presets import VOCODER, preset_folder
        from fastscore.vocoder import load_vocoder

        device = usable_device(args.device)
        vocoder = load_vocoder(args.vocoder or preset_folder(args.preset) / VOCODER).to(device)
        mel = vocoder.mel_config
        wave = read_wave(args.file, None, mel.sample_rate)
        front_end = LogMel(mel)
        watch = Stopwatch()
        copy = copy_synthesis(vocoder, wave, front_end)
        watch.lap("log-Mel and vocoder")
        save_wav(stage / args.out.name, copy, mel.sample_rate)
    seconds = len(copy) / mel.sample_rate
    print(args.out)
    print(
        f"{seconds:.2f} s at {mel.sample_rate} Hz; {watch}; "
        f"RTF {sum(watch.spans.values()) / seconds:.3f}"
    )
