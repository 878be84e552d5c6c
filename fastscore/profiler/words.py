"""Plain words for what a trace names in code, and what operators of PyTorch must move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TIMES, DASH, MICRO = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}", "\N{MICRO SIGN}"

# calls of the compiled library and kernels of our own, by the word they begin with
_OURS = {
    "norm_act_backward": "group norm, FiLM and SiLU, pulled back",
    "norm_act": "group norm, FiLM and SiLU",
    "tap_path": "tap norm and fusion, one scale",
    "tap_norm": "tap norm",
    "tap_fuse": "attention over taps",
    "tap_moments": "moments of taps",
    "own_path": "tap norm and fusion, one scale",
    "project_kernel": "tap norm and projections, one scale",
    "attend_kernel": "attention over taps, projection and residual, one scale",
    "own_position_backward": "attention over taps, pulled back",
    "own_position": "attention over taps",
    "all_positions": "attention over taps",
    "queries_backward": "attention over taps, pulled back",
    "keys_backward": "attention over taps, pulled back",
    "solver_step": "solver step with its noise",
    "bias_add": "bias and residual added",
    "edm_inputs": "scalings, patches and features of the noise level",
    "class_cotangents": "cotangents of the logits",
    "normals": "noise",
    "winograd": f"3{TIMES}3 convolution by Winograd's filtering",
    "linear": "linear layer",
}
_OPERATORS = {
    "mkldnn::_convolution_pointwise": "convolution (oneDNN)",
    "mkldnn::_convolution_transpose_pointwise": "convolution pulled back (oneDNN)",
    "aten::convolution": "convolution",
    "aten::conv2d": "2D convolution",
    "aten::conv_transpose2d": "2D convolution pulled back",
    "aten::conv1d": "1D convolution",
    "aten::conv_transpose1d": "transposed 1D convolution",
    "aten::matmul": "matrix product",
    "aten::mm": "matrix product",
    "aten::bmm": "matrix products",
    "aten::addmm": "linear layer",
    "aten::linear": "linear layer",
    "aten::scaled_dot_product_attention": "attention",
    "aten::softmax": "softmax",
    "aten::layer_norm": "layer norm",
    "aten::native_layer_norm": "layer norm",
    "aten::group_norm": "group norm",
    "aten::upsample_nearest2d": "upsampling",
    "aten::upsample_linear1d": "interpolation",
    "aten::pixel_unshuffle": "patches from pixels",
    "aten::pixel_shuffle": "pixels from patches",
    "aten::cat": "concatenation",
    "aten::stack": "stacking",
    "aten::contiguous": "copy into another layout",
    "aten::clone": "copy",
    "aten::copy_": "copy",
    "aten::to": "change of type or device",
    "aten::_to_copy": "change of type or device",
    "aten::fft_rfft": "Fourier transform",
    "aten::fft_irfft": "inverse Fourier transform",
    "aten::repeat": "repetition",
    "aten::mean": "mean",
    "aten::sum": "sum",
    "aten::cumsum": "running sum",
    "aten::isfinite": "check for infinities",
}
_SUMS = ("add", "sub", "mul", "div", "rsub", "neg", "where", "lerp", "addcmul")
_CURVES = (
    *("silu", "gelu", "exp", "log", "sin", "cos", "sqrt", "rsqrt", "square", "pow", "clamp"),
    *("clamp_min", "floor", "reciprocal", "abs", "sigmoid", "tanh"),
)
# what PyTorch's compiler does before it runs what it compiled
_COMPILER = ("TorchDynamo", "Torch-Compiled Region", "Pregraph")
_FRESH = ("empty", "empty_like", "empty_strided", "zeros", "ones", "full", "arange", "new_empty")
_VIEWS = (
    *("view", "reshape", "expand", "expand_as", "slice", "select", "unsqueeze", "squeeze", "t"),
    *("transpose", "permute", "narrow", "as_strided", "split", "unbind", "chunk", "unfold"),
    *("flatten", "unflatten", "movedim", "split_with_sizes", "result_type", "alias", "detach"),
    *("resolve_conj", "resolve_neg", "dropout", "lift_fresh", "real", "imag", "view_as_real"),
)
# work that reads its inputs and writes one output of the largest one's size, or their sum's
_STREAMS = {*_SUMS, *_CURVES, "copy_", "clone", "contiguous", "to", "_to_copy", "softmax", "mean"}
_STREAMS |= {"sum", "layer_norm", "pixel_shuffle", "pixel_unshuffle"}
_JOINS = {"cat", "stack"}
_SIZES = {"float": 4, "double": 8, "long int": 8, "int": 4, "bool": 1, "c10::BFloat16": 2}
_SIZES |= {"c10::Half": 2, "c10::complex<float>": 8, "unsigned char": 1, "signed char": 1}


def plain(name: str) -> str:
    """Words for a kernel, a call of the compiled library or an operator of PyTorch."""
    bare = name.removeprefix("_").removeprefix("fs_")
    for start, words in _OURS.items():
        if bare.startswith(start):
            return words
    if name in _OPERATORS:
        return _OPERATORS[name]
    word = name.partition("::")[2].rstrip("_")
    if name.startswith("aten::"):
        for words, known in (
            ("making room for a tensor", _FRESH),
            ("looking at a tensor another way", _VIEWS),
            ("sums and products, element by element", _SUMS),
            ("functions, element by element", _CURVES),
        ):
            if word in known:
                return words
    return _kernel(name)


def trivial(name: str) -> bool:
    """Whether an operator computes nothing: it makes room or a view, or finds a program."""
    if name.startswith(_COMPILER):
        return True
    word = name.partition("::")[2].rstrip("_")
    return name.startswith("aten::") and word in (*_FRESH, *_VIEWS)


def _kernel(name: str) -> str:
    """Words for a kernel of a library's on a GPU, or its name without its templates."""
    low = name.lower()
    signs = (
        ("memcpy dtoh", "copy to the host"),
        ("memcpy htod", "copy to the GPU"),
        ("memcpy", "copy on the GPU"),
        ("memset", "fill"),
        ("triton_", "fused by the compiler"),
        ("wgrad", "convolution, for weights (cuDNN)"),
        ("dgrad", "convolution pulled back (cuDNN)"),
        ("fprop", "convolution (cuDNN)"),
        ("convolve", "convolution (cuDNN)"),
        ("winograd", "convolution (cuDNN)"),
        ("nchwtonhwc", "change of layout (cuDNN)"),
        ("nhwctonchw", "change of layout (cuDNN)"),
        ("cudnn", "convolution (cuDNN)"),
        ("gemm", "matrix product"),
        ("gemv", "matrix product"),
        ("nvjet", "matrix product"),
        ("splitk", "matrix product"),
        ("flash", "attention"),
        ("fmha", "attention"),
        ("softmax", "softmax"),
        ("catarray", "concatenation"),
        ("reduce", "sum or mean"),
        ("elementwise", "sums, products and functions, element by element"),
        ("fft", "Fourier transform"),
        ("scan", "running sum"),
    )
    for sign, words in signs:
        if sign in low:
            return words
    return name.split("<")[0].split("(")[0].removeprefix("void ")[:60]


