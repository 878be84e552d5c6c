"""The table of metrics and the record of what a training cost."""

import json
import math

import pytest
import torch

from fastscore.train.logs import MetricsTable
from fastscore.train.record import EnergyCounter, RunRecord, _rapl_readers, write_record


class TestTable:
    def test_new_columns_and_dropped_rows(self, tmp_path):
        path = tmp_path / "metrics.csv"
        table = MetricsTable(path, 0)
        table.append(2, {"loss": 0.1})
        table.append(4, {"loss": math.nan, "mse": 2})
        table.append(6, {"loss": 0.3, "late": 1})
        whole = path.read_text()
        assert whole == "step,loss,mse,late\n2,0.1,,\n4,nan,2.0,\n6,0.3,,1.0\n"
        table = MetricsTable(path, 4)
        assert path.read_text() == "step,loss,mse\n2,0.1,\n4,nan,2.0\n"
        table.append(6, {"loss": 0.3, "late": 1})
        assert path.read_text() == whole

    def test_a_line_cut_short_is_dropped(self, tmp_path):
        path = tmp_path / "metrics.csv"
        path.write_text("step,loss,mse\n2,0.1,3\n4,0.")
        MetricsTable(path, 10)
        assert path.read_text() == "step,loss,mse\n2,0.1,3\n"


class TestRecord:
    def test_costs_add_up_over_sessions(self):
        first = RunRecord([torch.device("cpu")]).totals()
        earlier = first | {"wall_seconds": 100.0, "cpu_seconds": 50.0, "peak_rss_bytes": 1 << 60}
        second = RunRecord([torch.device("cpu")], earlier).totals()
        assert 100 < second["wall_seconds"] < 110
        assert 50 < second["cpu_seconds"] < 60
        assert second["peak_rss_bytes"] == 1 << 60
        assert (first["sessions"], second["sessions"]) == (1, 2)

    def test_energy_is_counted_across_a_wrap_or_stated_as_unknown(self, tmp_path):
        with pytest.raises(OSError, match="no RAPL counter"):
            _rapl_readers(tmp_path)
        zones = {
            "intel-rapl:0": "package-0",
            "intel-rapl:0:0": "core",
            "intel-rapl:1": "package-1",
            "intel-rapl:2": "psys",
        }
        for name, what in zones.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "name").write_text(f"{what}\n")
            (tmp_path / name / "energy_uj").write_text("9000000\n")
            (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")
        counter = EnergyCounter([torch.device("cpu")], tmp_path)
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("9500000\n")
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("500000\n")
        # it holds the packages: counted with them it would count them twice
        (tmp_path / "intel-rapl:2" / "energy_uj").write_text("9900000\n")
        counter.poll()
        assert counter.joules == pytest.approx(0.5 + 1.5)
        assert counter.source == "RAPL package counters"
        (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
        counter.poll()
        assert counter.joules is None
        assert counter.source.startswith("none: ")

    def test_values_that_json_lacks_become_null(self, tmp_path):
        write_record(tmp_path / "run.json", {"a": {"b": math.nan}, "c": 1.5})
        assert json.loads((tmp_path / "run.json").read_text()) == {"a": {"b": None}, "c": 1.5}
