"""Process set-up of a training: devices, precision, threads, stop signals, seeds."""

from __future__ import annotations

import atexit
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastscore.files import remove_leftovers

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# rank 0 validates alone while the others wait in a collective
_COLLECTIVE_TIMEOUT = timedelta(hours=6)


def stream_seed(seed: int, step: int, rank: int, purpose: str) -> int:
    """63-bit seed of one purpose at one step and rank: a hash, so that no two streams overlap."""
    text = f"{purpose}/{seed}/{step}/{rank}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the default generators of the CPU and of ``device``.

    What torch.manual_seed does beyond that costs half a millisecond a call where CUDA is built in
    but not in use: it records a stack trace for each kind of device.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def launch(accelerator: str, devices: int, precision: str) -> Fabric:
    """Fabric for one or several devices; under torchrun its process count replaces ``devices``.

    Raises ValueError when the accelerator is absent and ImportError when Fabric is not installed.
    """
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import TorchElasticEnvironment
        from lightning_fabric.strategies import DDPStrategy
    except ImportError as error:
        raise ImportError("training needs Fabric: pip install 'fastscore[train]'") from error
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("accelerator 'cuda' was asked for, but PyTorch sees no GPU; use 'cpu'")
    nodes = 1
    if TorchElasticEnvironment.detect():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    # buffers stay local: a broadcast in the middle of a GAN step would overwrite what its backward
    # pass still needs
    several = DDPStrategy(broadcast_buffers=False, timeout=_COLLECTIVE_TIMEOUT)
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=several if devices * nodes != 1 else "auto",
        **_precision(precision, accelerator),
    )
    fabric.launch()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)
    return fabric


def _leave_group() -> None:
    """End the threads of gloo while the interpreter can still serve them.

    One that other work kept from its core may hold a tensor of the last collective. To release it
    during the interpreter's shut-down ends the thread in the middle of C++, and thereby aborts a
    process whose training has finished well. Fabric does as much for NCCL alone.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def _precision(precision: str, device: str) -> dict[str, Any]:
    if precision == "32-true":
        return {"precision": precision}
    from lightning_fabric.plugins.precision import MixedPrecision

    class Autocast(MixedPrecision):
        """Autocast that leaves a module's inputs alone.

        Fabric's own rounds them to the low precision first, which would ruin noise levels and the
        preconditioning c_skip x that a denoiser computes in float32.
        """

        def convert_input(self, data: Any) -> Any:
            return data

    return {"plugins": [Autocast(precision, device=device)]}


@contextmanager
def cpu_settings(num_threads: int | None) -> Iterator[None]:
    """Set the number of threads and flush denormal numbers to zero; both are restored after.

    Denormals appear in decaying optimizer moments and activations and cost a CPU two orders of
    magnitude of speed each.
    """
    threads = torch.get_num_threads()
    flushing = (torch.tensor(1e-39) * 0.5).item() == 0.0
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushing)


@contextmanager
def gpu_settings(device: torch.device) -> Iterator[None]:
    """On a GPU let cuDNN try its convolutions once a shape and keep the fastest; restored after.

    Batches of a training have one shape, so what trying costs is paid in the first step alone.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for one training; ValueError when another one is writing into it."""
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise ImportError("training needs filelock: pip install 'fastscore[train]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another training is writing into {folder}; wait for it or choose another folder"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}; choose another") from error
    with lock:
        remove_leftovers(folder)
        yield


class StopSignals:
    """Turns a first SIGINT or SIGTERM into a request to stop; a second one interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # only the main thread may install handlers; a signal ignored on purpose (nohup) stays so
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _handle(self, number: int, _frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def stop(self) -> None:
        """Raise what an interrupted program raises: KeyboardInterrupt, on SIGTERM SystemExit."""
        if self.received == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt
