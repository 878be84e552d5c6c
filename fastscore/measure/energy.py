"""Joules of a call: counters and power samples, idle power subtracted, with an interval.

A source adds up joules: NVML's total energy counter, its power samples integrated by the trapezoid
rule where a GPU has no counter, or RAPL's package counters of a CPU. All of them cover whole
devices, so whatever else runs there is measured too. docs/instruments.md says how fine they are.
"""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fastscore.measure.traces import integrate

Call = Callable[[], Any]

POWERCAP = Path("/sys/class/powercap")
# a block shorter than this many updates of its source could be wrong by more than two per cent: one
# update may be missing at either end
UPDATES = 100
FEWEST_BLOCKS, MOST_BLOCKS = 5, 20
# seconds of idling, where a source needs no longer to tell its power
_IDLE = 3.0
# two-sided 95 % points of Student's distribution for 4 to 19 degrees of freedom
_STUDENT = (
    *(2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120),
    *(2.110, 2.101, 2.093),
)
# NVML's field of the power at this moment; what nvmlDeviceGetPowerUsage says is, from Ampere on, an
# average over one second (NVML reference)
_POWER_INSTANT = 186
_AVERAGED, _SAMPLED = 1.0, 0.1


class NoEnergyError(RuntimeError):
    """Nothing here can tell joules; the message says why and what would help."""


class Source(Protocol):
    """Adds up the joules of a device; ``period`` are the seconds between its updates."""

    name: str
    period: float

    def joules(self) -> float:
        """Joules since the source was made; NoEnergyError where it fails."""
        ...

    def close(self) -> None:
        """Let go of what reading needed."""
        ...


class NvmlCounter:
    """NVML's counter of millijoules since the driver was loaded (Volta and later)."""

    name = "NVML total energy counter"

    def __init__(self, nvml: Any, handle: Any, clock: Callable[[], float]) -> None:
        self._nvml, self._handle = nvml, handle
        self._first = self._last = self._read()
        self.period = update_period(self._read, clock)

    def _read(self) -> int:
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            raise NoEnergyError(f"NVML: {error}") from error

    def joules(self) -> float:
        """Joules since the source was made."""
        now = self._read()
        if now < self._last:
            raise NoEnergyError("NVML's energy counter went back: the driver was loaded again")
        self._last = now
        return (now - self._first) / 1e3

    def close(self) -> None:
        """Nothing is held."""


class PowerSamples:
    """Watts sampled by a thread and integrated over monotonic time stamps.

    ``read`` returns watts; ``period`` is what the sensor needs to answer to a change.
    """

    def __init__(
        self,
        read: Callable[[], float],
        period: float,
        name: str,
        clock: Callable[[], float] = time.perf_counter,
        every: float = 0.02,
    ) -> None:
        self.name, self.period = name, period
        self._read, self._clock, self._every = read, clock, every
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._failure: NoEnergyError | None = None
        self._joules, self._watts, self._time = 0.0, read(), clock()
        self._thread = threading.Thread(target=self._run, name="power samples", daemon=True)
        self._thread.start()

    def _sample(self) -> float:
        with self._lock:
            watts, now = self._read(), self._clock()
            self._joules += integrate((self._time, now), (self._watts, watts))
            self._time, self._watts = now, watts
            return self._joules

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self._sample()
            except NoEnergyError as error:
                self._failure = error
                return

    def joules(self) -> float:
        """Joules since the source was made."""
        if self._failure is not None:
            raise self._failure
        return self._sample()

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()


