"""Peak memory of a call: bytes of tensors, resident pages, and on a GPU what its allocator holds.

What each figure sees and does not see stands in docs/instruments.md. Tensors on a CPU are counted
by the memory events of PyTorch's profiler, which report every block that the allocator of tensors
hands out and takes back: a dispatch mode would see the same call along another path, since packed
weights and compiled kernels step aside for one, and it would miss what oneDNN allocates.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Any]

# the call that counts, among the profiler's events
_MARK = "fastscore.measure.memory"
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak(call: Call, device: str | torch.device = "cpu", warm: int = 1) -> dict[str, Any]:
    """Peak memory of ``call()`` in bytes, JSON-ready; what cannot be read is {"none": reason}.

    ``warm`` calls come first: they choose algorithms, fill caches and record graphs, whose memory
    stays. On a CPU the call then runs twice, once for tensors and once for resident pages:
    ``tensor_peak`` above what was held before it, ``tensor_held`` still there afterwards, ``rss``
    with ``before``, ``peak`` and ``growth``. On a GPU it runs once, ``tensor_peak`` likewise, and
    ``allocated_peak``, ``reserved_peak``, ``graph_pools`` and ``nvml`` are of the whole process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        for _ in range(warm):
            call()
        gc.collect()
        return {"device": str(device), **_on_gpu(call, device)}
    found = {"device": str(device), **tensor_peak(call, warm)}
    return {**found, "rss": resident_peak(call)}


def tensor_peak(call: Call, warm: int = 1) -> dict[str, int]:
    """Bytes of CPU tensors that ``call()`` allocates: peak above the start, and held at the end.

    Exact to the byte for the calling thread; blocks of other threads are not seen (in torch 2.11
    their memory events are dropped, pytorch issue 192290). The last of ``warm`` calls before is
    watched too, so that the call may free what that one left: of older blocks the end is not told.
    The result of the call is kept until the count is over.
    """
    for _ in range(warm - 1):
        call()
    # on a machine without a GPU the profiler's library would complain on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    with torch.autograd.profiler.profile(profile_memory=True, acc_events=False) as profiler:
        if warm:
            call()
        # or what was left to be collected would be counted as freed by the call
        gc.collect()
        with torch.autograd.profiler.record_function(_MARK):
            kept = call()
    results = profiler.kineto_results
    assert results is not None
    events = sorted(results.events(), key=lambda e: e.start_ns())
    now = start = highest = 0
    for event in events:
        if event.name() == _MARK:
            start = highest = now
        elif event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            now += event.nbytes()
            highest = max(highest, now)
    del kept
    return {"tensor_peak": highest - start, "tensor_held": now - start}


def resident_peak(call: Call) -> dict[str, Any]:
    """Resident bytes before ``call()``, their peak during it, and the difference.

    The peak (VmHWM) is reset first by writing 5 to /proc/self/clear_refs (Linux 4.0). Pages that
    the heap had kept for itself are given back before, or a call that fits into them would seem to
    need nothing. {"none": reason} where the system does not offer this.
    """
    try:
        _trim()
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
        kept = call()
        highest = _resident("VmHWM")
    except OSError as error:
        return {"none": f"the peak of resident pages cannot be reset: {error.strerror or error}"}
    del kept
    return {"before": before, "peak": highest, "growth": highest - before}


