"""What training the score networks costs: seconds and memory of a step, and the way of the loss.

    python bench/headline_training.py --threads 2 [--rounds 9] [--out FILE]
    python bench/headline_training.py --curves scoresubnet=RUN unet-equal-trainable=RUN ..

The first times steps of all contestants in turn, on random clips: what a step costs does not depend
on them. The second takes the validation losses out of the folders of finished trainings
(`fastscore train score | unet`), which saw the same clips, levels and noise.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import CONTESTANTS, OURS
from torch import nn

from fastscore.classifier import Classifier
from fastscore.config import CLASSIFIERS, SUBNETS, UNETS, MelConfig, MelSpace, SigmaRange
from fastscore.data import MelSet
from fastscore.files import write_bytes
from fastscore.measure import memory
from fastscore.measure.provenance import Watch
from fastscore.measure.timing import Stopwatch, interleaved, reference_work
from fastscore.train.launch import launch
from fastscore.train.score import ScoreTask
from fastscore.train.step import Stepper
from fastscore.train.task import LoopConfig, Task
from fastscore.train.unet import UNetTask

OUT = Path(__file__).resolve().parent / "results" / "headline"
# the recipe of the shipped ScoreSubnet
LOOP = LoopConfig(
    steps=6500,
    batch_size=32,
    lr=1.5e-3,
    warmup_steps=200,
    weight_decay=0.01,
    ema_decay=0.999,
    precision="bf16-mixed",
)


def clips(n: int, size: str) -> MelSet:
    """Random clips in the shape of the data."""
    config, rng = CLASSIFIERS[size], np.random.default_rng(0)
    mels = rng.normal(-5.0, 2.0, (n, config.n_mels, config.frames)).astype(np.float32)
    ids = np.arange(n) % len(config.labels)
    return MelSet(mels, ids, ["a"] * n, [Path("a.wav")] * n, config.labels, MelConfig())


def task(contestant: str, size: str, batch: int) -> Task:
    """The training of a contestant as `fastscore train` sets it up."""
    torch.manual_seed(0)
    data, config = clips(2 * batch, size), CLASSIFIERS[size]
    common = (data, data, MelSpace(mean=-5.0, std=2.0), SigmaRange(), batch)
    if contestant == OURS:
        classifier = Classifier(config).eval()
        return ScoreTask(SUBNETS[size], classifier, *common, tap_dtype=torch.bfloat16)
    return UNetTask(UNETS[f"{size}-{contestant.removeprefix('unet-')}"], *common)


class Training:
    """A training whose steps can be taken one at a time."""

    def __init__(self, contestant: str, size: str, device: str, batch: int = 32) -> None:
        self.task = task(contestant, size, batch)
        fabric = launch("cuda" if device == "cuda" else "cpu", 1, LOOP.precision)
        if hasattr(self.task, "setup"):
            self.task.setup(fabric.device, fabric.autocast)
        self.stepper = Stepper(self.task, LOOP, fabric)
        rng = torch.Generator().manual_seed(1)
        self.batch = fabric.to_device(self.task.batch(0, rng, 0, 1))

    def __call__(self) -> dict[str, float]:
        return self.stepper.step(0, self.batch)

    @property
    def modules(self) -> list[nn.Module]:
        """What is trained, and what is only read."""
        frozen = getattr(self.task, "frozen", None)
        return [*self.stepper.raw.values(), *([] if frozen is None else [frozen])]


def training_memory(contestant: str, size: str, device: str) -> dict[str, Any]:
    """Peak of a step of 32 clips: weights, optimiser state, gradients, activations, in bytes."""
    one = Training(contestant, size, device)
    optimizers = list(one.stepper._optimizers.values())
    averages = [t for ema in one.stepper._emas.values() for t in ema.average.values()]
    return memory.training(one, one.modules, optimizers, device, averages)


def step_times(size: str, device: str, rounds: int | None) -> dict[str, Any]:
    """Seconds a step of all contestants, taken in turn."""
    runs: dict[str, Callable[[], Any]] = {c: Training(c, size, device) for c in CONTESTANTS}
    place = torch.device(device)
    found = interleaved(
        runs,
        rounds,
        round_seconds=0.0,
        watch=Stopwatch(place, wall=True),
        reference=reference_work(place),
        budget=20.0,
    )
    return {
        name: {
            "median": t.median,
            **{f"p{q}": t.quantile(q / 100) for q in (20, 80, 99)},
            "seconds": t.seconds,
            "reference": t.reference,
        }
        for name, t in found.items()
    }


def curve(folder: Path) -> dict[str, Any]:
    """Validation losses and the record of a finished training."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        with (folder / "metrics.csv").open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["validation/loss"]]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is not the folder of a training: {error}") from None
    if not record["finished"]:
        raise ValueError(f"{folder}: the training is at step {record['steps']}; finish it first")
    return {
        "steps": [int(r["step"]) for r in rows],
        "loss": [float(r["validation/loss"]) for r in rows],
        "final": record["validation"],
        "record": {
            key: record[key]
            for key in (
                *("steps", "samples", "wall_seconds", "cpu_seconds", "energy_joules"),
                *("energy_source", "device_name", "threads", "precision", "parameters"),
            )
        },
    }


def reached(steps: list[int], losses: list[float], target: float) -> float | None:
    """Step at which the loss first came down to ``target``, between validations linearly."""
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return float(steps[0])
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--size", choices=("tiny", "paper"), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.curves:
        pairs = dict(pair.split("=", 1) for pair in args.curves if "=" in pair)
        if set(pairs) - set(CONTESTANTS) or len(pairs) != len(args.curves):
            parser.error(f"--curves: give NAME=RUN with NAME one of {', '.join(CONTESTANTS)}")
        values: dict[str, Any] = {name: curve(Path(run)) for name, run in pairs.items()}
        out = args.out or OUT / f"curves-{args.size}.json"
    else:
        watch = Watch(torch.device(args.device))
        rows = step_times(args.size, args.device, args.rounds)
        watch.end()
        values = {
            "command": f"python bench/headline_training.py --size {args.size} "
            f"--device {args.device} --threads {args.threads}"
            + (f" --rounds {args.rounds}" if args.rounds else ""),
            "provenance": watch.record,
            "rows": rows,
        }
        out = args.out or OUT / f"training-{args.size}-{args.device}.json"
    write_bytes(out, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())
    print(out)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"headline_training: {error}")
