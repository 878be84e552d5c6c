"""Energy against integrals known in closed form, and sources that fail in every way they can.

`Nvml` and files in powercap's layout stand for hardware that is not here.
"""

import itertools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastscore.measure import energy, traces
from fastscore.measure.energy import NoEnergyError

# nvidia-smi's format, stamps 19 to 34 ms apart: 70 W for 2 s, up to 400 W within 1 s, 4 s of
# 400 + 20 sin(2 pi t) W, down within 1 s, 70 W for 2 s
TRACE = Path(__file__).parent / "data" / "nvml_power.csv"
JOULES = 140 + 235 + 1600 + 235 + 140


def test_a_trace_with_a_known_integral():
    times, watts = traces.read_trace(TRACE)
    assert times[-1] == 10
    # the trapezoid rule on the sine, h^2 / 12 max |f''| a second, and powers given to 0.01 W
    limit = 4 * 0.034**2 / 12 * 20 * (2 * math.pi) ** 2 + 10 * 0.005
    assert traces.integrate(times, watts) == pytest.approx(JOULES, abs=limit)
    # straight lines have no error but that of rounding, wherever they are cut
    assert traces.integrate(times, watts, 0.5, 3.0) == pytest.approx(105 + 235, abs=2.5 * 0.005)
    assert traces.integrate(times, watts, 2.25, 2.5) == pytest.approx(
        330 * (0.5**2 - 0.25**2) / 2 + 70 * 0.25, abs=0.25 * 0.005
    )
    assert traces.main([str(TRACE)]) == "2349.998 J in 10.000 s, 235.000 W, 456 samples"


def test_a_sensor_that_moves_in_steps():
    """A sensor renewed every 100 ms, sampled every 20: late by half a step at each change."""
    times = [0.02 * i for i in range(501)]
    true = [100.0 if t < 3 or t >= 7 else 500.0 for t in times]
    seen = [true[i - i % 5] for i in range(len(times))]
    found = traces.integrate(times, seen)
    assert found == pytest.approx(10 * 100 + 4 * 400, abs=400 * 0.1)
    assert traces.integrate(times, [250.0] * len(times)) == pytest.approx(2500)


def test_traces_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="1 time stamps and 1 powers"):
        traces.integrate([0.0], [1.0])
    with pytest.raises(ValueError, match="fall from 2 to 1 s"):
        traces.integrate([0.0, 2.0, 1.0, 3.0], [1.0] * 4)
    with pytest.raises(ValueError, match="asked for 0 to 5"):
        traces.integrate([0.0, 2.0], [1.0, 1.0], 0.0, 5.0)
    path = tmp_path / "trace.csv"
    path.write_text("timestamp, power.draw [W]\n2026/11/20 10:15:32.123, [N/A]\n")
    with pytest.raises(ValueError, match=r"line 2 .* \[N/A\]"):
        traces.read_trace(path)


class Machine:
    """A device that draws 70 W, or 300 W during a call of 10 ms, and its clock."""

    idle, busy, took = 70.0, 300.0, 0.01

    def __init__(self) -> None:
        self.now = self.joules = 0.0

    def spend(self, seconds: float, watts: float) -> None:
        self.now += seconds
        self.joules += seconds * watts

    def clock(self) -> float:
        self.spend(1e-5, self.idle)
        return self.now

    def sleep(self, seconds: float) -> None:
        # in pieces, as counters move meanwhile
        for _ in range(int(seconds / 0.005)):
            self.spend(0.005, self.idle)

    def call(self) -> None:
        self.spend(self.took, self.busy)


class Nvml:
    """The functions of NVML in use, of a GPU whose energy counter is renewed every 20 ms."""

    renewed = 0.02

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818
        pass

    class NVMLError_NoPermission(NVMLError):  # noqa: N801, N818
        pass

    def __init__(self, machine: Machine, *, counter=None, instant=None, power=None) -> None:
        self.machine, self.errors = machine, {"counter": counter, "instant": instant}
        self.errors["power"] = power
        self.seen = 0, 0.0

    def _refuse(self, name: str) -> None:
        if self.errors[name] is not None:
            raise self.errors[name]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        self._refuse("counter")
        tick = int(self.machine.now / self.renewed)
        if tick > self.seen[0]:
            self.seen = tick, self.machine.joules
        return int(self.seen[1] * 1e3)

    def nvmlDeviceGetFieldValues(self, handle, fields):  # noqa: N802
        assert fields == [186]
        self._refuse("instant")
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=123000))]

    def nvmlDeviceGetPowerUsage(self, handle):  # noqa: N802
        self._refuse("power")
        return 99000


