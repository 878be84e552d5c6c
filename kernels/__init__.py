"""Operations between the convolutions: normalisation, tap normalisation and attention fusion.

The public entry points; ``reference`` holds their semantics in plain PyTorch.
"""

from fastscore_kernels.reference import norm_act, sample_rms, tap_fuse, tap_norm

__all__ = ["norm_act", "sample_rms", "tap_fuse", "tap_norm"]
