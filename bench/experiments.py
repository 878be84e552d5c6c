"""Switches of a guided step on a GPU, each against the step as it is, and what was predicted.

    python bench/experiments.py --out FILE [--batch 1 64] [--only NAME ..]

An experiment changes one thing while a step of `paper` is built and recorded; its answer is checked
against the same oracle as the step's own, and both are then timed in turn as replayed graphs. The
table, predictions beside outcomes, belongs into bench/NOTES.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fastscore_kernels import resolve
from fastscore_kernels.gpu import launch
from stage import Stage, parser

from fastscore.measure import subjects
from fastscore.measure.subjects import Built
from fastscore.measure.timing import Stopwatch, check_equal, interleaved, ratios, reference_work
from fastscore.measure.workloads import Step


@dataclass(frozen=True)
class Experiment:
    """One change: ``around`` is in force while the step is built, checked and timed.

    ``predicted`` is its time over that of the step as it is, ``why`` the reason in few words.
    """

    name: str
    predicted: float
    why: str
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    mode: str = "graphs"
    backend: str = "triton"
    precision: str = "bf16"


@contextlib.contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN time its algorithms in the warm-up runs before a capture."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def unsplit_norms() -> Iterator[None]:
    """Normalise in one launch, a group a program, however many processors stay idle."""
    with launch.parameters("norm_act", splits=1), launch.parameters("norm_act_backward", splits=1):
        yield


EXPERIMENTS = (
    Experiment(
        *("cudnn-benchmark", 0.85, "heuristics choose for large images; these are 40 x 32"),
        around=cudnn_benchmark,
    ),
    Experiment(
        *("unsplit-norms", 0.95, "39 launches less at batch 1; each of the rest reads 60 kB alone"),
        around=unsplit_norms,
    ),
    Experiment(
        *("early-launches", 0.93, "62 of our kernels follow another of ours, 0.7 us sooner each"),
        around=functools.partial(launch.early, True),
    ),
    Experiment(
        *("compiled-graphs", 0.97, "of 220 nodes only a dozen are left for a compiler to fuse"),
        mode="compiled-graphs",
    ),
    Experiment("reference-graphs", 2.5, "three times the nodes", backend="reference"),
    Experiment(
        *("reference-compiled-graphs", 1.1, "Inductor's norms take two kernels and a round trip"),
        mode="compiled-graphs",
        backend="reference",
    ),
    Experiment("fp32", 2.5, "no tensor cores: 67 TFLOP/s instead of 990", precision="fp32"),
    Experiment("eager", 4.0, "the host launches a kernel in 5 us, a graph in 1.3", mode="eager"),
)


def build(step: Step, one: Experiment | None, device: torch.device) -> Built:
    """The step as it is, or with one thing changed."""
    changed = step
    if one is not None:
        way = one.backend, step.model, one.mode, one.precision
        changed = Step(step.batch, *way, guided=step.guided)
    return subjects.build(changed, device)


@torch.no_grad()
def compare(
    step: Step, one: Experiment, device: torch.device, rounds: int | None
) -> dict[str, Any]:
    """Medians of both in turn and their ratio; WrongAnswerError where the answer is wrong."""
    against, answer = subjects.expected(step, device)
    usual = build(step, None, device)
    with one.around():
        other = build(step, one, device)
        narrow = one.precision == "bf16" or step.precision == "bf16"
        limit = subjects.STEP_BF16 if narrow else subjects.STEP
        check = check_equal({against: answer, one.name: other.answer(other.run())}, limit)
        found = interleaved(
            {"as it is": usual.run, one.name: other.run},
            rounds,
            watch=Stopwatch(device),
            reference=reference_work(device),
        )
    ratio = ratios(found, one.name, "as it is")
    return {
        "predicted": one.predicted,
        "why": one.why,
        "ratio": dict(zip(("median", "p20", "p80"), ratio, strict=True)),
        "seconds": {name: t.median for name, t in found.items()},
        "error": check.error,
        "limit": check.limit,
    }


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    found.add_argument("--only", nargs="+", choices=[e.name for e in EXPERIMENTS], metavar="NAME")
    return found.parse_args()


def planned(args: argparse.Namespace) -> list[tuple[Step, Experiment]]:
    """Pairs of a step and an experiment, in order of importance."""
    if args.dry:
        # nothing to record here: the step of the shipped model, the reference against the best
        step = Step(1, resolve(None, "cpu"), "digits", "eager", "fp32", guided=True)
        return [(step, Experiment("reference", 1.3, "dry run", backend="reference", mode="eager",
                                  precision="fp32"))]  # fmt: skip
    chosen = [e for e in EXPERIMENTS if not args.only or e.name in args.only]
    steps = [Step(b, "triton", "paper", "graphs", "bf16", guided=True) for b in args.batch]
    return list(itertools.product(steps, chosen))


def main() -> None:
    args = arguments()
    with Stage.open("experiments", args) as stage:
        pairs = planned(args)
        for step, one in pairs:
            name = f"{one.name}/b{step.batch}"
            rounds, seconds = (3, 0.0) if args.dry else (None, 30.0)
            run = functools.partial(compare, step, one, stage.device, rounds)
            row = stage.measure(name, run, seconds)
            if row is not None:
                print(name, summary(row), flush=True)
        stage.finish(len(pairs))


def summary(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"FAILED {row['failed']}"
    ratio = row["ratio"]
    return (
        f"predicted {row['predicted']:.2f}, found {ratio['median']:.2f} "
        f"[{ratio['p20']:.2f}, {ratio['p80']:.2f}]"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"experiments: {error}")
