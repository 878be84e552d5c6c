"""Registration of an operation with torch.library for every way that PyTorch may call it.

``torch.library.register_autograd`` (torch 2.11) cannot be called under torch.func.vjp: the function
it generates has no ``setup_context``. The autograd kernel here has one, so that the same operation
works under autograd, torch.func, torch.compile, make_fx and torch.export.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd, _len_torch_dispatch_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling

# one library a namespace: operators live as long as the library object
_LIBRARIES: dict[str, torch.library.Library] = {}
# what runs an operation of Triton kernels, by the operation's name
_LAUNCHERS: dict[str, Callable] = {}


def _library(name: str) -> torch.library.Library:
    """The library of an operator's namespace, made when first asked for."""
    namespace = name.partition("::")[0]
    if namespace not in _LIBRARIES:
        _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
    return _LIBRARIES[namespace]


def define(
    name: str, schema: str, implementation: Callable, fake: Callable, devices: Sequence[str]
) -> Any:
    """Define ``namespace::op`` with a kernel for the given devices ("CPU", "CUDA") and its fake.

    Returns the operator.
    """
    namespace, _, short = name.partition("::")
    library = _library(name)
    # outputs follow the inputs' strides, which a compiler must therefore keep
    library.define(short + schema, tags=(torch.Tag.needs_exact_strides,))
    for device in devices:
        library.impl(short, implementation, device)
    torch.library.register_fake(name, fake, lib=library)
    return getattr(getattr(torch.ops, namespace), short).default


def define_triton(name: str, schema: str, implementation: Callable, fake: Callable) -> Any:
    """Define ``namespace::op`` whose Triton kernels a compiler can see and export.

    Under the Triton interpreter there is nothing to see: a plain operation on CPU tensors.
    `torch.library.triton_op` would do the rest, but it brings an autograd kernel of its own and
    infers the schema, and takes neither from us.
    """
    from fastscore_kernels.backends import interpreting

    _LAUNCHERS[name] = implementation
    if interpreting():
        return define(name, schema, implementation, fake, ("CPU",))
    op = define(name, schema, implementation, fake, ("CUDA",))
    _decompose(name, implementation)
    return op


def launcher(op: Any) -> Callable | None:
    """What launches the Triton kernels of an operator; None for another one."""
    return _LAUNCHERS.get(op._schema.name)


def _decompose(name: str, implementation: Callable) -> None:
    """Let AOTAutograd look into an operation: its graph gets the launches instead.

    Exported programs keep the operation, as they keep those of `torch.library.triton_op`.
    """
    from torch._library.triton import triton_ops_to_kernels
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    def decomposed(mode: Any, op: Any, types: Any, args: tuple, kwargs: dict | None) -> Any:
        from fastscore_kernels.gpu.launch import visible
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode, visible():
            return implementation(*args, **(kwargs or {}))

    short = name.partition("::")[2]
    _library(name)._register_torch_dispatch_rule(short, FunctionalTensorMode, decomposed)
    # compiled graphs are cached by the source of what they launch
    triton_ops_to_kernels[name] = _kernels_beside(implementation)


def _kernels_beside(implementation: Callable) -> list[Any]:
    """All Triton kernels that the package's modules hold once ``implementation`` is imported."""
    from triton.runtime.jit import JITFunction

    package = __name__.rpartition(".")[0] + ".gpu"
    modules = [m for n, m in sorted(sys.modules.items()) if n.startswith(package)]
    found = {
        id(value): value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }
    return list(found.values())


def call(op: Any, kernel: Callable, *args: Any) -> Any:
    """``op(*args)``, by way of its kernel alone where nothing else wants to know of the call.

    The dispatcher with its autograd key costs 7 to 13 us, as much as a small kernel.
    """
    return kernel(*args) if direct(args) else op(*args)


def direct(args: Sequence[Any]) -> bool:
    """Whether no gradient, transform, trace, dispatch mode or profiler wants to see a call."""
    return untraced(args) and not torch.autograd._profiler_enabled()


