"""What people get wrong: one sentence, exit code 2 or ValueError, and nothing left behind."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import FileSizeLimit, everything
from small_presets import speech_like

from fastscore.cli import main
from fastscore.denoiser import TapDenoiser

soundfile = pytest.importorskip("soundfile")


def audio(path, kind):
    """A file that is no usable recording."""
    wave = speech_like(16000).numpy()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        soundfile.write(path, wave, 16000)
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "text":
        path.write_text("these are words about sound")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"wave": [1, 2, 3]}))
    elif kind == "nan":
        wave[77] = np.nan
        soundfile.write(path, wave, 16000, subtype="FLOAT")
    elif kind == "silent":
        soundfile.write(path, 0 * wave, 16000)
    elif kind == "ten minutes":
        soundfile.write(path, np.tile(wave[:8000], 600), 8000)
    elif kind == "folder":
        path.mkdir()
    elif kind == "no samples":
        soundfile.write(path, wave[:0], 16000)
    else:
        assert kind == "missing"
    return path


RECORDINGS = {
    "missing": "no such file",
    "empty": "0 bytes",
    "truncated": "truncated",
    "text": "not wav, flac or ogg",
    "pickle": "not wav, flac or ogg",
    "nan": "NaN",
    "silent": "silent",
    "ten minutes": "600.0 s of audio exceed the limit of 60 s",
    "folder": "not a file",
    "no samples": "no samples",
}


class TestRecordings:
    @pytest.mark.parametrize("kind", RECORDINGS)
    def test_are_refused_by_classify_and_vocode(self, kind, preset, pipe, here, refused):
        path = audio(here / "a.wav", kind)
        before = everything(here)
        for command in (["classify", path], ["vocode", path, "--out", here / "new" / "b.wav"]):
            said = refused(*command, "--preset", preset)
            assert str(path) in said
            assert RECORDINGS[kind] in said
            assert everything(here) == before
        for refuse in (pipe.classify, pipe.vocode_file):
            with pytest.raises(ValueError, match=RECORDINGS[kind]):
                refuse(path)

    def test_good_files_are_still_classified(self, preset, here, capsys):
        soundfile.write("good.wav", speech_like().numpy(), 16000)
        audio(here / "bad.wav", "empty")
        assert main(["classify", "bad.wav", "good.wav", "--preset", str(preset)]) == 2
        said = capsys.readouterr()
        assert said.out.startswith("good.wav: ")
        assert said.err.startswith("fastscore: error: bad.wav: the file is empty")

    @pytest.mark.parametrize(
        ("wave", "sentence"),
        [
            (torch.zeros(0), "floats"),
            (torch.zeros(2, 16000), r"shape \(2, 16000\)"),
            (torch.ones(16000, dtype=torch.int16), "int16"),
            (torch.full((16000,), float("nan")), "NaN"),
            (torch.full((16000,), 0.5), "silent"),
        ],
    )
    def test_unusable_waves(self, pipe, wave, sentence):
        with pytest.raises(ValueError, match=sentence):
            pipe.classify(wave)

    def test_sample_rates_that_are_none(self, pipe, here):
        with pytest.raises(ValueError, match="positive whole numbers"):
            pipe.classify(speech_like(), sample_rate=0)
        soundfile.write("a.wav", speech_like().numpy(), 16000)
        with pytest.raises(ValueError, match="has its own"):
            pipe.classify("a.wav", sample_rate=8000)

    def test_mels_of_another_shape(self, pipe):
        for refuse in (pipe.vocode, pipe.probabilities):
            with pytest.raises(ValueError, match="shape"):
                refuse(torch.zeros(2, 80, 24))
        with pytest.raises(ValueError, match="NaN"):
            pipe.vocode(torch.full((1, 16, 24), float("nan")))


NAN = float("nan")
REQUESTS = [
    ({"labels": "eleven"}, ["eleven"], "'eleven' is unknown; choose from yes, no, up, down"),
    ({"labels": ["yes", "ja"]}, ["yes", "ja"], "'ja' is unknown; choose from"),
    ({"n": 0}, ["--n", "0"], "n 0 must be"),
    ({"n": -3}, ["--n", "-3"], "n -3 must be"),
    ({"steps": 0}, ["--steps", "0"], "steps 0 must be a whole number of at least 1"),
    ({"steps": -5}, ["--steps", "-5"], "steps -5 must be"),
    ({"nfe": 0}, ["--nfe", "0"], "nfe 0 must be"),
    ({"guidance": NAN}, ["yes", "--guidance", "nan"], "guidance nan must be a finite number"),
    ({"guidance": -1.0}, ["yes", "--guidance", "-1"], "guidance -1.0 must be"),
    ({"guidance": float("inf")}, ["yes", "--guidance", "inf"], "guidance inf must be"),
    ({"seed": -1}, ["--seed", "-1"], "seed -1 is not a whole number from 0 to"),
    ({"seed": 2**63}, ["--seed", str(2**63)], "seed 9223372036854775808 is not"),
    ({"first": -1}, ["--first", "-1"], "first -1 must be"),
    ({"first": 2**32}, ["--first", str(2**32)], "exceed 2^32"),
    ({"sampler": "magic"}, ["--sampler", "magic"], "sampler 'magic' is unknown; choose one of"),
    ({"schedule": "fine"}, ["--schedule", "fine"], "schedule 'fine' is unknown; choose one of"),
    (
        {"options": {"heat": 2.0}},
        ["--option", "heat=2"],
        "sampler euler_ancestral has no option 'heat'; it has eta, s_noise",
    ),
    ({"options": {"eta": 7.0}}, ["--option", "eta=7"], "eta 7.0 must be finite and from 0 to 1"),
    (
        {"sampler": "unipc", "steps": 1, "options": {"order": 2}},
        ["--sampler", "unipc", "--steps", "1", "--option", "order=2"],
        "order 2",
    ),
    ({"interval": (3.0, 1.0)}, ["--interval", "3", "1"], "0 <= low < high"),
    ({"interval": (NAN, 1.0)}, ["--interval", "nan", "1"], "0 <= low < high"),
    ({"batch_size": 0}, ["--batch-size", "0"], "batch_size 0 must be"),
]


class TestRequests:
    @pytest.mark.parametrize(
        ("options", "arguments", "sentence"), REQUESTS, ids=[" ".join(r[1]) for r in REQUESTS]
    )
    def test_are_refused(self, options, arguments, sentence, preset, pipe, here, refused):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            pipe.sample(**options)
        said = refused("sample", "--preset", preset, "--out", "new/er", "--quiet", *arguments)
        assert sentence in said
        assert everything(here) == []

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"labels": []}, "empty list"),
            ({"labels": ["yes", "no"], "n": 3}, "a list of 2 labels"),
            ({"labels": ["yes", "no"], "guidance": [1.0]}, "1 entries for 2 samples"),
            ({"labels": ["yes", "no"], "guidance": torch.tensor([1.0, NAN])}, "guidance nan"),
            ({"guidance": "3"}, "guidance '3'"),
            ({"labels": [3]}, "label 3 is unknown"),
            ({"steps": 2.5}, "steps 2.5"),
            ({"steps": True}, "steps True"),
            ({"steps": 2, "nfe": 2}, "both given"),
            ({"seed": 1.0}, "seed 1.0"),
            ({"seed": None}, "seed None"),
        ],
    )
    def test_are_refused_from_python(self, pipe, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            pipe.sample(**options)

    def test_guidance_that_breaks_sampling_is_named(self, pipe):
        with pytest.raises(ValueError, match=r"diverged at guidance 1e\+38"):
            pipe.sample("yes", guidance=1e38, interval=(0.0, 100.0))

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["sing"],
            ["sample", "--loud"],
            ["sample", "--n", "many"],
            ["sample", "--steps", "3", "--nfe", "3"],
            ["classify"],
            ["vocode", "a.wav"],
            ["train"],
        ],
    )
    def test_command_lines_that_cannot_be_read(self, arguments, refused):
        assert "--help" in refused(*arguments)

    def test_devices_that_are_not_there(self, preset, here, refused):
        for device, sentence in (("tpu", "tpu"), ("mps", "use cpu or cuda"), ("cuda:99", "GPUs")):
            said = refused("sample", "--preset", preset, "--device", device, "--out", "new")
            assert sentence in said
        assert "threads 0" in refused("sample", "--preset", preset, "--threads", "0")
        assert everything(here) == []


class TestOutput:
    def test_a_file_where_a_folder_should_be(self, preset, here, refused):
        (here / "out").write_text("mine")
        for out in ("out", "out/deeper"):
            said = refused("sample", "--preset", preset, "--out", out)
            assert "choose another output folder" in said
        assert (here / "out").read_text() == "mine"

    def test_a_folder_where_a_file_should_be(self, preset, here, refused):
        (here / "out" / "yes_001.wav").mkdir(parents=True)
        said = refused("sample", "yes", "--n", "2", "--preset", preset, "--out", "out", "--quiet")
        assert "a folder has that name" in said
        # not even the file that could have been written
        assert everything(here) == ["out", "out/yes_001.wav"]
        soundfile.write("a.wav", speech_like().numpy(), 16000)
        assert "is a folder" in refused("vocode", "a.wav", "--out", "out", "--preset", preset)

    def test_one_file_for_several_samples(self, preset, here, refused):
        said = refused("sample", "yes", "--n", "2", "--out", "a.wav", "--preset", preset)
        assert "one file for 2 samples" in said
        assert "mp3" in refused("sample", "yes", "--out", "a.mp3", "--preset", preset)

    def test_a_place_that_cannot_be_written(self, preset, here, refused):
        # refuses everybody, unlike permissions, which the superuser has
        said = refused("sample", "--preset", preset, "--out", "/proc/fastscore")
        assert "cannot make the folder /proc/fastscore" in said

    @pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
    def test_a_folder_without_permission(self, preset, here, refused):
        (here / "locked").mkdir(mode=0o500)
        assert "locked" in refused("sample", "--preset", preset, "--out", "locked")

    @pytest.mark.parametrize("limit", [0, 13_000])
    def test_a_full_disk(self, preset, here, refused, limit):
        """At 13 kB the wave fits, the picture does not: neither stays."""
        arguments = ["sample", "yes", "--preset", preset, "--quiet", "--plot", "--nfe", "2"]
        with FileSizeLimit(limit):
            said = refused(*arguments, "--out", "new/er")
        assert "File too large" in said
        assert str(Path("new/er")) in said
        assert ".fastscore-" not in said
        assert everything(here) == []

    def test_a_full_disk_keeps_what_was_there(self, preset, pipe, here):
        result = pipe.sample("yes", steps=1)
        pipe.save(result, "out")
        before = (here / "out" / "yes_000.wav").read_bytes()
        other = pipe.sample("yes", steps=2)
        with FileSizeLimit(4000), pytest.raises(ValueError, match="File too large"):
            pipe.save(other, "out")
        assert everything(here) == ["out", "out/yes_000.wav"]
        assert (here / "out" / "yes_000.wav").read_bytes() == before

    def test_a_picture_without_matplotlib(self, preset, here, refused, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        arguments = ["sample", "yes", "--preset", preset, "--quiet", "--plot", "--nfe", "1"]
        assert "pip install 'fastscore[plot]'" in refused(*arguments, "--out", "new")
        assert everything(here) == []


class TestInterruption:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_while_sampling(self, number, code, preset, here, monkeypatch, capsys):
        parts, calls = TapDenoiser.parts, []

        def interrupted(self, *arguments):
            calls.append(1)
            if len(calls) == 9:
                assert [p.name for p in (here / "a" / "b").iterdir()]  # work has begun
                os.kill(os.getpid(), number)
            return parts(self, *arguments)

        monkeypatch.setattr(TapDenoiser, "parts", interrupted)
        assert self.run("sample", "yes", "--n", "3", "--preset", preset, "--out", "a/b") == code
        assert everything(here) == []
        assert "Traceback" not in capsys.readouterr().err

    def test_while_writing(self, preset, here, monkeypatch, capsys):
        from fastscore import audio as files

        save, calls = files.save_wav, []

        def interrupted(*arguments):
            save(*arguments)
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(files, "save_wav", interrupted)
        (here / "kept").mkdir()
        assert self.run("sample", "yes", "--n", "3", "--preset", preset, "--out", "kept") == 130
        assert everything(here) == ["kept"]
        assert "interrupted" in capsys.readouterr().err

    def test_of_the_program_itself(self, preset, here):
        """The signal a terminal sends, to a process of its own."""
        command = [sys.executable, "-m", "fastscore", "sample", "yes", "--steps", "100000"]
        process = subprocess.Popen(
            [*command, "--preset", str(preset), "--out", "a/b"],
            stderr=subprocess.PIPE,
            text=True,
            # whatever runs the tests in the background may have had it ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        said = ""
        while "sampling" not in said:
            said += process.stderr.read(1)
            assert process.poll() is None, said
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
        rest = process.stderr.read()
        process.stderr.close()
        assert rest.rstrip().endswith("fastscore: interrupted")
        assert "Traceback" not in rest
        assert everything(here) == []

    @staticmethod
    def run(*arguments):
        try:
            return main([str(a) for a in arguments])
        except SystemExit as stop:
            return stop.code


def test_traceback_on_demand(preset):
    with pytest.raises(ValueError, match="unknown"):
        main(["--traceback", "sample", "eleven", "--preset", str(preset), "--quiet"])


def test_a_reader_that_has_gone():
    """As in ``fastscore info | head -1``: no complaint."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fastscore", "--version"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE
