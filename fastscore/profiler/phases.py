"""Names of marks and phases, as they stand in a trace."""

from __future__ import annotations

PHASE, LAYER, NATIVE, EVALUATION = "phase: ", "layer: ", "native: ", "evaluation "
RUN = "phase: request and result"
# how wide a batch of cotangents is tells whose they are
FORWARD, JEM, CLASS, BOTH = "classifier forward", "JEM VJP", "class VJP", "both VJPs"
TAPS, SUBNET, UNET, VOCODER = "taps", "subnet", "U-Net", "vocoder"
SOLVER, PRECONDITIONING, WHOLE = "solver", "preconditioning", "denoiser, one program"
UNDIVIDED = "classifier, not divided"
GRAPH = "CUDA graph"
