"""Train a part of the published size in a GPU's minutes, and go on where the last call stopped.

    python bench/gpu_train.py PART --data ROOT .. --run FOLDER --out FILE.json [--minutes 9]
        [--total-minutes 18] [--classifier FILE] [--steps N] [--compile] [--backend triton]

PART is classifier, score, unet-equal-trainable, unet-equal-total or vocoder. The first call times
steps with their batches, chooses how many of them end within --total-minutes together with
validation and export, and writes that to FOLDER/plan.json; a later call with the same FOLDER goes
on with its state, to the same schedule. Every call ends before its --minutes are over.

It needs soundfile, lightning_fabric, filelock and tensorboard. A machine without a network lacks
the first and what that stands on (cffi), and may lack the second: their wheels (2 MB in all) are
carried and lie on PYTHONPATH. Recordings come as parcels (bench/parcels.py), weights leave as
shards (bench/artifacts.py). --device cpu --dry trains small networks for six steps.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_recipes import (
    PARTS,
    THREADS,
    Plan,
    Timed,
    build,
    choose,
    classifier_of,
    needs_classifier,
    read_plan,
    write_plan,
)
from stage import Stage, parser

from fastscore.train.launch import cpu_settings, gpu_settings, launch
from fastscore.train.loop import run
from fastscore.train.state import write_state
from fastscore.train.step import Batches, Stepper

NEEDED = ("soundfile", "lightning_fabric", "filelock", "tensorboard", "safetensors", "tqdm")
# steps before the clock, in which convolutions are tried and kernels compiled, and seconds on it
WARM_UP, SECONDS = 8, 15.0


def check_packages(names: tuple[str, ...] = NEEDED) -> None:
    """ValueError, before a minute is spent, where a package that training needs is missing.

    Imported they are: a package may be there without what it stands on itself.
    """
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:
            missing.append(f"{name} ({error})")
    if missing:
        raise ValueError(
            f"{', '.join(missing)} cannot be imported here; carry the wheels, install them with "
            "pip --no-index --target FOLDER, and put FOLDER on PYTHONPATH"
        )


def trial(args: argparse.Namespace, began: float) -> Timed:
    """Time steps of the training, its validation and its state, on weights that are thrown away."""
    task, loop = build(args, steps=10**6, every=10**6)
    start = time.monotonic() - began
    with cpu_settings(loop.num_threads):
        fabric = launch(loop.accelerator, 1, loop.precision)
        with gpu_settings(fabric.device):
            stepper, batches = Stepper(task, loop, fabric), Batches(task, loop, fabric)
            if hasattr(task, "setup"):
                task.setup(fabric.device, fabric.autocast)
            try:
                rounds = (1, 0.0) if args.dry else (WARM_UP, SECONDS)
                step = _step_seconds(stepper, batches, *rounds)
            finally:
                batches.close()
            with tempfile.TemporaryDirectory() as folder:
                validation = _timed(lambda: _validate(task, stepper, Path(folder)))
                save = _timed(lambda: write_state(Path(folder) / "state.ckpt", stepper.state()))
    return Timed(start, step, validation, save)


def _step_seconds(stepper: Stepper, batches: Batches, warm_up: int, seconds: float) -> float:
    """Mean seconds of a step, from making its batch to reading its loss."""
    for number in range(warm_up):
        stepper.step(number, batches.get(number))
    begin, taken = time.perf_counter(), 0
    while taken < 2 or time.perf_counter() - begin < seconds:
        stepper.step(warm_up + taken, batches.get(warm_up + taken))
        taken += 1
    return (time.perf_counter() - begin) / taken


def _validate(task: Any, stepper: Stepper, folder: Path) -> None:
    with stepper.averaged() as modules:
        task.validate(modules)
        task.export(modules, folder / f"{task.name}.safetensors")


def _timed(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def planned(args: argparse.Namespace, began: float) -> Plan:
    """The plan of the run folder, made now where it holds none."""
    path = args.run / "plan.json"
    plan = read_plan(path, args.part, args.dry)
    if plan is not None:
        return plan
    if (args.run / "state.ckpt").exists():
        raise ValueError(f"{args.run} holds a training without a plan; choose another --run")
    timed = trial(args, began)
    if args.device == "cuda":
        torch.cuda.empty_cache()
    minutes = (args.minutes, args.total_minutes or args.minutes)
    plan = choose(args.part, args.dry, timed, minutes, time.monotonic() - began, args.steps)
    args.run.mkdir(parents=True, exist_ok=True)
    write_plan(path, plan)
    return plan


def describe(plan: Plan) -> dict[str, Any]:
    """A plan as a row."""
    return {
        "part": plan.part,
        "steps": plan.steps,
        "validate_every": plan.validate_every,
        "minutes": plan.minutes,
        "total_minutes": plan.total_minutes,
        "seconds": {name: round(s, 4) for name, s in vars(plan.timed).items()},
    }


def train(args: argparse.Namespace, stage: Stage) -> dict[str, Any]:
    """Plan where there is none, train until the time or the steps are over; the run record."""
    began = time.monotonic()
    plan = planned(args, began)
    stage.add("plan", describe(plan))
    until = time.monotonic() + stage.seconds_left - plan.timed.close
    task, loop = build(args, plan.steps, plan.validate_every)
    record = run(task, loop, args.run, until=until)
    stage.add("training", figures(record, args, loop.batch_size))
    if record["finished"]:
        stage.finish()
    return record


def figures(record: dict[str, Any], args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Row of the training so far, over all its calls."""
    busy = record["wall_seconds"] - record["validation_seconds"]
    kept = (
        *("task", "steps", "samples", "finished", "sessions", "skipped_steps", "validation"),
        *("wall_seconds", "validation_seconds", "cpu_seconds", "energy_joules", "energy_source"),
        *("device_name", "precision", "peak_device_bytes", "peak_rss_bytes", "parameters"),
    )
    return {
        **{name: record[name] for name in kept},
        "part": args.part,
        "of_steps": record["loop"]["steps"],
        "batch_size": batch,
        "clips_per_second": record["samples"] / busy,
        "losses": last_losses(args.run / "metrics.csv"),
        "compiled": args.compile,
        "backend": os.environ.get("FASTSCORE_BACKEND", "auto"),
    }


