"""What a workload times, built anew, and what its answer must be.

The expected answer comes from other code than what is timed, as far as there is any: guidance and
gradient taps from autograd, and everything else from the reference in another batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastscore.denoiser import Denoiser, TapDenoiser, scalings
from fastscore.devices import fp32_products
from fastscore.engine import Clips, CudaGraphs, Engine, GraphPool, Model, Options, Task
from fastscore.engine.compiled import CompiledDenoiser
from fastscore.engine.programs import Program
from fastscore.measure import operations
from fastscore.measure.models import prepared, prepared_vocoder, score_network
from fastscore.measure.workloads import (
    COMPILED,
    EAGER,
    RECORDED,
    Course,
    EndToEnd,
    Loop,
    Modelled,
    Op,
    Step,
    Vocoder,
    Workload,
)
from fastscore.pipeline import Pipeline
from fastscore.presets import Defaults, load_parts
from fastscore.samplers import sampler_named, schedule_for
from fastscore.vocoder import render

# of the largest value: fp32 sums are taken in another order through some thirty layers; a sampler
# feeds every difference back into its next step
STEP, LOOP, VOCODER = 1e-4, 1e-3, 1e-4
# what rounding to bf16 may change, as bench/NOTES.md has it for a step
STEP_BF16, LOOP_BF16 = 0.05, 0.1


class Built(NamedTuple):
    """``run`` is timed and its output's ``answer`` checked.

    ``wall``: it waits for the device by itself. ``flush``: caches are to be cold on a GPU.
    ``again`` False: building it compiles or records, which is done once. ``modules`` hold what it
    computes with.
    """

    run: Callable[[], Any]
    answer: Callable[[Any], Any] = lambda output: output
    wall: bool = False
    flush: bool = False
    again: bool = True
    modules: tuple[nn.Module, ...] = ()


class Expected(NamedTuple):
    """Where the answer of a problem comes from, and what it is."""

    against: str
    answer: Any


def build(workload: Workload, device: torch.device) -> Built:
    """What ``workload`` times, with operands and weights built anew.

    Products of fp32 numbers are exact to rounding, as a pipeline computes them unless told
    otherwise; PyTorch by itself lets convolutions on a GPU use TF32.
    """
    with fp32_products(device, tf32=False):
        built = _BUILDERS[type(workload)](workload, device)
    if device.type != "cuda":
        return built

    def run() -> Any:
        with fp32_products(device, tf32=False):
            return built.run()

    return built._replace(run=run)


@torch.no_grad()
def expected(workload: Workload, device: torch.device) -> Expected:
    """The answer of the workload's problem, whatever its backend, mode and precision."""
    with fp32_products(device, tf32=False):
        return _EXPECTED[type(workload)](workload, device)


def tolerance(workload: Workload, device: torch.device) -> float:
    """The largest error allowed, as a share of the largest value."""
    if isinstance(workload, Op):
        return operations.case(workload, device).tolerance
    assert isinstance(workload, Modelled)
    narrow = workload.precision == "bf16"
    if isinstance(workload, Step):
        return STEP_BF16 if narrow else STEP
    if isinstance(workload, Vocoder):
        return VOCODER
    return LOOP_BF16 if narrow else LOOP


def _op(op: Op, device: torch.device) -> Built:
    return Built(operations.case(op, device).run(op.backend), flush=True)


def _op_expected(op: Op, device: torch.device) -> Expected:
    return Expected("plain PyTorch", operations.case(op, device).run("eager")())


