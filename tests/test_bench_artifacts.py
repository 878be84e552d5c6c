"""Weights as the repository keeps them: shards within the limit, and a preset that speaks."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import randomise

from fastscore import Pipeline
from fastscore.checkpoint import load_checkpoint, save_checkpoint, weights_hash
from fastscore.classifier import Classifier
from fastscore.config import (
    CLASSIFIERS,
    SUBNETS,
    UNETS,
    ClassifierConfig,
    HifiGanConfig,
    MelConfig,
    MelSpace,
    SigmaRange,
    SubnetConfig,
    UNetConfig,
    to_dict,
)
from fastscore.presets import load_parts
from fastscore.subnet import ScoreSubnet
from fastscore.train import classifier as classifier_training
from fastscore.train import score as score_training
from fastscore.unet import UNet
from fastscore.vocoder import HifiGanGenerator, save_vocoder

ROOT = Path(__file__).parents[1]
KIB = 1024
# networks in the place of the published ones, whose weights would be 100 MB
SMALL = {
    "classifier": ClassifierConfig(channels=(8, 16), blocks=(1, 1), groups=4, emb_dim=16),
    "subnet": SubnetConfig(
        channels=(8, 16), blocks=(1, 1), attention=(False, True), heads=2, groups=4, emb_dim=16
    ),
    "unet": UNetConfig(
        channels=(8, 16), blocks=(1, 1), attention=(False, True), heads=2, groups=4, emb_dim=16
    ),
    "generator": HifiGanConfig(upsample_initial_channel=32, resblock_kernel_sizes=(3,),
                               resblock_dilation_sizes=((1, 3),)),
}  # fmt: skip
SPACE, SIGMA = MelSpace(mean=-4.0, std=2.0), SigmaRange()


@pytest.fixture
def artifacts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    module = importlib.import_module("artifacts")
    small = {
        name: type(known)(known.kind, known.key, to_dict(SMALL[known.key]), known.part)
        for name, known in module.KNOWN.items()
    }
    monkeypatch.setattr(module, "KNOWN", small)
    return module


@pytest.fixture
def trained(artifacts, tmp_path):
    """Exports of four trainings; ScoreSubnet's over the classifier as it is kept."""
    folder = tmp_path / "runs"
    folder.mkdir()
    config = SMALL["classifier"]
    mel = MelConfig()
    save_checkpoint(
        folder / "first.safetensors",
        "classifier",
        classifier_training.checkpoint_config(config, mel, SPACE, SIGMA),
        randomise(Classifier(config)).state_dict(),
    )
    artifacts.keep(folder / "first.safetensors", "classifier-paper", tmp_path / "kept", 8 * KIB)
    artifacts.join("classifier-paper", folder / "classifier.safetensors", tmp_path / "kept")
    classifier = Classifier(config)
    classifier.load_state_dict(load_checkpoint(folder / "classifier.safetensors").tensors)
    save_checkpoint(
        folder / "score.safetensors",
        "score",
        score_training.checkpoint_config(SMALL["subnet"], classifier, mel, SPACE, SIGMA),
        randomise(ScoreSubnet(SMALL["subnet"], config)).state_dict(),
    )
    stored = {"mel": to_dict(mel), "space": to_dict(SPACE), "sigma": to_dict(SIGMA)}
    unet = randomise(UNet(SMALL["unet"])).state_dict()
    save_checkpoint(
        folder / "unet.safetensors", "unet", {"unet": to_dict(SMALL["unet"]), **stored}, unet
    )
    vocoder = randomise(HifiGanGenerator(SMALL["generator"]))
    save_vocoder(folder / "vocoder.safetensors", vocoder, dtype="float16")
    return folder


def keep_all(artifacts, trained, out):
    for name in artifacts.KNOWN:
        if name != "classifier-paper":
            kind = artifacts.KNOWN[name].kind
            artifacts.keep(trained / f"{kind}.safetensors", name, out, 40 * KIB)


