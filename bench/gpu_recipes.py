"""How each part of the published size is trained on a GPU, and how many steps its minutes hold."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from artifacts import remedy
from fastscore.checkpoint import load_checkpoint
from fastscore.commands.train import add_parser
from fastscore.config import from_dict
from fastscore.files import write_bytes
from fastscore.presets import CLASSIFIER, preset_folder
from fastscore.train.task import LoopConfig, Task

PARTS = ("classifier", "score", "unet-equal-trainable", "unet-equal-total", "vocoder")
# averaged weights are validated and exported so often over a training
VALIDATIONS = 10
CHECKPOINT_MINUTES = 3.0
# seconds that no measurement foresees: a slow disk, the end of the process
MARGIN = 8.0
# one core makes 17000 clips a second into batches, several times what a GPU takes of them
THREADS = 1
_FORMAT, _VERSION = "fastscore-plan", 1


@dataclass(frozen=True)
class Recipe:
    """``arguments`` of `fastscore train`, and settings of its ``loop`` that it has none for.

    ``most_steps`` is as many as are worth taking; None takes what there is time for.
    """

    arguments: tuple[str, ...]
    loop: dict[str, Any]
    most_steps: int | None = None


_BATCH = ("--batch-size", "256", "--lr", "1e-3", "--precision", "bf16-mixed")
_DENOISING = {"warmup_steps": 300, "ema_decay": 0.999}
RECIPES = {
    # one training in the place of two: the shifts and gains that the shipped classifier began with,
    # the noise levels that it ended with. 4000 x 256 clips are 170 times the recordings, and more
    # only learns them by heart
    "classifier": Recipe(
        (
            *("classifier", "--preset", "paper", *_BATCH),
            *("--log-sigma-mean", "0", "--log-sigma-std", "1.5"),
        ),
        {"warmup_steps": 200, "ema_decay": 0.999},
        4000,
    ),
    "score": Recipe(("score", "--preset", "paper", *_BATCH), _DENOISING),
    **{
        part: Recipe(("unet", "--preset", f"paper-{part[5:]}", *_BATCH), _DENOISING)
        for part in PARTS[2:4]
    },
    "vocoder": Recipe(("vocoder", "--preset", "hifigan-v1"), {}),
}
_DRY = ("--batch-size", "4")
# small networks, a few steps: does all of it run?
DRY = {
    "classifier": Recipe(("classifier", "--preset", "tiny", *_DRY), {}, 6),
    "score": Recipe(("score", "--preset", "tiny", *_DRY), {}, 6),
    **{part: Recipe(("unet", "--preset", f"tiny-{part[5:]}", *_DRY), {}, 6) for part in PARTS[2:4]},
    "vocoder": Recipe(("vocoder", "--preset", "digits", *_DRY), {}, 6),
}


def recipe(part: str, dry: bool) -> Recipe:
    """Recipe of a part."""
    return (DRY if dry else RECIPES)[part]


@dataclass(frozen=True)
class Timed:
    """What was measured before the steps were chosen, all in seconds.

    ``start`` is data and set-up of a call; ``step`` one step, its batch included; ``validation``
    that of the averaged weights, with their export; ``save`` the state.
    """

    start: float
    step: float
    validation: float
    save: float

    @property
    def close(self) -> float:
        """What a call must keep for its end: a validation, the state, and what is not foreseen."""
        return self.validation + self.save + MARGIN


@dataclass(frozen=True)
class Plan:
    """A training spread over one or several calls: what the first chose, and from what."""

    part: str
    dry: bool
    steps: int
    minutes: float
    total_minutes: float
    timed: Timed

    @property
    def validate_every(self) -> int:
        """Steps between validations."""
        return max(1, math.ceil(self.steps / (2 if self.dry else VALIDATIONS)))


def choose(
    part: str,
    dry: bool,
    timed: Timed,
    minutes: tuple[float, float],
    spent: float,
    most: int | None,
) -> Plan:
    """As many steps as end, validated and exported, within all calls.

    ``minutes`` are those of a call and of all calls together, ``spent`` seconds of the first one
    that are gone. ValueError where no step would be left.
    """
    one, total = minutes
    calls = math.ceil(total / one)
    usable = 60 * total - spent - (calls - 1) * timed.start - calls * timed.close
    usable -= VALIDATIONS * timed.validation + usable / (60 * CHECKPOINT_MINUTES) * timed.save
    # a part in thirty for what is slower later than it was in the beginning
    steps = int(usable / 1.03 / timed.step)
    limits = [n for n in (recipe(part, dry).most_steps, most) if n is not None]
    steps = min([steps, *limits])
    if steps < 1:
        raise ValueError(
            f"no step fits: of {total:g} minutes in {calls} calls start, validations and states "
            f"leave {max(usable, 0.0):.0f} s, and a step takes {timed.step:.2f} s; give more "
            "--minutes or --total-minutes"
        )
    return Plan(part, dry, steps, one, total, timed)


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan, atomically."""
    values = {"format": _FORMAT, "version": _VERSION, **asdict(plan)}
    write_bytes(path, (json.dumps(values, indent=1) + "\n").encode())


