"""One small problem of every Triton kernel, of odd sizes, forward and backward.

    python bench/odd_cases.py OP [--device cuda]

For tools that watch a whole process: nothing else runs on the GPU. Operands are made on the host,
so that all the GPU's memory that is read was written by a copy or by one of our kernels. `planted`
reads what nobody wrote, and writes beyond its memory: what watches must tell.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch

if "cpu" in sys.argv:
    # read when Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl
from fastscore_kernels.gpu.bias_add import bias_add
from fastscore_kernels.gpu.class_cotangents import class_cotangents
from fastscore_kernels.gpu.edm_inputs import edm_inputs
from fastscore_kernels.gpu.launch import parameters
from fastscore_kernels.gpu.norm_act import norm_act, norm_act_backward
from fastscore_kernels.gpu.solver_step import normals, solver_step
from fastscore_kernels.gpu.tap_fuse import tap_fuse, tap_fuse_backward
from fastscore_kernels.gpu.tap_norm import tap_norm
from fastscore_kernels.gpu.tap_path import tap_path
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
PLANTED = "planted"
# samples, channels, groups or heads, rows, columns: no power of two, no multiple of a block
SHAPE = (3, 20, 4, 7, 5)


class Operands:
    """Random operands of one type on a device, copied there from the host."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self.dtype = device, dtype

    def plane(self, channels: int) -> Tensor:
        """Activations [B, channels, H, W], channels-last."""
        samples, _, _, *plane = SHAPE
        x = torch.randn(samples, channels, *plane).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last).to(self._device)

    def narrow(self, *shape: int) -> Tensor:
        """Numbers of the activations' type."""
        return torch.randn(shape).to(self.dtype).to(self._device)

    def single(self, *shape: int) -> Tensor:
        """fp32 numbers."""
        return torch.randn(shape).to(self._device)

    def whole(self, *shape: int) -> Tensor:
        """int64 numbers, below 100."""
        return torch.randint(0, 100, shape).to(self._device)


def normalise(splits: int, make: Operands) -> None:
    samples, channels, groups, *_ = SHAPE
    x, weight, bias = make.plane(channels), make.single(channels), make.single(channels)
    film = make.single(samples, 2 * channels)
    ways = {"splits": splits, "block_n": 8}
    with parameters("norm_act", **ways), parameters("norm_act_backward", **ways):
        y, stats = norm_act(x, weight, bias, film, groups, True, 1e-5, make.narrow(channels))
        norm_act_backward(y, x, stats, weight, bias, film, groups, True, y, make.narrow(channels))


def normalise_taps(splits: int, make: Operands) -> None:
    _, channels, groups, *_ = SHAPE
    affine = [make.single(channels) for _ in range(4)]
    with parameters("tap_norm", splits=splits, block_n=8):
        tap_norm(make.plane(channels), make.plane(channels), groups, *affine, 1e-5)


def attend(spatial: bool, make: Operands) -> None:
    _, channels, heads, *_ = SHAPE
    q, first, second = make.plane(channels), make.plane(2 * channels), make.plane(2 * channels)
    out = tap_fuse(q, first, second, heads, spatial)
    tap_fuse_backward(out, q, first, second, heads, spatial)
    tap_fuse_backward(tap_fuse(q, first, None, heads, spatial), q, first, None, heads, spatial)


def path(spatial: bool, known: int, make: Operands) -> None:
    _, channels, groups, *_ = SHAPE
    width, heads = 18, 2
    norms = [make.single(channels) for _ in range(4)]
    sizes = ((width, channels), (2 * width, channels), (2 * width, channels))
    sizes += ((width, 2 * channels), (width, width))
    weights = [t for rows, n in sizes for t in (make.narrow(rows, n, 1, 1), make.narrow(rows))]
    taps = make.plane(channels), make.plane(channels)
    with parameters("tap_path_project" if spatial else "tap_path_own", known=known):
        tap_path(*taps, *norms, *weights, groups, heads, spatial, 1e-5)


def add(make: Operands) -> None:
    _, channels, _, rows, _ = SHAPE
    band = make.single(1, channels, rows, 1)
    bias_add(make.plane(channels), make.narrow(channels), band, make.plane(channels))
    bias_add(make.plane(channels), make.narrow(channels), None, None)


def read(make: Operands) -> None:
    samples = SHAPE[0]
    x, sigma, dtype = make.single(samples, 1, 6, 10), make.single(samples).exp(), make.dtype
    edm_inputs(x, sigma, make.single(samples), make.single(5), 0.7, 2, dtype)
    class_cotangents(make.single(samples, 7), make.whole(samples) % 7)


def solve(make: Operands) -> None:
    samples, size = SHAPE[0], (SHAPE[0], 1, *SHAPE[3:])
    x, old = make.single(*size), make.single(*size)
    raw, guidance = make.narrow(*size), make.narrow(*size)
    counters = make.whole(samples, 3)
    solver_step(x, raw, guidance, None, old, make.single(samples, 7), counters, 1)
    normals(make.whole(samples), make.whole(samples), make.whole(2), 131, 0)


@triton.jit
def beyond_kernel(x, y, BLOCK: tl.constexpr):
    """Copy more than either tensor holds."""
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) + 1.0)


def beyond(make: Operands) -> None:
    source = torch.empty_like(make.single(3))
    beyond_kernel[(1,)](source, torch.empty_like(source), BLOCK=64)


CASES: dict[str, Callable[[Operands], None]] = {
    "norm_act": lambda make: normalise(1, make),
    "norm_act_split": lambda make: normalise(3, make),
    "tap_norm": lambda make: normalise_taps(1, make),
    "tap_norm_split": lambda make: normalise_taps(3, make),
    "tap_fuse_own": lambda make: attend(False, make),
    "tap_fuse_all": lambda make: attend(True, make),
    "tap_path_own": lambda make: path(False, 0, make),
    "tap_path_own_known": lambda make: path(False, 1, make),
    "tap_path_all": lambda make: path(True, 0, make),
    "tap_path_all_known": lambda make: path(True, 1, make),
    "bias_add": add,
    "edm_inputs": read,
    "solver_step": solve,
}


def finished(op: str) -> str:
    """What a case says last: a tool that never ran it may report no error either."""
    return f"case {op} has run"


def run(op: str, device: torch.device) -> None:
    """Run a case in every type; on a GPU until all of it is done."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        make = Operands(device, dtype)
        beyond(make) if op == PLANTED else CASES[op](make)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(finished(op), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; None takes the arguments of the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=(*CASES, PLANTED))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args(arguments)
    run(args.op, torch.device(args.device))


if __name__ == "__main__":
    main()
