"""Every launch that the models' presets make: the launchers called on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from fastscore_kernels.gpu import shapes
from fastscore_kernels.gpu.bias_add import bias_add
from fastscore_kernels.gpu.class_cotangents import class_cotangents
from fastscore_kernels.gpu.edm_inputs import edm_inputs
from fastscore_kernels.gpu.norm_act import norm_act, norm_act_backward
from fastscore_kernels.gpu.solver_step import normals, solver_step
from fastscore_kernels.gpu.tap_fuse import tap_fuse, tap_fuse_backward
from fastscore_kernels.gpu.tap_norm import tap_norm
from fastscore_kernels.gpu.tap_path import tap_path
from torch import Tensor

OPS = (
    "norm_act",
    "bias_add",
    "tap_norm",
    "tap_fuse",
    "tap_path",
    "edm_inputs",
    "class_cotangents",
    "solver_step",
)


@dataclass(frozen=True)
class Case:
    """One problem: its operation, a name for people, and the call."""

    op: str
    label: str
    call: Callable[[], object]


def cases(
    ops: tuple[str, ...] = OPS,
    presets: tuple[str, ...] = tuple(shapes.CLASSIFIERS),
    dtypes: tuple[str, ...] = shapes.DTYPES,
    batches: tuple[int, ...] = shapes.BATCHES,
) -> Iterator[Case]:
    """All problems of the chosen operations, presets, dtypes and batch sizes."""
    for dtype in dtypes:
        kind = getattr(torch, dtype)
        for batch in batches:
            for preset in presets:
                for op in ops:
                    if op in _OF_OP:
                        label = f"{preset} {dtype} b{batch}"
                        yield from _OF_OP[op](preset, kind, batch, label)
            if "edm_inputs" in ops:
                yield from _edm_inputs(kind, batch, f"{dtype} b{batch}")
            if "class_cotangents" in ops:
                logits = _vector(batch, 10, dtype=kind)
                label = torch.empty(batch, dtype=torch.int64, device="meta")
                yield Case(
                    "class_cotangents",
                    f"{dtype} b{batch}",
                    lambda logits=logits, label=label: class_cotangents(logits, label),
                )
            if "solver_step" in ops:
                yield from _solver_steps(kind, batch, f"{dtype} b{batch}")


def _plane(batch: int, channels: int, plane: tuple[int, int], dtype: torch.dtype) -> Tensor:
    shape = (batch, channels, *plane)
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last)


def _vector(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm_acts(preset: str, dtype: torch.dtype, batch: int, label: str) -> Iterator[Case]:
    classifier, subnet = shapes.CLASSIFIERS[preset], shapes.SUBNETS[preset]
    for model in (classifier, subnet):
        for channels, plane in zip(model.channels, shapes.PLANES, strict=True):
            for film in (True, False):
                name = f"{label} c{channels} {plane[0]}x{plane[1]} {'film' if film else 'plain'}"
                yield Case("norm_act", name, _norm_act(batch, channels, plane, dtype, film, model))


def _norm_act(
    batch: int,
    channels: int,
    plane: tuple[int, int],
    dtype: torch.dtype,
    film: bool,
    model: shapes.Classifier | shapes.Subnet,
) -> Callable[[], object]:
    def call() -> None:
        x = _plane(batch, channels, plane, dtype)
        weight, bias = _vector(channels, dtype=dtype), _vector(channels, dtype=dtype)
        rows = _vector(batch, 2 * channels, dtype=dtype) if film else None
        # what norms with FiLM normalise lacks a bias; what flows past those without is added
        pre = weight if film else None
        _, stats = norm_act(x, weight, bias, rows, model.groups, True, shapes.EPS, pre)
        for addend in (None,) if film else (None, x):
            norm_act_backward(x, x, stats, weight, bias, rows, model.groups, True, addend, pre)

    return call


def _bias_adds(preset: str, dtype: torch.dtype, batch: int, label: str) -> Iterator[Case]:
    for model in (shapes.CLASSIFIERS[preset], shapes.SUBNETS[preset]):
        for channels, plane in zip(model.channels, shapes.PLANES, strict=True):
            for banded in (False, True):

                def call(
                    c: int = channels, plane: tuple[int, int] = plane, banded: bool = banded
                ) -> None:
                    x = _plane(batch, c, plane, dtype)
                    # the classifier's stem has a band and no residual, blocks have no band
                    band = _plane(1, c, (plane[0], 1), torch.float32) if banded else None
                    for residual in (x, None) if banded else (x,):
                        bias_add(x, _vector(c, dtype=dtype), band, residual)

                name = f"{label} c{channels} {plane[0]}x{plane[1]} {'band' if banded else 'block'}"
                yield Case("bias_add", name, call)


def _tap_norms(preset: str, dtype: torch.dtype, batch: int, label: str) -> Iterator[Case]:
    model = shapes.CLASSIFIERS[preset]
    for channels, plane in zip(model.channels, shapes.PLANES, strict=True):

        def call(channels: int = channels, plane: tuple[int, int] = plane) -> None:
            tap = _plane(batch, channels, plane, dtype)
            affine = [_vector(channels, dtype=dtype)] * 4
            tap_norm(tap, tap, model.groups, *affine, shapes.EPS)

        yield Case("tap_norm", f"{label} c{channels} {plane[0]}x{plane[1]}", call)


def _tap_fuses(preset: str, dtype: torch.dtype, batch: int, label: str) -> Iterator[Case]:
    model = shapes.SUBNETS[preset]
    for channels, plane, spatial in zip(
        model.channels, shapes.PLANES, model.attention, strict=True
    ):

        def call(
            channels: int = channels, plane: tuple[int, int] = plane, spatial: bool = spatial
        ) -> None:
            q = _plane(batch, channels, plane, dtype)
            tap = _plane(batch, 2 * channels, plane, dtype)
            tap_fuse(q, tap, tap, model.heads, spatial)
            tap_fuse_backward(q, q, tap, tap, model.heads, spatial)

        kind = "all" if spatial else "own"
        yield Case("tap_fuse", f"{label} c{channels} {plane[0]}x{plane[1]} {kind}", call)


def _tap_paths(preset: str, dtype: torch.dtype, batch: int, label: str) -> Iterator[Case]:
    classifier, subnet = shapes.CLASSIFIERS[preset], shapes.SUBNETS[preset]
    for c, width, plane, spatial in zip(
        classifier.channels, subnet.channels, shapes.PLANES, subnet.attention, strict=True
    ):

        def call(
            c: int = c, w: int = width, plane: tuple[int, int] = plane, spatial: bool = spatial
        ) -> None:
            tap = _plane(batch, c, plane, dtype)
            sizes = ((w, c), (w,), (2 * w, c), (2 * w,), (2 * w, c), (2 * w,))
            sizes = (*sizes, (w, 2 * c), (w,), (w, w), (w,))
            norms = [_vector(c, dtype=dtype)] * 4
            weights = [_vector(*s, dtype=dtype) for s in sizes]
            groups, heads = classifier.groups, subnet.heads
            tap_path(tap, tap, *norms, *weights, groups, heads, spatial, shapes.EPS)

        kind = "all" if spatial else "own"
        yield Case("tap_path", f"{label} c{c} w{width} {plane[0]}x{plane[1]} {kind}", call)


def _edm_inputs(dtype: torch.dtype, batch: int, label: str) -> Iterator[Case]:
    x, sigma, freqs = _vector(batch, 1, *shapes.SAMPLE), _vector(batch), _vector(16)
    for gamma in (None, sigma):

        def call(gamma: Tensor | None = gamma) -> None:
            edm_inputs(x, sigma, gamma, freqs, 0.5, 2, dtype)

        yield Case("edm_inputs", f"{label} {'unguided' if gamma is None else 'guided'}", call)


def _solver_steps(dtype: torch.dtype, batch: int, label: str) -> Iterator[Case]:
    x = _vector(batch, 1, *shapes.SAMPLE)
    raw = _vector(batch, 1, *shapes.SAMPLE, dtype=dtype)
    coefficients = _vector(batch, 7)
    counters = torch.empty(batch, 3, dtype=torch.int64, device="meta")
    for guidance in (None, raw):
        for old in (None, x):
            for words in (None, counters):
                parts = [label, "raw", *["guided"] * (guidance is not None)]
                parts += ["old"] * (old is not None) + ["noise"] * (words is not None)

                def call(
                    guidance: Tensor | None = guidance,
                    old: Tensor | None = old,
                    words: Tensor | None = words,
                ) -> None:
                    solver_step(x, raw, guidance, None, old, coefficients, words, 0)

                yield Case("solver_step", " ".join(parts), call)
    for old in (None, x):
        for words in (None, counters):

            def rest(old: Tensor | None = old, words: Tensor | None = words) -> None:
                solver_step(x, None, None, x, old, coefficients, words, 0)

            parts = [label, "denoised", *["old"] * (old is not None)]
            yield Case("solver_step", " ".join(parts + ["noise"] * (words is not None)), rest)
    seeds = torch.empty(batch, dtype=torch.int64, device="meta")
    size = shapes.SAMPLE[0] * shapes.SAMPLE[1]
    yield Case("solver_step", f"{label} normals", lambda: normals(seeds, seeds, seeds, size, 0))


_OF_OP = {
    "norm_act": _norm_acts,
    "bias_add": _bias_adds,
    "tap_norm": _tap_norms,
    "tap_fuse": _tap_fuses,
    "tap_path": _tap_paths,
}
