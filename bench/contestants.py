"""Who is compared: ScoreSubnet, and the U-Net baseline at its two sizes, with one classifier.

    python bench/contestants.py --assemble unet-equal-total --out FOLDER

puts a preset together around the baseline's weights in artifacts/, which are not in the package:
sampling, evaluation, export and profiling take the folder like any other preset.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from artifacts import ARTIFACTS, NETWORKS, assemble
from fastscore.checkpoint import first_difference, load_checkpoint, save_checkpoint
from fastscore.classifier import Classifier
from fastscore.config import CLASSIFIERS, SUBNETS, UNETS, MelSpace, SigmaRange, to_dict
from fastscore.denoiser import Denoiser, GuidedUNet, TapDenoiser
from fastscore.presets import CLASSIFIER, DEFAULTS, SCORE, VOCODER, load_parts, preset_folder
from fastscore.subnet import ScoreSubnet
from fastscore.unet import UNet

CONTESTANTS = NETWORKS
OURS, BASELINES = CONTESTANTS[0], CONTESTANTS[1:]
SIZES = ("tiny", "paper")
TITLES = {
    OURS: "ScoreSubnet",
    "unet-equal-trainable": "U-Net, equal trainable",
    "unet-equal-total": "U-Net, equal total",
}
# the package's preset of size tiny, whose classifier, vocoder and sampling all of them share
SHARED = "digits"
RECIPE = (
    "fastscore train unet --preset {size}-{kind} --data ROOTS --classifier "
    "fastscore/presets/digits/classifier.safetensors --out FOLDER --threads 1 --validate-every 250"
)


def artifact(name: str) -> Path:
    """Where the trained weights of a baseline of size tiny lie."""
    return ARTIFACTS / f"{name}-tiny.safetensors"


def trained_preset(
    name: str, folder: Path, size: str = "tiny", vocoder: str = "digits"
) -> Path | str:
    """Preset of a contestant: the package's own of size tiny, or one put together in ``folder``.

    ``vocoder`` is one of `artifacts.VOCODERS`, for another size than tiny. ValueError where weights
    are not there.
    """
    if size != "tiny":
        return assemble(size, folder, name, vocoder, ARTIFACTS)
    if name == OURS:
        return SHARED
    weights = artifact(name)
    if not weights.is_file():
        raise ValueError(
            f"{weights.name} is not in artifacts/; fetch the whole repository, or train it: "
            + RECIPE.format(size="tiny", kind=name.removeprefix("unet-"))
        )
    folder.mkdir(parents=True, exist_ok=True)
    source = preset_folder(SHARED)
    for file in (CLASSIFIER, VOCODER, DEFAULTS):
        shutil.copyfile(source / file, folder / file)
    shutil.copyfile(weights, folder / SCORE)
    load_parts(folder)
    return folder


def untrained(
    name: str,
    size: str,
    guided: bool = True,
    patch: int | None = None,
    device: str = "cpu",
) -> Denoiser:
    """A contestant with random weights, channels-last: what costs are measured on.

    A baseline that is not guided has no classifier, as it would have none in use. ``patch`` is
    another one than a baseline has: 1 reads single bins. ``device`` is cpu, or meta to count only.
    """
    torch.manual_seed(0)
    with torch.device(device):
        net = _composed(name, size, guided, patch)
    if device == "cpu":
        wake(net)
    net.eval().requires_grad_(False)
    return net.to(memory_format=torch.channels_last)


def _composed(name: str, size: str, guided: bool, patch: int | None) -> Denoiser:
    config = CLASSIFIERS[size]
    space, sigma = MelSpace(frames=config.frames), SigmaRange()
    if name == OURS:
        return TapDenoiser(Classifier(config), ScoreSubnet(SUBNETS[size], config), space, sigma)
    shape = UNETS[f"{size}-{name.removeprefix('unet-')}"]
    unet = UNet(shape if patch is None else replace(shape, patch=patch))
    return GuidedUNet(unet, Classifier(config) if guided else None, space, sigma)


@torch.no_grad()
def wake(module: nn.Module) -> None:
    """Leave no weight at its zero start: products with zeros are not what training leaves."""
    for p in module.parameters():
        if p.ndim >= 2 and not p.any():
            p.normal_(std=p[0].numel() ** -0.5)


def keep(weights: Path, name: str) -> Path:
    """Put weights that were trained into artifacts/, in float16; ValueError for another network."""
    stored = load_checkpoint(weights, "unet")
    expected = to_dict(UNETS[f"tiny-{name.removeprefix('unet-')}"])
    difference = first_difference(stored.config["unet"], expected)
    if difference is not None:
        key, found, wanted = difference
        raise ValueError(f"{weights}: {key} is {found}, but {name} has {wanted}")
    out = artifact(name)
    save_checkpoint(out, "unet", stored.config, stored.tensors, stored.extra, dtype="float16")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--assemble", choices=BASELINES, help="put a preset together")
    what.add_argument("--keep", type=Path, metavar="FILE", help="put trained weights in artifacts/")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the preset")
    parser.add_argument("--as", dest="name", choices=BASELINES, help="whose weights they are")
    args = parser.parse_args()
    if (args.out if args.assemble else args.name) is None:
        parser.error("--assemble needs --out FOLDER, and --keep needs --as NAME")
    try:
        print(
            trained_preset(args.assemble, args.out) if args.assemble else keep(args.keep, args.name)
        )
    except (ValueError, OSError) as error:
        sys.exit(f"contestants: {error}")


if __name__ == "__main__":
    main()
