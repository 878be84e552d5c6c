"""What a workload must do at least: multiply-accumulates, bytes, and its bound on a machine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastscore.denoiser import Denoiser
from fastscore.measure import macs, work
from fastscore.measure.models import prepared, prepared_vocoder
from fastscore.measure.operations import case
from fastscore.measure.roofline import Peaks, bound
from fastscore.measure.subjects import task
from fastscore.measure.workloads import EndToEnd, Loop, Op, Step, Vocoder, Workload
from fastscore.vocoder import Generator

CPU = torch.device("cpu")


class Cost(NamedTuple):
    """Multiply-accumulates and bytes of one call, None where unknown; its bound on a machine."""

    macs: int | None
    bytes: int | None
    bound: Callable[[Peaks], dict[str, Any]] | None


def cost(workload: Workload) -> Cost:
    """What one call of ``workload`` must do, counted on tensors without values."""
    return _COSTS[type(workload)](workload)


def _op(op: Op) -> Cost:
    """Products of plain PyTorch; bytes as `fastscore_kernels.traffic` has them."""
    # imported here: it brings parts of the compiler that nothing else needs
    from torch.utils.flop_counter import FlopCounterMode

    found = case(op, CPU)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found.run("eager")()
    done = counter.get_total_flops() // 2
    if found.traffic is None:
        return Cost(done, None, None)
    moved = found.traffic.must
    return Cost(done, moved, lambda peaks: bound(done, moved, "fp32", peaks))


def _step(step: Step) -> Cost:
    found = _evaluation(step.model, step.precision, step.batch, step.guided)
    return Cost(found.macs, found.bytes, found.bound)


@functools.lru_cache(maxsize=64)
def _evaluation(model: str, precision: str, batch: int, guided: bool) -> work.Work:
    """Rows of all backends and modes share one count."""
    return work.step(_denoiser(model, precision), batch, guided)


def _loop(loop: Loop | EndToEnd) -> Cost:
    """The sum of its evaluations, of which the interval leaves some unguided."""
    net = _denoiser(loop.model, loop.precision)
    asked = loop.guided if isinstance(loop, Loop) else True
    course = task(loop.course, loop.nfe, net.sigma_range).course(asked)
    assert course is not None
    guided_steps = [kind.guided for kind in course.kinds]
    steps = [_evaluation(loop.model, loop.precision, loop.batch, g) for g in guided_steps]

    def limit(peaks: Peaks) -> dict[str, Any]:
        return _sum([kind.bound(peaks) for kind in steps])

    return Cost(sum(s.macs for s in steps), sum(s.bytes for s in steps), limit)


def _vocoder(vocoder: Vocoder) -> Cost:
    net = prepared_vocoder(vocoder.model, CPU)
    return _waves(net, vocoder.batch, vocoder.frames)


def _waves(net: Generator, batch: int, frames: int) -> Cost:
    mel = net.mel_config
    done = macs.of(net, torch.empty(batch, mel.n_mels, frames, device="meta")).total
    weights = sum(p.nbytes for p in net.parameters())
    moved = weights + 4 * batch * frames * (mel.n_mels + mel.hop_length)
    return Cost(done, moved, lambda peaks: bound(done, moved, "fp32", peaks))


def _end_to_end(how: EndToEnd) -> Cost:
    loop = _loop(how)
    net = prepared_vocoder(how.model, CPU)
    frames = _denoiser(how.model, how.precision).space.frames
    waves = _waves(net, how.batch, frames)
    parts = (loop, waves)

    def limit(peaks: Peaks) -> dict[str, Any]:
        return _sum([part.bound(peaks) for part in parts if part.bound is not None])

    return Cost(sum(p.macs or 0 for p in parts), sum(p.bytes or 0 for p in parts), limit)


def _sum(limits: list[dict[str, Any]]) -> dict[str, Any]:
    """Bounds of one after the other, named after what takes the most of them."""
    names: dict[str, float] = {}
    for limit in limits:
        names[limit["name"]] = names.get(limit["name"], 0.0) + limit["seconds"]
    return {"name": max(names, key=names.__getitem__), "seconds": sum(names.values())}


def _denoiser(model: str, precision: str) -> Denoiser:
    return prepared(model, CPU, "reference", precision, packed=False)


_COSTS: dict[type, Callable[[Any], Cost]] = {
    Op: _op,
    Step: _step,
    Loop: _loop,
    Vocoder: _vocoder,
    EndToEnd: _end_to_end,
}
