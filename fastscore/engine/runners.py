"""How one batch is drawn: directly, or by replaying recorded programs of the same functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fastscore.engine.programs import Buffers, Program, ProgramCache
from fastscore.engine.recorders import Recorder
from fastscore.inpaint import Inpainting
from fastscore.noise import NoiseSource
from fastscore.samplers import SamplerSpec
from fastscore.solver import Guidance
from fastscore.trajectory import (
    Course,
    Denoiser,
    Kind,
    Setting,
    Watcher,
    course,
    follow,
    trajectory,
)

# x0 [B, ...] to what is made of it
Finish = Callable[[Tensor], tuple[Tensor, ...]]
_KNOWN = ("known", "mask", "strength")


@dataclass(frozen=True)
class Task:
    """How to draw: a sampler, its levels (a 0 last) and options, and where guidance counts."""

    spec: SamplerSpec
    sigmas: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] = (0.0, float("inf"))

    @property
    def nfe(self) -> int:
        """Denoiser evaluations a clip takes."""
        return self.spec.nfe(len(self.sigmas) - 1)

    def course(self, guided: bool) -> Course | None:
        """Course of a sampler that follows a plan, None for another."""
        if self.spec.plan is None:
            return None
        low, high = self.interval
        return course(
            self.spec.plan(self.sigmas, **self.options),
            self.sigmas,
            lambda sigma: guided and low < sigma <= high,
        )


@dataclass(frozen=True)
class Model:
    """What draws: a denoiser, what is made of its x0, the shape of one clip, where and how."""

    denoise: Denoiser
    finish: Finish
    shape: tuple[int, ...]
    device: torch.device
    backend: str | None = None

    def inpainting(self, batch: Buffers) -> Inpainting | None:
        """What is known of the clips."""
        if "known" not in batch:
            return None
        return Inpainting.over(*(batch[name] for name in _KNOWN))

    def conditioned(self, batch: Buffers) -> Denoiser:
        """The denoiser, told what is known of the clips."""
        known = self.inpainting(batch)
        return self.denoise if known is None else known.around(self.denoise)

    def completed(self, x0: Tensor, batch: Buffers) -> Tensor:
        """x0 [B, ...] with what is known of the clips in its place."""
        known = self.inpainting(batch)
        return x0 if known is None else known.finish(x0)

    def watcher(self, watch: Watcher | None, batch: Buffers) -> Watcher | None:
        """``watch``, shown what is known of the clips in its place."""
        if watch is None or "known" not in batch:
            return watch
        return lambda step, x, x0: watch(step, x, self.completed(x0, batch))

    def setting(self, batch: Buffers) -> Setting:
        """Setting of a trajectory over the tensors of a batch."""
        noise = NoiseSource.over(batch["seeds"], batch["numbers"])
        denoise = self.conditioned(batch)
        return Setting(denoise, batch["labels"], batch["gammas"], noise, backend=self.backend)

    def start(self, batch: Buffers, sigma: Tensor | float) -> Tensor:
        """Initial state [B, ...] fp32."""
        noise = NoiseSource.over(batch["seeds"], batch["numbers"])
        x = noise.initial((len(batch["seeds"]), *self.shape), self.backend) * sigma
        known = self.inpainting(batch)
        return x if known is None else known.start(x)

    def follow(self, batch: Buffers, kinds: tuple[Kind, ...], watch: Watcher | None) -> Tensor:
        """x0 at the end of the course in ``batch["table"]``."""
        table = batch["table"]
        start = self.start(batch, table[0, 0])
        watch = self.watcher(watch, batch)
        return self.completed(trajectory(self.setting(batch), kinds, table, start, watch), batch)

    def loop(
        self, task: Task, batch: Buffers, guided: bool, denoise: Denoiser, watch: Watcher | None
    ) -> Tensor:
        """x0 by a sampler that is no plan; ``denoise`` is conditioned already.

        Labels and strengths may still be on the CPU: there they are checked without waiting.
        """
        guidance = Guidance()
        if guided:
            guidance = Guidance(batch["labels"], batch["gammas"], task.interval)
        watch = self.watcher(watch, batch)
        found = task.spec.run(
            denoise,
            self.start(batch, task.sigmas[0]),
            task.sigmas,
            guidance=guidance,
            noise=NoiseSource.over(batch["seeds"], batch["numbers"]),
            callback=watch and (lambda step, sigma, x, x0: watch(step, x, x0)),
            **task.options,
        )
        return self.completed(found.x, batch)


class Runner(Protocol):
    """Draws one batch, given as tensors on the CPU."""

    def draw(self, task: Task, batch: Buffers, guided: bool, watch: Watcher | None) -> Tensor:
        """x0 [B, ...] on the device."""
        ...

    def finish(self, x0: Tensor) -> tuple[Tensor, ...]:
        """What the model makes of x0."""
        ...


class Direct:
    """Calls the model's functions as they are."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def draw(self, task: Task, batch: Buffers, guided: bool, watch: Watcher | None) -> Tensor:
        """x0 [B, ...] on the device."""
        model = self._model
        route = task.course(guided)
        if route is None:
            batch = _for_loop(batch, model.device)
            return model.loop(task, batch, guided, model.conditioned(batch), watch)
        batch = {name: t.to(model.device) for name, t in batch.items()}
        table = route.table().to(model.device)
        return model.follow({**batch, "table": table}, route.kinds, watch)

    def finish(self, x0: Tensor) -> tuple[Tensor, ...]:
        """What the model makes of x0."""
        return self._model.finish(x0)


