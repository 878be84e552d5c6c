"""``fastscore profile``: the page and the trace it writes, and what it refuses."""

import gzip
import html.parser
import json
import re
import signal

import pytest
from refusals import everything

from fastscore import cli
from fastscore.measure import roofline
from fastscore.measure.roofline import Level, Peaks
from fastscore.profiler import collect, page
from fastscore.profiler.report import Row, timeline

PEAKS = Peaks("cpu", 1, (Level("memory", None, 2**26, 1e10, 1e10),), {"fp32": 1e11, "bf16": 1e11})
# elements that have no end tag
VOID = {"meta", "link", "br"}


class Page(html.parser.HTMLParser):
    """Elements of a page, checked for closing in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.attributes = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [found for name, found in self.attributes if name == tag]


@pytest.fixture(scope="module")
def written(preset, tmp_path_factory):
    """Page and trace of a small preset, and the report that the page shows."""
    folder = tmp_path_factory.mktemp("profile")
    make, made = page.to_html, []

    def keep(report):
        made.append(report)
        return make(report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "peaks", lambda device: PEAKS)
        patch.setattr(page, "to_html", keep)
        arguments = ["profile", "--preset", preset, "--label", "no", "--nfe", "3", "--rounds", "1"]
        out = folder / "report.html"
        assert cli.main([*map(str, arguments), "--quiet", "--out", str(out)]) == 0
    assert everything(folder) == ["report.html", "report.trace.json.gz"]
    return out.read_text(encoding="utf-8"), folder / "report.trace.json.gz", made[0]


@pytest.fixture(scope="module")
def report(written):
    return written[2]


@pytest.fixture(scope="module")
def parsed(written):
    return Page(written[0])


class TestPage:
    def test_it_needs_nothing_but_itself(self, written, parsed):
        text = written[0]
        assert len(text.encode()) < page.LIMIT / 20
        loaded = [a.get("src") or a.get("href") for _, a in parsed.attributes]
        assert {url[0] for url in loaded if url} <= {"#", "d"}
        assert [a["href"] for a in parsed.all("link")] == ["data:,"]
        assert not re.search(r"https?://|url\(|@import", text)

    def test_every_section_is_there_and_linked(self, parsed):
        sections = [a["id"] for a in parsed.all("section")]
        links = [a["href"].removeprefix("#") for a in parsed.all("a")]
        assert sections == [name for name, _, _ in page._SECTIONS]
        assert links == ["content", *sections]
        ids = {a["id"] for _, a in parsed.attributes if "id" in a}
        assert set(links) <= ids

    def test_it_can_be_read_by_ear_and_used_by_keyboard(self, parsed):
        assert parsed.all("html")[0]["lang"] == "en"
        for picture in parsed.all("svg"):
            assert picture["role"] == "img"
            assert picture["aria-label"]
        regions = [a for _, a in parsed.attributes if a.get("class") in ("box", "view")]
        assert regions
        for region in regions:
            assert (region["tabindex"], region["role"]) == ("0", "region")
            assert region["aria-label"]
        assert all(a["type"] == "button" for a in parsed.all("button"))

    def test_it_says_what_was_measured_and_how_it_was_skewed(self, written):
        text = written[0]
        for words in ("Under the profiler the run took", "nothing scaled", "in one batched pass"):
            assert words in text
        for phase in ("classifier forward", "both VJPs", "class VJP", "taps", "subnet", "vocoder"):
            assert f"</i>{phase}</th>" in text
        assert "fastscore profile --preset FOLDER --label no --batch 1 --nfe 3" in text

    def test_the_trace_beside_it_opens(self, written):
        raw = json.loads(gzip.decompress(written[1].read_bytes()))
        names = {event.get("name") for event in raw["traceEvents"]}
        assert {"phase: both VJPs", "phase: vocoder"} <= names
        assert "traceName" not in raw

    def test_a_page_that_grew_too_large_is_refused(self, report, monkeypatch):
        monkeypatch.setattr(page, "LIMIT", 1000)
        with pytest.raises(ValueError, match="fewer evaluations"):
            page.to_html(report)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--device", "cuda"], "PyTorch sees 0 GPUs"),
            (["--mode", "graphs"], "needs a CUDA device"),
            (["--label", "eleven"], "label 'eleven' is unknown"),
            (["--preset", "nowhere"], "nowhere"),
            (["--backend", "fast"], "backend 'fast' is unknown"),
            (["--nfe", "0"], "nfe 0"),
            (["--batch", "0"], "at least 1"),
            (["--threads", "0"], "at least 1"),
            (["--out", "nowhere/report.html"], "does not exist"),
            (["--out", "report.pdf"], "ends in .html"),
            (["--out", "/proc/report.html"], "cannot write /proc/report"),
        ],
    )
    def test_bad_input_is_refused_and_leaves_nothing(
        self, preset, here, refused, arguments, sentence
    ):
        if arguments[0] == "--device":
            import torch

            if torch.cuda.is_available():
                pytest.skip("there is a GPU")
        chosen = arguments if "--preset" in arguments else ["--preset", preset, *arguments]
        assert sentence in refused("profile", "--quiet", *chosen)
        assert everything(here) == []

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_killed_run_leaves_what_there_was(self, preset, here, monkeypatch, number):
        (here / "profile.html").write_text("before")

        def killed(*_, **__):
            signal.raise_signal(number)

        monkeypatch.setattr(collect, "record", killed)
        arguments = ["profile", "--preset", str(preset), "--quiet"]
        if number == signal.SIGTERM:
            with pytest.raises(SystemExit):
                cli.main(arguments)
        else:
            assert cli.main(arguments) == cli.EXIT_INTERRUPTED
        assert everything(here) == ["profile.html"]
        assert (here / "profile.html").read_text() == "before"


def test_a_long_timeline_leaves_out_its_middle():
    from fastscore.profiler.events import Span, Trace

    marks = [Span("evaluation guided", 10.0 * i, 10.0 * i + 9, "mark", 0) for i in range(500)]
    trace = Trace(5000.0, [], [], [], marks, [], 0, 0, False)
    rows, left_out = timeline(trace)
    assert left_out == 440
    assert [row.words for row in (rows[0], rows[1], rows[-2], rows[-1])] == [
        *("before", "1 guided", "500 guided", "after")
    ]
    assert rows[1] == Row("1 guided", 0.0, 10.0, [])
