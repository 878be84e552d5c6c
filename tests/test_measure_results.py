"""The result file: whole after every row, read strictly, refused in one sentence."""

import dataclasses
import json

import pytest
from sentences import sentence

from fastscore.measure.results import (
    Check,
    Results,
    Rounds,
    Row,
    Time,
    none,
    quantile,
    read_results,
)

SECONDS = (1.0e-3, 1.2e-3, 1.1e-3, 1.3e-3)


def timed(name="ops/a/native", values=SECONDS, sittings=2):
    rounds = Rounds(values, tuple(2 * v for v in values), sittings)
    workload = {"suite": "ops", "batch": 8, "shape": [1, 2]}
    bound = {"name": "bandwidth", "seconds": 1e-4, "share": 0.1}
    check = Check("plain PyTorch", 1e-7, 1e-5)
    return Row(
        name,
        workload,
        "ok",
        "",
        check,
        rounds,
        Time.of(values),
        none("no"),
        none("no"),
        bound=bound,
    )


def write(path, *rows, finish=True):
    results = Results.start(path, "ops", "fastscore bench ops", {"threads": 1})
    for row in rows:
        results.add(row)
    if finish:
        results.finish()
    return results


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "r.json"
    rows = timed(), Row("b", {}, "failed", "wrong answer"), Row("c", {}, "skipped", "no GPU")
    write(path, *rows)
    found = read_results(path)
    assert found.rows == rows
    assert (found.suite, found.command, found.finished) == ("ops", "fastscore bench ops", True)
    assert found.provenance == {"threads": 1}
    assert found.note == ""
    assert found.row("b") == rows[1]
    assert found.row("d") is None


def test_the_same_content_has_the_same_bytes(tmp_path):
    for name in ("a.json", "b.json"):
        write(tmp_path / name, timed(), timed("second"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2  # nothing temporary stays


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_run_stopped_in_the_middle_keeps_its_rows(tmp_path, rows):
    path = tmp_path / "r.json"
    write(path, *(timed(f"row{i}") for i in range(rows)), finish=False)
    found = read_results(path)
    assert not found.finished
    assert len(found.rows) == rows
    assert f"row{rows - 1}" in found.note if rows else "before its first row" in found.note


def test_a_row_that_a_reader_would_refuse_is_not_written(tmp_path):
    path = tmp_path / "r.json"
    results = write(path, timed(), finish=False)
    before = path.read_bytes()
    for row, word in (
        (timed(), "twice"),
        (dataclasses.replace(timed("b"), status="fine"), "fine"),
        (dataclasses.replace(timed("b"), status="failed"), "without a reason"),
        (dataclasses.replace(timed("b"), time=None), "without the other"),
        (dataclasses.replace(timed("b"), workload={"x": float("nan")}), "finite"),
        (dataclasses.replace(timed("b"), workload={"x": object()}), "plain"),
        (timed("b", (1.0, 2.0, 3.0)), "equal sittings"),
    ):
        assert word in sentence(results.add, row)
    assert path.read_bytes() == before
    results.finish()
    assert "finished" in sentence(results.add, timed("b"))


def test_files_that_are_none(tmp_path):
    path = tmp_path / "r.json"
    assert "does not exist" in sentence(read_results, path)
    assert "folder" in sentence(read_results, tmp_path)
    for content, words in (
        (b" \n", ["empty"]),
        (b"\xff\xfe\x00", ["no text"]),
        (b'{\n "format": fast', ["line 2", "column 12"]),
        (b'{"a": NaN}', ["NaN"]),
        (b"[" * 100_000, ["deeply"]),
        (b"[1, 2]", ["no result file"]),
        (b'{"benchmarks": [], "machine_info": {}}', ["no result file"]),
    ):
        path.write_bytes(content)
        said = sentence(read_results, path)
        assert all(word in said for word in ["r.json", *words]), said


@pytest.mark.parametrize(
    ("version", "words"), [(2, "update fastscore"), (0, "run the suite"), ("1", "not a number")]
)
def test_other_versions(tmp_path, version, words):
    path = tmp_path / "r.json"
    write(path, timed())
    path.write_text(path.read_text().replace('"version": 1', f'"version": {json.dumps(version)}'))
    assert words in sentence(read_results, path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "r.json"
    write(path, timed())
    whole = path.read_bytes()
    for size in range(len(whole.rstrip()) - 1, 0, -97):
        path.write_bytes(whole[:size])
        assert "line" in sentence(read_results, path)


def change(path, edit):
    found = json.loads(path.read_text())
    edit(found, found["rows"][0])
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda f, r: r.pop("macs"), "lacks macs"),
        (lambda f, r: r.update(speed=3), "'speed'"),
        (lambda f, r: f.update(more=1), "'more'"),
        (lambda f, r: f.pop("rows"), "lacks rows"),
        (lambda f, r: f.update(rows={}), "a list"),
        (lambda f, r: f["rows"].append(5), "row 2"),
        (lambda f, r: f["rows"].append(r), "twice"),
        (lambda f, r: r.update(name=3), "name"),
        (lambda f, r: r.update(macs=1.5), "macs"),
        (lambda f, r: r.update(macs=True), "macs"),
        (lambda f, r: r.update(workload=[]), "workload"),
        (lambda f, r: r.update(energy={"none": ""}), "energy"),
        (lambda f, r: r.update(bound={"name": "x"}), "bound lacks"),
        (lambda f, r: r["rounds"].update(unit="ms"), "'ms'"),
        (lambda f, r: r["rounds"].update(values=[]), "none"),
        (lambda f, r: r["rounds"].update(values=[1, 2, 3, -1]), "-1"),
        (lambda f, r: r["rounds"].update(values=[1, 2, 3, "4"]), "'4'"),
        (lambda f, r: r["rounds"].update(reference=[1.0]), "reference"),
        (lambda f, r: r["rounds"].update(sittings=3), "sittings"),
        (lambda f, r: r["time"].update(median=5.0), "median"),
        (lambda f, r: r["check"].update(error=None), "error"),
        (lambda f, r: r.update(reason=7), "reason"),
        (lambda f, r: f.update(finished="yes"), "finished"),
    ],
)
def test_rows_of_another_shape(tmp_path, edit, words):
    path = tmp_path / "r.json"
    write(path, timed())
    change(path, edit)
    assert words in sentence(read_results, path)


def test_sittings_join():
    part = Rounds((1.0, 2.0), (3.0, 4.0))
    assert Rounds.joined([part, part]) == Rounds((1.0, 2.0) * 2, (3.0, 4.0) * 2, 2)
    assert Rounds.joined([Rounds((1.0,))] * 3) == Rounds((1.0,) * 3, None, 3)
    assert "same number" in sentence(Rounds.joined, [part, Rounds((1.0,), (2.0,))])


def test_quantiles_are_between_the_nearest_two():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.25) == 1.25
    assert quantile([7.0], 0.99) == 7.0
    assert "no values" in sentence(quantile, [], 0.5)
