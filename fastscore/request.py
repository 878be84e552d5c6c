"""What is asked of a sampling call, checked in full before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from fastscore.config import SigmaRange
from fastscore.engine import Clips, Task
from fastscore.inpaint import Inpainting
from fastscore.noise import seed_tensor
from fastscore.presets import Defaults, check_interval, check_sampler_options
from fastscore.samplers import SamplerSpec, sampler_named, schedule_for

Labels = str | Sequence[str | None] | None
Strengths = float | Sequence[float] | Tensor | None

# numbers of samples that share a seed, as `fastscore.noise` counts them
_NUMBERS = 2**32


@dataclass(frozen=True)
class Request:
    """One call of ``Pipeline.sample``: a label index (-1: none) and a gamma for each sample."""

    spec: SamplerSpec
    sigmas: tuple[float, ...]
    options: dict[str, Any]
    interval: tuple[float, float]
    ids: list[int]
    gammas: list[float]
    seed: int
    first: int
    batch_size: int

    @property
    def task(self) -> Task:
        """How the engine is to draw."""
        return Task(self.spec, self.sigmas, self.options, self.interval)

    def clips(self, inpainting: Inpainting | None = None) -> Clips:
        """What the engine is to draw; without a label or without strength a clip is unguided."""
        strong = zip(self.ids, self.gammas, strict=True)
        return Clips(
            labels=[label if gamma > 0 else -1 for label, gamma in strong],
            gammas=self.gammas,
            seeds=[self.seed] * len(self.ids),
            numbers=list(range(self.first, self.first + len(self.ids))),
            inpainting=inpainting,
        )


@dataclass(frozen=True)
class Ticket:
    """A request for one clip, which shares batches with requests of its group."""

    request: Request

    @property
    def group(self) -> Hashable:
        """What a batch has in common: everything but labels, strengths and seeds."""
        asked = self.request
        options = tuple(sorted(asked.options.items()))
        return asked.spec.name, asked.sigmas, asked.interval, options


def make_request(
    defaults: Defaults,
    trained: SigmaRange,
    known: Sequence[str],
    *,
    labels: Labels,
    batch_size: int,
    n: int | None = None,
    guidance: Strengths = None,
    steps: int | None = None,
    nfe: int | None = None,
    sampler: str | None = None,
    options: Mapping[str, Any] | None = None,
    schedule: str | None = None,
    interval: tuple[float, float] | None = None,
    seed: int = 0,
    first: int = 0,
) -> Request:
    """Arguments of ``Pipeline.sample`` with the defaults filled in; ValueError for one unfit."""
    spec = sampler_named(defaults.sampler if sampler is None else sampler)
    own = spec.name == defaults.sampler
    chosen = {**(defaults.sampler_options if own else {}), **(options or {})}
    check_sampler_options(spec, chosen)
    sigmas = schedule_for(
        spec,
        _evaluations(spec, defaults, steps, nfe),
        trained,
        schedule=defaults.schedule if own and schedule is None else schedule,
        sigma_min=defaults.sigma_min,
        sigma_max=defaults.sigma_max,
        options=defaults.schedule_options if own and schedule is None else None,
    )
    interval = defaults.guidance_interval if interval is None else interval
    ids = _label_ids(known, labels, n)
    seed = int(seed) if isinstance(seed, Integral) and not isinstance(seed, bool) else seed
    seed_tensor([seed])  # says what a seed may be
    first = whole("first", first, 0)
    if first + len(ids) > _NUMBERS:
        raise ValueError(f"first {first} + {len(ids)} samples exceed 2^32; use another seed")
    return Request(
        spec=spec,
        sigmas=sigmas,
        options=chosen,
        interval=(0.0, math.inf) if interval is None else check_interval(interval),
        ids=ids,
        gammas=_gammas(defaults.guidance if guidance is None else guidance, len(ids)),
        seed=seed,
        first=first,
        batch_size=whole("batch_size", batch_size, 1),
    )


def whole(name: str, value: int, least: int) -> int:
    """``value`` as int, a whole number of at least ``least``; ValueError otherwise."""
    # Integral and Real, so that numpy's numbers are taken
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} {value!r} must be a whole number of at least {least}")
    return int(value)


def _evaluations(spec: SamplerSpec, defaults: Defaults, steps: int | None, nfe: int | None) -> int:
    """Denoiser evaluations a sample may take."""
    if steps is not None and nfe is not None:
        raise ValueError(f"steps {steps} and nfe {nfe} were both given; give one of them")
    if steps is not None:
        return spec.nfe(whole("steps", steps, 1))
    return defaults.nfe if nfe is None else whole("nfe", nfe, 1)


def _label_ids(known: Sequence[str], labels: Labels, n: int | None) -> list[int]:
    if labels is None or isinstance(labels, str):
        labels = [labels] * whole("n", 1 if n is None else n, 1)
    elif n is not None and n != len(labels):
        raise ValueError(
            f"n {n} was given with a list of {len(labels)} labels; give n with one label, or "
            "a list with one entry a sample"
        )
    if not len(labels):
        raise ValueError("labels is an empty list; give one entry a sample")
    index = {label: i for i, label in enumerate(known)}
    for label in labels:
        if label is not None and label not in index:
            raise ValueError(f"label {label!r} is unknown; choose from {', '.join(known)}")
    return [-1 if label is None else index[label] for label in labels]


def _gammas(guidance: float | Sequence[float] | Tensor, n: int) -> list[float]:
    if hasattr(guidance, "tolist"):  # tensors and arrays
        guidance = guidance.tolist()
    several = isinstance(guidance, list | tuple)
    values = list(guidance) if several else [guidance] * n
    if len(values) != n:
        raise ValueError(f"guidance has {len(values)} entries for {n} samples; give one for each")
    for value in values:
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise ValueError(
                f"guidance {value!r} must be a finite number, 0 or more; 0 is unguided, 3 is usual"
            )
    return [float(value) for value in values]
