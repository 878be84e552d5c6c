"""The public interface: from labels to waveforms, and from waveforms to labels."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from fastscore_kernels import resolve
from torch import Tensor

from fastscore.checkpoint import weights_hash
from fastscore.classifier import Classifier
from fastscore.config import MelSpace, SigmaRange, to_dict
from fastscore.denoiser import Denoiser, compose
from fastscore.devices import BATCH_SIZES, check_precision, fp32_products, usable_device
from fastscore.engine import BatchWatcher, Clips, Drawn, Engine, Model, Options, Task, joined
from fastscore.inpaint import Inpainting
from fastscore.noise import SEED_LIMIT
from fastscore.presets import Defaults, load_parts
from fastscore.request import Labels, Request, Strengths, Ticket, make_request, whole
from fastscore.results import Result, save_result
from fastscore.samplers import SamplingCancelledError
from fastscore.stats import Latencies, process_memory
from fastscore.stream import QUEUE_SIZE, Stream
from fastscore.subnet import ScoreSubnet
from fastscore.unet import UNet
from fastscore.vocoder import Generator
from fastscore.voice import Voice


@dataclass(frozen=True)
class Progress:
    """Where sampling stands after a solver step: ``done`` of ``total`` steps over all samples.

    ``mels`` [count, n_mels, frames] fp32 are the log-Mels of the present batch as denoised at noise
    level ``sigma``; the first of them is sample number ``first``.
    """

    done: int
    total: int
    first: int
    step: int
    sigma: float
    mels: Tensor


class Setup(TypedDict, total=False):
    """Keywords of every way to make a `Pipeline`; its docstring says what they mean."""

    device: str | torch.device
    batch_size: int | None
    backend: str | None
    precision: str
    engine: Options | None


class Pipeline(Voice):
    """A denoiser over a classifier's taps and a vocoder that together sample, classify and vocode.

    ``denoiser`` and ``vocoder`` are moved to ``device``, frozen and put in evaluation mode where
    they are modules. ``defaults`` says how ``sample`` behaves unless told otherwise. ``batch_size``
    None is 1 on a CPU and 16 on a GPU. ``backend`` names the implementation of the fused
    operations, one of `fastscore_kernels.BACKENDS`; None takes the device's best. ``precision`` is
    one of `PRECISIONS`; ``engine`` says how batches are run. May be used from several threads,
    which take turns. Raises ValueError for a device, backend or precision that is not there, or
    parts whose shapes differ.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        vocoder: Generator,
        *,
        defaults: Defaults | None = None,
        name: str = "custom",
        device: str | torch.device = "cpu",
        batch_size: int | None = None,
        backend: str | None = None,
        precision: str = "fp32",
        engine: Options | None = None,
    ) -> None:
        super().__init__(denoiser, vocoder, device, backend, precision)
        self.name = name
        self.defaults = defaults or Defaults()
        size = BATCH_SIZES[self.device.type] if batch_size is None else batch_size
        self.batch_size = whole("batch_size", size, 1)
        shape = (1, self.mel_config.n_mels, self.frames)
        model = Model(self.denoiser, self.finish, shape, self.device, self.backend)
        self.engine = Engine(model, engine or Options())
        self._latency = Latencies()

    @classmethod
    def from_parts(
        cls,
        classifier: Classifier,
        network: ScoreSubnet | UNet,
        vocoder: Generator,
        *,
        space: MelSpace,
        sigma: SigmaRange,
        defaults: Defaults | None = None,
        name: str = "custom",
        **setup: Unpack[Setup],
    ) -> Pipeline:
        """Pipeline of a classifier of your own, a score network trained on it and a vocoder."""
        denoiser = compose(classifier, network, space, sigma)
        return cls(denoiser, vocoder, defaults=defaults, name=name, **setup)

    @classmethod
    def from_pretrained(
        cls, preset: str | os.PathLike[str] = "digits", **setup: Unpack[Setup]
    ) -> Pipeline:
        """Pipeline from a preset in the package, by name, or from the folder of one, by path.

        Raises ValueError where a file is missing, damaged, of another kind, or does not belong to
        the others.
        """
        device = usable_device(setup.get("device", "cpu"))
        resolve(setup.get("backend"), device.type)
        check_precision(setup.get("precision", "fp32"), device)
        parts = load_parts(preset)
        return cls.from_parts(
            *(parts.classifier, parts.network, parts.vocoder),
            space=parts.space,
            sigma=parts.sigma,
            defaults=parts.defaults,
            name=parts.folder.name,
            **setup,
        )

    @property
    def guidance(self) -> float:
        """Default guidance strength gamma."""
        return self.defaults.guidance

    def sample(
        self,
        labels: Labels = None,
        *,
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
        known: Tensor | None = None,
        mask: Tensor | None = None,
        batch_size: int | None = None,
        callback: Callable[[Progress], Any] | None = None,
    ) -> Result:
        """Draw speech: one label for ``n`` samples, or a list with one entry a sample.

        A label of None, alone or in a list, draws without guidance. ``guidance`` is gamma, one
        number or one a sample. ``steps`` counts solver steps, ``nfe`` bounds denoiser evaluations:
        give one of them or neither. ``options`` are keywords of the sampler, such as s_noise, over
        the preset's. ``interval`` (low, high) guides at low < sigma <= high only.
        What is None is the preset's default.

        Sample i depends on ``seed`` and its number ``first`` + i: ``sample(label, seed=s,
        first=i)`` draws it again. To the bit so where samples are computed one by one, as they are
        with a ``batch_size`` of 1 and by a deterministic engine; in batches the last bits depend on
        the size of the batch and on what else is in it.

        ``known`` and ``mask`` keep a part of the Mels and draw the rest to it: natural-log Mels
        [n_mels, frames] or one for each sample, and bool of such a shape, True where they are kept
        (`fastscore.inpaint.prefix_mask`, `region_mask`).

        ``callback`` gets a ``Progress`` after every step; returning False cancels with
        SamplingCancelledError. Raises ValueError for arguments out of range and an unknown label.
        """
        asked = make_request(
            self.defaults,
            self.denoiser.sigma_range,
            self.labels,
            labels=labels,
            n=n,
            guidance=guidance,
            steps=steps,
            nfe=nfe,
            sampler=sampler,
            options=options,
            schedule=schedule,
            interval=interval,
            seed=seed,
            first=first,
            batch_size=self.batch_size if batch_size is None else batch_size,
        )
        watch = callback and self._reporter(asked, callback)
        clips = asked.clips(self._inpainting(known, mask, len(asked.ids)))
        drawn = self._draw(asked.task, clips, asked.batch_size, watch)
        return self._result(asked, drawn, slice(None))

    def stream(
        self,
        *,
        max_batch: int | None = None,
        max_wait: float = 0.0,
        queue_size: int = QUEUE_SIZE,
    ) -> Stream:
        """A `Stream` that draws one clip at a time for callers in any number of threads.

        Requests that differ in label, strength and seed only share batches of up to ``max_batch``
        (None: the pipeline's batch size); ``max_wait`` and ``queue_size`` as `Stream` takes them.
        Each clip is a `Result` of one sample. Without a seed every clip gets a fresh one.
        """
        size = whole("max_batch", self.batch_size if max_batch is None else max_batch, 1)

        def serve(tickets: Sequence[Ticket], abandoned: Callable[[], bool]) -> list[Any]:
            return self._serve(tickets, size, abandoned)

        return Stream(
            self._ticket,
            serve,
            max_batch=size,
            max_wait=max_wait,
            queue_size=queue_size,
            device=self.device,
        )

    def save(
        self, result: Result, folder: str | os.PathLike[str], plot: bool = False
    ) -> list[Path]:
        """Write a result's waves, and mels.png with ``plot``, as `save_result` does."""
        return save_result(result, folder, plot)

    def warmup(
        self,
        batch_sizes: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        guided: Sequence[bool] = (True, False),
    ) -> dict[str, float]:
        """Draw throw-away batches, so that nothing is compiled or captured later; what it took.

        ``batch_sizes`` None is the pipeline's own; ``steps`` None is one step, or the preset's
        where programs are compiled for guided and unguided steps or recorded for a number of them.
        Returns seconds in all, of compiling and
        of recording, programs recorded and bytes their graphs hold.
        """
        asked = make_request(
            self.defaults,
            self.denoiser.sigma_range,
            self.labels,
            labels=self.labels[0],
            steps=1 if steps is None and self.engine.options.mode == "eager" else steps,
            batch_size=self.batch_size,
        )
        with fp32_products(self.device, self.precision == "tf32"):
            return self.engine.warm_up(asked.task, batch_sizes or (self.batch_size,), guided)

    def stats(self) -> dict[str, Any]:
        """JSON-ready: counts of the engine, latency of ``sample`` in seconds, memory in bytes."""
        return {
            **dataclasses.asdict(self.engine.stats()),
            "latency": dataclasses.asdict(self._latency.summary()),
            "memory": dataclasses.asdict(process_memory(self.device)),
        }

    def close(self) -> None:
        """Let go of what the engine holds; sampling is over."""
        self.engine.close()

    def describe(self) -> dict[str, Any]:
        """JSON-ready provenance: preset, defaults, device, backend, sizes and hashes of weights."""
        parts = {**self.denoiser.networks, "vocoder": self.vocoder}
        return {
            "preset": self.name,
            "device": str(self.device),
            "backend": self.backend,
            "precision": self.precision,
            "packed": self.packed,
            "engine": to_dict(self.engine.options),
            "batch_size": self.batch_size,
            "labels": list(self.labels),
            "defaults": to_dict(self.defaults),
            "mel": to_dict(self.mel_config),
            "space": to_dict(self.denoiser.space),
            "sigma": to_dict(self.denoiser.sigma_range),
            "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()},
            "hashes": {k: weights_hash(m) for k, m in parts.items()},
        }

    @torch.no_grad()
    def _draw(self, task: Task, clips: Clips, batch_size: int, watch: BatchWatcher | None) -> Drawn:
        start = time.perf_counter()
        with fp32_products(self.device, self.precision == "tf32"):
            drawn = self.engine.draw(task, clips, max_batch=batch_size, watch=watch)
        self._latency.add(time.perf_counter() - start)
        return drawn

    def _inpainting(
        self, known: Tensor | None, mask: Tensor | None, count: int
    ) -> Inpainting | None:
        """What ``sample`` is told of the Mels, normalised; ValueError where it does not fit."""
        if known is None and mask is None:
            return None
        if known is None or mask is None:
            raise ValueError("known and mask belong together; give both or neither")
        shape = (self.mel_config.n_mels, self.frames)
        for name, value in (("known", known), ("mask", mask)):
            if tuple(value.shape[-2:]) != shape or value.numel() not in (
                math.prod(shape),
                count * math.prod(shape),
            ):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; {shape}, or one for each of the "
                    f"{count} samples, is needed"
                )
        space = self.denoiser.space
        normalised = (known.detach().cpu().float() - space.mean) / space.std
        return Inpainting(normalised.view(-1, 1, *shape), mask.cpu().view(-1, 1, *shape))

    def _result(self, asked: Request, drawn: Drawn, part: slice) -> Result:
        """Result of the ``part`` of what was drawn that ``asked`` asks for."""
        _, mels, waves, fine = (output[part] for output in drawn.outputs)
        if not fine.all():
            raise ValueError(_diverged(asked, int(fine.int().argmin())))
        share = len(fine) / len(drawn.outputs[0])
        return Result(
            waves=waves,
            sample_rate=self.sample_rate,
            mels=mels,
            mel=self.mel_config,
            labels=tuple(None if k < 0 else self.labels[k] for k in asked.ids),
            guidance=tuple(asked.gammas),
            nfe=drawn.nfe,
            sampler=asked.spec.name,
            seconds={stage: seconds * share for stage, seconds in drawn.seconds.items()},
            seed=asked.seed,
            first=asked.first,
        )

    def _ticket(self, label: str | None, *, seed: int | None = None, **options: Any) -> Ticket:
        """What a stream is asked for, checked; ValueError where ``sample`` would raise it."""
        return Ticket(
            make_request(
                self.defaults,
                self.denoiser.sigma_range,
                self.labels,
                labels=label,
                seed=secrets.randbelow(SEED_LIMIT) if seed is None else seed,
                batch_size=1,
                **options,
            )
        )

    def _serve(
        self, tickets: Sequence[Ticket], batch_size: int, abandoned: Callable[[], bool]
    ) -> list[Result | Exception]:
        """A result for each ticket of one group, or why there is none."""

        def watch(start: int, count: int, step: int, x: Tensor, x0: Tensor) -> None:
            if abandoned():
                raise SamplingCancelledError(step, step + 1)

        # whoever watches a trajectory that is one graph would have it taken to pieces
        watched = None if self.engine.options.recorded else watch
        clips = joined([ticket.request.clips() for ticket in tickets])
        drawn = self._draw(tickets[0].request.task, clips, batch_size, watched)
        results: list[Result | Exception] = []
        for i, ticket in enumerate(tickets):
            try:
                results.append(self._result(ticket.request, drawn, slice(i, i + 1)))
            except ValueError as error:
                results.append(error)
        return results

    def _reporter(self, asked: Request, callback: Callable[[Progress], Any]) -> BatchWatcher:
        steps, clips = len(asked.sigmas) - 1, len(asked.ids)
        done = 0

        def report(start: int, count: int, step: int, x: Tensor, x0: Tensor) -> None:
            nonlocal done
            done += count
            progress = Progress(
                done=done,
                total=steps * clips,
                first=asked.first + start,
                step=step,
                sigma=asked.sigmas[step],
                mels=self.mels(x0),
            )
            if callback(progress) is False:
                raise SamplingCancelledError(step, asked.spec.nfe(step + 1))

        return report


def _diverged(asked: Request, index: int) -> str:
    return (
        f"sample {asked.first + index} diverged at guidance {asked.gammas[index]:g} with "
        f"{asked.spec.name} and {len(asked.sigmas) - 1} steps; lower the guidance or take more "
        "steps"
    )
