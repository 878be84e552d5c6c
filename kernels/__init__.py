"""Operations between the convolutions: normalisation, tap normalisation, attention fusion, solver.

Each has a plain PyTorch definition in ``reference``, compiled CPU kernels (``native``) and Triton
kernels (``triton``); ``backend=`` chooses, `available` tells what is there.
"""

from fastscore_kernels.backends import BACKENDS, available, resolve
from fastscore_kernels.bias_add import bias_add
from fastscore_kernels.class_cotangents import class_cotangents
from fastscore_kernels.edm_inputs import edm_inputs
from fastscore_kernels.norm_act import (
    norm_act,
    norm_act_backward,
    norm_act_forward,
    norm_act_linearize,
)
from fastscore_kernels.registration import dense
from fastscore_kernels.solver_step import normals, solver_step
from fastscore_kernels.tap_fuse import tap_fuse
from fastscore_kernels.tap_norm import tap_norm
from fastscore_kernels.tap_path import Norms, Projections, tap_path

__all__ = [
    "BACKENDS",
    "Norms",
    "Projections",
    "available",
    "bias_add",
    "class_cotangents",
    "dense",
    "edm_inputs",
    "norm_act",
    "norm_act_backward",
    "norm_act_forward",
    "norm_act_linearize",
    "normals",
    "resolve",
    "solver_step",
    "tap_fuse",
    "tap_norm",
    "tap_path",
]