def step_arguments(batch: int, guided: bool, device: torch.device, shape=(80, 64)) -> tuple:
    """x, sigma and, where guided, label and gamma of a step; the same in every process."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, *shape, generator=rng).to(device)
    sigma = torch.logspace(-1, 1, batch) if batch > 1 else torch.ones(1)
    if not guided:
        return x, sigma.to(device)
    label = torch.arange(batch, device=device) % 10
    return x, sigma.to(device), label, torch.full((batch,), 3.0, device=device)


def _step(step: Step, device: torch.device) -> Built:
    net = prepared(step.model, device, step.backend, step.precision)
    args = step_arguments(step.batch, step.guided, device, net.shape)
    denoise = CompiledDenoiser(net, device) if step.mode in COMPILED else net
    if step.mode in RECORDED:
        names = ("x", "sigma", "label", "gamma")
        inputs = dict(zip(names, args, strict=False))
        return _recorded(
            lambda b: (denoise(*(b.get(name) for name in names)),), inputs, device, net
        )
    run = functools.partial(denoise, *args, *(None,) * (4 - len(args)))
    return Built(run, again=step.mode == EAGER, modules=(net,))


def _recorded(
    function: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    device: torch.device,
    net: nn.Module,
) -> Built:
    program = Program(function, inputs, CudaGraphs(device, GraphPool()), device)
    return Built(lambda: program(inputs), again=False, modules=(net,))


def _step_expected(step: Step, device: torch.device) -> Expected:
    net = prepared(step.model, device, "reference", "fp32", packed=False)
    args = step_arguments(step.batch, step.guided, device, net.shape)
    by = isinstance(net, TapDenoiser) or step.guided
    against = "autograd" if by else "the reference in another batch"
    return Expected(against, by_autograd(net, *args))


def by_autograd(
    net: Denoiser,
    x: Tensor,
    sigma: Tensor,
    label: Tensor | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    """A step as one writes it first, x0 [B, 1, H, W]: autograd differentiates the classifier.

    As guided-diffusion has it (Dhariwal and Nichol 2021): the classifier runs once for its taps,
    which are differentiated by logsumexp, and once more for the gradient of the label's
    log-probability at the input. The score network runs in batches other than x is.
    """
    c = scalings(sigma, net.space.sigma_data)
    c_skip, c_out, c_in = (v[:, None, None, None] for v in (c.c_skip, c.c_out, c.c_in))
    inputs: tuple[Any, ...] = (c_in * x, c.c_noise)
    if isinstance(net, TapDenoiser):
        with torch.enable_grad():
            emb = net.classifier.embed(c.c_noise)
            # the taps are the leaves: nothing below the shallowest is asked for
            h = net.classifier.lower(c_in * x, emb).detach().requires_grad_()
            logits, taps = net.classifier.upper(h, emb)
            gradients = torch.autograd.grad(logits.logsumexp(dim=1).sum(), taps)
        inputs += (tuple(t.detach() for t in taps), gradients)
    with torch.no_grad():
        denoised = c_skip * x + c_out * _in_other_batches(score_network(net), inputs)
    if label is None or gamma is None:
        return denoised
    assert net.classifier is not None
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        log_p = net.classifier(c_in * leaf, c.c_noise).log_softmax(dim=1)
        (slope,) = torch.autograd.grad(log_p.gather(1, label[:, None]).sum(), leaf)
    return denoised + (gamma * sigma.square())[:, None, None, None] * slope


def _in_other_batches(function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
    """``function`` of a batch of two where there is one, else of the first and of the others."""

    def part(values: Any, rows: list[int]) -> Any:
        if isinstance(values, tuple):
            return tuple(part(v, rows) for v in values)
        return values[rows]

    count = len(inputs[0])
    parts = [[0, 0]] if count == 1 else [[0], list(range(1, count))]
    return torch.cat([function(*part(inputs, rows)) for rows in parts])[:count]


def task(course: Course, nfe: int, trained: Any) -> Task:
    """How the engine draws along a frozen course."""
    spec = sampler_named(course.sampler)
    sigmas = schedule_for(
        spec,
        nfe,
        trained,
        schedule=course.schedule,
        sigma_min=course.sigma_min,
        sigma_max=course.sigma_max,
        options=dict(course.schedule_options),
    )
    return Task(spec, sigmas, dict(course.options), course.interval)


def _clips(loop: Loop, extra: int = 0) -> Clips:
    """A label a clip, in turn, and a number a clip; ``extra`` clips more than the batch."""
    count = loop.batch + extra
    labels = [i % 10 if loop.guided else -1 for i in range(count)]
    return Clips(labels, [loop.course.gamma] * count, [0] * count, list(range(count)))


def _engine(net: Denoiser, device: torch.device, backend: str, mode: str) -> Engine:
    model = Model(net, lambda x0: (), (1, *net.shape), device, backend)
    return Engine(model, Options(mode=mode))


def _loop(loop: Loop, device: torch.device) -> Built:
    net = prepared(loop.model, device, loop.backend, loop.precision)
    engine = _engine(net, device, loop.backend, loop.mode)
    how, clips = task(loop.course, loop.nfe, net.sigma_range), _clips(loop)
    return Built(
        lambda: engine.draw(how, clips, max_batch=loop.batch),
        lambda drawn: drawn.outputs[0],
        wall=True,
        again=loop.mode == EAGER,
        modules=(net,),
    )


def _loop_expected(loop: Loop, device: torch.device) -> Expected:
    net = prepared(loop.model, device, "reference", "fp32", packed=False)
    engine = _engine(net, device, "reference", EAGER)
    how = task(loop.course, loop.nfe, net.sigma_range)
    drawn = engine.draw(how, _clips(loop, extra=1), max_batch=loop.batch + 1)
    return Expected("the reference in another batch", drawn.outputs[0][: loop.batch])


def _mels(vocoder: Vocoder, count: int, bands: int, device: torch.device) -> Tensor:
    """Noise about as loud as speech, natural log."""
    rng = torch.Generator().manual_seed(0)
    shape = (count, bands, vocoder.frames)
    return (-5 + 2 * torch.randn(shape, generator=rng)).clamp_min(-11.5).to(device)


def _vocoder(vocoder: Vocoder, device: torch.device) -> Built:
    net = prepared_vocoder(vocoder.model, device)
    mels = _mels(vocoder, vocoder.batch, net.mel_config.n_mels, device)
    if vocoder.mode in RECORDED:
        return _recorded(lambda b: (render(net, b["mels"]),), {"mels": mels}, device, net)
    return Built(lambda: render(net, mels), modules=(net,))


def _vocoder_expected(vocoder: Vocoder, device: torch.device) -> Expected:
    net = prepared_vocoder(vocoder.model, device)
    mels = _mels(vocoder, vocoder.batch, net.mel_config.n_mels, device)
    waves = _in_other_batches(lambda m: render(net, m), (mels,))
    return Expected("the same in another batch", waves)


def _pipeline(
    how: EndToEnd, device: torch.device, backend: str, mode: str, precision: str
) -> Pipeline:
    parts, course = load_parts(how.model), how.course
    defaults = Defaults(
        sampler=course.sampler,
        nfe=how.nfe,
        guidance=course.gamma,
        guidance_interval=course.interval,
        schedule=course.schedule,
        sigma_min=course.sigma_min,
        sigma_max=course.sigma_max,
        sampler_options=dict(course.options),
        schedule_options=dict(course.schedule_options),
    )
    return Pipeline(
        parts.denoiser(),
        parts.vocoder,
        defaults=defaults,
        device=device,
        backend=backend,
        precision=precision,
        engine=Options(mode=mode),
    )


def _labels(pipeline: Pipeline, count: int) -> list[str]:
    return [pipeline.labels[i % len(pipeline.labels)] for i in range(count)]


def _end_to_end(how: EndToEnd, device: torch.device) -> Built:
    pipeline = _pipeline(how, device, how.backend, how.mode, how.precision)
    labels = _labels(pipeline, how.batch)
    return Built(
        lambda: pipeline.sample(labels, batch_size=how.batch),
        lambda result: result.mels,
        wall=True,
        again=how.mode == EAGER,
        modules=(pipeline.denoiser, pipeline.vocoder),
    )


def _end_to_end_expected(how: EndToEnd, device: torch.device) -> Expected:
    pipeline = _pipeline(how, device, "reference", EAGER, "fp32")
    labels = _labels(pipeline, how.batch + 1)
    mels = pipeline.sample(labels, batch_size=how.batch + 1).mels
    return Expected("the reference in another batch", mels[: how.batch])


_BUILDERS: dict[type, Callable[[Any, torch.device], Built]] = {
    Op: _op,
    Step: _step,
    Loop: _loop,
    Vocoder: _vocoder,
    EndToEnd: _end_to_end,
}
_EXPECTED: dict[type, Callable[[Any, torch.device], Expected]] = {
    Op: _op_expected,
    Step: _step_expected,
    Loop: _loop_expected,
    Vocoder: _vocoder_expected,
    EndToEnd: _end_to_end_expected,
}
