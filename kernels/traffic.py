"""What each operation must move and launch: bytes and kernels, op by op in PyTorch and fused here.

A pass is one reading or one writing of an activation. ``must``: inputs read once, outputs written
once. ``eager``: the passes of the PyTorch operations that `reference` and users write. ``fused``:
those of the native kernels, which read an input of statistics twice when it does not stay in cache.
Per-channel parameters are left out: they are some kilobytes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes that must move, that eager PyTorch moves and that one fused kernel moves; launches."""

    must: int
    eager: int
    fused: int
    launches_eager: int
    launches_fused: int = 1

    def describe(self) -> dict[str, float]:
        """JSON-ready: megabytes and launches."""
        return {
            "MB_must": self.must / 1e6,
            "MB_eager": self.eager / 1e6,
            "MB_fused": self.fused / 1e6,
            "launches_eager": self.launches_eager,
            "launches_fused": self.launches_fused,
        }


def norm_act(
    batch: int, channels: int, positions: int, itemsize: int, film: bool = True
) -> Traffic:
    """GroupNorm (two readings, one writing), FiLM (scale, then shift), SiLU; forward."""
    tensor = batch * channels * positions * itemsize
    # 1 + scale is a launch of its own
    passes, launches = (3 + 4 + 2, 5) if film else (3 + 2, 2)
    return Traffic(2 * tensor, passes * tensor, 3 * tensor, launches)


def norm_act_backward(
    batch: int, channels: int, positions: int, itemsize: int, film: bool = True
) -> Traffic:
    """SiLU's VJP (two readings, one writing), FiLM's product, GroupNorm's VJP (four, one)."""
    tensor = batch * channels * positions * itemsize
    passes, launches = (3 + 2 + 5, 3) if film else (3 + 5, 2)
    # fused: cotangent and input for the sums, both again for the image
    return Traffic(3 * tensor, passes * tensor, 5 * tensor, launches)


def tap_norm(batch: int, channels: int, positions: int, itemsize: int) -> Traffic:
    """RMS of the gradient, division by it, two norms, two affine maps, one concatenation."""
    tensor = batch * channels * positions * itemsize
    # a copy, |g|, its maximum, g / peak, its square, their mean
    rms = 2 + 2 + 1 + 2 + 2 + 1
    passes = rms + 2 + 2 * 3 + 4 * 2 + 4
    return Traffic(4 * tensor, passes * tensor, 6 * tensor, 20)


def tap_fuse(
    batch: int, channels: int, positions: int, itemsize: int, taps: int = 2, spatial: bool = False
) -> Traffic:
    """Tokens stacked and, over all positions, laid out for SDPA; products, softmax, sums."""
    tensor = batch * channels * positions * itemsize
    must = (2 + 2 * taps) * tensor
    stack = 4 * taps
    if spatial:
        # keys and values rearranged, then attention
        return Traffic(must, (stack + 4 * taps + 2 * taps + 2) * tensor, must, 4)
    # products of all taps (two readings, one writing), their sums; weighted values likewise
    return Traffic(must, (stack + 2 * (3 * taps + taps)) * tensor, must, 7)


def solver_step(batch: int, size: int, itemsize: int, guided: bool = True) -> Traffic:
    """c_skip x + c_out raw + w guidance, then keep x + pull x0 + pull_old old + kick z."""
    tensor = 4 * batch * size
    raw = itemsize * batch * size * (2 if guided else 1)
    # every product and every sum is a pass of its own; the noise is some hundred more
    sums = (2 * 3 + (2 if guided else 1) * 2) + (2 * 4 + 3 * 3)
    return Traffic(4 * tensor + raw, sums * tensor, 4 * tensor + raw, 12 if guided else 10)
