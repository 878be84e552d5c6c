"""Generators of both kinds against independent computations, and what they promise about sound."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import randomise
from torch import nn

from fastscore.audio import LogMel
from fastscore.config import HifiGanConfig, MelConfig, SpectralVocoderConfig
from fastscore.vocoder import (
    PRESETS,
    build_generator,
    load_vocoder,
    receptive_frames,
    require_mel,
    save_vocoder,
    vocode,
    vocode_in_chunks,
)
from fastscore.vocoder.hifigan import HifiGanGenerator
from fastscore.vocoder.spectral import SpectralGenerator
from fastscore.vocoder.weightnorm import add_weight_norm, fold_weight_norm

MEL = MelConfig(n_mels=10, hop_length=20, win_length=80, n_fft=128)
TYPE1 = HifiGanConfig(
    mel=MEL,
    upsample_rates=(5, 4),
    upsample_kernel_sizes=(10, 8),
    upsample_initial_channel=12,
    resblock_kernel_sizes=(3, 5),
    resblock_dilation_sizes=((1, 3), (1, 2, 4)),
)
TYPE2 = HifiGanConfig(
    mel=MEL,
    resblock="2",
    upsample_rates=(4, 5),
    # an even difference, and an odd one
    upsample_kernel_sizes=(8, 10),
    upsample_initial_channel=8,
    resblock_kernel_sizes=(3, 5, 7),
    resblock_dilation_sizes=((1, 2), (2, 6), (3, 12)),
)
SMALL = SpectralVocoderConfig(
    dim=16, hidden=24, blocks=1, fine_dim=16, fine_hidden=24, fine_blocks=1, pitch_dim=16
)


def hifigan(config: HifiGanConfig) -> HifiGanGenerator:
    return randomise(HifiGanGenerator(config)).eval()


def spectral(config: SpectralVocoderConfig = SMALL) -> SpectralGenerator:
    torch.manual_seed(1)
    return SpectralGenerator(config).eval()


def random_mel(batch: int, frames: int, bands: int = 10) -> torch.Tensor:
    return torch.randn(batch, bands, frames) * 2 - 5


def by_hand(weights: dict[str, torch.Tensor], config: HifiGanConfig, x: torch.Tensor):
    """HiFi-GAN from the text of the paper and its slopes, with functional convolutions only."""

    def conv(name, x, dilation=1):
        weight = weights[f"{name}.weight"]
        same = dilation * (weight.shape[2] - 1) // 2
        return F.conv1d(x, weight, weights[f"{name}.bias"], padding=same, dilation=dilation)

    def upsample(name, x, rate):
        # full transposed convolution, then the middle rate * T samples; a surplus of one goes left
        full = F.conv_transpose1d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], rate)
        surplus = full.shape[2] - rate * x.shape[2]
        left = (surplus + 1) // 2
        return full[..., left : left + rate * x.shape[2]]

    kernels = len(config.resblock_kernel_sizes)
    x = conv("conv_pre", x)
    for i, rate in enumerate(config.upsample_rates):
        x = upsample(f"ups.{i}", F.leaky_relu(x, 0.1), rate)
        branches = []
        for j, dilations in enumerate(config.resblock_dilation_sizes):
            y, block = x, f"resblocks.{i * kernels + j}"
            for n, d in enumerate(dilations):
                if config.resblock == "1":
                    z = conv(f"{block}.convs1.{n}", F.leaky_relu(y, 0.1), d)
                    y = y + conv(f"{block}.convs2.{n}", F.leaky_relu(z, 0.1))
                else:
                    y = y + conv(f"{block}.convs.{n}", F.leaky_relu(y, 0.1), d)
            branches.append(y)
        x = torch.stack(branches).mean(dim=0)
    return torch.tanh(conv("conv_post", F.leaky_relu(x, 0.01))).squeeze(1)


class TestHifiGan:
    @pytest.mark.parametrize("config", [TYPE1, TYPE2], ids=["type 1", "type 2"])
    @torch.no_grad()
    def test_equals_a_computation_by_hand(self, config):
        generator = hifigan(config)
        mel = random_mel(2, 13)
        wave = generator(mel)
        assert wave.shape == (2, 13 * 20)
        assert wave.std() > 0.05
        expected = by_hand(generator.state_dict(), config, mel)
        torch.testing.assert_close(wave, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(("name", "millions"), [("v1", 13.92), ("v2", 0.92), ("v3", 1.46)])
    def test_presets_have_the_published_sizes(self, name, millions):
        generator = HifiGanGenerator(PRESETS[name])
        count = sum(p.numel() for p in generator.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.015)

    @pytest.mark.parametrize("kernel", [4, 5, 6, 7])
    def test_every_kernel_gives_exactly_rate_times_the_length(self, kernel):
        config = HifiGanConfig(
            mel=MelConfig(n_mels=10, hop_length=4, win_length=16, n_fft=16),
            upsample_rates=(4,),
            upsample_kernel_sizes=(kernel,),
            upsample_initial_channel=4,
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1,),),
        )
        assert hifigan(config)(random_mel(1, 9)).shape == (1, 36)

    @torch.no_grad()
    def test_normalises_before_when_told(self):
        config = HifiGanConfig(**{**vars(TYPE1), "normalize_before": True})
        generator, plain = hifigan(config), hifigan(TYPE1)
        generator.mean.normal_()
        generator.scale.uniform_(0.5, 2.0)
        plain.load_state_dict(generator.state_dict(), strict=False)
        mel = random_mel(1, 6)
        shifted = (mel - generator.mean[:, None]) / generator.scale[:, None]
        torch.testing.assert_close(generator(mel), plain(shifted))

    @pytest.mark.parametrize("config", [TYPE1, TYPE2], ids=["type 1", "type 2"])
    @torch.no_grad()
    def test_chunks_equal_the_whole(self, config):
        generator, mel = hifigan(config), random_mel(2, 90)
        whole = generator(mel)
        for chunk in (11, 37, 1000):
            parts = vocode_in_chunks(generator, mel, chunk)
            torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="chunk 0"):
            vocode_in_chunks(generator, mel, 0)

    @torch.no_grad()
    def test_receptive_field_is_enough_and_not_much_more(self):
        generator, reach = hifigan(TYPE1), receptive_frames(TYPE1)
        mel = random_mel(1, 4 * reach).double()
        generator.double()
        changed = mel.clone()
        changed[..., 2 * reach] += 1.0
        hit = (generator(mel) != generator(changed)).reshape(-1, 20).any(dim=1).nonzero()
        assert hit.min() >= reach
        assert hit.max() <= 3 * reach
        assert hit.max() - hit.min() >= reach


class TestWeightNorm:
    @torch.no_grad()
    def test_folded_equals_unfolded(self):
        generator = add_weight_norm(hifigan(TYPE1))
        for name, p in generator.named_parameters():
            if name.endswith("original0"):
                p.mul_(torch.rand(p.shape) + 0.5)
        folded = HifiGanGenerator(TYPE1)
        folded.load_state_dict(fold_weight_norm(generator.state_dict()))
        mel = random_mel(2, 8)
        torch.testing.assert_close(folded(mel), generator(mel), atol=1e-6, rtol=1e-5)

    def test_old_names_fold_like_new_ones(self):
        conv = nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(3, 5, 4))
        new = {f"ups.0.{k}": v for k, v in conv.state_dict().items()}
        old = {
            k.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): v
            for k, v in new.items()
        }
        a, b = fold_weight_norm(new), fold_weight_norm(old)
        assert set(a) == set(b) == {"ups.0.weight", "ups.0.bias"}
        assert torch.equal(a["ups.0.weight"], b["ups.0.weight"])
        torch.testing.assert_close(a["ups.0.weight"], conv.weight)

    def test_half_a_pair_is_named(self):
        with pytest.raises(ValueError, match=r"a\.weight_g has no weight_v"):
            fold_weight_norm({"a.weight_g": torch.ones(2, 1, 1)})
        with pytest.raises(ValueError, match=r"a\.weight_v has no weight_g"):
            fold_weight_norm({"a.weight_v": torch.ones(2, 3, 1)})
        with pytest.raises(ValueError, match="shape"):
            fold_weight_norm({"a.weight_g": torch.ones(3), "a.weight_v": torch.ones(3, 2, 1)})


class TestSpectral:
    @torch.no_grad()
    def test_a_sample_does_not_depend_on_its_batch(self):
        generator, mel = spectral(), random_mel(3, 16, 80)
        wave = generator(mel)
        assert wave.shape == (3, 16 * 256)
        assert wave.dtype == torch.float32
        assert torch.equal(wave, generator(mel))
        # pulses add up the rounding of the pitch over the clip; all else is rounding of one frame
        torch.testing.assert_close(
            wave[1:2], generator(mel[1:2]), atol=0.1 * wave.std().item(), rtol=0
        )
        f0 = torch.full((3, 16), 150.0)
        phase, noise = torch.rand(3, dtype=torch.float64), torch.randn(3, 16 * 256 + 384)
        wave = generator.render(mel, f0, phase, noise)
        alone = generator.render(mel[1:2], f0[1:2], phase[1:2], noise[1:2])
        torch.testing.assert_close(wave[1:2], alone, atol=1e-6, rtol=1e-4)

    @torch.no_grad()
    def test_the_level_is_the_mels_before_any_training(self):
        generator = spectral()
        front = LogMel(MelConfig())
        noise = 0.1 * torch.randn(1, 64 * 256)
        mel = front(noise)
        back = front(generator(mel))
        # corrections start near zero, and a pulse train's lines stand 9 dB above noise
        assert abs((back - mel)[..., 4:-4].mean()) < 2.0
        assert generator(torch.full((1, 80, 16), math.log(1e-5))).abs().max() < 1e-3

    @torch.no_grad()
    def test_the_interpolated_level_is_that_of_white_noise(self):
        generator = spectral()
        noise = torch.randn(4, 256 * 64)
        level = generator._level(LogMel(MelConfig())(noise))
        # the logarithm of a band's mean magnitude, against unit variance in each bin's spectrum
        assert level[:, 20:-20, 8:-8].mean().abs() < 0.15

    def test_the_spectrum_inverts(self):
        generator = spectral()
        margin = 192
        wave = torch.randn(2, 16 * 256 + 2 * margin)
        back = generator._invert(generator._spectrum(wave))
        torch.testing.assert_close(back, wave[:, margin:-margin], atol=1e-4, rtol=1e-4)

    def test_pulses_are_all_harmonics_of_equal_strength(self):
        generator = spectral()
        f0 = torch.full((1, 64), 250.0)
        wave = generator._pulses(f0, torch.zeros(1, dtype=torch.float64))[0, 192:-192]
        spectrum = torch.fft.rfft(wave[:16000].double()).abs() / 8000
        harmonics = spectrum[250:7501:250]
        torch.testing.assert_close(harmonics, torch.ones_like(harmonics), atol=1e-3, rtol=0)
        spectrum[250:7501:250] = 0
        assert spectrum[1:7600].max() < 1e-3
        # count = 30.4: the next one has 0.4 of the strength
        assert spectrum[7750] == pytest.approx(0.4, abs=1e-3)

    def test_pulses_follow_a_glide_without_clicks(self):
        generator = spectral()
        f0 = torch.linspace(100.0, 200.0, 64)[None]
        wave = generator._pulses(f0, torch.zeros(1, dtype=torch.float64))[0]
        peaks = (wave > 0.3 * wave.max()).nonzero()[:, 0]
        starts = peaks[torch.cat([torch.tensor([True]), peaks.diff() > 20])]
        rates = 16000 / starts.diff()
        assert rates[0] == pytest.approx(100, abs=3)
        assert rates[-1] == pytest.approx(200, abs=5)
        assert (rates.diff() > -4).all()

    def test_pitch_is_read_around_the_likeliest_bin(self):
        head = spectral().pitch
        logits = torch.full((1, 2, 96), -20.0)
        logits[0, 0, 40] = 5.0
        logits[0, 1, 10:12] = 5.0
        logits[0, 1, 70] = 4.0
        f0 = head.frequency(logits)[0]
        assert f0[0] == pytest.approx(head.log_centres[40].exp().item(), rel=1e-4)
        assert f0[1] == pytest.approx(head.log_centres[10:12].mean().exp().item(), rel=1e-4)

    def test_noise_is_white_and_the_same_everywhere(self):
        noise = spectral().noise
        assert noise.shape == (65536,)
        assert abs(noise.mean()) < 0.01
        assert noise.std() == pytest.approx(1.0, abs=0.01)
        lag = (noise[1:] * noise[:-1]).mean()
        assert abs(lag) < 0.02
        # splitmix64 of 1 by its definition, through Box and Muller
        z = (0x9E3779B97F4A7C15 ^ (0x9E3779B97F4A7C15 >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        u, v = ((z >> 32) + 0.5) / 2**32, (z % 2**32) / 2**32
        first = math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)
        assert noise[0].item() == pytest.approx(first, rel=1e-6)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"hop_length": 100}, "hop_length 256 must be a multiple"),
            ({"n_fft": 384}, "n_fft 384"),
            ({"kernel_size": 4}, "kernel_size 4"),
            ({"pitch_min": 600.0}, "pitch_min 600"),
            ({"pitch_bins": 2}, "pitch_bins 2"),
        ],
    )
    def test_impossible_configurations_are_refused(self, values, message):
        with pytest.raises(ValueError, match=message):
            SpectralVocoderConfig(**values)


class TestApi:
    @pytest.mark.parametrize("config", [SMALL, TYPE1], ids=["spectral", "hifigan"])
    @torch.no_grad()
    def test_round_trip(self, config, tmp_path):
        generator = randomise(build_generator(config)).eval()
        save_vocoder(tmp_path / "vocoder.safetensors", generator)
        again = load_vocoder(tmp_path / "vocoder.safetensors", config.mel)
        assert again.config == config
        assert not again.training
        mel = random_mel(1, 8, config.mel.n_mels)
        assert torch.equal(again(mel), generator(mel))

    def test_what_ships_is_under_5_megabytes(self, tmp_path):
        path = tmp_path / "vocoder.safetensors"
        save_vocoder(path, SpectralGenerator(SpectralVocoderConfig()), dtype="float16")
        assert path.stat().st_size < 5e6

    def test_another_mel_is_refused_with_both_shown(self):
        generator = hifigan(TYPE1)
        require_mel(generator, MEL)
        with pytest.raises(ValueError, match="trained on another Mel") as error:
            require_mel(generator, MelConfig(), "voc.safetensors")
        text = str(error.value)
        assert text.startswith("voc.safetensors")
        rows = {line.split()[0]: line for line in text.splitlines()[2:]}
        assert rows["hop_length"].split()[1:] == ["256", "20", "<-", "differs"]
        assert rows["sample_rate"].split()[1:] == ["16000", "16000"]
        assert rows["log_floor"].split()[1:] == ["1e-05", "1e-05"]

    def test_bad_mels_are_refused(self):
        generator = hifigan(TYPE1)
        for shape in ((10, 8), (1, 11, 8), (1, 10, 0)):
            with pytest.raises(ValueError, match=r"\[batch, 10, frames\]"):
                vocode(generator, torch.zeros(shape))
        with pytest.raises(ValueError, match="NaN"):
            vocode(generator, torch.full((1, 10, 4), float("nan")))

    @torch.no_grad()
    def test_vocode_is_the_generator(self):
        mel = random_mel(1, 12)
        torch.testing.assert_close(vocode(hifigan(TYPE2), mel), hifigan(TYPE2)(mel))
        mel = random_mel(1, 12, 80)
        assert torch.equal(vocode(spectral(), mel), spectral()(mel))
        assert np.isfinite(vocode(spectral(), mel).numpy()).all()

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"resblock": "3"}, "resblock '3'"),
            ({"upsample_rates": (5, 5)}, "multiply to 25"),
            ({"upsample_kernel_sizes": (4, 8)}, "must not be below"),
            ({"resblock_kernel_sizes": (3,)}, "same length"),
            ({"resblock_kernel_sizes": (3, 4)}, "must be odd"),
            ({"upsample_initial_channel": 2}, "cannot be halved"),
        ],
    )
    def test_impossible_configurations_are_refused(self, values, message):
        with pytest.raises(ValueError, match=message):
            HifiGanConfig(**{**vars(TYPE1), **values})
