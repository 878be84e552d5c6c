"""Presets: folders with a classifier, a score network, a vocoder and how to sample from them."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastscore.checkpoint import (
    Checkpoint,
    first_difference,
    load_checkpoint,
    load_into,
    weights_hash,
)
from fastscore.classifier import Classifier
from fastscore.config import (
    ClassifierConfig,
    MelConfig,
    MelSpace,
    SigmaRange,
    SubnetConfig,
    UNetConfig,
    from_dict,
    to_dict,
)
from fastscore.denoiser import Denoiser, compose
from fastscore.samplers import SCHEDULES, SamplerSpec, sampler_named
from fastscore.solver import Common
from fastscore.subnet import ScoreSubnet
from fastscore.unet import UNet
from fastscore.vocoder import Generator, load_vocoder

CLASSIFIER, SCORE, VOCODER = "classifier.safetensors", "score.safetensors", "vocoder.safetensors"
DEFAULTS, CARD = "preset.json", "MODEL_CARD.md"
ROOT = Path(__file__).with_name("presets")

T = TypeVar("T")


@dataclass(frozen=True)
class Defaults:
    """How a pipeline samples unless told otherwise: the content of preset.json.

    ``guidance`` is gamma; ``guidance_interval`` (low, high) in sigma limits it, None is everywhere.
    ``schedule``, ``sigma_min`` and ``sigma_max`` None are the sampler's own schedule over the
    trained range. ``sampler_options`` and ``schedule_options`` are further keywords of that sampler
    and schedule, such as eta and leap.
    """

    sampler: str = "euler_ancestral"
    nfe: int = 60
    guidance: float = 3.0
    guidance_interval: tuple[float, ...] | None = None
    schedule: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    sampler_options: dict[str, Any] = field(default_factory=dict)
    schedule_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = sampler_named(self.sampler)
        check_sampler_options(spec, self.sampler_options)
        if self.nfe < 1:
            raise ValueError(f"nfe {self.nfe} must be at least 1 evaluation")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance {self.guidance} must be finite and not negative")
        if self.guidance_interval is not None:
            check_interval(self.guidance_interval)
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule {self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}"
            )
        name = self.schedule or spec.schedule
        taken = {"n", "sigma_min", "sigma_max", "sde"}
        _check_options(f"schedule {name}", SCHEDULES[name], taken, self.schedule_options)


def check_sampler_options(spec: SamplerSpec, options: Mapping[str, Any]) -> None:
    """ValueError for an option that the sampler has not."""
    taken = {"denoise", "x", "sigmas", "common", *Common.__annotations__}
    _check_options(f"sampler {spec.name}", spec.run, taken, options)


def _check_options(
    what: str, function: Callable[..., Any], taken: set[str], options: Mapping[str, Any]
) -> None:
    """ValueError for an option that ``function`` has not, apart from those that are ``taken``."""
    known = set(inspect.signature(function).parameters) - taken
    for name in options:
        if name not in known:
            raise ValueError(
                f"{what} has no option {name!r}; it has {', '.join(sorted(known)) or 'none'}"
            )


class Frozen(NamedTuple):
    """A classifier and what it was trained on."""

    model: Classifier
    mel: MelConfig
    space: MelSpace
    sigma: SigmaRange


class Parts(NamedTuple):
    """What a preset folder holds, read and found to belong together."""

    classifier: Classifier
    network: ScoreSubnet | UNet
    vocoder: Generator
    mel: MelConfig
    space: MelSpace
    sigma: SigmaRange
    defaults: Defaults
    folder: Path

    def denoiser(self) -> Denoiser:
        """The denoiser that classifier and score network make."""
        return compose(self.classifier, self.network, self.space, self.sigma)


def check_interval(interval: tuple[float, ...]) -> tuple[float, float]:
    """(low, high) of a guidance interval in sigma; ValueError unless 0 <= low < high."""
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise ValueError(
            f"guidance interval {interval!r} must be two noise levels, 0 <= low < high; such as "
            "(0.3, 8)"
        )
    return float(interval[0]), float(interval[1])


def preset_names() -> list[str]:
    """Names of the presets in the package."""
    return sorted(p.parent.name for p in ROOT.glob(f"*/{DEFAULTS}"))


def preset_folder(name: str | os.PathLike[str]) -> Path:
    """Folder of a preset, by the name of one in the package or by path.

    Raises ValueError when there is neither, or when a file is missing in it.
    """
    folder = Path(name)
    if isinstance(name, str) and name in preset_names():
        folder = ROOT / name
    if not folder.is_dir():
        known = ", ".join(preset_names()) or "none"
        raise ValueError(
            f"preset {os.fspath(name)!r} is neither one of those in the package ({known}) nor a "
            "folder; choose one of them"
        )
    needed = (CLASSIFIER, SCORE, VOCODER, DEFAULTS)
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not a preset: {' and '.join(missing)} missing; a preset holds "
            f"{', '.join(needed)}"
        )
    return folder


def read_defaults(path: Path) -> Defaults:
    """Content of a preset.json; ValueError where it is not JSON or not of this form."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it or write {{}}") from None
    try:
        return from_dict(Defaults, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_parts(name: str | os.PathLike[str]) -> Parts:
    """Read a preset and check that its parts were made for each other.

    Raises ValueError where a file is missing, damaged or of another kind, where Mel, normalisation
    or sigma range differ (both shown side by side), or where the ScoreSubnet was trained on another
    classifier.
    """
    folder = preset_folder(name)
    defaults = read_defaults(folder / DEFAULTS)
    one = load_checkpoint(folder / CLASSIFIER, "classifier")
    two = load_checkpoint(folder / SCORE)
    if two.kind not in _NETWORKS:
        raise ValueError(
            f"{two.path} holds a {two.kind!r} model, but a {' or '.join(map(repr, _NETWORKS))} "
            "model is needed here"
        )
    vocoder = load_vocoder(folder / VOCODER)
    for what in ("mel", "space", "sigma"):
        stored = {CLASSIFIER: _part(one, what), SCORE: _part(two, what)}
        if what == "mel":
            stored[VOCODER] = to_dict(vocoder.mel_config)
        _require_equal(folder, what, stored)
    frozen = _classifier(one)
    network = _NETWORKS[two.kind](two, one, frozen.model)
    return Parts(frozen.model, network, vocoder, *frozen[1:], defaults, folder)


def read_classifier(path: str | os.PathLike[str]) -> Frozen:
    """Classifier of a checkpoint, frozen, in evaluation mode; ValueError where it is unusable."""
    return _classifier(load_checkpoint(path, "classifier"))


def _classifier(stored: Checkpoint) -> Frozen:
    model = Classifier(_config(ClassifierConfig, stored, "classifier"))
    load_into(model, stored.tensors, stored.path or CLASSIFIER)
    return Frozen(
        model.requires_grad_(False).eval(),
        _config(MelConfig, stored, "mel"),
        _config(MelSpace, stored, "space"),
        _config(SigmaRange, stored, "sigma"),
    )


def _subnet(stored: Checkpoint, beside: Checkpoint, classifier: Classifier) -> ScoreSubnet:
    """ScoreSubnet, where it was trained on the classifier beside it."""
    difference = first_difference(_part(stored, "classifier"), _part(beside, "classifier"))
    if difference is not None:
        key, made_for, given = difference
        raise ValueError(
            f"{stored.path} was trained on a classifier with {key} {made_for}, but {beside.path} "
            f"has {given}; use the classifier it was trained on"
        )
    expected, found = stored.config.get("classifier_hash"), weights_hash(classifier)
    if not isinstance(expected, str):
        raise ValueError(
            f"{stored.path} does not say which classifier it was trained on (no classifier_hash); "
            "export it again with this version of fastscore"
        )
    if expected != found:
        raise ValueError(
            f"{stored.path} was trained on the classifier {expected[:12]}, but {beside.path} is "
            f"{found[:12]}; use the classifier it was trained on"
        )
    subnet = ScoreSubnet(_config(SubnetConfig, stored, "subnet"), classifier.config)
    load_into(subnet, stored.tensors, stored.path or SCORE)
    return subnet


def _unet(stored: Checkpoint, beside: Checkpoint, classifier: Classifier) -> UNet:
    """U-Net of a checkpoint; any classifier of its space can guide it."""
    unet = UNet(_config(UNetConfig, stored, "unet"))
    load_into(unet, stored.tensors, stored.path or SCORE)
    return unet


# kinds of checkpoint that predict the score
_NETWORKS = {"score": _subnet, "unet": _unet}


def _part(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    values = checkpoint.config.get(key)
    if not isinstance(values, dict):
        raise ValueError(f"{checkpoint.path} holds no {key!r} configuration; export it again")
    return values


def _config(cls: type[T], checkpoint: Checkpoint, key: str) -> T:
    try:
        return from_dict(cls, _part(checkpoint, key))
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None


def _require_equal(folder: Path, what: str, stored: Mapping[str, dict[str, Any]]) -> None:
    """ValueError with a table, a column for each file, unless all files state the same."""
    columns = list(stored.values())
    if all(column == columns[0] for column in columns):
        return
    names = {"mel": "Mel configurations", "space": "normalisations", "sigma": "sigma ranges"}
    rows = [["", *stored]]
    for key in dict.fromkeys(key for column in columns for key in column):
        cells = [str(column.get(key, "absent")) for column in columns]
        rows.append([key, *cells, "" if len(set(cells)) == 1 else "<- differs"])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(stored) + 2)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)) for row in rows]
    raise ValueError(
        f"{folder}: the {names[what]} of its parts differ; use parts that were trained together:\n"
        + "\n".join(f"  {line.rstrip()}" for line in lines)
    )