def test_shards_are_within_the_limit_and_give_the_weights_back(artifacts, trained, tmp_path):
    for size in (6 * KIB, 20 * KIB, 15 * 1024 * KIB):
        out = tmp_path / str(size)
        *shards, index = artifacts.keep(trained / "score.safetensors", "score-paper", out, size)
        assert sorted(out.iterdir()) == sorted([*shards, index])
        assert max(p.stat().st_size for p in shards) <= size
        # nearly full, so few: what is left of each but the last does not hold the next tensor
        assert len(shards) <= 1 + sum(p.stat().st_size for p in shards) // (size // 2)
        name = f"score-paper-00001-of-{len(shards):05d}.safetensors"
        assert shards[0].name == name
        joined = load_checkpoint(artifacts.join("score-paper", out / "one.safetensors", out))
        source = load_checkpoint(trained / "score.safetensors")
        assert (joined.kind, joined.config) == (source.kind, source.config)
        assert set(joined.tensors) == set(source.tensors)
        for key, tensor in source.tensors.items():
            assert torch.equal(joined.tensors[key], tensor.bfloat16().float())


def test_what_is_in_16_bits_stays_as_it_is(artifacts, trained, tmp_path):
    source = trained / "vocoder.safetensors"
    artifacts.keep(source, "vocoder-hifigan-v1", tmp_path / "v", 40 * KIB)
    artifacts.join("vocoder-hifigan-v1", tmp_path / "one.safetensors", tmp_path / "v")
    assert (tmp_path / "one.safetensors").read_bytes() == source.read_bytes()
    kept = load_checkpoint(trained / "classifier.safetensors", upcast=False).tensors
    assert {t.dtype for t in kept.values()} == {torch.bfloat16}


@pytest.mark.parametrize("network", ["scoresubnet", "unet-equal-trainable", "unet-equal-total"])
@pytest.mark.parametrize("vocoder", ["digits", "hifigan-v1"])
def test_an_assembled_preset_speaks(artifacts, trained, tmp_path, network, vocoder):
    keep_all(artifacts, trained, tmp_path / "kept")
    folder = artifacts.assemble("paper", tmp_path / "p", network, vocoder, tmp_path / "kept")
    parts = load_parts(folder)
    assert type(parts.network) is (ScoreSubnet if network == "scoresubnet" else UNet)
    assert type(parts.vocoder) is (HifiGanGenerator if vocoder == "hifigan-v1" else type(
        load_parts("digits").vocoder))  # fmt: skip
    assert parts.defaults == load_parts("digits").defaults
    waves = Pipeline.from_pretrained(folder).sample("seven", nfe=2, seed=1).waves
    assert waves.shape == (1, 64 * 256)
    assert bool(waves.isfinite().all())


def test_a_score_network_of_the_unrounded_classifier_is_refused(artifacts, trained, tmp_path):
    first = Classifier(SMALL["classifier"])
    first.load_state_dict(load_checkpoint(trained / "first.safetensors").tensors)
    path = trained / "score.safetensors"
    stored = load_checkpoint(path)
    save_checkpoint(
        path, "score", stored.config | {"classifier_hash": weights_hash(first)}, stored.tensors
    )
    keep_all(artifacts, trained, tmp_path / "kept")
    with pytest.raises(ValueError, match="was trained on the classifier"):
        artifacts.assemble("paper", tmp_path / "preset", folder=tmp_path / "kept")


def test_missing_weights_name_the_command_that_trains_them(artifacts, trained, tmp_path):
    with pytest.raises(
        ValueError, match=r"score-paper\.index\.json is not in .*gpu_train\.py score"
    ):
        artifacts.assemble("paper", tmp_path / "preset", folder=tmp_path / "kept")
    assert not (tmp_path / "preset").exists()
    keep_all(artifacts, trained, tmp_path / "kept")
    shard = next((tmp_path / "kept").glob("unet-equal-total-paper-00001*"))
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} is not in .*gpu_train\.py unet-equal-to"):
        artifacts.assemble("paper", tmp_path / "p", "unet-equal-total", folder=tmp_path / "kept")
    with pytest.raises(ValueError, match="known are"):
        artifacts.read("other", tmp_path)


