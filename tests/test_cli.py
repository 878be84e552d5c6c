"""The program as people call it."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from refusals import refusal
from small_models import LABELS
from small_presets import speech_like
from speech_folders import write_folder

from fastscore import Pipeline, __version__
from fastscore.checkpoint import load_checkpoint
from fastscore.cli import main

soundfile = pytest.importorskip("soundfile")

COMMANDS = (
    ["sample"],
    ["classify"],
    ["vocode"],
    ["info"],
    ["evaluate"],
    ["train"],
    ["train", "classifier"],
    ["train", "score"],
    ["train", "vocoder"],
    ["train", "recogniser"],
)


@pytest.fixture(scope="module")
def preset(preset):
    """As it stands on a command line."""
    return str(preset)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "speech")


@pytest.fixture
def recording(here):
    soundfile.write(here / "a.flac", speech_like(9000, 8000).numpy(), 8000)
    return here / "a.flac"


def files(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: fastscore {' '.join(command)}")
    assert len(text.splitlines()) > 5


def test_help_is_quick_and_loads_no_framework():
    probe = (
        "import sys, time; start = time.process_time(); from fastscore.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(time.process_time() - start, {'torch', 'numpy', 'tqdm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    *help_text, last = done.stdout.splitlines()
    seconds, loaded = last.split(" ", 1)
    assert float(seconds) < 0.5
    assert loaded == "set()"
    text = " ".join(help_text)
    for command in COMMANDS:
        assert command[0] in text


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastscore {__version__}\n"


class TestSample:
    def test_writes_every_label_and_a_picture(self, preset, here, capsys):
        arguments = ["sample", "yes", "up", "--n", "2", "--out", "deep/er", "--plot"]
        assert main([*arguments, "--preset", preset, "--seed", "5"]) == 0
        names = ["yes_000.wav", "yes_001.wav", "up_002.wav", "up_003.wav"]
        assert files(here / "deep" / "er") == sorted([*names, "mels.png"])
        expected = Pipeline.from_pretrained(preset).sample(["yes", "yes", "up", "up"], seed=5)
        for name, wave in zip(names, expected.waves, strict=True):
            data, _ = soundfile.read(here / "deep" / "er" / name, dtype="int16")
            assert np.array_equal(data, (wave.double() * 32768).round().clamp(-32768, 32767))
        said = capsys.readouterr()
        assert [line for line in said.out.splitlines() if line.endswith(".wav")] == [
            f"deep/er/{name}" for name in names
        ]
        assert "6 evaluations each (euler_ancestral, guidance 2, seed 5)" in said.out
        assert "RTF " in said.out
        for stage in ("import", "load", "warm-up", "sampling", "vocoder", "writing"):
            assert f"{stage} " in said.out
        # a bar with the number of steps, to the end
        assert "24/24" in said.err

    def test_unguided_where_no_label_is_named(self, preset, here, capsys):
        assert main(["sample", "--preset", preset, "--n", "2", "--quiet"]) == 0
        assert files(here) == ["unguided_000.wav", "unguided_001.wav"]
        said = capsys.readouterr()
        assert "unguided" in said.out
        assert said.err == ""

    def test_one_file_by_name(self, preset, here):
        main(["sample", "yes", "--preset", preset, "--out", "seven.wav", "--plot", "--quiet"])
        assert files(here) == ["seven.png", "seven.wav"]

    def test_a_file_can_be_drawn_again(self, preset, here):
        arguments = ["sample", "no", "--preset", preset, "--quiet", "--steps", "3", "--out"]
        main([*arguments, "many", "--n", "3"])
        main([*arguments, "one", "--first", "2"])
        assert files(here / "one") == ["no_002.wav"]
        again, first = ((here / d / "no_002.wav").read_bytes() for d in ("one", "many"))
        assert again == first

    def test_arguments_reach_the_pipeline(self, preset, here, capsys):
        options = [
            "--sampler",
            "heun",
            "--steps",
            "4",
            "--guidance",
            "0.5",
            "--interval",
            "0.5",
            "2",
        ]
        main(["sample", "yes", "--preset", preset, "--quiet", *options])
        assert "7 evaluations each (heun, guidance 0.5, seed 0)" in capsys.readouterr().out
        expected = Pipeline.from_pretrained(preset).sample(
            "yes", sampler="heun", steps=4, guidance=0.5, interval=(0.5, 2.0)
        )
        data, _ = soundfile.read(here / "yes_000.wav")
        assert np.abs(data - expected.waves[0].clamp(-1, 1).numpy()).max() < 1e-4


class TestHearing:
    def test_classify(self, preset, recording, capsys):
        assert main(["classify", str(recording), str(recording), "--preset", preset]) == 0
        heard = Pipeline.from_pretrained(preset).classify(recording)
        best = next(iter(heard))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith(f"{recording}: {best} {100 * heard[best]:.1f} %, ")
        assert lines[0].count("%") == 3

    def test_classify_as_json(self, preset, recording, capsys):
        main(["classify", str(recording), "--preset", preset, "--json"])
        said = json.loads(capsys.readouterr().out)
        assert said["file"] == str(recording)
        assert set(said["probabilities"]) == set(LABELS)

    def test_vocode(self, preset, recording, here, capsys):
        assert main(["vocode", str(recording), "--out", "copy.wav", "--preset", preset]) == 0
        data, rate = soundfile.read(here / "copy.wav")
        assert rate == 16000
        assert len(data) == 18000
        expected = Pipeline.from_pretrained(preset).vocode_file(recording).clamp(-1, 1)
        assert np.abs(data - expected.numpy()).max() < 1e-4
        assert "RTF" in capsys.readouterr().out

    def test_vocode_with_another_vocoder(self, preset, recording, here):
        """Its own Mel is used, whatever the preset's."""
        from fastscore.config import HifiGanConfig
        from fastscore.vocoder import HifiGanGenerator, save_vocoder

        config = HifiGanConfig(upsample_initial_channel=16)
        save_vocoder(here / "other.safetensors", HifiGanGenerator(config))
        arguments = ["vocode", str(recording), "--out", "copy.wav", "--preset", preset]
        assert main([*arguments, "--vocoder", "other.safetensors"]) == 0
        assert soundfile.info(here / "copy.wav").frames == 18000