def untraced(args: Sequence[Any]) -> bool:
    """Whether no gradient, transform, trace or dispatch mode wants to see a call."""
    if (
        is_compiling()
        or type(args[0]) is not Tensor
        or _len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    ):
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(isinstance(a, Tensor) and a.requires_grad for a in args)


def differentiate(
    op: Any, save: Callable[[Any, tuple, Any], None], backward: Callable[..., tuple]
) -> None:
    """Give ``op`` a derivative: ``save(ctx, inputs, outputs)``, ``backward(ctx, *grads)``."""

    class Differentiable(_SingleLevelFunction):
        @staticmethod
        def forward(*args: Any) -> Any:
            with _AutoDispatchBelowAutograd():
                return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple:
            return backward(ctx, *grads)

    def kernel(keys: Any, *args: Any) -> Any:
        if not torch.is_grad_enabled() or not any(
            isinstance(a, Tensor) and a.requires_grad for a in args
        ):
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)
        if torch._C._are_functorch_transforms_active():
            # this kernel is already called once a level, by the transform itself
            with enable_single_level_autograd_function():
                return Differentiable.apply(*args)
        return Differentiable.apply(*args)

    short = op._schema.name.partition("::")[2]
    _library(op._schema.name).impl(short, kernel, "Autograd", with_keyset=True)


def once_differentiable(op: Any) -> None:
    """Let a backward operator say that it has no derivative itself, when asked for it."""

    def refuse(ctx: Any, *grads: Tensor | None) -> tuple:
        raise NotImplementedError(
            f"{op._schema.name} has no derivative of its own; for second derivatives use backend "
            "reference"
        )

    differentiate(op, lambda ctx, inputs, outputs: None, refuse)


def batch(op: Any, per_sample: set[int], output_dims: Sequence[int]) -> None:
    """Let torch.func.vmap fold its dimension into the batch dimension of ``op``.

    ``per_sample`` numbers the arguments whose first dimension is the batch; ``output_dims`` says
    where each output has it. Where another argument is batched, samples are run one by one.
    """

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        size = info.batch_size
        mapped = {i for i, dim in enumerate(in_dims) if dim is not None}
        if mapped <= per_sample:
            folded = [
                _fold(arg, in_dims[i], size) if i in per_sample else arg
                for i, arg in enumerate(args)
            ]
            outputs = _as_tuple(op(*folded))
            split = tuple(
                o.unflatten(dim, (size, -1)) for o, dim in zip(outputs, output_dims, strict=True)
            )
            return _like(op, split), _like(op, tuple(output_dims))
        rows = [
            _as_tuple(op(*(_pick(a, dim, i) for a, dim in zip(args, in_dims, strict=True))))
            for i in range(size)
        ]
        stacked = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return _like(op, stacked), _like(op, (0,) * len(stacked))

    vectorise(op, rule)


def vectorise(op: Any, rule: Callable) -> None:
    """Register ``rule(info, in_dims, *args) -> (outputs, out_dims)`` for torch.func.vmap."""
    torch.library.register_vmap(op._schema.name, rule, lib=_library(op._schema.name))


def _fold(arg: Any, dim: int | None, size: int) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    rows = arg.movedim(dim, 0) if dim is not None else arg.expand(size, *arg.shape)
    return dense(rows.flatten(0, 1))


def _pick(arg: Any, dim: int | None, index: int) -> Any:
    return arg if dim is None else dense(arg.select(dim, index))


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@functools.cache
def _returns_one(op: Any) -> bool:
    return len(op._schema.returns) == 1


def _like(op: Any, values: tuple) -> Any:
    return values[0] if _returns_one(op) else values


def dense(t: Tensor) -> Tensor:
    """``t`` [B, C, H, W], copied to channels-last if it is neither that nor contiguous."""
    if t.ndim != 4 or t.is_contiguous():
        return t.contiguous()
    return t.contiguous(memory_format=torch.channels_last)
