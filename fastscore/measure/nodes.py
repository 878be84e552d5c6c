"""What a call launches on a GPU: counted without one, on tensors without memory, or seen on one.

At batch 1 a step is bound by how many kernels follow one another, each a node of its graph, so
their number is predicted and reported beside the time. The prediction runs the very functions on
`FakeTensor`s of a GPU, which also finds what no graph may hold: a wait for the device, a copy from
or to the host, operands on different devices.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fastscore_kernels.registration import launcher
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda:0")
# kernels of an operation of PyTorch's where it is not one; a convolution's bias is an addition
# after cuDNN's kernel, and what cuDNN adds to change a layout is not foreseen
_KERNELS = {
    "native_group_norm": 2,
    "native_group_norm_backward": 3,
    "_fft_r2c": 2,
    "_fft_c2r": 2,
}
_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "device", "sym_size", "detach")


@dataclass
class Launches:
    """Names of kernels one after the other, and transfers between host and device.

    ``made`` are the launches of our own kernels as `launch.record` has them, where predicted.
    """

    names: list[str] = field(default_factory=list)
    transfers: list[str] = field(default_factory=list)
    made: list[Any] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Nodes of a graph of the call."""
        return len(self.names)

    @property
    def kernels(self) -> Counter[str]:
        """How often each kernel is launched."""
        return Counter(self.names)

    @property
    def chained(self) -> int:
        """Our own kernels that follow another of ours, where predicted."""
        ours = {one.kernel.fn.__name__ for one in self.made}
        return sum(a in ours and b in ours for a, b in itertools.pairwise(self.names))


@contextlib.contextmanager
def imagined() -> Iterator[None]:
    """Tensors made inside have no memory; those of a GPU need none to be there.

    Raises what a GPU would: operands on two devices, and, by PyTorch's
    DataDependentOutputException, a value of the device that the host asks for.
    """
    with FakeTensorMode(), torch.no_grad():
        yield


def move(module: nn.Module) -> nn.Module:
    """``module`` on the imagined GPU, in place, channels-last as a pipeline lays it out."""
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None:
                part._parameters[name] = nn.Parameter(_moved(p), requires_grad=False)
        for name, b in list(part._buffers.items()):
            if b is not None:
                part._buffers[name] = _moved(b)
    return module


def _moved(t: Tensor) -> Tensor:
    last = t.ndim == 4
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(t.shape, dtype=t.dtype, device=DEVICE, memory_format=layout)


def predicted(
    function: Callable[[], Any], arch: str = "sm_90", device: Any | None = None
) -> Launches:
    """Launches of ``function``, which computes with tensors of `imagined`, on a GPU of ``arch``.

    ``device`` is another one that the rules of the kernels are to know (`launch.Device`).
    """
    census = _Census(arch, device)
    with census:
        function()
    return census.launches


class _Census(TorchDispatchMode):
    """Notes what every operation would launch, and lets it go on."""

    def __init__(self, arch: str, device: Any | None) -> None:
        super().__init__()
        self.launches = Launches()
        self._arch, self._device = arch, device

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        start = launcher(op)
        if start is not None:
            self._note_launches(start, args)
            return result
        name = op._schema.name.partition("::")[2]
        self._note_transfer(name, args, kwargs, result)
        if name in _NOTHING or _is_view(op) or not _on_device(result):
            return result
        self.launches.names += [name] * _KERNELS.get(name, 1)
        if name == "convolution" and args[2] is not None:
            self.launches.names.append("convolution's bias")
        return result

    def _note_launches(self, start: Callable, args: tuple) -> None:
        from fastscore_kernels.gpu.launch import DEVICES, record

        # what it does in PyTorch beside its launches (copies of layouts) is noted as well
        with record(self._device or DEVICES[self._arch]) as launches, self:
            start(*args)
        self.launches.names += [one.kernel.fn.__name__ for one in launches]
        self.launches.made += launches

    def _note_transfer(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        places = {t.device.type for t in tree_leaves((args, kwargs, result)) if _is_tensor(t)}
        # a number on the host that takes part is an argument of the kernel
        moved = places > {"cpu"} and name in ("_to_copy", "copy_", "copy", "clone")
        if moved or name == "_local_scalar_dense":
            self.launches.transfers.append(name)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_view(op: Any) -> bool:
    return any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns)


def _on_device(result: Any) -> bool:
    return any(_is_tensor(t) and t.device.type == DEVICE.type for t in tree_leaves(result))


def seen(run: Callable[[], Any], device: torch.device) -> Launches:
    """Kernels and copies that one call launches on a GPU, by PyTorch's profiler.

    ``run`` has been called before: what is compiled, recorded or set up is not counted.
    """
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize(device)
    launches = Launches()
    for event in found.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or _is_annotation(event):
            continue
        if event.name.startswith("Memcpy") and "DtoD" not in event.name:
            launches.transfers.append(event.name)
        else:
            launches.names.append(event.name)
    return launches


def _is_annotation(event: Any) -> bool:
    return bool(getattr(event, "is_user_annotation", False))
