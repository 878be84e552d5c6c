"""Training of vocoders: pitch labels, segments, discriminators, losses, steps of the loop."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastscore.audio import LogMel
from fastscore.config import HifiGanConfig, MelConfig, SpectralVocoderConfig
from fastscore.data import WaveSet
from fastscore.train.discriminators import (
    DiscriminatorConfig,
    Discriminators,
    PeriodDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)
from fastscore.train.pitch import track_pitch
from fastscore.train.task import LoopConfig
from fastscore.train.vocoder import (
    PRESETS,
    Renderer,
    VocoderTask,
    VocoderTrainConfig,
)
from fastscore.train.vocoder_data import SegmentConfig, Segments
from fastscore.train.vocoder_losses import VocoderLossConfig, pitch_loss, spectral_loss
from fastscore.vocoder import load_vocoder
from fastscore.vocoder.spectral import SpectralGenerator

MEL = MelConfig()
SMALL = SpectralVocoderConfig(
    dim=16, hidden=24, blocks=1, fine_dim=16, fine_hidden=24, fine_blocks=1, pitch_dim=16
)
SMALL_HIFIGAN = HifiGanConfig(
    upsample_rates=(16, 16),
    upsample_kernel_sizes=(32, 32),
    upsample_initial_channel=16,
    resblock="2",
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 2),),
)
DISCRIMINATORS = DiscriminatorConfig(
    periods=(2, 3), period_channels=(4, 8), resolutions=(256,), spectral_channels=4
)
SETTINGS = VocoderTrainConfig(
    segments=SegmentConfig(frames=8, context=2),
    discriminators=DISCRIMINATORS,
    losses=VocoderLossConfig(adversarial_from=3),
)


def buzz(f0: np.ndarray, rate: int = 16000) -> torch.Tensor:
    """Nine harmonics, falling by 1/k, of a fundamental given in Hz for every sample."""
    phase = 2 * np.pi * np.cumsum(f0) / rate
    wave = sum(np.cos(k * phase) / k for k in range(1, 10))
    return torch.from_numpy(0.1 * wave).float()


def waves(seconds: tuple[float, ...] = (0.3, 0.5, 0.4)) -> WaveSet:
    """Buzzes of 110, 160, 210 Hz, ... as the dataset cache holds them."""
    clips = [
        buzz(np.full(int(16000 * s), 110.0 + 50 * i)).mul(32768).short().numpy()
        for i, s in enumerate(seconds)
    ]
    return WaveSet(
        samples=np.concatenate(clips),
        offsets=np.cumsum([0, *map(len, clips)]),
        label_ids=np.zeros(len(clips), dtype=np.int64),
        speakers=["a"] * len(clips),
        paths=[Path(f"{i}.wav") for i in range(len(clips))],
        labels=("buzz",),
        sample_rate=16000,
    )


class TestPitch:
    @pytest.mark.parametrize("f0", [62.0, 110.0, 233.0, 410.0, 520.0])
    def test_steady_tones(self, f0):
        track = track_pitch(buzz(np.full(8000, f0)))
        assert track.f0.shape == track.weight.shape == (62,)
        error = (track.f0[4:-8] / f0).log2().abs().max() * 1200
        # cents; a bin is 43 wide
        assert error < 25
        assert track.weight[4:-8].min() > 0.9

    def test_follows_a_glide(self):
        f0 = np.linspace(100, 220, 16000)
        track = track_pitch(buzz(f0))
        expected = torch.from_numpy(f0[64::128][:125]).float()
        assert ((track.f0 / expected).log2().abs()[4:-8] * 1200 < 40).all()

    def test_silence_and_noise_have_no_weight(self):
        assert track_pitch(torch.zeros(4000)).weight.max() == 0
        noise = track_pitch(0.1 * torch.randn(16000))
        assert noise.weight.mean() < 0.1
        assert noise.f0.isfinite().all()

    def test_a_period_beyond_the_window_is_refused(self):
        with pytest.raises(ValueError, match=r"f_min 30\.0 Hz"):
            track_pitch(torch.zeros(4000), f_min=30.0)


class TestSegments:
    def draw(self, config: SegmentConfig, seed: int = 0, n: int = 6):
        segments = Segments(waves(), MEL, config, pitch=True)
        return segments, segments.draw(n, torch.Generator().manual_seed(seed))

    def test_are_a_function_of_the_generator(self):
        config = SegmentConfig(frames=8, context=2)
        _, first = self.draw(config)
        _, again = self.draw(config)
        _, other = self.draw(config, seed=1)
        for name in ("wave", "mel", "f0", "voiced"):
            assert torch.equal(first[name], again[name])
        assert not torch.equal(first["wave"], other["wave"])

    def test_mel_belongs_to_the_wave(self):
        config = SegmentConfig(frames=16, context=4, disturbed=0.0)
        segments, batch = self.draw(config)
        assert batch["wave"].shape == (6, 24 * 256)
        assert batch["mel"].shape == (6, 80, 24)
        own = LogMel(MEL)(batch["wave"])
        edge = segments.edge
        torch.testing.assert_close(batch["mel"][..., edge:-edge], own[..., edge:-edge])
        # frames at the edges see the recording beyond the segment, not its reflection
        assert (batch["mel"] - own)[..., 0].abs().max() > 0.01

    def test_pitch_belongs_to_the_wave(self):
        _, batch = self.draw(SegmentConfig(frames=16, context=4, disturbed=0.0), n=16)
        voiced = batch["voiced"] > 0.9
        assert 0.2 < voiced.float().mean() < 0.95
        f0 = batch["f0"][voiced]
        nearest = torch.tensor([110.0, 160.0, 210.0])
        assert ((f0[:, None] / nearest).log2().abs().min(dim=1).values * 1200 < 20).all()
        loud = batch["wave"].unflatten(1, (-1, 256)).abs().amax(dim=2) > 1e-3
        assert (loud[voiced]).all()

    def test_silence_around_the_clips_is_seen(self):
        _, batch = self.draw(SegmentConfig(frames=8, context=2, disturbed=0.0), n=24)
        silent = (batch["mel"] == batch["mel"].min()).all(dim=1).float().mean()
        assert 0.05 < silent < 0.8
        assert batch["mel"].min() == pytest.approx(MEL.log_min)

    def test_disturbed_mels_stay_near_and_above_the_floor(self):
        _, clean = self.draw(SegmentConfig(frames=8, context=2, disturbed=0.0), n=16)
        config = SegmentConfig(frames=8, context=2, disturbed=0.5, mel_noise=0.1)
        _, noisy = self.draw(config, n=16)
        assert torch.equal(clean["wave"], noisy["wave"])
        changed = (clean["mel"] != noisy["mel"]).flatten(1).any(dim=1)
        assert 3 <= changed.sum() <= 15
        assert noisy["mel"].min() >= MEL.log_min

    @pytest.mark.parametrize("values", [{"frames": 4}, {"context": -1}, {"gain_min": 0.0}])
    def test_impossible_settings_are_refused(self, values):
        with pytest.raises(ValueError, match=next(iter(values))):
            SegmentConfig(**values)


class TestDiscriminators:
    def test_period_equals_the_published_form(self):
        part = PeriodDiscriminator(3, (4, 8))
        wave = torch.randn(2, 100)
        scores, features = part(wave)
        # columns of a [T / p, p] picture under kernels one wide
        x = 4.0 * wave[:, :99].reshape(2, 1, 33, 3)
        for layer, feature, stride in zip(part.layers, features, (3, 3, 1), strict=True):
            weight = layer.weight[..., None]
            x = torch.nn.functional.conv2d(x, weight, layer.bias, (stride, 1), (2, 0))
            x = torch.nn.functional.leaky_relu(x, 0.1)
            rows = x.permute(0, 3, 1, 2).flatten(0, 1)
            torch.testing.assert_close(feature, rows, atol=1e-5, rtol=1e-5)
        x = torch.nn.functional.conv2d(x, part.out.weight[..., None], part.out.bias, 1, (1, 0))
        rows = x.permute(0, 3, 1, 2).flatten(0, 1)
        torch.testing.assert_close(scores, rows, atol=1e-5, rtol=1e-5)

    def test_spectral_ones_do_not_hear_the_sign(self):
        parts = Discriminators(DISCRIMINATORS)
        wave = 0.1 * torch.randn(2, 2048)
        (score, _), (mirrored, _) = parts(wave, False)[0], parts(-wave, False)[0]
        torch.testing.assert_close(score, mirrored)
        assert len(parts(wave)) == 3
        assert len(parts(wave, False)) == 1
        assert (parts(wave)[0][0] != parts(-wave)[0][0]).any()

    def test_losses(self):
        ones, zeros = torch.ones(2, 1, 5), torch.zeros(2, 1, 5)
        real, fake = [(ones, [ones, 2 * ones])], [(zeros, [ones, ones])]
        assert discriminator_loss(real, fake) == 0
        assert discriminator_loss(fake, real) == 2
        assert adversarial_loss(fake) == 1
        assert adversarial_loss(real) == 0
        assert feature_loss(real, real) == 0
        # relative differences 0 and 1/2
        assert feature_loss(real, fake) == pytest.approx(0.25)
        # the ones in front are left out
        assert feature_loss(real, [(zeros, []), *fake]) == pytest.approx(0.25)

    def test_learn_to_tell_tone_from_noise(self):
        parts = Discriminators(DISCRIMINATORS)
        optimizer = torch.optim.AdamW(parts.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            phase = 6.28 * torch.rand(4, 1) + torch.arange(1024) * 0.2
            real, fake = 0.1 * torch.sin(phase), 0.07 * torch.randn(4, 1024)
            loss = discriminator_loss(parts(real), parts(fake))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.4
        assert losses[-1] < 0.5 * losses[0]


class TestLosses:
    def test_spectral_loss_ignores_phase_and_sees_level(self):
        wave = 0.1 * torch.randn(2, 4096)
        assert spectral_loss(wave, wave, (256, 512)) == 0
        assert spectral_loss(-wave, wave, (256, 512)) < 1e-5
        assert spectral_loss(2 * wave, wave, (256, 512)) > 0.5

    def test_pitch_loss_is_least_at_the_right_bin(self):
        centres = SpectralGenerator(SMALL).pitch.log_centres
        f0 = centres[[30, 60]].exp()[None]
        right = torch.full((1, 2, 96), -9.0)
        right[0, 0, 29:32] = right[0, 1, 59:62] = 0.0
        wrong = right.roll(8, dims=2)
        ones, zeros = torch.ones(1, 2), torch.zeros(1, 2)
        assert pitch_loss(right, f0, ones, centres) < 2.5
        assert pitch_loss(wrong, f0, ones, centres) > 6.0
        # frames without voice count for little beside one with
        mixed = torch.cat([right[:, :1], wrong[:, 1:]], dim=1)
        half_voiced = torch.tensor([[1.0, 0.0]])
        assert pitch_loss(mixed, f0, half_voiced, centres) < 2.7
        assert pitch_loss(wrong, f0, zeros, centres) > 6.0


class TestTask:
    def config(self, **values) -> LoopConfig:
        settings = {
            "steps": 6,
            "batch_size": 2,
            "lr": 5e-3,
            "ema_decay": 0.5,
            "clip_norm": 5.0,
            "final_lr_ratio": 1.0,
            "warmup_steps": 1,
            "betas": (0.8, 0.99),
            "validate_every": 6,
            "log_every": 1,
            "accelerator": "cpu",
            "num_threads": 1,
        }
        return LoopConfig(**(settings | values))

    def task(self, generator=SMALL, settings=SETTINGS) -> VocoderTask:
        torch.manual_seed(0)
        return VocoderTask(generator, waves(), waves((0.3,)), 2, settings)

    def run(self, task, config, out):
        pytest.importorskip("lightning_fabric", reason="training needs the extra train")
        from fastscore.train.loop import run

        return run(task, config, out)

    def test_a_spectral_generator_learns(self, tmp_path):
        task = self.task()
        with torch.no_grad():
            before = task.validate({"generator": task.trained["generator"].eval()})["mel"]
        self.run(task, self.config(steps=25, validate_every=25), tmp_path)
        rows = (tmp_path / "metrics.csv").read_text().splitlines()
        names, last = rows[0].split(","), rows[-1].split(",")
        row = dict(zip(names, last, strict=True))
        assert float(row["validation/mel"]) < 0.6 * before
        assert float(row["generator/adversarial"]) > 0
        generator = load_vocoder(tmp_path / "vocoder.safetensors", MEL)
        assert generator.config == SMALL

    def test_hifigan_is_exported_without_weight_norm(self, tmp_path):
        losses = VocoderLossConfig(adversarial_from=0, match_periods=True, pitch=0.0)
        settings = VocoderTrainConfig(SETTINGS.segments, DISCRIMINATORS, losses)
        task = self.task(SMALL_HIFIGAN, settings)
        assert any("parametrizations" in name for name in task.trained["generator"].state_dict())
        self.run(task, self.config(steps=2, ema_decay=0.0, validate_every=2), tmp_path)
        generator = load_vocoder(tmp_path / "vocoder.safetensors", MEL)
        mel = torch.randn(1, 80, 6) - 5
        with torch.no_grad():
            trained, _ = task.trained["generator"](mel)
            # stored in half precision
            torch.testing.assert_close(generator(mel), trained, atol=2e-3, rtol=0)

    def test_the_discriminators_see_a_wave_without_a_graph(self):
        task = self.task()
        batch = task.batch(5, torch.Generator().manual_seed(0), 0, 1)
        loss, _ = task.loss("discriminator", task.trained, batch)
        loss.backward()
        assert all(p.grad is None for p in task.trained["generator"].parameters())
        assert any(p.grad.abs().sum() > 0 for p in task.trained["discriminator"].parameters())
        assert batch["fake"].requires_grad

    def test_before_their_time_discriminators_learn_nothing(self):
        task = self.task()
        batch = task.batch(0, torch.Generator().manual_seed(0), 0, 1)
        loss, _ = task.loss("discriminator", task.trained, batch)
        loss.backward()
        grads = [p.grad for p in task.trained["discriminator"].parameters()]
        assert all(g is not None and g.abs().sum() == 0 for g in grads)
        _, parts = task.loss("generator", task.trained, batch)
        assert "adversarial" not in parts

    def test_the_renderer_is_the_generator(self):
        generator = SpectralGenerator(SMALL).eval()
        mel = torch.randn(2, 80, 8) - 5
        noise = generator.noise[: 8 * 256 + 384].expand(2, -1)
        wave, logits = Renderer(generator)(mel, torch.zeros(2, dtype=torch.float64), noise)
        assert torch.equal(wave, generator(mel))
        assert logits.shape == (2, 8, 96)

    def test_presets_name_what_ships_and_the_papers_shapes(self):
        assert set(PRESETS) == {"digits", "hifigan-v1", "hifigan-v2", "hifigan-v3"}
        assert PRESETS["digits"].generator == SpectralVocoderConfig()
        assert PRESETS["hifigan-v2"].generator.upsample_initial_channel == 128

    def test_nothing_to_match_is_refused(self):
        with pytest.raises(ValueError, match="match_periods"):
            VocoderTrainConfig(discriminators=DiscriminatorConfig(resolutions=()))
        with pytest.raises(ValueError, match="no period and no resolution"):
            DiscriminatorConfig(periods=(), resolutions=())