def read_plan(path: Path, part: str, dry: bool) -> Plan | None:
    """The plan of an earlier call, None where there is none; ValueError where it is of another."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (values.pop("format"), values.pop("version")) != (_FORMAT, _VERSION):
            raise ValueError("another format")
        plan = from_dict(Plan, values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the plan of a training ({error}); choose another --run"
        ) from None
    if (plan.part, plan.dry) != (part, dry):
        kind = "dry run" if plan.dry else "training"
        raise ValueError(f"{path} is the plan of a {kind} of {plan.part}; choose another --run")
    return plan


def build(args: argparse.Namespace, steps: int, every: int) -> tuple[Task, LoopConfig]:
    """Task and loop as `fastscore train` sets them up, from fresh weights of the recipe's seed."""
    chosen = recipe(args.part, args.dry)
    command = [*chosen.arguments, "--data", *map(str, args.data), "--out", str(args.run)]
    command += ["--steps", str(steps), "--validate-every", str(every), "--log-every", "20"]
    command += ["--checkpoint-minutes", str(CHECKPOINT_MINUTES), "--accelerator", args.device]
    command += ["--threads", str(THREADS)]
    if args.device == "cpu":
        # many a processor only emulates bf16
        command += ["--precision", "32-true"]
    if needs_classifier(args.part):
        command += ["--classifier", str(classifier_of(args))]
    if args.cache_dir is not None:
        command += ["--cache-dir", str(args.cache_dir)]
    if args.compile and args.part != "vocoder":
        command.append("--compile")
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    given = parser.parse_args(["train", *command])
    task, loop = given.build(given)
    return task, replace(loop, **chosen.loop)


def needs_classifier(part: str) -> bool:
    """Whether a part is trained over a classifier."""
    return part not in ("classifier", "vocoder")


def classifier_of(args: argparse.Namespace) -> Path:
    """The classifier to train over; ValueError where none is named, or one that would change.

    ScoreSubnet's file names its classifier by its weights. Weights in float32 would be rounded when
    they are kept, and nobody could put the two together again.
    """
    if args.classifier is None:
        if args.dry:
            return preset_folder("digits") / CLASSIFIER
        raise ValueError(
            f"{args.part} is trained over a classifier: --classifier FILE, from python "
            f"bench/artifacts.py join classifier-paper --out FILE; {remedy('classifier-paper')}"
        )
    stored = load_checkpoint(args.classifier, "classifier", upcast=False)
    wide = [name for name, t in stored.tensors.items() if t.is_floating_point() and t.itemsize > 2]
    if args.part == "score" and wide:
        raise ValueError(
            f"{args.classifier} is not as it will be kept: {wide[0]} has more than 16 bits; first "
            "python bench/artifacts.py keep, then join, and train over what join writes"
        )
    return args.classifier
