"""How kernels are launched: one entry for all of them, and the rule behind every block size.

A launch is a pure function of shapes, dtype and device: nothing is measured or tuned at run time. A
checked-in table ``tables/sm_<major><minor>.json`` may replace the rule's choice where a
measurement on that architecture says so.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from fastscore_kernels.gpu.interpreting import read_bounds_with_numpy_2_4
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

if triton.knobs.runtime.interpret:
    read_bounds_with_numpy_2_4()

TABLES = Path(__file__).with_name("tables")


@dataclass(frozen=True)
class Device:
    """What the rules need to know of a processor: its architecture and how many cores it has."""

    arch: str
    multiprocessors: int


# the chips that kernels are built for ahead of time: A100, H100, B200
DEVICES = {
    "sm_80": Device("sm_80", 108),
    "sm_90": Device("sm_90", 132),
    "sm_100": Device("sm_100", 148),
}
# shared memory that one program may have, in bytes
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
_INTERPRETER = Device("interpreter", 8)
# architectures that can launch a kernel before the one ahead of it has ended
EARLY = ("sm_90", "sm_100")


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """One answer of `choose`: the operation, a table's key for the problem, the rule's parameters.

    ``chosen`` are the parameters after the device's table and `parameters`.
    """

    op: str
    key: str
    rule: Mapping[str, int]
    chosen: Mapping[str, int]


@dataclass(frozen=True)
class _Recording:
    device: Device
    launches: list[Launch]


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)
_overrides: ContextVar[Mapping[str, Mapping[str, int]]] = ContextVar("overrides", default={})  # noqa: B039
_visible: ContextVar[bool] = ContextVar("visible", default=False)
_choices: ContextVar[list[Choice] | None] = ContextVar("choices", default=None)
_early: ContextVar[bool] = ContextVar("early", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run ``kernel`` over ``grid``; inside ``record`` only note that it would run."""
    recording = _recording.get()
    # the compiler orders its launches itself, and wants every argument named
    options["DEPENDENT"] = not _visible.get() and _launched_early(args[0])
    if options["DEPENDENT"]:
        options["launch_pdl"] = True
    if recording is not None:
        recording.launches.append(Launch(kernel, grid, args, options))
    elif _visible.get() and not isinstance(kernel, InterpretedFunction):
        torch.library.wrap_triton(kernel)[grid](*args, **options)
    else:
        # Triton launches on the current device, whatever device its arguments are on
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **options)


def _launched_early(x: Tensor) -> bool:
    wanted = _early.get()
    if wanted and device_of(x).arch not in EARLY:
        raise ValueError(
            f"kernels cannot be launched early on {device_of(x).arch}; {' and '.join(EARLY)} can"
        )
    return wanted


@contextmanager
def early(wanted: bool) -> Iterator[None]:
    """Launch kernels inside before the one ahead has ended, where ``wanted``.

    Programmatic dependent launch: a kernel is brought to the processors while the last programs of
    the one before it run, and waits there until all they wrote is in memory. Graphs keep how their
    kernels were launched. A launch is a ValueError on a device that cannot.
    """
    token = _early.set(wanted)
    try:
        yield
    finally:
        _early.reset(token)


@contextmanager
def visible() -> Iterator[None]:
    """Let launches made inside appear in the graph that a compiler is tracing."""
    token = _visible.set(True)
    try:
        yield
    finally:
        _visible.reset(token)


@contextmanager
def record(device: Device) -> Iterator[list[Launch]]:
    """Collect the launches made inside, as they would be on ``device``, and run none of them."""
    launches: list[Launch] = []
    token = _recording.set(_Recording(device, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


@contextmanager
def choices() -> Iterator[list[Choice]]:
    """Collect what `choose` is asked inside, and answers; whether launches are made or recorded."""
    found: list[Choice] = []
    token = _choices.set(found)
    try:
        yield found
    finally:
        _choices.reset(token)


@contextmanager
def parameters(op: str, **values: int) -> Iterator[None]:
    """Replace some launch parameters of ``op`` inside: for measurements and for tests."""
    token = _overrides.set({**_overrides.get(), op: values})
    try:
        yield
    finally:
        _overrides.reset(token)


def device_of(x: Tensor) -> Device:
    """The device that a launch on ``x`` would run on."""
    recording = _recording.get()
    if recording is not None:
        return recording.device
    return _cuda_device(x.device.index or 0) if x.is_cuda else _INTERPRETER


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def choose(op: str, device: Device, shape: Mapping[str, Any], rule: Mapping[str, int]) -> dict:
    """The rule's launch parameters, with what the table of the device or a test puts in place."""
    chosen, key = dict(rule), shape_key(shape)
    chosen.update(table(device.arch).get(op, {}).get(key, {}))
    chosen.update(_overrides.get().get(op, {}))
    unknown = chosen.keys() - rule.keys()
    if unknown:
        raise ValueError(
            f"{op} has no launch parameter {sorted(unknown)[0]!r}; it has {', '.join(rule)}"
        )
    noted = _choices.get()
    if noted is not None:
        noted.append(Choice(op, key, dict(rule), dict(chosen)))
    return chosen


def shape_key(shape: Mapping[str, Any]) -> str:
    """A table's key for a problem: its sizes by name, in the order given."""
    return " ".join(f"{name}={value}" for name, value in shape.items())


@functools.cache
def table(arch: str) -> dict[str, dict[str, dict[str, int]]]:
    """Measured launch parameters of ``arch``: operation -> problem -> parameter -> value."""
    path = TABLES / f"{arch}.json"
    return read_table(path) if path.is_file() else {}


def read_table(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Read one table; ValueError, naming the file, when it is not one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"launch table {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"launch table {path} must hold an object of operations")
    for op, problems in content.items():
        if not isinstance(problems, dict):
            raise ValueError(f"launch table {path}: {op!r} must hold an object of problems")
        for problem, chosen in problems.items():
            good = isinstance(chosen, dict) and all(
                type(v) is int and 0 <= v <= 65536 for v in chosen.values()
            )
            if not good:
                raise ValueError(
                    f"launch table {path}: {op!r}, {problem!r} must map launch parameters to "
                    f"whole numbers in 0 .. 65536, not {chosen!r}"
                )
    return content


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return triton.next_power_of_2(int(n))


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-int(a) // int(b))


def is_last(x: Tensor) -> bool:
    """Whether a dense [B, C, H, W] tensor keeps a position's channels side by side.

    With one position both layouts are the same memory and channels-last reads wider.
    """
    return not x.is_contiguous() or x.shape[2] * x.shape[3] == 1


def like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` in the memory format of ``other``, copied only when it is in the other one."""
    if is_last(other):
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def film_rows(film: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """FiLM rows with unit stride and their distance; without FiLM a pointer that nobody reads."""
    if film is None:
        return stand_in, 0
    if film.stride(1) != 1:
        film = film.contiguous()
    return film, film.stride(0)
