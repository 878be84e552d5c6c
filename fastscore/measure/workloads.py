"""Named workloads that never change once named: what is slower tomorrow is not another question.

A name says all that a workload is: ``step/digits/b8/guided/native/bf16`` is one guided evaluation
of eight samples by the model digits, on native kernels, in bf16. To measure something else, add a
name; to stop measuring something, remove one.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SUITES = ("ops", "step", "loop", "vocoder", "end-to-end")
EAGER, COMPILE, GRAPHS, COMPILED_GRAPHS = "eager", "compile", "graphs", "compiled-graphs"
COMPILED, RECORDED = (COMPILE, COMPILED_GRAPHS), (GRAPHS, COMPILED_GRAPHS)
# batches that a CPU would take minutes for
_ON_GPU = (64, 256)

# a model of fastscore and the usual pair at equal trainable and at equal total parameters
TINY = ("digits", "unet-tiny-equal-trainable", "unet-tiny-equal-total")
PAPER = ("paper", "unet-paper-equal-trainable", "unet-paper-equal-total")


@dataclass(frozen=True)
class Workload:
    """What all workloads have; ``backend`` is that of `fastscore_kernels`, or "eager" for an op."""

    batch: int
    backend: str

    suite = ""

    @property
    def name(self) -> str:
        """Suite, subject, sizes, backend, and mode and precision where they are not the usual."""
        return f"{self.suite}/{self.problem}/{self.backend}"

    @property
    def problem(self) -> str:
        """What is computed, however: workloads of one problem must agree, and are timed in turn."""
        raise NotImplementedError

    @property
    def group(self) -> str:
        """Workloads of one group are timed in turn."""
        return self.problem

    def describe(self) -> dict[str, Any]:
        """The workload in plain values, as they come back from a file."""
        return json.loads(json.dumps({"suite": self.suite, **asdict(self)}))

    def only_on_gpu(self) -> str:
        """Why a CPU is not asked for this; "" where it is."""
        if self.batch in _ON_GPU:
            return f"batch {self.batch} is for a GPU"
        if self.backend == "triton":
            return "the triton backend runs on a GPU"
        return ""


@dataclass(frozen=True)
class Op(Workload):
    """An operation of `fastscore_kernels` on channels-last activations [batch, channels, h, w].

    ``fused``, ``heads`` and ``spatial`` are of a fusion of taps: its channels and how it attends.
    """

    op: str
    channels: int
    height: int
    width: int
    groups: int = 8
    fused: int = 0
    heads: int = 0
    spatial: bool = False

    suite = "ops"

    @property
    def problem(self) -> str:
        """Operation and shape."""
        shape = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        kind = ("-spatial" if self.spatial else "-own") if self.fused else ""
        return f"{self.op}/{shape}" + (f"-{self.fused}{kind}" if self.fused else "")

    @property
    def positions(self) -> int:
        """Height times width."""
        return self.height * self.width


@dataclass(frozen=True)
class Modelled(Workload):
    """A workload of one of `fastscore.measure.models.MODELS`."""

    model: str
    mode: str = EAGER
    precision: str = "fp32"

    @property
    def name(self) -> str:
        """Mode and precision are named where they are not the usual."""
        rest = [self.backend] if self.backend else []
        rest += [self.mode] if self.mode != EAGER else []
        rest += [self.precision] if self.precision != "fp32" else []
        return "/".join((self.suite, self.problem, *rest))

    @property
    def group(self) -> str:
        """A model of fastscore and its baselines at the same sizes."""
        family = TINY[0] if self.model in TINY else PAPER[0] if self.model in PAPER else self.model
        return self.problem.replace(self.model, family, 1)

    def only_on_gpu(self) -> str:
        """Graphs are CUDA's."""
        if self.mode in RECORDED:
            return "CUDA graphs need a GPU"
        return super().only_on_gpu()


@dataclass(frozen=True)
class Step(Modelled):
    """One denoiser evaluation, the unit that every sampler repeats; ``guided`` with gamma 3."""

    guided: bool = True

    suite = "step"

    @property
    def problem(self) -> str:
        """Model, batch, and whether guided."""
        return f"{self.model}/b{self.batch}/{_guided(self.guided)}"


