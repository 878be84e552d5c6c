"""Presets whose parts are damaged or were not made for each other, and trainings asked wrongly."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from refusals import everything
from small_presets import VOCODER, write_preset, write_score
from torch import nn

from fastscore import Pipeline
from fastscore.checkpoint import load_checkpoint, save_checkpoint
from fastscore.cli import main
from fastscore.config import MelConfig, MelSpace, SigmaRange, SpectralVocoderConfig


@pytest.fixture
def broken(preset, tmp_path):
    """A copy of the preset, to be damaged."""
    return Path(shutil.copytree(preset, tmp_path / "broken"))


PARTS = ("classifier.safetensors", "score.safetensors", "vocoder.safetensors")


class TestPresets:
    def test_unknown_names_list_the_known(self, refused, here):
        said = refused("sample", "--preset", "digit")
        assert "preset 'digit' is neither one of those in the package (" in said
        (here / "empty").mkdir()
        said = refused("info", "./empty")
        assert "classifier.safetensors and score.safetensors and vocoder" in said

    @pytest.mark.parametrize("name", PARTS)
    @pytest.mark.parametrize("damage", ["empty", "truncated", "foreign", "pickle", "other kind"])
    def test_damaged_parts_are_named(self, name, damage, broken, refused, here):
        path = broken / name
        if damage == "empty":
            path.write_bytes(b"")
        elif damage == "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
        elif damage == "foreign":
            from safetensors.torch import save_file

            save_file({"weight": torch.ones(2)}, path)
        elif damage == "pickle":
            torch.save(nn.Linear(2, 2).state_dict(), path)
        else:
            other = PARTS[(PARTS.index(name) + 1) % 3]
            path.write_bytes((broken / other).read_bytes())
        said = refused("sample", "yes", "--preset", broken, "--out", "new")
        assert str(path) in said
        assert everything(here) == []

    @pytest.mark.parametrize("name", PARTS[:2])
    @pytest.mark.parametrize("key", ["mel", "space", "sigma", "classifier"])
    def test_configurations_that_are_missing(self, name, key, broken):
        stored = load_checkpoint(broken / name)
        del stored.config[key]
        save_checkpoint(broken / name, stored.kind, stored.config, stored.tensors)
        with pytest.raises(ValueError, match=f"{name} holds no '{key}'"):
            Pipeline.from_pretrained(broken)

    def test_weights_of_another_shape(self, broken):
        path = broken / "score.safetensors"
        stored = load_checkpoint(path)
        stored.tensors["stem.bias"] = torch.zeros(3)
        save_checkpoint(path, stored.kind, stored.config, stored.tensors)
        with pytest.raises(ValueError, match=r"'stem.bias' has shape \(3,\)"):
            Pipeline.from_pretrained(broken)

    @pytest.mark.parametrize(
        ("other", "title", "row"),
        [
            (
                {"vocoder": SpectralVocoderConfig(**{**vars(VOCODER), "mel": MelConfig(
                    n_mels=16, win_length=400)})},
                "Mel configurations",
                ("win_length", "1024", "1024", "400", "<- differs"),
            ),
            (
                {"mel": MelConfig(n_mels=16, f_max=7600.0)},
                "Mel configurations",
                ("f_max", "8000.0", "7600.0", "8000.0", "<- differs"),
            ),
            (
                {"space": MelSpace(frames=24, mean=-5.0, std=2.0, sigma_data=0.7)},
                "normalisations",
                ("mean", "-4.0", "-5.0", "<- differs"),
            ),
            (
                {"sigma": SigmaRange(0.01, 20.0)},
                "sigma ranges",
                ("min", "0.02", "0.01", "<- differs"),
            ),
        ],
    )  # fmt: skip
    def test_parts_that_differ_are_shown_side_by_side(
        self, other, title, row, tmp_path, capsys, here
    ):
        folder = write_preset(tmp_path / "mixed", **other)
        assert main(["sample", "yes", "--preset", str(folder), "--out", "new"]) == 2
        first, header, *rows = capsys.readouterr().err.splitlines()
        assert f"the {title} of its parts differ" in first
        assert header.split() == list(PARTS[: len(row) - 2])
        (marked,) = [line for line in rows if "differs" in line]
        assert marked.split(maxsplit=len(row) - 1) == list(row)
        assert everything(here) == []

    def test_a_score_of_another_classifier(self, broken, tmp_path, refused):
        other = write_preset(tmp_path / "other", seed=9)
        shutil.copy(other / "score.safetensors", broken)
        said = refused("sample", "yes", "--preset", broken)
        assert "score.safetensors was trained on the classifier" in said
        assert "use the classifier it was trained on" in said

    def test_a_score_that_names_no_classifier(self, broken, pipe, refused):
        write_score(broken / "score.safetensors", pipe.denoiser.classifier, digest=None)
        assert "does not say which classifier" in refused("info", broken)

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ("{", "is not JSON"),
            ("[1]", "expected a dictionary"),
            ('{"nfe": "60"}', "Defaults.nfe: expected int"),
            ('{"steps": 60}', "unknown key 'steps'"),
            ('{"sampler": "magic"}', "sampler 'magic' is unknown"),
            ('{"nfe": 0}', "nfe 0"),
            ('{"guidance": NaN}', "guidance nan"),
            ('{"guidance_interval": [1]}', "guidance interval"),
            ('{"schedule": "odd"}', "schedule 'odd' is unknown"),
            ('{"sampler": "euler", "sampler_options": {"eta": 1}}', "no option 'eta'"),
        ],
    )
    def test_defaults_that_cannot_be_used(self, content, sentence, broken, refused):
        (broken / "preset.json").write_text(content)
        said = refused("info", broken)
        assert sentence in said
        assert "preset.json" in said

    def test_a_schedule_beyond_the_training(self, broken, refused):
        (broken / "preset.json").write_text(json.dumps({"sigma_max": 80.0}))
        said = refused("sample", "yes", "--preset", broken, "--out", broken / "new")
        assert "sigma 80 is outside the range 0.02 to 20" in said
        assert not (broken / "new").exists()

    def test_parts_that_do_not_fit_from_python(self, pipe):
        parts = pipe.denoiser
        options = {"space": MelSpace(frames=32), "sigma": parts.sigma_range}
        with pytest.raises(ValueError, match="24 frames"):
            Pipeline.from_parts(parts.classifier, parts.subnet, pipe.vocoder, **options)

    def test_architectures_that_do_not_exist(self, refused):
        assert "choose one of tiny, paper" in refused("info", "--model", "huge")


class TestTraining:
    def test_without_data_or_with_bad_settings(self, preset, here, refused, tmp_path):
        train = ["train", "classifier", "--out", "new"]
        assert "give --data ROOT or --sc09" in refused(*train)
        assert "no such folder" in refused(*train, "--data", "nowhere")
        assert "preset 'big' is unknown" in refused(*train, "--preset", "big")
        assert "steps -1 must be" in refused(*train, "--steps", "-1")
        assert "lr nan" in refused(*train, "--lr", "nan")
        assert "precision '8'" in refused(*train, "--precision", "8")
        assert "does not exist" in refused(*train, "--initial", "none.safetensors")
        said = refused(
            "train", "score", "--out", "new", "--classifier", preset / "score.safetensors"
        )
        assert "a 'classifier' model is needed" in said
        assert everything(here) == []

    def test_broken_recordings_are_named(self, here, refused):
        from speech_folders import write_folder

        data = write_folder(here / "data")
        (data / "one" / "a_nohash_0.wav").write_bytes(b"RIFF")
        train = ["train", "classifier", "--data", data, "--labels", "one,two", "--cache-dir", "c"]
        assert "a_nohash_0.wav" in refused(*train, "--out", "new")
        assert not (here / "new").exists()
        assert "'six' is unknown" in refused(*train[:-3], "six,one", "--out", "new")
