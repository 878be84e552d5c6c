"""Settings that a preset is drawn with, one row each, and drawing with them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastscore.config import SigmaRange
from fastscore.noise import INITIAL_STEP, NoiseSource
from fastscore.pipeline import Pipeline
from fastscore.samplers import Guidance, SamplerSpec, initial_state, sampler_named
from fastscore.samplers import schedule_for as named_schedule
from fastscore.sde import karras_sigmas


@dataclass(frozen=True)
class Setting:
    """How a row is drawn; the defaults are those of the preset `digits` at 30 evaluations.

    ``temperature`` scales fresh noise, by the sampler's own s_noise where it has one; ``start``
    scales the initial noise. Guidance is ``gamma`` * sigma^``slope`` at low < sigma <= high.
    ``rho`` is for the karras schedule, ``leap`` for the one of that name; ``levels`` are noise
    levels in full, in place of any. ``precision`` is the pipeline's. ``options`` are further
    keywords of the sampler.
    """

    sampler: str = "dpmpp_2m_sde"
    nfe: int = 30
    gamma: float = 5.0
    slope: float = 0.0
    low: float = 0.2
    high: float = 20.0
    schedule: str | None = None
    rho: float = 7.0
    leap: float = 0.3
    sigma_min: float = 0.03
    sigma_max: float = 20.0
    temperature: float = 0.7
    start: float = 1.0
    levels: tuple[float, ...] = ()
    precision: str = "fp32"
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Setting:
        """From "key=value ..."; keys that are no field are options of the sampler.

        ValueError for a word without "=" and a value that is not of its field's type.
        """
        kinds = {field.name: field.default for field in fields(cls)}
        known: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for word in text.split():
            name, found, value = word.partition("=")
            if not found:
                raise ValueError(f"probe word {word!r} has no '='; write key=value")
            if name not in kinds or name == "options":
                options[name] = _number(value)
            elif name == "levels":
                known[name] = tuple(float(level) for level in value.split(","))
            else:
                default = kinds[name]
                known[name] = value if default is None else type(default)(value)
        return cls(**known, options=tuple(sorted(options.items())))

    @property
    def spec(self) -> SamplerSpec:
        """The sampler."""
        return sampler_named(self.sampler)

    def words(self) -> str:
        """What differs from the defaults, as ``parse`` reads it."""
        changed = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "options" and getattr(self, field.name) != field.default
        }
        changed = {"sampler": self.sampler, "nfe": self.nfe} | changed | dict(self.options)
        return " ".join(f"{k}={_text(v)}" for k, v in changed.items())

    def sigmas(self, trained: SigmaRange) -> tuple[float, ...]:
        """Levels, the closing 0 included."""
        if self.levels:
            return (*self.levels, 0.0)
        if (self.schedule or self.spec.schedule) == "karras":
            n = (self.nfe - 1) // self.spec.evaluations + 1
            return karras_sigmas(n, self.sigma_min, self.sigma_max, self.rho)
        return named_schedule(
            self.spec,
            self.nfe,
            trained,
            schedule=self.schedule,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            options={"leap": self.leap} if self.schedule == "leap" else None,
        )


def _number(value: str) -> Any:
    try:
        return float(value)
    except ValueError:
        return value


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_text(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


class Tempered:
    """Noise of a source, that of the start scaled by ``start`` and all fresh noise by ``fresh``."""

    def __init__(self, source: NoiseSource, start: float, fresh: float) -> None:
        self.source, self.start, self.fresh = source, start, fresh

    def __call__(self, step: int, shape: Sequence[int], draw: int = 0) -> Tensor:
        """Noise [B, ...] of ``shape``."""
        scale = self.start if step == INITIAL_STEP else self.fresh
        return self.source(step, shape, draw) * scale


class Sloped:
    """A denoiser whose guidance is gamma * sigma^slope."""

    def __init__(self, denoise: Any, slope: float) -> None:
        self.denoise, self.slope, self.sigma_range = denoise, slope, denoise.sigma_range

    def _strength(self, sigma: Tensor, gamma: Tensor | None) -> Tensor | None:
        return None if gamma is None else gamma * sigma**self.slope

    def __call__(
        self, x: Tensor, sigma: Tensor, label: Tensor | None, gamma: Tensor | None
    ) -> Tensor:
        """Denoised x0 [B, ...]."""
        return self.denoise(x, sigma, label, self._strength(sigma, gamma))


@torch.no_grad()
def draw(
    pipeline: Pipeline, setting: Setting, n: int, seed: int, start: int, batch: int
) -> tuple[Tensor, np.ndarray, int]:
    """Waves [n, samples], label indices [n] and evaluations a clip of samples start .. start + n.

    Sample i has label i mod K.
    """
    spec, space = setting.spec, pipeline.denoiser.space
    sigmas = setting.sigmas(pipeline.denoiser.sigma_range)
    denoise = Sloped(pipeline.denoiser, setting.slope) if setting.slope else pipeline.denoiser
    options = dict(setting.options)
    fresh = setting.temperature
    if "s_noise" in inspect.signature(spec.run).parameters:
        options["s_noise"], fresh = fresh, 1.0
    labels = np.arange(start, start + n) % len(pipeline.labels)
    waves, used = [], 0
    for first in range(start, start + n, batch):
        rows = range(first, min(first + batch, start + n))
        noise: Any = NoiseSource([seed] * len(rows), rows)
        if setting.start != 1 or fresh != 1:
            noise = Tempered(noise, setting.start, fresh)
        shape = (len(rows), 1, pipeline.mel_config.n_mels, pipeline.frames)
        drawn = spec.run(
            denoise,
            initial_state(noise, shape, sigmas[0]),
            sigmas,
            guidance=Guidance(
                torch.from_numpy(labels[rows.start - start : rows.stop - start]),
                setting.gamma,
                (setting.low, setting.high),
            ),
            noise=noise,
            **options,
        )
        used = drawn.nfe
        mels = drawn.x[:, 0] * space.std + space.mean
        waves.append(pipeline.vocode(mels.clamp_min(pipeline.mel_config.log_min)))
    return torch.cat(waves), labels, used