@dataclass(frozen=True)
class Course:
    """How a trajectory runs, as the digits preset drew when this was named."""

    sampler: str = "dpmpp_2m_sde"
    options: tuple[tuple[str, float], ...] = (("s_noise", 0.7), ("s_noise_below", 2.0))
    schedule: str = "leap"
    schedule_options: tuple[tuple[str, float], ...] = (("leap", 0.15),)
    sigma_min: float = 0.08
    sigma_max: float = 40.0
    gamma: float = 4.0
    interval: tuple[float, float] = (0.2, 20.0)


@dataclass(frozen=True)
class Loop(Modelled):
    """A whole trajectory of ``nfe`` evaluations by the engine, without vocoder."""

    guided: bool = True
    nfe: int = 12
    course: Course = field(default_factory=Course)

    suite = "loop"

    @property
    def problem(self) -> str:
        """Model, batch, evaluations, and whether guided."""
        return f"{self.model}/b{self.batch}/n{self.nfe}/{_guided(self.guided)}"


@dataclass(frozen=True)
class Vocoder(Modelled):
    """Waves of log-Mels of 64 frames."""

    frames: int = 64

    suite = "vocoder"

    @property
    def problem(self) -> str:
        """Model and batch."""
        return f"{self.model}/b{self.batch}"

    def only_on_gpu(self) -> str:
        """HiFi-GAN's largest generator takes a CPU seconds a clip."""
        if self.model.startswith("hifigan") and self.batch > 1:
            return f"{self.model} in batch {self.batch} is for a GPU"
        return super().only_on_gpu()


@dataclass(frozen=True)
class EndToEnd(Modelled):
    """Label to waveform: ``Pipeline.sample`` in ``nfe`` evaluations, guided, vocoder included."""

    nfe: int = 12
    course: Course = field(default_factory=Course)

    suite = "end-to-end"

    @property
    def problem(self) -> str:
        """Preset, batch and evaluations."""
        return f"{self.model}/b{self.batch}/n{self.nfe}"


def _guided(guided: bool) -> str:
    return "guided" if guided else "unguided"


# backend, mode and precision: as written first, with compiled kernels, rounded, and by the engine
VARIANTS = (
    ("reference", EAGER, "fp32"),
    ("reference", COMPILE, "fp32"),
    ("reference", GRAPHS, "fp32"),
    ("reference", COMPILED_GRAPHS, "fp32"),
    ("native", EAGER, "fp32"),
    ("native", EAGER, "bf16"),
    ("native", COMPILE, "fp32"),
    ("triton", EAGER, "fp32"),
    ("triton", EAGER, "bf16"),
    ("triton", COMPILE, "fp32"),
    ("triton", GRAPHS, "fp32"),
    ("triton", GRAPHS, "bf16"),
    ("triton", COMPILED_GRAPHS, "fp32"),
    ("triton", COMPILED_GRAPHS, "bf16"),
)
# a vocoder has no operation of fastscore_kernels
VOCODER_VARIANTS = (("", EAGER, "fp32"), ("", GRAPHS, "fp32"))

# channels, height, width of the activations of the presets tiny and paper at 80 x 64
_NORMS = (
    *((32, 40, 32), (64, 20, 16), (80, 20, 16), (128, 10, 8)),
    *((112, 10, 8), (112, 20, 16), (144, 40, 32), (192, 40, 32), (208, 20, 16), (256, 10, 8)),
)
# and of taps, with the width of ScoreSubnet there and how it attends
_TAPS = (
    ((32, 40, 32), 32, False),
    ((64, 20, 16), 80, False),
    ((128, 10, 8), 128, True),
    ((192, 40, 32), 144, False),
    ((208, 20, 16), 112, True),
    ((256, 10, 8), 112, True),
)
# a normalised log-Mel, and logits of ten digits
_SAMPLE = (1, 80, 64)
_LOGITS = (10, 1, 1)
OP_BACKENDS = ("eager", "native", "triton")
# what exists for a GPU's sake
GPU_BACKENDS = ("eager", "triton")