def measured(machine: Machine, source, **settings):
    return energy.energy(
        machine.call, "cpu", source=source, clock=machine.clock, sleep=machine.sleep, **settings
    )


def test_a_counter_and_idle_power_subtracted():
    machine = Machine()
    source = energy.on_nvml(Nvml(machine), None, machine.clock)
    assert source.name == "NVML total energy counter"
    assert source.period == pytest.approx(0.02, rel=0.01)
    found = measured(machine, source, seconds=20, idle=3)
    # 230 W above idling for 10 ms; reading the clock between calls idles
    assert found["joules"] == pytest.approx(2.3, rel=0.01)
    assert found["low"] < 2.3 < found["high"]
    # one update missing at either end of 20 s, and what blocks scatter by
    assert found["high"] - found["low"] < 0.05
    assert found["idle_watts"] == pytest.approx([70, 70], rel=0.02)
    assert found["watts"] == pytest.approx(300, rel=0.01)
    assert found["gross"] == pytest.approx(3.0, rel=0.01)
    assert len(found["blocks"]) == 10
    json.dumps(found)


def test_idle_power_that_moves_widens_the_interval():
    machine = Machine()
    calls = itertools.count()

    def call() -> None:
        Machine.call(machine)
        if next(calls) == 1000:
            machine.idle = 90.0

    source = energy.on_nvml(Nvml(machine), None, machine.clock)
    machine.call = call
    found = measured(machine, source, seconds=20, idle=3)
    assert found["idle_watts"] == pytest.approx([70, 90], rel=0.02)
    assert found["joules"] == pytest.approx(2.2, rel=0.01)
    assert found["low"] < 2.1
    assert found["high"] > 2.3


def test_idling_lasts_as_long_as_a_slow_counter_needs():
    machine = Machine()
    nvml = Nvml(machine)
    nvml.renewed = 0.1
    source = energy.on_nvml(nvml, None, machine.clock)
    assert "give 50 s and 5 s" in measured(machine, source, seconds=20)["none"]
    assert measured(machine, source, seconds=60)["joules"] == pytest.approx(2.3, rel=0.03)


def test_no_figure_from_too_short_a_run():
    machine = Machine()
    source = energy.on_nvml(Nvml(machine), None, machine.clock)
    found = measured(machine, source, seconds=5, idle=3)
    assert "5 s and 3 s of idling are too short" in found["none"]
    assert "give 10 s and 1 s or more" in found["none"]
    assert "too short" in measured(machine, source, seconds=20, idle=0.1)["none"]


def test_no_figure_for_what_cannot_be_told_from_idling():
    machine = Machine()
    machine.busy = machine.idle + 0.01
    source = energy.on_nvml(Nvml(machine), None, machine.clock)
    assert "cannot be told from idling" in measured(machine, source, seconds=20, idle=3)["none"]


class Ticks:
    """A clock that moves by 10 ms whenever it is read; ``times`` are what it said."""

    def __init__(self) -> None:
        self.times = [0.0]

    def __call__(self) -> float:
        self.times.append(self.times[-1] + 0.01)
        return self.times[-1]


def sampled(source: energy.PowerSamples, clock: Ticks, samples: int) -> float:
    """Joules once the source's own thread has taken so many samples."""
    limit = time.monotonic() + 20
    while len(clock.times) < samples and time.monotonic() < limit:
        time.sleep(0.001)
    source.close()
    return source.joules()


def test_gpus_without_a_counter_are_sampled():
    machine = Machine()
    missing = Nvml.NVMLError_NotSupported("Not Supported")
    for errors, watts, period in (({}, 123, 0.1), ({"instant": missing}, 99, 1.0)):
        clock = Ticks()
        source = energy.on_nvml(Nvml(machine, counter=missing, **errors), None, clock)
        joules = sampled(source, clock, 4)
        assert joules == pytest.approx(watts * (clock.times[-1] - clock.times[1]))
        assert source.period == period


