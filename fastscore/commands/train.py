"""``fastscore train``: a classifier, a ScoreSubnet, a U-Net, a vocoder or a recogniser."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastscore.presets import Frozen
    from fastscore.train.task import LoopConfig, Task

_TUNED = (
    "steps",
    "batch_size",
    "lr",
    "precision",
    "seed",
    "accelerator",
    "devices",
    "validate_every",
    "log_every",
    "checkpoint_minutes",
)


def add_parser(commands: Any) -> None:
    """Describe the command and its trainings."""
    parser = commands.add_parser(
        "train",
        help="train a classifier, a ScoreSubnet, a U-Net, a vocoder or a recogniser",
        description="Train one part. A training that was interrupted or killed goes on where it "
        "was when the same command is given again. Several machines train together under torchrun.",
        epilog="fastscore train PART --help describes a training.",
    )
    parts = parser.add_subparsers(metavar="PART", required=True)
    classifier = _part(parts, "classifier", "noise-conditioned classifier", _classifier)
    _add_model(classifier)
    _add_corruption(classifier)
    _add_skip(classifier)
    classifier.add_argument(
        "--initial", type=Path, metavar="FILE", help="start from the weights of this classifier"
    )
    score = _part(parts, "score", "ScoreSubnet over a frozen classifier", _score)
    _add_denoiser(score, "the frozen classifier")
    _add_model(score)
    taps = score.add_mutually_exclusive_group()
    taps.add_argument("--feature-taps-only", action="store_true", help="no gradient taps")
    taps.add_argument("--gradient-taps-only", action="store_true", help="no feature taps")
    unet = _part(parts, "unet", "U-Net score network, the baseline", _unet)
    _add_denoiser(unet, "the classifier that will guide it: its Mel, normalisation, noise levels")
    unet.add_argument(
        "--preset",
        default="tiny-equal-trainable",
        metavar="NAME",
        help="tiny or paper, each -equal-trainable or -equal-total (default: %(default)s)",
    )
    unet.add_argument("--compile", action="store_true", help="run through torch.compile")
    vocoder = _part(parts, "vocoder", "vocoder", _vocoder)
    vocoder.add_argument(
        "--preset",
        default="digits",
        metavar="NAME",
        help="digits (compact), hifigan-v1, hifigan-v2 or hifigan-v3 (default: %(default)s)",
    )
    _add_skip(vocoder)
    _part(parts, "recogniser", "recogniser that judges samples", _recogniser)


def _part(
    parts: Any, name: str, what: str, build: Callable[[argparse.Namespace], tuple[Task, LoopConfig]]
) -> argparse.ArgumentParser:
    parser = parts.add_parser(name, help=what, description=f"Train a {what}.")
    data = parser.add_argument_group("data (one or both)")
    data.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="ROOT",
        help="folders LABEL/SPEAKER_nohash_TAKE.EXT of wav, flac or ogg files",
    )
    data.add_argument(
        "--sc09", type=Path, metavar="FOLDER", help="Speech Commands there, fetched where absent"
    )
    data.add_argument("--labels", metavar="A,B,..", help="labels to train on (default: all)")
    data.add_argument("--cache-dir", type=Path, metavar="FOLDER", help="cache of what is computed")
    loop = parser.add_argument_group("training (defaults: what the shipped preset was made with)")
    loop.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write")
    loop.add_argument("--steps", type=int)
    loop.add_argument("--batch-size", type=int, metavar="N", help="clips a step and process")
    loop.add_argument("--lr", type=float, help="highest learning rate")
    loop.add_argument("--precision", metavar="P", help="32-true, bf16-mixed or 16-mixed")
    loop.add_argument("--seed", type=int)
    loop.add_argument("--accelerator", metavar="A", help="auto, cpu or cuda")
    loop.add_argument("--devices", type=int, metavar="N", help="processes on this machine")
    loop.add_argument("--threads", type=int, metavar="N", help="CPU threads a process")
    loop.add_argument("--validate-every", type=int, metavar="STEPS")
    loop.add_argument("--log-every", type=int, metavar="STEPS")
    loop.add_argument("--checkpoint-minutes", type=float, metavar="M")
    loop.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="stop after so long, with the state written; the same command goes on",
    )
    loop.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with what --out holds (default), or refuse to",
    )
    loop.add_argument(
        "--extend", action="store_true", help="let a resumed training have other --steps"
    )
    parser.set_defaults(run=run, build=build)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", default="tiny", metavar="NAME", help="tiny or paper (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="run through torch.compile")


def _add_denoiser(parser: argparse.ArgumentParser, classifier: str) -> None:
    parser.add_argument("--classifier", type=Path, required=True, metavar="FILE", help=classifier)
    _add_corruption(parser)
    _add_skip(parser)


def _add_corruption(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shift", type=int, metavar="FRAMES", help="largest random time shift")
    parser.add_argument("--gain", type=float, metavar="NATS", help="largest random gain")
    parser.add_argument("--log-sigma-mean", type=float, metavar="M", help="mean of log sigma")
    parser.add_argument("--log-sigma-std", type=float, metavar="S", help="deviation of log sigma")


def _add_skip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave broken files out instead of refusing"
    )


def run(args: argparse.Namespace) -> None:
    """Train and say where the result is."""
    from fastscore.train.loop import run as train

    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes} must be positive")
    until = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    task, loop = args.build(args)
    record = train(task, loop, args.out, resume=args.resume, extend=args.extend, until=until)
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0:
        if record["finished"]:
            print(args.out / f"{task.name}.safetensors")
        else:
            print(f"stopped at step {record['steps']} of {loop.steps}; the same command goes on")
        found = ", ".join(f"{name} {value:.4g}" for name, value in record["validation"].items())
        print(f"{record['steps']} steps; validation: {found or 'none'}")


def _classifier(args: argparse.Namespace) -> tuple[Task, LoopConfig]:
    from fastscore.checkpoint import load_checkpoint
    from fastscore.config import CLASSIFIERS, MelSpace, SigmaRange, from_dict
    from fastscore.data import load_mels
    from fastscore.train.classifier import ClassifierTask
    from fastscore.train.mels import measure_space
    from fastscore.train.task import LoopConfig

    config = _named(args.preset, CLASSIFIERS)
    config = dataclasses.replace(config, labels=_labels(args, config.labels))
    recipe = LoopConfig(
        steps=1500,
        batch_size=64,
        lr=2e-3,
        warmup_steps=100,
        weight_decay=0.05,
        ema_decay=0.998,
        precision="bf16-mixed",
        validate_every=300,
    )
    loop = _loop(args, recipe)
    initial = load_checkpoint(args.initial, "classifier") if args.initial else None
    common = _mel_options(args, config.labels, config.frames)
    train, held_out = (
        load_mels(_roots(args), split, **common) for split in ("train", "validation")
    )
    # a classifier that goes on must keep the normalisation it was trained with
    space = from_dict(MelSpace, initial.config["space"]) if initial else measure_space(train)
    return ClassifierTask(
        config,
        train,
        held_out,
        space,
        SigmaRange(),
        loop.batch_size,
        **_corruption(args, ClassifierTask),
        initial=initial,
        compiled=args.compile,
    ), loop


def _score(args: argparse.Namespace) -> tuple[Task, LoopConfig]:
    import torch

    from fastscore.config import SUBNETS
    from fastscore.train.score import ScoreTask

    config = _named(args.preset, SUBNETS)
    config = dataclasses.replace(
        config,
        feature_taps=not args.gradient_taps_only,
        gradient_taps=not args.feature_taps_only,
    )
    frozen, loop, common = _denoising(args)
    return ScoreTask(
        config,
        frozen.model,
        **common,
        # nothing is learned in the classifier, so it can run in the low precision throughout
        tap_dtype=torch.bfloat16 if loop.precision == "bf16-mixed" else torch.float32,
        compiled=args.compile,
    ), loop


def _unet(args: argparse.Namespace) -> tuple[Task, LoopConfig]:
    from fastscore.config import UNETS
    from fastscore.train.unet import UNetTask

    config = _named(args.preset, UNETS)
    _, loop, common = _denoising(args)
    return UNetTask(config, **common, compiled=args.compile), loop


def _denoising(args: argparse.Namespace) -> tuple[Frozen, LoopConfig, dict[str, Any]]:
    """The classifier, the loop, and what every denoising task is given: data, levels, batch."""
    from fastscore.data import load_mels
    from fastscore.presets import read_classifier
    from fastscore.train.denoising import DenoisingTask
    from fastscore.train.task import LoopConfig

    recipe = LoopConfig(
        steps=6500,
        batch_size=32,
        lr=1.5e-3,
        warmup_steps=200,
        weight_decay=0.01,
        ema_decay=0.999,
        precision="bf16-mixed",
        validate_every=500,
    )
    loop = _loop(args, recipe)
    frozen = read_classifier(args.classifier)
    labels = _labels(args, frozen.model.config.labels)
    common = {**_mel_options(args, labels, frozen.space.frames), "mel": frozen.mel}
    train, held_out = (
        load_mels(_roots(args), split, **common) for split in ("train", "validation")
    )
    return (
        frozen,
        loop,
        {
            "train": train,
            "validation": held_out,
            "space": frozen.space,
            "sigma": frozen.sigma,
            "batch_size": loop.batch_size,
            **_corruption(args, DenoisingTask),
        },
    )


def _corruption(args: argparse.Namespace, task: Any) -> dict[str, Any]:
    """Noise levels and augmentation: the task's own, with what the command line says otherwise."""
    augment = {"shift": args.shift, "gain": args.gain}
    levels = {"log_mean": args.log_sigma_mean, "log_std": args.log_sigma_std}
    return {
        "augment": dataclasses.replace(task.AUGMENT, **_given(augment)),
        "levels": dataclasses.replace(task.LEVELS, **_given(levels)),
    }


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _vocoder(args: argparse.Namespace) -> tuple[Task, LoopConfig]:
    from fastscore.config import DIGITS
    from fastscore.data import load_waves
    from fastscore.train.vocoder import PRESETS, VocoderTask

    preset = _named(args.preset, PRESETS)
    loop = _loop(args, preset.loop)
    train, held_out = (
        load_waves(
            _roots(args),
            split,
            labels=_labels(args, DIGITS),
            mel=preset.generator.mel,
            cache_dir=args.cache_dir,
            skip_broken=args.skip_broken,
        )
        for split in ("train", "validation")
    )
    return VocoderTask(preset.generator, train, held_out, loop.batch_size, preset.settings), loop