class TestInfo:
    def test_of_a_preset(self, preset, capsys):
        assert main(["info", preset]) == 0
        text = capsys.readouterr().out
        for part in (
            "yes, no, up, down",
            "8 x 8 x 12",
            "euler_ancestral",
            "hop_length",
            "together",
        ):
            assert part in text

    def test_as_json(self, preset, capsys):
        assert main(["info", preset, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["defaults"]["nfe"] == 6
        assert facts["taps"] == {"stage1": [8, 8, 12], "stage2": [16, 4, 6]}
        assert facts["macs"]["guided"] > facts["macs"]["unguided"] > 0
        assert facts["bytes"]["together"] > 100_000

    def test_of_an_architecture(self, capsys):
        assert main(["info", "--model", "tiny"]) == 0
        text = capsys.readouterr().out
        assert "published: 16,440,000,000" in text
        assert "stage3" in text


class TestTrain:
    def test_a_classifier_a_score_and_a_preset_of_them(self, data, here, monkeypatch, capsys):
        """What training writes is what sampling reads; architectures are shrunk to be quick."""
        from small_presets import VOCODER

        from fastscore import config
        from fastscore.config import ClassifierConfig, SpectralVocoderConfig, SubnetConfig
        from fastscore.vocoder import SpectralGenerator, save_vocoder

        small = {"channels": (8, 16), "blocks": (1, 1), "groups": 4, "emb_dim": 16}
        monkeypatch.setitem(config.CLASSIFIERS, "tiny", ClassifierConfig(**small))
        score = SubnetConfig(**small, attention=(False, True), heads=2)
        monkeypatch.setitem(config.SUBNETS, "tiny", score)
        common = ["--data", str(data), "--steps", "2", "--batch-size", "4", "--threads", "1"]
        common += ["--cache-dir", "cache", "--precision", "32-true", "--out", "preset"]
        labels = ["--labels", "one,two,three"]
        assert main(["train", "classifier", *common[:-1], "classifier", *labels]) == 0
        frozen = "classifier/classifier.safetensors"
        # the score may be trained on fewer labels than the classifier knows
        options = ["--classifier", frozen, "--labels", "two", "--gradient-taps-only"]
        assert main(["train", "score", *common[:-1], "score", *options]) == 0
        stored = load_checkpoint("score/score.safetensors", "score").config
        assert stored["subnet"]["feature_taps"] is False
        assert stored["classifier"]["labels"] == ["one", "two", "three"]
        with (here / "score" / "metrics.csv").open() as table:
            assert "validation/loss" in csv.DictReader(table).fieldnames
        folder = here / "preset"
        folder.mkdir()
        for name in ("classifier", "score"):
            (folder / f"{name}.safetensors").write_bytes(
                (here / name / f"{name}.safetensors").read_bytes()
            )
        (folder / "preset.json").write_text("{}")
        shape = {
            k: getattr(VOCODER, k) for k in ("dim", "hidden", "blocks", "fine_dim", "pitch_dim")
        }
        save_vocoder(
            folder / "vocoder.safetensors", SpectralGenerator(SpectralVocoderConfig(**shape))
        )
        capsys.readouterr()
        assert main(["sample", "three", "--preset", "./preset", "--nfe", "2", "--out", "s"]) == 0
        assert files(here / "s") == ["three_000.wav"]

    def test_goes_on_or_refuses_to(self, data, here, capsys, monkeypatch):
        from fastscore import config
        from fastscore.config import ClassifierConfig

        small = ClassifierConfig(channels=(8, 16), blocks=(1, 1), groups=4, emb_dim=16)
        monkeypatch.setitem(config.CLASSIFIERS, "tiny", small)
        common = ["train", "classifier", "--data", str(data), "--labels", "one,two,three"]
        common += ["--batch-size", "2", "--threads", "1", "--cache-dir", "cache"]
        common += ["--precision", "32-true", "--out", "run", "--seed", "3"]
        assert main([*common, "--steps", "1"]) == 0
        assert main([*common, "--steps", "1", "--no-resume"]) == 2
        assert "already holds a training" in capsys.readouterr().err
        assert main([*common, "--steps", "2"]) == 2
        assert main([*common, "--steps", "2", "--extend"]) == 0
        assert json.loads((here / "run" / "run.json").read_text())["steps"] == 2
        assert main([*common, "--steps", "2", "--extend", "--minutes", "0"]) == 2
        assert "--minutes 0.0 must be positive" in capsys.readouterr().err
        # a time that is over when the first step ends
        common[common.index("run")] = "short"
        assert main([*common, "--steps", "3", "--minutes", "1e-6"]) == 0
        assert "stopped at step 1 of 3; the same command goes on" in capsys.readouterr().out
        assert main([*common, "--steps", "3"]) == 0
        assert json.loads((here / "short" / "run.json").read_text())["sessions"] == 2

    @pytest.mark.parametrize("part", ["vocoder", "recogniser"])
    def test_builds_the_other_trainings(self, part, data, here):
        """Task and settings as ``run`` gets them; their steps are tested where they are defined."""
        from fastscore.cli import make_parser

        arguments = ["train", part, "--data", str(data), "--labels", "one,two,three", "--out", "o"]
        args = make_parser().parse_args(
            [*arguments, "--batch-size", "2", "--lr", "0.5", "--cache-dir", "cache"]
        )
        task, loop = args.build(args)
        assert task.name == part
        assert (loop.batch_size, loop.lr) == (2, 0.5)
        batch = task.batch(0, torch.Generator().manual_seed(0), 0, 1)
        assert len(batch["wave"]) == 2


def test_evaluate_draws_judges_and_writes(preset, here, shared_data, capsys, monkeypatch):
    """The command hands its arguments to the evaluation, which is tested on its own."""
    from fastscore.metrics import evaluate as module

    seen = {}

    class Written:
        def to_text(self):
            return "a table"

    def record(pipeline, roots, settings, out, cache_dir):
        seen.update(pipeline=pipeline, roots=roots, settings=settings, out=out, cache=cache_dir)
        return Written()

    monkeypatch.setattr(module, "evaluate", record)
    arguments = ["evaluate", preset, "--n", "20", "--nfe", "3", "--batch-size", "5", "--seed", "4"]
    arguments += ["--guidance", "1.5", "--data", str(shared_data / "digits-human"), "--out", "r"]
    assert main([*arguments, "--cache-dir", "c", "--dnsmos-clips", "0"]) == 0
    assert seen["pipeline"].batch_size == 5
    settings = seen["settings"]
    assert (settings.n, settings.nfes, settings.gamma) == (20, (3, None), 1.5)
    assert (settings.seed, settings.batch_size, settings.dnsmos_clips) == (4, 5, 0)
    assert str(seen["out"]) == "r"
    assert str(seen["cache"]) == "c"
    assert "a table" in capsys.readouterr().out


def test_a_pipeline_is_what_an_evaluation_needs(preset):
    """Names and signatures of the protocol that evaluations rely on."""
    pipe = Pipeline.from_pretrained(preset, batch_size=2)
    drawn = pipe.sample(["yes", None, "up"], guidance=None, nfe=None, seed=2**50)
    assert drawn.nfe == 6
    assert pipe.vocode(drawn.mels).shape == drawn.waves.shape
    found = pipe.guide_labels(drawn.mels)
    assert found.dtype == torch.int64
    assert found.shape == (3,)
    assert (pipe.guidance, pipe.frames, pipe.mel_config.n_mels) == (2.0, 24, 16)
    json.dumps(pipe.describe())


def test_recordings_may_be_named_by_the_environment(here, capsys, monkeypatch):
    monkeypatch.delenv("FASTSCORE_DATA", raising=False)
    assert "give --data ROOT, or set FASTSCORE_DATA" in refusal(capsys, "evaluate")
    monkeypatch.setenv("FASTSCORE_DATA", str(here / "absent"))
    assert "absent" in refusal(capsys, "evaluate", "--dnsmos-clips", "0")
