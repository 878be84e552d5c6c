"""What torch.compile writes for a GPU that is not there, and what of it follows; prints JSON.

    python tests/imagined_compiler.py MODEL PRECISION [--unguided] [--build]

The engine's own `CompiledDenoiser` runs Dynamo, AOTAutograd and Inductor on tensors without memory.
Inductor's module is read, not run: it gives tensors of the right shapes. With --build its kernels
are compiled for sm_90. A process of its own: PyTorch and Triton are told of a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import types
import warnings
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

SM_90 = types.SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)


class Driver:
    """What Triton asks of a GPU before it runs anything on it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def tell_of_a_gpu() -> None:
    """To be called before the compiler is imported, which keeps some of these functions."""
    triton.runtime.driver.set_active(Driver())
    torch.cuda.get_device_properties = lambda device=None: SM_90
    torch.cuda.get_device_capability = lambda device=None: (SM_90.major, SM_90.minor)
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    # which a machine without a GPU would not take for bf16, and with it another layout
    kinds = torch._C._ConvBackend
    torch._C._select_conv_backend = lambda *args, **named: (
        kinds.CudnnTranspose if named["transposed"] else kinds.Cudnn
    )
    from torch.utils import _triton

    _triton.has_triton = lambda: True
    from torch._inductor.runtime import triton_helpers as helpers

    helpers.set_driver_to_gpu = lambda: None


tell_of_a_gpu()

from fastscore_kernels.gpu import launch  # noqa: E402
from small_models import small_denoiser  # noqa: E402
from torch._inductor import config  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402

from fastscore.denoiser import set_precision  # noqa: E402
from fastscore.devices import fp32_products  # noqa: E402
from fastscore.engine.compiled import CompiledDenoiser  # noqa: E402
from fastscore.measure import nodes  # noqa: E402
from fastscore.measure.models import MODELS, imagined  # noqa: E402


class Written:
    """Every graph that Inductor was given, and the module that it wrote."""

    def __init__(self) -> None:
        self.operators: list[list[str]] = []
        self.sources: list[str] = []

    def module(self, graph: GraphLowering) -> types.SimpleNamespace:
        """Stands in for the module: its answers have shapes alone."""
        called = [n for n in graph.module.graph.nodes if n.op == "call_function"]
        self.operators.append([str(n.target) for n in called])
        self.sources.append(graph.codegen()[0].value)
        shapes = [
            (tuple(map(int, t.get_size())), tuple(map(int, t.get_stride())), t.get_dtype())
            for t in graph.graph_outputs
        ]

        def call(args: list[Any]) -> list[torch.Tensor]:
            args.clear()
            return [torch.empty_strided(*s, dtype=d, device=nodes.DEVICE) for *s, d in shapes]

        return types.SimpleNamespace(call=call, __file__="", key="", path="")


def compiled(name: str, precision: str, guided: bool) -> tuple[Written, dict[str, Any]]:
    """Two steps of a model on the imagined GPU."""
    net = small_denoiser() if name == "small" else MODELS[name]().eval()
    set_precision(net, "bf16" if precision == "bf16" else "fp32")
    shape = (1, 1, *net.shape)
    written = Written()
    GraphLowering.compile_to_module = lambda graph: written.module(graph)
    with nodes.imagined(), fp32_products(nodes.DEVICE, tf32=precision == "tf32"):
        imagined(net)
        denoise = CompiledDenoiser(net, nodes.DEVICE)
        for _ in range(2):
            x, sigma, gamma = (torch.empty(s, device=nodes.DEVICE) for s in (shape, (1,), (1,)))
            label = torch.empty(1, dtype=torch.int64, device=nodes.DEVICE)
            answer = denoise(x, sigma, *((label, gamma) if guided else (None, None)))
    return written, {"compilations": denoise.compilations, "shape": list(answer.shape)}


def kernels(source: str) -> Counter[str]:
    """Launches of one call of a module that Inductor wrote."""
    body = source[source.index("def call(") :]
    lines = [line for line in body.splitlines() if not line.lstrip().startswith("#")]
    found = re.findall(r"(extern_kernels\.\w+|\w+)(?:_\d+\.run)?\(", "\n".join(lines))
    ours = re.findall(r"(\w+?)_\d+\.run\(", "\n".join(lines))
    pointwise = ("triton_poi", "triton_red", "triton_per")
    launched = ["triton, fused" if n.startswith(pointwise) else n for n in ours]
    return Counter(launched) + Counter(n for n in found if n.startswith("extern_kernels."))


def build(source: str) -> list[str]:
    """Compile every kernel of a module for sm_90; the names of all of them."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    built: list[str] = []

    def precompile(kernel: CachingAutotuner, *args: Any, **named: Any) -> None:
        kernel._precompile_worker()
        built.append(kernel.fn.__name__)

    CachingAutotuner.precompile = precompile
    with config.patch(compile_threads=1):
        exec(compile(source, "written", "exec"), {"__name__": "written", "__file__": "written"})
    return built


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("small", *MODELS))
    parser.add_argument("precision", choices=("fp32", "tf32", "bf16"))
    parser.add_argument("--unguided", action="store_true")
    parser.add_argument("--build", action="store_true")
    args = parser.parse_args()
    # what a GPU that is not there would say of itself
    launch._cuda_device = lambda index: launch.DEVICES["sm_90"]
    # folding computes constants on the GPU
    with config.patch(fx_graph_cache=False, joint_graph_constant_folding=False):
        written, found = compiled(args.model, args.precision, not args.unguided)
    (source,), (operators,) = written.sources, written.operators
    counts = kernels(source)
    found |= {
        "operators": Counter(operators),
        "kernels": counts,
        "total": counts.total(),
        # kernels that read nothing
        "fills": re.findall(r"(triton_poi\w+)\.run\(buf\d+, \d+, stream", source),
        "double": re.findall(r"'(\w+)': 'fp64'", source),
    }
    if args.build:
        found["built"] = build(source)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