def last_losses(path: Path) -> dict[str, float]:
    """The last reported value of every loss."""
    found: dict[str, float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found |= {k: float(v) for k, v in row.items() if k.endswith("/loss") and v}
    return found


def parse() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("part", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    found.add_argument("--data", type=Path, nargs="+", required=True, metavar="ROOT")
    found.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="of the training")
    found.add_argument("--classifier", type=Path, metavar="FILE", help="as artifacts.py joins it")
    found.add_argument(
        "--total-minutes", type=float, metavar="M", help="of all calls together (default: one)"
    )
    found.add_argument("--steps", type=int, metavar="N", help="at most, whatever there is time for")
    found.add_argument("--cache-dir", type=Path, metavar="FOLDER", help="of Mels and waves")
    found.add_argument("--compile", action="store_true", help="networks through torch.compile")
    found.add_argument("--backend", choices=("reference", "triton"), help="of fused operations")
    args = found.parse_args()
    total = args.total_minutes
    if args.minutes <= 0 or (total is not None and total < args.minutes):
        found.error("--minutes must be positive, and --total-minutes at least as many")
    if args.steps is not None and args.steps < 1:
        found.error(f"--steps {args.steps} must be at least 1")
    return args


def main() -> None:
    args = parse()
    check_packages()
    torch.set_num_threads(THREADS)
    if args.backend:
        os.environ["FASTSCORE_BACKEND"] = args.backend
    if needs_classifier(args.part):
        # refused before a GPU or a file is touched
        classifier_of(args)
    with Stage.open(f"train-{args.part}", args) as stage:
        record = train(args, stage)
    row = stage.rows["training"]
    print(
        f"{args.part}: step {record['steps']} of {row['of_steps']}, "
        f"{row['clips_per_second']:.0f} clips/s, {record['validation']}"
    )
    if not record["finished"]:
        print("the same command goes on")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError) as error:
        sys.exit(f"gpu_train: {error}")
