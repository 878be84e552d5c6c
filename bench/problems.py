"""Every registered operation shape as a problem of the GPU campaign: with a dtype and batch 64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from fastscore.measure.workloads import Op, suite

# what a time limit is to cut last comes first: a lone clip, throughput, and fp32 at the end
ORDER = tuple((dtype, batch) for dtype in (torch.bfloat16, torch.float32) for batch in (1, 64, 8))
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# small enough for Triton's interpreter, one of each kind
TINY = (
    *(Op(1, "eager", op, 8, 2, 2, 4) for op in ("norm_act", "norm_act_vjp", "tap_norm")),
    *(
        Op(1, "eager", op, 8, 2, 2, 4, fused=8, heads=2, spatial=spatial)
        for op in ("tap_fuse", "tap_path")
        for spatial in (False, True)
    ),
    *(
        Op(1, "eager", op, 1, 4, 4)
        for op in ("solver_step", "solver_step_without_noise", "normals", "edm_inputs")
    ),
    Op(1, "eager", "bias_add", 8, 2, 2),
    Op(1, "eager", "class_cotangents", 4, 1, 1),
)


@dataclass(frozen=True)
class Problem:
    """An operation at one shape on operands of one dtype."""

    op: Op
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Dtype, operation and shape."""
        return f"{NAMES[self.dtype]}/{self.op.problem}"


def problems(dry: bool) -> list[Problem]:
    """All of them, the most important first; in a dry run a tiny one of each operation."""
    if dry:
        return [Problem(op, torch.bfloat16) for op in TINY]
    # shapes do not depend on the batch
    shapes = [w for w in suite("ops") if isinstance(w, Op) and w.backend == "eager"]
    shapes = [w for w in shapes if w.batch == 1]
    return list(dict.fromkeys(_ordered(shapes)))


def _ordered(shapes: list[Op]) -> Iterator[Problem]:
    for dtype, batch in ORDER:
        for op in shapes:
            # noise is drawn from whole numbers, and logits are fp32: one problem for all dtypes
            kind = ORDER[0][0] if op.op in ("normals", "class_cotangents") else dtype
            yield Problem(replace(op, batch=batch), kind)