class Rapl:
    """Running average power limit counters of all processor packages (Linux powercap).

    Counters wrap around at ``max_energy_range_uj``; they must be read more often than that, which
    at 300 W is some minutes. DRAM and the zones inside a package are left out: they are part of it,
    or not the processor.
    """

    name = "RAPL package counters"

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._zones = [z for z in sorted(root.glob("*-rapl:*")) if _is_package(z)]
        if not self._zones:
            raise NoEnergyError("this machine offers no RAPL counter (no package in powercap)")
        self._spans = [self._number(z / "max_energy_range_uj") for z in self._zones]
        self._last = [self._number(z / "energy_uj") for z in self._zones]
        self._microjoules = 0
        self.period = update_period(lambda: self._number(self._zones[0] / "energy_uj"), clock)

    @staticmethod
    def _number(path: Path) -> int:
        try:
            return int(path.read_text())
        except PermissionError:
            raise NoEnergyError(
                f"RAPL: {path.name} may be read by the superuser only; allow reading it"
            ) from None
        except (OSError, ValueError) as error:
            raise NoEnergyError(f"RAPL: {path.name} cannot be read ({error})") from error

    def joules(self) -> float:
        """Joules of all packages since the source was made."""
        for i, (zone, span) in enumerate(zip(self._zones, self._spans, strict=True)):
            now = self._number(zone / "energy_uj")
            self._microjoules += unwrapped(self._last[i], now, span)
            self._last[i] = now
        return self._microjoules / 1e6

    def close(self) -> None:
        """Nothing is held."""


def _is_package(zone: Path) -> bool:
    # a platform's zone (psys) stands beside the packages and contains them
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def unwrapped(before: int, now: int, span: int) -> int:
    """Increase of a counter that starts anew after ``span``, seen at most once around."""
    return now - before if now >= before else now - before + span


def update_period(
    read: Callable[[], Any], clock: Callable[[], float] = time.perf_counter, patience: float = 2.0
) -> float:
    """Median seconds between changes of what ``read`` returns; NoEnergyError if it stands still."""
    start, last, moments = clock(), read(), []
    while len(moments) < 6:
        value, now = read(), clock()
        if value != last:
            moments.append(now)
            last = value
        elif now - start > patience:
            raise NoEnergyError(f"the energy counter did not move within {patience:g} s")
    # the first change came at any moment after the first reading
    return statistics.median(b - a for a, b in itertools.pairwise(moments))