def in_child(
    make: Callable[..., Call],
    *args: Any,
    device: str | torch.device = "cpu",
    warm: int = 1,
    threads: int | None = None,
    timeout: float = 600.0,
) -> dict[str, Any]:
    """`peak` of the call that ``make(*args)`` returns, in a fresh process.

    Nothing that this process has loaded, cached or freed counts there. ``make`` is a function of a
    module, and it and ``args`` can be pickled (ValueError otherwise); ``threads`` as in
    torch.set_num_threads. ``made`` in the answer are resident bytes before the first call.
    {"none": reason} where the process failed, was killed, as for want of memory, or took longer
    than ``timeout`` seconds.
    """
    try:
        pickle.dumps((make, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"in_child: {make!r} or its arguments cannot be sent to another process ({error}); "
            "give a function of a module and plain values"
        ) from None
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(
        target=_child, args=(there, make, args, str(device), warm, threads), daemon=True
    )
    child.start()
    # the child's end is its alone, so that its death shows here
    there.close()
    try:
        if not here.poll(timeout):
            return {"none": f"the measuring process took longer than {timeout:g} s"}
        return here.recv()
    except EOFError:
        child.join(10)
        return {"none": f"the measuring process ended with code {child.exitcode}, no figure sent"}
    finally:
        if child.is_alive():
            child.terminate()
        child.join()
        here.close()


def _child(
    pipe: Any,
    make: Callable[..., Call],
    args: tuple,
    device: str,
    warm: int,
    threads: int | None,
) -> None:
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        call = make(*args)
        made = _status("VmRSS")
        found = {**peak(call, device, warm), "made": made}
    except Exception as error:
        found = {"none": f"{type(error).__name__}: {error}"}
    pipe.send(found)
    pipe.close()


def weights(*modules: nn.Module) -> dict[str, int]:
    """Bytes of parameters, buffers and packed weights (`fastscore.packed`), shared ones once.

    Packed weights are what they occupy: layouts of oneDNN fill up channels.
    """
    seen: set[int] = set()
    sizes = {"parameters": 0, "buffers": 0, "packed": 0}
    for module in modules:
        sizes["parameters"] += _new_bytes(module.parameters(), seen)
        sizes["buffers"] += _new_bytes(module.buffers(), seen)
        sizes["packed"] += _new_bytes(_packed(module), seen)
    return {**sizes, "total": sum(sizes.values())}


def _packed(module: nn.Module) -> Iterable[Tensor]:
    for part in module.modules():
        prepared = getattr(part, "prepared", None)
        if prepared is not None:
            yield from (v for v in vars(prepared).values() if isinstance(v, Tensor))


def _new_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for t in tensors:
        if t.is_mkldnn:
            key, size = id(t), torch.ops.mkldnn._nbytes(t)
        else:
            key, size = t.untyped_storage()._cdata, t.untyped_storage().nbytes()
        total += 0 if key in seen else size
        seen.add(key)
    return total


def training(
    step: Call,
    modules: Iterable[nn.Module],
    optimizers: Iterable[torch.optim.Optimizer],
    device: str | torch.device = "cpu",
    averages: Iterable[Tensor] = (),
) -> dict[str, Any]:
    """Peak memory of one training step: weights, gradients, optimiser state and what passes by.

    ``step()`` is a whole one: forward, backward, update. One runs before, so that the optimisers'
    state is there. ``averages`` are the tensors of copies that the training keeps of its weights.
    ``total`` is what stays between steps plus the peak above it: activations kept for the backward
    pass, and gradients where a step begins without them.
    """
    modules, optimizers = list(modules), list(optimizers)
    found = peak(step, device)
    seen: set[int] = set()
    weight_bytes = sum(_new_bytes((*m.parameters(), *m.buffers()), seen) for m in modules)
    gradients = [p.grad for m in modules for p in m.parameters() if p.grad is not None]
    states = [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    stays = {
        "weights": weight_bytes,
        "gradients": _new_bytes(gradients, seen),
        "optimizer_state": _new_bytes(states, seen),
        "averages": _new_bytes(averages, seen),
    }
    return {**found, **stays, "total": sum(stays.values()) + found["tensor_peak"]}


def graph_pools(device: str | torch.device = "cuda") -> dict[str, int]:
    """Bytes of the segments that CUDA graphs' private pools hold on ``device``, and in use there.

    From the allocator's own snapshot; `fastscore.engine.GraphPool` is one such pool.
    """
    index = _index(torch.device(device))
    segments = [
        s
        for s in torch.cuda.memory_snapshot()
        if s["device"] == index and tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)
    ]
    return {
        "reserved": sum(s["total_size"] for s in segments),
        "allocated": sum(s["allocated_size"] for s in segments),
    }


def _on_gpu(call: Call, device: torch.device) -> dict[str, Any]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize(device)
    after, highest = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    del kept
    return {
        "tensor_peak": highest - before,
        "tensor_held": after - before,
        "allocated_peak": highest,
        "reserved_peak": torch.cuda.max_memory_reserved(device),
        "graph_pools": graph_pools(device),
        "nvml": nvml_process(device),
    }


def nvml_process(device: torch.device, nvml: Any = None) -> dict[str, Any]:
    """Bytes that the driver counts for this process on a GPU: context, modules and all pools.

    {"none": reason} without the binding, permission, or an entry for this process, as in a
    container whose process numbers are its own. ``nvml`` takes the place of the module pynvml.
    """
    if nvml is None:
        try:
            import pynvml as nvml
        except ImportError:
            return {"none": "no NVML binding; pip install 'fastscore[bench]'"}
    try:
        nvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        entries = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError as error:
        return {"none": f"NVML: {error}"}
    for entry in entries:
        if entry.pid == os.getpid():
            if entry.usedGpuMemory is None:
                return {"none": "NVML names this process but not its memory"}
            return {"process": int(entry.usedGpuMemory), "processes": len(entries)}
    return {
        "none": f"NVML lists {len(entries)} processes on the GPU and not number {os.getpid()}; in "
        "a container, share the host's process numbers"
    }


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _resident(field: str) -> int:
    found = _status(field)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return found


def _status(field: str) -> int | None:
    """A field of this process's status in bytes."""
    try:
        text = _STATUS.read_text()
        return int(text.partition(f"\n{field}:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _trim() -> None:
    """Give freed pages of the heap back to the system, where its library can."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)
