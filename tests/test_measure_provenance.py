"""What a figure was taken on: known, unknown with a reason, and warnings where it is doubtful."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fastscore.measure import nvml, provenance
from fastscore.measure.provenance import Watch, machine, processor_state

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def core(folder, khz: int, throttled: int = 0, governor: str = "performance") -> None:
    for name, value in (
        ("cpufreq/scaling_cur_freq", khz),
        ("cpufreq/cpuinfo_max_freq", 3_500_000),
        ("cpufreq/scaling_governor", governor),
        ("thermal_throttle/core_throttle_count", throttled),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine that tells clocks and heat."""
    monkeypatch.setattr(provenance, "SYSTEM", tmp_path / "cpu")
    monkeypatch.setattr(provenance, "ZONES", tmp_path / "thermal")
    for zone, (kind, heat) in enumerate((("x86_pkg_temp", 71500), ("battery", 99000))):
        folder = tmp_path / "thermal" / f"thermal_zone{zone}"
        folder.mkdir(parents=True)
        (folder / "type").write_text(f"{kind}\n")
        (folder / "temp").write_text(f"{heat}\n")
    core(tmp_path / "cpu" / "cpu0", 3_000_000)
    core(tmp_path / "cpu" / "cpu1", 2_000_000)
    return tmp_path / "cpu"


@pytest.fixture
def quiet(monkeypatch):
    load = [0.1, 0.1, 0.1]
    monkeypatch.setattr(provenance, "_load", lambda: list(load))
    return load


def test_clocks_and_heat_of_a_processor(system):
    assert processor_state() == {
        "governor": "performance",
        "mhz": {"least": 2000.0, "mean": 2500.0, "limit": 3500.0},
        "celsius": 71.5,
        "throttled": 0,
    }


def test_what_a_machine_does_not_tell_is_null(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "SYSTEM", tmp_path)
    monkeypatch.setattr(provenance, "ZONES", tmp_path)
    assert set(processor_state().values()) == {None}


def test_a_machine_is_named():
    found = machine(CPU)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["threads"] == torch.get_num_threads()
    assert found["processor"]["cores"] >= 1
    assert found["gpu"] is None
    if (provenance.ROOT / ".git").exists():
        assert len(found["commit"]["id"]) == 40
        assert found["commit"]["dirty"] in (True, False)


def test_an_installed_package_has_no_commit(tmp_path, monkeypatch):
    """The repository around site-packages, if any, is somebody else's."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == {"id": None, "dirty": None}


def test_heat_in_the_middle_is_a_warning(system, quiet):
    watch = Watch(CPU)
    watch.sample("after row a")
    assert watch.warnings == []
    core(system / "cpu1", 1_000_000, throttled=3)
    watch.sample("after row b")
    watch.sample("after row c")
    assert watch.warnings == ["the processor slowed down for heat, seen after row b"]
    assert [s["at"] for s in watch.record["seen"]] == ["after row a", "after row b", "after row c"]
    assert watch.record["seen"][1]["mhz"]["least"] == 1000.0


def test_a_busy_machine_is_a_warning(quiet):
    watch = Watch(CPU)
    quiet[0] = 100.0
    watch.end()
    assert watch.record["load"][0] == 0.1
    assert watch.record["load_after"][0] == 100.0
    (sentence,) = watch.warnings
    assert "busy at the end: load 100.0 on" in sentence
    assert "busy at the start" in Watch(CPU).warnings[0]


class Library(SimpleNamespace):
    """An NVML as far as it is asked; attributes that are exceptions are raised."""

    class NVMLError(Exception):
        def __init__(self, value):
            super().__init__(f"error {value}")
            self.value = value

    def __getattr__(self, name):
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def query(*arguments):
            found = self.answers.get(name, 0)
            if isinstance(found, Exception):
                raise found
            return found

        return query


@pytest.fixture
def library(monkeypatch):
    names = {
        "NVML_ERROR_LIBRARY_NOT_FOUND": 12,
        "NVML_ERROR_DRIVER_NOT_LOADED": 9,
        "NVML_ERROR_NO_PERMISSION": 4,
        "NVML_ERROR_NOT_FOUND": 6,
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "NVML_PERF_POLICY_THERMAL": 1,
    }
    fake = Library(**names, answers={})
    fake.answers |= {
        "nvmlSystemGetDriverVersion": b"580.1",
        "nvmlDeviceGetClockInfo": 1980,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1,
        "nvmlDeviceGetViolationStatus": SimpleNamespace(violationTime=0),
        "nvmlDeviceGetComputeRunningProcesses": [],
    }
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(
            uuid="0", name="a GPU", major=9, minor=0, total_memory=2**30
        ),
    )
    return fake


def test_a_gpu_is_named_and_watched(library, quiet):
    watch = Watch(GPU)
    state = watch.record["gpu"]["state"]
    assert watch.record["gpu"]["name"] == "a GPU"
    assert (state["driver"], state["mhz"]["sm"]) == ("580.1", 1980)
    assert state["throttle"] == ["idle"]
    assert watch.warnings == []
    library.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0x40 | 0x4000
    library.answers["nvmlDeviceGetViolationStatus"] = SimpleNamespace(violationTime=5e9)
    library.answers["nvmlDeviceGetComputeRunningProcesses"] = [
        SimpleNamespace(pid=-1, usedGpuMemory=2**20)
    ]
    watch.sample("after row a")
    assert watch.warnings == [
        "another process was on the GPU after row a: -1",
        "the GPU slowed down, seen after row a: thermal slowdown by hardware, reason 0x4000",
        "the GPU slowed down for heat, seen after row a",
    ]


def test_a_query_that_a_gpu_lacks_is_null(library):
    library.answers["nvmlDeviceGetTemperature"] = Library.NVMLError(3)
    library.answers["nvmlDeviceGetViolationStatus"] = Library.NVMLError(3)
    state = machine(GPU)["gpu"]["state"]
    assert (state["celsius"], state["hot_seconds"]) == (None, None)
    assert state["mhz"]["sm"] == 1980


@pytest.mark.parametrize(
    ("number", "reason"),
    [(4, "gives no permission to this user"), (9, "driver is not loaded"), (12, "no NVML library")],
)
def test_nvml_that_does_not_tell_has_a_named_reason(library, quiet, number, reason):
    library.answers["nvmlInit"] = Library.NVMLError(number)
    watch = Watch(GPU)
    assert reason in watch.record["gpu"]["state"]["none"]
    assert reason in watch.warnings[0]


def test_without_the_binding_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(nvml.NvmlError, match=r"pip install 'fastscore\[bench\]'"):
        nvml.Gpu(GPU)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("", {"id": None, "dirty": None}),
        ("0123abc", {"id": "0123abc", "dirty": False}),
        ("0123abc-dirty", {"id": "0123abc", "dirty": True}),
    ],
)
def test_a_copy_without_its_repository_is_told_its_commit(monkeypatch, tmp_path, told, found):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("FASTSCORE_COMMIT", told)
    assert provenance.commit() == found