def open_source(
    device: str | torch.device,
    *,
    nvml: Any = None,
    powercap: Path = POWERCAP,
    clock: Callable[[], float] = time.perf_counter,
) -> Source:
    """What tells the joules of ``device`` best; NoEnergyError with the reason where nothing does.

    ``nvml`` takes the place of the module pynvml.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return Rapl(powercap, clock)
    if nvml is None:
        try:
            import pynvml as nvml
        except ImportError as error:
            raise NoEnergyError("no NVML binding; pip install 'fastscore[bench]'") from error
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(_uuid(device))
    except nvml.NVMLError as error:
        raise NoEnergyError(f"NVML: {error}") from error
    return on_nvml(nvml, handle, clock)


def on_nvml(nvml: Any, handle: Any, clock: Callable[[], float] = time.perf_counter) -> Source:
    """The counter of a GPU, else its power at each moment, else its average power."""
    try:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError_NotSupported:
        return _power(nvml, handle, clock)
    except nvml.NVMLError as error:
        raise NoEnergyError(f"NVML: {error}") from error
    return NvmlCounter(nvml, handle, clock)


def _power(nvml: Any, handle: Any, clock: Callable[[], float]) -> PowerSamples:
    def instant() -> float:
        field = nvml.nvmlDeviceGetFieldValues(handle, [_POWER_INSTANT])[0]
        if field.nvmlReturn != 0:
            raise nvml.NVMLError(field.nvmlReturn)
        return field.value.uiVal / 1e3

    def average() -> float:
        return nvml.nvmlDeviceGetPowerUsage(handle) / 1e3

    def guarded(read: Callable[[], float]) -> Callable[[], float]:
        def watts() -> float:
            try:
                return read()
            except nvml.NVMLError as error:
                raise NoEnergyError(f"NVML: {error}") from error

        return watts

    try:
        instant()
    except nvml.NVMLError:
        return PowerSamples(guarded(average), _AVERAGED, "NVML average power, integrated", clock)
    return PowerSamples(guarded(instant), _SAMPLED, "NVML power, integrated", clock)


def _uuid(device: torch.device) -> str:
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def energy(
    call: Call,
    device: str | torch.device = "cpu",
    seconds: float = 20.0,
    idle: float | None = None,
    *,
    source: Source | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Any] = time.sleep,
) -> dict[str, Any]:
    """Joules of one ``call()`` above idling, repeated for ``seconds``; {"none": reason} if unknown.

    Idle power is measured for ``idle`` seconds before and after (None: 3, or 50 updates of the
    source), each time once the device has had as long to settle. ``low`` and ``high``: 95 % by
    Student's distribution over blocks, widened by half the difference of both idle powers and by
    one update of the source at either end. No figure where a block would be shorter than 100
    updates of the source, or the interval reaches zero.
    """
    device = torch.device(device)
    own = source is None
    try:
        source = source or open_source(device, clock=clock)
    except NoEnergyError as error:
        return {"none": str(error)}
    try:
        return _measure(call, device, seconds, idle, source, clock, sleep)
    except NoEnergyError as error:
        return {"none": str(error)}
    finally:
        if own:
            source.close()


def _measure(
    call: Call,
    device: torch.device,
    seconds: float,
    idle: float | None,
    source: Source,
    clock: Callable[[], float],
    sleep: Callable[[float], Any],
) -> dict[str, Any]:
    shortest = UPDATES * source.period
    idle = max(_IDLE, shortest / 2) if idle is None else idle
    blocks = min(MOST_BLOCKS, int(seconds / shortest + 1e-9))
    if blocks < FEWEST_BLOCKS or idle < shortest / 2:
        raise NoEnergyError(
            f"{source.name} moves every {source.period * 1e3:.3g} ms: {seconds:g} s and {idle:g} s "
            f"of idling are too short for a figure; give {FEWEST_BLOCKS * shortest:.3g} s and "
            f"{shortest / 2:.3g} s or more"
        )
    call()
    _wait(device)
    before = _idle_watts(source, idle, clock, sleep)
    found = _blocks(call, device, blocks, seconds / blocks, source, clock)
    after = _idle_watts(source, idle, clock, sleep)
    return {
        **_figure(found, before, after, source.period),
        "source": source.name,
        "period": source.period,
    }


# calls, seconds and joules of one block
Block = tuple[int, float, float]


def _blocks(
    call: Call,
    device: torch.device,
    blocks: int,
    seconds: float,
    source: Source,
    clock: Callable[[], float],
) -> list[Block]:
    found, moment, joules = [], clock(), source.joules()
    for _ in range(blocks):
        calls, until = 0, moment + seconds
        while True:
            call()
            # launches must not run ahead of the clock
            _wait(device)
            calls += 1
            if clock() >= until:
                break
        now, total = clock(), source.joules()
        found.append((calls, now - moment, total - joules))
        moment, joules = now, total
    return found


def _figure(blocks: Sequence[Block], before: float, after: float, period: float) -> dict[str, Any]:
    """The figure of one call and its interval from blocks, and idle watts before and after."""
    calls, seconds, gross = (sum(column) for column in zip(*blocks, strict=True))
    idle = (before + after) / 2
    each = [(joules - idle * took) / count for count, took, joules in blocks]
    joules = (gross - idle * seconds) / calls
    spread = _STUDENT[len(each) - FEWEST_BLOCKS] * statistics.stdev(each) / math.sqrt(len(each))
    drift = abs(after - before) / 2 * seconds / calls
    ends = 2 * period * gross / seconds / calls
    low, high = joules - spread - drift - ends, joules + spread + drift + ends
    if low <= 0:
        raise NoEnergyError(
            f"a call cannot be told from idling: {joules:.3g} J, from {low:.3g} to {high:.3g}"
        )
    return {
        "joules": joules,
        "low": low,
        "high": high,
        "gross": gross / calls,
        "calls": calls,
        "seconds": seconds,
        "watts": gross / seconds,
        "idle_watts": [before, after],
        "blocks": each,
    }


def _idle_watts(
    source: Source, seconds: float, clock: Callable[[], float], sleep: Callable[[float], Any]
) -> float:
    sleep(seconds)
    start, joules = clock(), source.joules()
    sleep(seconds)
    now, total = clock(), source.joules()
    return (total - joules) / (now - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