def test_samples_of_a_power_that_rises():
    clock = Ticks()

    def watts() -> float:
        # the moment comes next
        return 100 + 1000 * (clock.times[-1] + 0.01)

    first = clock.times[-1] + 0.01
    source = energy.PowerSamples(watts, 0.1, "ramp", clock, every=0.001)
    joules, last = sampled(source, clock, 12), clock.times[-1]
    assert last > 0.1
    # the rule is exact on a line
    assert joules == pytest.approx(100 * (last - first) + 500 * (last**2 - first**2))


def test_a_sensor_that_fails_on_the_way():
    power = iter([50.0, 60.0])

    def watts() -> float:
        try:
            return next(power)
        except StopIteration:
            raise NoEnergyError("NVML: GPU is lost") from None

    source = energy.PowerSamples(watts, 0.1, "lost", every=0.001)
    source._thread.join(5)
    with pytest.raises(NoEnergyError, match="GPU is lost"):
        source.joules()
    source.close()


def test_without_permission_or_library():
    machine = Machine()
    refused = Nvml.NVMLError_NoPermission("Insufficient Permissions")
    missing = Nvml.NVMLError_NotSupported("Not Supported")
    with pytest.raises(NoEnergyError, match="NVML: Insufficient Permissions"):
        energy.on_nvml(Nvml(machine, counter=refused), None, machine.clock)
    nothing = Nvml(machine, counter=missing, instant=missing, power=missing)
    with pytest.raises(NoEnergyError, match="NVML: Not Supported"):
        energy.on_nvml(nothing, None, machine.clock)


def test_a_driver_that_was_loaded_again():
    machine = Machine()
    nvml = Nvml(machine)
    source = energy.on_nvml(nvml, None, machine.clock)
    before = source.joules()
    machine.sleep(1)
    assert source.joules() - before == pytest.approx(70, abs=2 * 0.02 * 70)
    nvml.seen = 10**9, 0.0
    with pytest.raises(NoEnergyError, match="went back"):
        source.joules()


SPAN = 262_143_328_850


class Powercap:
    """Two packages, a part of one, and the platform that contains both, in powercap's layout."""

    def __init__(self, root: Path) -> None:
        self.root, self.microjoules = root, SPAN - 30_000
        zones = {"0": "package-0", "0:0": "core", "1": "package-1", "2": "psys"}
        for number, name in zones.items():
            zone = root / f"intel-rapl:{number}"
            zone.mkdir(parents=True)
            (zone / "name").write_text(f"{name}\n")
            (zone / "max_energy_range_uj").write_text(f"{SPAN}\n")
        self.now = 0.0
        self.spend(0)

    def spend(self, microjoules: int) -> None:
        self.microjoules += microjoules
        for zone in self.root.iterdir():
            (zone / "energy_uj").write_text(f"{self.microjoules % SPAN}\n")

    def clock(self) -> float:
        self.now += 0.001
        self.spend(1000)
        return self.now


def test_rapl_counters_wrap_around(tmp_path):
    powercap = Powercap(tmp_path)
    source = energy.open_source("cpu", powercap=tmp_path, clock=powercap.clock)
    assert source.period == pytest.approx(0.001)
    before = source.joules()
    assert powercap.microjoules < SPAN
    powercap.spend(500_000)
    assert powercap.microjoules > SPAN
    # both packages, neither the part nor the platform
    assert source.joules() - before == pytest.approx(2 * 0.5)
    assert energy.unwrapped(7, 5, 10) == 8
    assert energy.unwrapped(5, 7, 10) == 2


def test_processors_without_counters(tmp_path, monkeypatch):
    found = energy.energy(lambda: None, "cpu", source=None, seconds=1)
    if not energy.POWERCAP.exists():
        assert found == {"none": "this machine offers no RAPL counter (no package in powercap)"}
    Powercap(tmp_path)
    with pytest.raises(NoEnergyError, match="did not move within 2 s"):
        energy.open_source("cpu", powercap=tmp_path, clock=itertools.count().__next__)
    read = Path.read_text

    def refuse(path: Path, *args, **kwargs) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(NoEnergyError, match="read by the superuser only"):
        energy.open_source("cpu", powercap=tmp_path)
