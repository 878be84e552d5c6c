"""What a program without Python needs to draw from an exported model, as lines of text.

One fact a line, its name first; numbers as hexadecimal floats, which every C library reads back to
the bit. The plans are those that `fastscore.plans` computes in float64, so nothing is computed
twice: read `kernels/native/draw` for the reader.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastscore.config import MelConfig, MelSpace, SigmaRange
from fastscore.presets import Defaults
from fastscore.request import make_request

FORMAT = "fastscore-draw 1"
# evaluations for which plans are offered besides the preset's own
_OFFERED = (4, 8, 12, 16, 30, 60)


def draw_text(
    labels: tuple[str, ...],
    mel: MelConfig,
    space: MelSpace,
    sigma: SigmaRange,
    defaults: Defaults,
    device: str,
    torch: str,
    processor: tuple[str, ...],
) -> str:
    """The lines; without plans where the preset's sampler follows none.

    The graphs are compiled for ``device``, release ``torch`` of PyTorch and instruction sets
    ``processor``.
    """
    lines = [
        FORMAT,
        f"device {device}",
        f"torch {torch}",
        f"processor {' '.join(processor)}",
        f"sample_rate {mel.sample_rate}",
        f"bands {mel.n_mels}",
        f"frames {space.frames}",
        f"mean {space.mean.hex()}",
        f"std {space.std.hex()}",
        f"log_min {mel.log_min.hex()}",
        f"guidance {float(defaults.guidance).hex()}",
        f"evaluations {defaults.nfe}",
        *(f"label {label}" for label in labels),
    ]
    for evaluations in sorted({defaults.nfe, *_OFFERED}):
        lines += _plan(labels, sigma, defaults, evaluations)
    return "\n".join([*lines, "end", ""])


def _plan(
    labels: tuple[str, ...], sigma: SigmaRange, defaults: Defaults, evaluations: int
) -> Iterator[str]:
    """A plan line, then one a step: guided or not, sigma and the weights of its update."""
    asked = make_request(defaults, sigma, labels, labels=labels[0], nfe=evaluations, batch_size=1)
    course = asked.task.course(guided=True)
    if course is None:
        return
    yield f"plan {evaluations} {asked.spec.name}"
    for kind, row in zip(course.kinds, course.rows, strict=True):
        yield f"step {int(kind.guided)} {' '.join(float(value).hex() for value in row)}"
