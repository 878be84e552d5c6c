"""``fastscore info``: what a preset or an architecture holds and costs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from fastscore.commands.common import DEFAULT_PRESET

if TYPE_CHECKING:
    from fastscore.denoiser import Denoiser


def add_parser(commands: Any) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "info",
        help="show what a preset holds and costs",
        description="Show labels, parameters, taps, multiply-accumulates a step, Mel "
        "configuration, file sizes and defaults of a preset; or, with --model, of an architecture "
        "without weights, beside the published figures.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "preset", nargs="?", default=DEFAULT_PRESET, help="name or folder (default: %(default)s)"
    )
    what.add_argument("--model", metavar="NAME", help="tiny or paper")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Gather and print."""
    facts = _model(args.model) if args.model else _preset(args.preset)
    print(json.dumps(facts, indent=1) if args.json else _text(facts))


def _preset(name: str) -> dict[str, Any]:
    from fastscore.pipeline import Pipeline
    from fastscore.presets import CLASSIFIER, SCORE, VOCODER, preset_folder, preset_names

    folder = preset_folder(name)
    pipeline = Pipeline.from_pretrained(name)
    facts = pipeline.describe()
    for key in ("device", "backend", "batch_size"):
        del facts[key]
    sizes = {file: (folder / file).stat().st_size for file in (CLASSIFIER, SCORE, VOCODER)}
    return {
        **facts,
        "folder": str(folder),
        **_network(pipeline.denoiser),
        "bytes": {**sizes, "together": sum(sizes.values())},
        "presets in the package": preset_names(),
    }


def _model(name: str) -> dict[str, Any]:
    import torch

    from fastscore.classifier import Classifier
    from fastscore.config import CLASSIFIERS, SUBNETS, MelSpace, SigmaRange
    from fastscore.cost import PUBLISHED, parameters
    from fastscore.denoiser import TapDenoiser
    from fastscore.subnet import ScoreSubnet

    if name not in CLASSIFIERS:
        raise ValueError(f"model {name!r} is unknown; choose one of {', '.join(CLASSIFIERS)}")
    config = CLASSIFIERS[name]
    with torch.device("meta"):
        classifier, subnet = Classifier(config), ScoreSubnet(SUBNETS[name], config)
        denoiser = TapDenoiser(classifier, subnet, MelSpace(frames=config.frames), SigmaRange())
    counts = {"classifier": parameters(classifier), "subnet": parameters(subnet)}
    return {
        "model": name,
        "parameters": counts,
        **_network(denoiser.eval()),
        "published": {
            "parameters": {
                "subnet": PUBLISHED["trainable"],
                "classifier and subnet": PUBLISHED["total"],
            },
            "macs": {k: PUBLISHED[k] for k in ("unguided", "guided")},
        },
    }


def _network(denoiser: Denoiser) -> dict[str, Any]:
    from fastscore.cost import step_macs, tap_shapes

    shapes = tap_shapes(denoiser) if denoiser.PART == "subnet" else {}
    return {
        "taps": {name: list(shape) for name, shape in shapes.items()},
        "macs": step_macs(denoiser),
    }


def _text(facts: dict[str, Any]) -> str:
    lines = []
    published = facts.get("published", {"parameters": {}, "macs": {}})
    for key in ("preset", "model", "folder"):
        if key in facts:
            lines.append(f"{key}: {facts[key]}")
    if "labels" in facts:
        lines.append(f"labels: {', '.join(facts['labels'])}")
    counts = dict(facts["parameters"])
    score = "unet" if "unet" in counts else "subnet"
    counts[f"classifier and {score}"] = counts["classifier"] + counts[score]
    lines.append("parameters:")
    lines += [_row(k, f"{v:,}", published["parameters"].get(k)) for k, v in counts.items()]
    if facts["taps"]:
        lines.append("taps (channels x bands x frames), a feature and a gradient tap each:")
    lines += [_row(k, " x ".join(map(str, v))) for k, v in facts["taps"].items()]
    lines.append("multiply-accumulates a step (convolutions and matrix products):")
    lines += [_row(k, f"{v:,}", published["macs"].get(k)) for k, v in facts["macs"].items()]
    titles = {
        "defaults": "defaults of sampling",
        "mel": "Mel configuration",
        "space": "normalised log-Mel",
        "sigma": "trained noise levels",
        "bytes": "files, bytes",
        "hashes": "hashes of the weights",
    }
    for key, title in titles.items():
        if key in facts:
            lines.append(f"{title}:")
            lines += [_row(name, _value(value)) for name, value in facts[key].items()]
    return "\n".join(lines)


def _row(name: str, value: str, published: float | None = None) -> str:
    beside = "" if published is None else f"   (published: {published:,.0f})"
    return f"  {name:24} {value:>16}{beside}"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, str):
        return value[:16]
    return f"{value:g}" if isinstance(value, float) else str(value)
