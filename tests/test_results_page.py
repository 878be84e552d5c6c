"""docs/results.md from result files: every row there, what is missing named, ratios right."""

import json

import pytest


@pytest.fixture(scope="module")
def costs(bench):
    """Result of the tiny networks with made-up memory, and no times."""
    contestants, headline = bench("contestants"), bench("headline")
    rows = {
        headline.row_name(c, g): {
            str(b): {"weights": {"total": 10**6}, "tensor_peak": b * 10**6 * (1 + i)}
            for b in (1, 64)
        }
        for i, c in enumerate(contestants.CONTESTANTS)
        for g in (False, True)
    }
    record = {
        "commit": {"id": "0123456789abcdef", "dirty": False},
        "versions": {"torch": "2.11.0"},
        "processor": {"model": "CPU", "cores": 2},
        "threads": 2,
        "load": [0.5, 0, 0],
        "warnings": ["it was busy"],
    }
    part = {"provenance": record, "command": "python bench/headline.py"}
    return {
        "size": "tiny",
        "static": {**part, "rows": headline.static("tiny")},
        "memory": {**part, "rows": rows},
        "energy": {**part, "rows": {name: {"none": "there is no counter"} for name in rows}},
        "full_resolution": headline.full_resolution("tiny"),
    }


def test_costs_are_those_of_the_networks(costs):
    static = costs["static"]["rows"]
    ours, theirs = (static[f"{c}/guided"] for c in ("scoresubnet", "unet-equal-total"))
    assert ours["parameters"] == 2282174
    assert ours["trainable"] == 1272660
    # the pair has the same classifier beside its U-Net, and alone it has none
    alone = static["unet-equal-total/unguided"]
    assert theirs["parameters"] - alone["parameters"] == ours["parameters"] - ours["trainable"]
    assert sum(theirs["macs_by_part"].values()) == theirs["macs"] > alone["macs"]
    # a stage on four times as many positions costs four times as much; only embeddings do not
    full = costs["full_resolution"]["unet-equal-total/unguided"]
    assert full == pytest.approx(4 * alone["macs"], rel=0.15)


def test_the_page_has_every_row_and_names_what_is_missing(bench, costs, tmp_path):
    page = bench("results_page")
    (tmp_path / "headline").mkdir()
    (tmp_path / "headline" / "costs-tiny-cpu.json").write_text(json.dumps(costs))
    text = page.page(tmp_path, [])
    for contestant, guided in page.ROWS:
        assert text.count(page.title(contestant, guided)) >= 1
    # 1 MB of weights and 64 of a clip each, and twice as much a clip
    assert "129.0 (1.98x)" in text
    assert "`paper` on cpu: not measured" in text
    assert "Training: not measured" in text
    # nothing that was timed is there: a busy machine does not matter
    assert "it was busy" not in text
    assert "commit 0123456789." in text
    assert text.count("not measured") > 24, "no quality was given"


def test_the_step_at_which_a_loss_was_reached(bench):
    reached = bench("headline_training").reached
    assert reached([10, 20, 30], [1.0, 0.5, 0.4], 0.75) == 15
    assert reached([10, 20, 30], [1.0, 0.5, 0.4], 2.0) == 10
    assert reached([10, 20, 30], [1.0, 0.5, 0.4], 0.3) is None


def test_damaged_results_are_named(bench, tmp_path):
    page, quality, headline = bench("results_page"), bench("headline_quality"), bench("headline")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken.json is not JSON"):
        page.load(broken)
    with pytest.raises(ValueError, match=r"broken.json, line 1 is not a row"):
        quality.read(broken)
    with pytest.raises(ValueError, match="not JSON of this benchmark"):
        headline.read(broken, "tiny", "cpu")
    broken.write_text('{"format": "fastscore-headline", "version": 0}')
    with pytest.raises(ValueError, match="remove it or choose another"):
        headline.read(broken, "tiny", "cpu")


def test_a_baseline_without_its_weights_says_how_they_are_made(bench, tmp_path, monkeypatch):
    contestants = bench("contestants")
    monkeypatch.setattr(contestants, "ARTIFACTS", tmp_path)
    with pytest.raises(ValueError, match="fastscore train unet --preset tiny-equal-total"):
        contestants.trained_preset("unet-equal-total", tmp_path / "preset")