def test_damage_is_noticed(artifacts, trained, tmp_path):
    kept = tmp_path / "kept"
    shard = sorted(kept.glob("classifier-paper-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged: its SHA-256"):
        artifacts.join("classifier-paper", tmp_path / "one.safetensors", kept)
    shard.write_bytes(data)
    index = kept / "classifier-paper.index.json"
    values = json.loads(index.read_text())
    for change in (
        {"format": "other"},
        {"version": 2},
        {"shards": {"../evil.safetensors": {"sha256": ""}}},
        {"tensors": {"a": "absent"}},
        {"config": None},
    ):
        index.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match="not the index of an artifact"):
            artifacts.join("classifier-paper", tmp_path / "one.safetensors", kept)
    lost = values["tensors"] | {"lost": next(iter(values["shards"]))}
    index.write_text(json.dumps(values | {"tensors": lost}))
    with pytest.raises(ValueError, match="lack the tensor 'lost'"):
        artifacts.join("classifier-paper", tmp_path / "one.safetensors", kept)


def test_another_network_is_not_kept_under_a_name(artifacts, trained, tmp_path):
    with pytest.raises(ValueError, match="is a 'classifier' model"):
        artifacts.keep(trained / "score.safetensors", "classifier-paper", tmp_path)
    stored = load_checkpoint(trained / "unet.safetensors")
    wider = stored.config | {"unet": stored.config["unet"] | {"heads": 4}}
    save_checkpoint(trained / "wider.safetensors", "unet", wider, stored.tensors)
    with pytest.raises(ValueError, match="heads is 4, but unet-equal-total-paper has 2"):
        artifacts.keep(trained / "wider.safetensors", "unet-equal-total-paper", tmp_path)
    with pytest.raises(ValueError, match="does not fit a shard"):
        artifacts.keep(trained / "unet.safetensors", "unet-equal-total-paper", tmp_path, 2 * KIB)
    with pytest.raises(ValueError, match="--as"):
        artifacts.keep(trained / "unet.safetensors", "../evil", tmp_path)


def test_keeping_again_leaves_no_old_shard(artifacts, trained, tmp_path):
    out = tmp_path / "kept"
    before = len(list(out.glob("classifier-paper-*")))
    paths = artifacts.keep(trained / "first.safetensors", "classifier-paper", out)
    assert before > 2 == len(paths)
    assert sorted(out.iterdir()) == sorted(paths)


def test_artifacts_of_the_published_size(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    known = importlib.import_module("artifacts").KNOWN
    assert known["classifier-paper"].config == to_dict(CLASSIFIERS["paper"])
    assert known["score-paper"].config == to_dict(SUBNETS["paper"])
    assert known["unet-equal-total-paper"].config == to_dict(UNETS["paper-equal-total"])


def test_the_program_refuses_in_one_sentence(tmp_path):
    command = [sys.executable, ROOT / "bench" / "artifacts.py", "assemble", "paper", "--out"]
    run = subprocess.run(
        [*command, tmp_path / "preset", "--artifacts", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("artifacts: classifier-paper.index.json is not in")
    assert len(run.stderr.splitlines()) == 1


def test_contestants_take_another_size_from_the_artifacts(
    artifacts, trained, tmp_path, monkeypatch
):
    keep_all(artifacts, trained, tmp_path / "kept")
    contestants = importlib.import_module("contestants")
    monkeypatch.setattr(contestants, "ARTIFACTS", tmp_path / "kept")
    folder = contestants.trained_preset("unet-equal-total", tmp_path / "p", "paper", "hifigan-v1")
    assert type(load_parts(folder).vocoder) is HifiGanGenerator