def _ops() -> Iterator[Op]:
    for batch in (1, 8):
        for op, shape in itertools.product(("norm_act", "norm_act_vjp"), _NORMS):
            yield from (Op(batch, b, op, *shape) for b in OP_BACKENDS)
        for shape, _, _ in _TAPS:
            yield from (Op(batch, b, "tap_norm", *shape) for b in OP_BACKENDS)
        for op, (shape, width, spatial) in itertools.product(("tap_fuse", "tap_path"), _TAPS):
            more = {"fused": width, "heads": 4, "spatial": spatial}
            yield from (Op(batch, b, op, *shape, **more) for b in OP_BACKENDS)
        for op in ("solver_step", "solver_step_without_noise", "normals"):
            yield from (Op(batch, b, op, *_SAMPLE) for b in OP_BACKENDS)
        for shape in _NORMS:
            yield from (Op(batch, b, "bias_add", *shape) for b in GPU_BACKENDS)
        for op, shape in (("edm_inputs", _SAMPLE), ("class_cotangents", _LOGITS)):
            yield from (Op(batch, b, op, *shape) for b in GPU_BACKENDS)


def _steps() -> Iterator[Step]:
    for batch, models, guided in itertools.product((1, 8, 64, 256), (TINY, PAPER), (False, True)):
        for model, (backend, *rest) in itertools.product(models, VARIANTS):
            yield Step(batch, backend, model, *rest, guided=guided)


def _loops() -> Iterator[Loop]:
    for batch, models, nfe in itertools.product((1, 8, 64), (TINY, PAPER), (8, 12)):
        for guided, model in itertools.product((False, True), models):
            for backend, *rest in VARIANTS:
                yield Loop(batch, backend, model, *rest, guided=guided, nfe=nfe)


def _vocoders() -> Iterator[Vocoder]:
    for model, batch in itertools.product(("digits", "hifigan-v1"), (1, 8, 64)):
        for backend, *rest in VOCODER_VARIANTS:
            yield Vocoder(batch, backend, model, *rest)


def _end_to_end() -> Iterator[EndToEnd]:
    for batch, nfe in itertools.product((1, 8, 64), (8, 12)):
        for backend, *rest in VARIANTS:
            yield EndToEnd(batch, backend, "digits", *rest, nfe=nfe)


_TABLES = dict(zip(SUITES, (_ops, _steps, _loops, _vocoders, _end_to_end), strict=True))


def grouped(name: str) -> dict[str, list[Workload]]:
    """Workloads of a suite by group; ValueError for an unknown one."""
    if name not in _TABLES:
        raise ValueError(f"suite {name!r} is unknown; choose one of {', '.join(SUITES)}")
    found: dict[str, list[Workload]] = {}
    for workload in _TABLES[name]():
        found.setdefault(workload.group, []).append(workload)
    return found


def suite(name: str) -> tuple[Workload, ...]:
    """Workloads of a suite, those of a group beside each other; ValueError for an unknown one."""
    return tuple(itertools.chain.from_iterable(grouped(name).values()))


def chosen(name: str, only: Sequence[str] = ()) -> tuple[Workload, ...]:
    """Workloads of a suite that one of ``only`` names: in full, as a pattern with * or by a part.

    ValueError where one of them names none.
    """
    everything = suite(name)
    if not only:
        return everything
    found = []
    for pattern in only:
        fitting = list(_fitting(everything, pattern))
        if not fitting:
            raise ValueError(
                f"no row of suite {name} is named {pattern!r}; fastscore bench {name} --list "
                "shows their names"
            )
        found += fitting
    names = {w.name for w in found}
    return tuple(w for w in everything if w.name in names)


def _fitting(workloads: Iterable[Workload], pattern: str) -> Iterable[Workload]:
    exact = [w for w in workloads if w.name == pattern]
    if exact:
        return exact
    if any(sign in pattern for sign in "*?["):
        return [w for w in workloads if fnmatch.fnmatchcase(w.name, pattern)]
    return [w for w in workloads if pattern in w.name]