def _recogniser(args: argparse.Namespace) -> tuple[Task, LoopConfig]:
    from fastscore.metrics.recogniser import RecogniserConfig
    from fastscore.train.recogniser import RecogniserTask
    from fastscore.train.task import LoopConfig

    config = RecogniserConfig()
    config = dataclasses.replace(config, labels=_labels(args, config.labels))
    recipe = LoopConfig(steps=4000, batch_size=64, lr=2e-3, weight_decay=0.05, validate_every=500)
    loop = _loop(args, recipe)
    return RecogniserTask(_roots(args), config, args.cache_dir, loop.batch_size), loop


def _named(name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(known)}")
    return known[name]


def _loop(args: argparse.Namespace, recipe: LoopConfig) -> LoopConfig:
    """The recipe with what the command line says otherwise; seeds the start of the weights."""
    import torch

    given = _given({name: getattr(args, name) for name in _TUNED})
    if args.threads is not None:
        given["num_threads"] = args.threads
    loop = dataclasses.replace(recipe, **given)
    torch.manual_seed(loop.seed)
    return loop


def _roots(args: argparse.Namespace) -> list[Path]:
    roots = list(args.data)
    if args.sc09 is not None:
        from fastscore.folders import speech_commands

        roots.append(speech_commands(args.sc09))
    if not roots:
        raise ValueError("no data was named; give --data ROOT or --sc09 FOLDER")
    return roots


def _labels(args: argparse.Namespace, default: tuple[str, ...]) -> tuple[str, ...]:
    if args.labels is None:
        return default
    from fastscore.folders import check_labels

    return check_labels([label.strip() for label in args.labels.split(",")])


def _mel_options(args: argparse.Namespace, labels: tuple[str, ...], frames: int) -> dict[str, Any]:
    return {
        "labels": labels,
        "frames": frames,
        "cache_dir": args.cache_dir,
        "skip_broken": args.skip_broken,
    }