class Recording:
    """Replays programs: a whole trajectory with all that is made of it, or step by step.

    Step by step where somebody watches, and for samplers that are no plan.
    """

    def __init__(self, model: Model, recorder: Recorder, programs: ProgramCache) -> None:
        self._model, self._recorder, self._programs = model, recorder, programs
        self._finished: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def draw(self, task: Task, batch: Buffers, guided: bool, watch: Watcher | None) -> Tensor:
        """x0 [B, ...] on the device."""
        route = task.course(guided)
        if route is None:
            return self._loop(task, batch, guided, watch)
        if watch is not None:
            return self._steps(route, batch, watch)
        model, kinds = self._model, route.kinds

        def whole(buffers: Buffers) -> tuple[Tensor, ...]:
            x0 = model.follow(buffers, kinds, None)
            return x0, *model.finish(x0)

        inputs = {**batch, "table": route.table()}
        x0, *made = self._run(("trajectory", kinds), whole, inputs)
        self._finished = x0, tuple(made)
        return x0

    def finish(self, x0: Tensor) -> tuple[Tensor, ...]:
        """What the model makes of x0, already there where the trajectory was one program."""
        if self._finished is not None and self._finished[0] is x0:
            (_, made), self._finished = self._finished, None
            return made
        return self._run("finish", lambda buffers: self._model.finish(buffers["x"]), {"x": x0})

    def _steps(self, route: Course, batch: Buffers, watch: Watcher) -> Tensor:
        model, table, kinds = self._model, route.table(), route.kinds
        start = self._run(
            "start", lambda b: (model.start(b, b["sigma"]),), {**batch, "sigma": table[0, :1]}
        )[0]

        def advance(
            i: int, x: Tensor, old: Tensor | None, older: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            kind = kinds[i]

            def step(b: Buffers) -> tuple[Tensor, ...]:
                setting = model.setting(b)
                return setting.advance(
                    b["step"], b["x"], b["row"], kind, b.get("old"), b.get("older")
                )

            inputs = {**batch, "x": x, "row": table[i], "step": torch.tensor([i])}
            if kind.old and old is not None:
                inputs["old"] = old
            if kind.older and older is not None:
                inputs["older"] = older
            following, x0 = self._run(("step", kind), step, inputs)
            return following, x0

        def last(x: Tensor) -> Tensor:
            denoise = self._denoiser(batch)
            sigma = table[-1, :1].repeat(len(x))
            conditions = (batch["labels"], batch["gammas"]) if kinds[-1].guided else (None, None)
            return denoise(x, sigma, *conditions)

        known = {name: batch[name].to(model.device) for name in _KNOWN if name in batch}
        x0 = follow(start, len(kinds), advance, last, model.watcher(watch, known))
        return model.completed(x0, known)

    def _loop(self, task: Task, batch: Buffers, guided: bool, watch: Watcher | None) -> Tensor:
        moved = _for_loop(batch, self._model.device)
        return self._model.loop(task, moved, guided, self._denoiser(batch), watch)

    def _denoiser(self, batch: Buffers) -> Denoiser:
        """The conditioned denoiser by replays, a program for guided and one for unguided."""
        model = self._model

        def denoise(x: Tensor, sigma: Tensor, label: Tensor | None, gamma: Tensor | None) -> Tensor:
            def evaluate(b: Buffers) -> tuple[Tensor, ...]:
                return (model.conditioned(b)(b["x"], b["sigma"], b.get("label"), b.get("gamma")),)

            inputs = {"x": x, "sigma": sigma}
            if label is not None and gamma is not None:
                inputs |= {"label": label, "gamma": gamma}
            inputs |= {name: batch[name] for name in _KNOWN if name in batch}
            return self._run("denoise", evaluate, inputs)[0]

        # churn may not lift a level above it
        denoise.sigma_range = getattr(model.denoise, "sigma_range", None)  # type: ignore[attr-defined]
        return denoise

    def _run(
        self, name: Any, function: Callable[[Buffers], tuple[Tensor, ...]], inputs: Buffers
    ) -> tuple[Tensor, ...]:
        # what a program is recorded for: its function and the names and shapes of what it reads
        key = name, tuple(sorted((k, tuple(t.shape)) for k, t in inputs.items()))

        def make() -> Program:
            return Program(function, inputs, self._recorder, self._model.device)

        return self._programs.run(key, make, inputs)


def _for_loop(batch: Buffers, device: torch.device) -> dict[str, Tensor]:
    """The batch on a device, but for what a sampler checks before it begins."""
    checked = ("labels", "gammas")
    return {name: t if name in checked else t.to(device) for name, t in batch.items()}