def operator_bytes(name: str, args: Mapping[str, Any]) -> int | None:
    """Bytes that one operator of PyTorch reads and writes at least; None where nobody knows."""
    if "bytes" in args:
        # a copy between host and GPU, or on it
        return int(args["bytes"])
    word = name.partition("::")[2]
    word = word if word in _STREAMS else word.rstrip("_")
    sizes = _tensor_bytes(args)
    if not name.startswith("aten::") or not sizes:
        return 0 if trivial(name) else None
    if word in _JOINS:
        return 2 * sum(sizes)
    return sum(sizes) + max(sizes) if word in _STREAMS else (0 if trivial(name) else None)


def _tensor_bytes(args: Mapping[str, Any]) -> list[int]:
    dims, kinds = args.get("Input Dims") or [], args.get("Input type") or []
    found = []
    for shape, kind in zip(dims, kinds, strict=False):
        if isinstance(kind, str) and kind in _SIZES and _is_shape(shape):
            found.append(math.prod(shape) * _SIZES[kind])
        elif kind == "TensorList" and isinstance(shape, list):
            found += [math.prod(s) * 4 for s in shape if _is_shape(s)]
    return found


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, Sequence) and bool(shape) and all(isinstance(n, int) for n in shape)


def milliseconds(us: float) -> str:
    """Three digits in us, ms or s."""
    for unit, scale in (("s", 1e6), ("ms", 1e3)):
        if us >= scale:
            return f"{_three(us / scale)} {unit}"
    return f"{_three(us)} {MICRO}s"


def megabytes(count: float) -> str:
    """Three digits in B, kB, MB or GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{_three(count / scale)} {unit}"
    return f"{count:.0f} B"


def operations(count: float) -> str:
    """Three digits of multiply-accumulates."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{_three(count / scale)} {unit}MACs"
    return f"{count:.0f} MACs"


def in_ms(us: float) -> str:
    """Milliseconds with two decimals, for a column."""
    return f"{us / 1e3:.2f}"


def percent(share: float) -> str:
    """A share as people read it."""
    value = 100 * share
    if 0 < value < 0.1:
        return "< 0.1 %"
    return f"{value:.1f} %" if value < 10 else f"{value:.0f} %"


def _three(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
