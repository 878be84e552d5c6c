"""The baseline: its U-Net against plain PyTorch, its guidance against autograd, all paths equal."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import native_or_skip
from small_models import SPACE, inputs, randomise, small_classifier
from small_presets import MEL, SIGMA, write_preset
from small_presets import SPACE as PRESET_SPACE
from test_train_tasks import LOOP, mel_set, rng, score_task

from fastscore import Pipeline
from fastscore.checkpoint import load_checkpoint, save_checkpoint
from fastscore.cli import main
from fastscore.config import CLASSIFIERS, UNETS, SigmaRange, UNetConfig, from_dict, to_dict
from fastscore.cost import parameters, step_macs
from fastscore.denoiser import GuidedUNet, scalings, set_precision
from fastscore.export.graphs import GRAPHS, example_inputs, load_model, trace
from fastscore.layers import set_backend
from fastscore.packed import pack
from fastscore.presets import load_parts
from fastscore.taps import class_gradient, read_taps
from fastscore.train.loop import run
from fastscore.train.mels import measure_space
from fastscore.train.unet import UNetTask
from fastscore.unet import UNet

CONFIG = UNetConfig(
    n_mels=16,
    frames=24,
    channels=(8, 16),
    blocks=(1, 2),
    attention=(False, True),
    heads=2,
    groups=4,
    emb_dim=32,
)
LABEL, GAMMA = torch.tensor([2, -1, 0]), torch.tensor([1.0, 5.0, 3.0])


def small_unet(seed: int = 5) -> UNet:
    return randomise(UNet(CONFIG), seed).eval().requires_grad_(False)


def small_pair() -> GuidedUNet:
    pair = GuidedUNet(small_unet(), small_classifier(), SPACE, SigmaRange())
    return pair.eval().to(memory_format=torch.channels_last)


class Plain:
    """The same U-Net written out in PyTorch's functions, from the names of its weights alone."""

    def __init__(self, unet: UNet) -> None:
        self.w = dict(unet.state_dict())
        self.emb = unet.embedding

    def conv(self, name, x, **how):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **how)

    def norm(self, name, x, emb=None):
        y = F.group_norm(x, 4, self.w[f"{name}.weight"], self.w[f"{name}.bias"])
        if emb is not None:
            film = F.linear(emb, self.w[f"{name}.film.weight"], self.w[f"{name}.film.bias"])
            scale, shift = film[:, :, None, None].chunk(2, dim=1)
            y = y * (1 + scale) + shift
        return F.silu(y)

    def attention(self, name, x):
        b, c, h, w = x.shape
        y = F.group_norm(x, 4, self.w[f"{name}.norm.weight"], self.w[f"{name}.norm.bias"])
        q, k, v = (
            t.reshape(b, 2, c // 2, h * w).transpose(2, 3)
            for t in self.conv(f"{name}.qkv", y).chunk(3, dim=1)
        )
        weights = (q @ k.transpose(2, 3) / (c // 2) ** 0.5).softmax(dim=-1)
        return x + self.conv(f"{name}.out", (weights @ v).transpose(2, 3).reshape(b, c, h, w))

    def block(self, name, x, emb):
        y = self.conv(f"{name}.conv1", self.norm(f"{name}.norm1", x), padding=1)
        y = self.conv(f"{name}.conv2", self.norm(f"{name}.norm2", y, emb), padding=1)
        x = self.conv(f"{name}.skip", x) if f"{name}.skip.weight" in self.w else x
        return (
            self.attention(f"{name}.attention", x + y)
            if f"{name}.attention.qkv.weight" in self.w
            else x + y
        )

    def __call__(self, x, c_noise):
        emb = self.emb(c_noise)
        first = self.conv("stem", F.pixel_unshuffle(x, 2), padding=1) + self.w["band"]
        one = self.block("encoder.0.0", first, emb)
        two = self.conv("down.0", one, stride=2, padding=1)
        three = self.block("encoder.1.0", two, emb)
        four = self.block("encoder.1.1", three, emb)
        h = self.block("middle.1", self.block("middle.0", four, emb), emb)
        for i, skip in enumerate((four, three, two)):
            h = self.block(f"decoder.0.{i}", torch.cat((h, skip), dim=1), emb)
        h = F.interpolate(self.conv("up.0.proj", h), scale_factor=2.0)
        h = self.conv("up.0.conv", h, padding=1)
        for i, skip in enumerate((one, first)):
            h = self.block(f"decoder.1.{i}", torch.cat((h, skip), dim=1), emb)
        return F.pixel_shuffle(self.conv("out", self.norm("norm", h), padding=1), 2)


def test_forward_is_the_network_written_out():
    unet = small_unet()
    x, sigma = inputs(3)
    torch.testing.assert_close(unet(x, sigma.log() / 4), Plain(unet)(x, sigma.log() / 4))


def test_a_new_network_predicts_nothing_and_every_weight_learns():
    unet = UNet(CONFIG)
    x, sigma = inputs(2)
    assert not unet(x, sigma.log()).any()
    unet = randomise(unet)
    unet(x, sigma.log()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())


def test_guided_by_autograd():
    pair = small_pair()
    x, sigma = inputs(3)
    c = scalings(sigma, SPACE.sigma_data)
    c_skip, c_out, c_in = (v[:, None, None, None] for v in (c.c_skip, c.c_out, c.c_in))
    leaf = x.clone().requires_grad_()
    log_p = pair.classifier(c_in * leaf, c.c_noise).log_softmax(dim=1)
    chosen = log_p.gather(1, LABEL.clamp_min(0)[:, None])[:, 0] * (LABEL >= 0)
    (slope,) = torch.autograd.grad(chosen.sum(), leaf)
    x0 = c_skip * x + c_out * pair.unet(c_in * x, c.c_noise)
    torch.testing.assert_close(pair(x, sigma), x0)
    strength = (GAMMA * sigma.square())[:, None, None, None]
    torch.testing.assert_close(pair(x, sigma, LABEL, GAMMA), x0 + strength * slope)


def test_class_gradient_is_the_guidance_of_the_taps():
    classifier = small_classifier()
    x, sigma = inputs(3)
    guidance = read_taps(classifier, x, sigma.log(), LABEL).guidance
    torch.testing.assert_close(class_gradient(classifier, x, sigma.log(), LABEL), guidance)


def test_alone_it_has_no_labels_and_refuses_them():
    alone = GuidedUNet(small_unet(), None, SPACE, SigmaRange())
    x, sigma = inputs(3)
    assert alone.labels == ()
    assert alone.shape == (16, 24)
    assert set(step_macs(alone)) == {"unguided"}
    torch.testing.assert_close(alone(x, sigma), small_pair()(x, sigma))
    with pytest.raises(ValueError, match="no classifier to guide with"):
        alone(x, sigma, LABEL, GAMMA)
    with pytest.raises(ValueError, match="GuidedUNet: give label and gamma together"):
        alone(x, sigma, LABEL)


@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_packed_and_native_it_gives_the_same_and_the_same_bits_in_every_batch(guided):
    native_or_skip()
    pair = small_pair()
    set_backend(pair, "native")
    x, sigma = inputs(3)
    rest = (LABEL, GAMMA) if guided else ()
    set_backend(pair, "reference")
    expected = pair(x, sigma, *rest)
    set_backend(pair, "native")
    assert pack(pair) > 0
    found = pair(x, sigma, *rest)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    one = pair(x[1:2], sigma[1:2], *(t[1:2] for t in rest))
    assert torch.equal(found[1:2], one)


@torch.no_grad()
def test_bf16_is_near_fp32_and_returns_fp32():
    pair = small_pair()
    x, sigma = inputs(3)
    expected = pair(x, sigma, LABEL, GAMMA)
    set_precision(pair, "bf16")
    found = pair(x, sigma, LABEL, GAMMA)
    assert found.dtype == torch.float32
    # three significant digits a layer, of an answer as large as the noisy input
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def test_the_sizes_are_those_compared_with():
    with torch.device("meta"):
        for name, total in (("tiny", (1272660, 2282174)), ("paper", (4405636, 12363934))):
            counts = [
                parameters(UNet(UNETS[f"{name}-{kind}"]))
                for kind in ("equal-trainable", "equal-total")
            ]
            assert counts == pytest.approx(total, rel=0.015)
            config, unet = CLASSIFIERS[name], UNETS[f"{name}-equal-total"]
            assert (config.n_mels, config.frames, config.patch) == (
                *(unet.n_mels, unet.frames, unet.patch),
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": [8, 18]}, "multiples of groups 4 and heads 2"),
        ({"blocks": [1]}, "one entry a level"),
        ({"frames": 26}, "multiple of 4"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        from_dict(UNetConfig, {**to_dict(CONFIG), **changes})


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A preset whose score network is a U-Net."""
    folder = write_preset(tmp_path_factory.mktemp("preset") / "pair")
    parts = {"mel": MEL, "space": PRESET_SPACE, "sigma": SIGMA}
    config = {"unet": to_dict(CONFIG), **{k: to_dict(v) for k, v in parts.items()}}
    save_checkpoint(folder / "score.safetensors", "unet", config, small_unet().state_dict())
    return folder


def test_a_preset_with_it_samples_and_describes_itself(preset, capsys):
    pipe = Pipeline.from_pretrained(preset)
    assert isinstance(pipe.denoiser, GuidedUNet)
    assert set(pipe.describe()["hashes"]) == {"classifier", "unet", "vocoder"}
    one, two = (pipe.sample(["no"], seed=s).mels for s in (0, 0))
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    main(["info", str(preset), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["taps"] == {}
    assert facts["parameters"]["unet"] == parameters(small_unet())
    main(["info", str(preset)])
    assert "classifier and unet" in capsys.readouterr().out


def test_a_preset_of_another_space_or_kind_is_refused(preset, tmp_path):
    folder = shutil.copytree(preset, tmp_path / "other")
    stored = load_checkpoint(folder / "score.safetensors", "unet")
    config = {**stored.config, "sigma": to_dict(SigmaRange(0.5, 2.0))}
    save_checkpoint(folder / "score.safetensors", "unet", config, stored.tensors)
    with pytest.raises(ValueError, match="sigma ranges of its parts differ"):
        load_parts(folder)
    save_checkpoint(folder / "score.safetensors", "classifier", config, stored.tensors)
    with pytest.raises(ValueError, match="but a 'score' or 'unet' model is needed"):
        load_parts(folder)


@torch.no_grad()
def test_traced_for_export_it_equals_itself_for_every_batch(preset):
    model = load_model(preset, torch.device("cpu"))
    assert set(model.hashes) == {"classifier", "unet", "vocoder"}
    for name in GRAPHS[:2]:
        program = trace(model, name, 8).module()
        for batch in (1, 4):
            args = example_inputs(model, name, batch)
            torch.testing.assert_close(program(*args), model.graphs[name](*args))


def unet_task(**kwargs) -> UNetTask:
    mels = mel_set()
    return UNetTask(CONFIG, mels, mel_set(16, 1), measure_space(mels), SigmaRange(), 16, **kwargs)


def test_it_is_trained_on_the_very_numbers_that_the_subnet_sees():
    ours, other = (t.batch(3, rng(7), 0, 1) for t in (unet_task(), score_task(small_classifier())))
    assert set(ours) == set(other)
    assert all(torch.equal(ours[key], other[key]) for key in ours)


def test_training_lowers_the_loss_and_exports_what_a_preset_takes(tmp_path):
    task = unet_task()
    before = task.validate(task.trained)["loss"]
    record = run(task, LOOP, tmp_path)
    assert record["validation"]["loss"] < 0.9 * before
    stored = load_checkpoint(tmp_path / "unet.safetensors", "unet")
    assert from_dict(UNetConfig, stored.config["unet"]) == CONFIG
    unet = UNet(CONFIG)
    unet.load_state_dict(stored.tensors)
    found = task.validate({"unet": unet})["loss"]
    assert found == pytest.approx(record["validation"]["loss"], rel=1e-5)
