"""The public interface: what it draws, what that depends on, and what it says it took."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_models import LABELS
from small_presets import MEL, SPACE, speech_like, write_preset

from fastscore import Pipeline
from fastscore.audio import LogMel, fit_length
from fastscore.engine import Options
from fastscore.noise import NoiseSource
from fastscore.presets import load_parts
from fastscore.samplers import Guidance, SamplingCancelledError, euler_ancestral, schedule_for
from fastscore.vocoder import vocode

soundfile = pytest.importorskip("soundfile")

MIXED = (None, "yes", "no", None, "up", "down", "yes")
ALL = torch.ones(16, 24, dtype=torch.bool)
GAMMAS = (1.0, 2.0, 3.0, 0.0, 5.0, 0.0, 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_preset(tmp_path_factory.mktemp("preset") / "small")


@pytest.fixture(scope="module")
def pipe(folder):
    return Pipeline.from_pretrained(folder)


@pytest.fixture
def calls(pipe, monkeypatch):
    """Arguments of every evaluation of the denoiser."""
    seen = []
    parts = pipe.denoiser.parts

    def counted(x, sigma, label=None, gamma=None):
        seen.append((x, sigma, label, gamma))
        return parts(x, sigma, label, gamma)

    monkeypatch.setattr(pipe.denoiser, "parts", counted)
    return seen


class TestBits:
    @pytest.mark.parametrize(("size", "first"), [(1, 0), (2, 1), (3, 2), (5, 0)])
    def test_a_deterministic_sample_depends_on_itself_alone(self, folder, pipe, size, first):
        options = {"seed": 7, "nfe": 4}
        exact = Pipeline.from_pretrained(folder, engine=Options(deterministic=True))
        together = exact.sample(MIXED, guidance=GAMMAS, first=first, batch_size=size, **options)
        for i, (label, gamma) in enumerate(zip(MIXED, GAMMAS, strict=True)):
            alone = pipe.sample(label, guidance=gamma, first=first + i, **options)
            assert torch.equal(alone.mels[0], together.mels[i])
            assert torch.equal(alone.waves[0], together.waves[i])

    def test_batch_sizes_agree_to_rounding(self, pipe):
        one, three = (pipe.sample(MIXED, batch_size=size, nfe=4).mels for size in (1, 3))
        assert (one - three).abs().max() < 1e-3 * one.std()

    def test_seed_number_and_label_each_change_the_sample(self, pipe):
        start = pipe.sample("yes", nfe=3).mels
        others = [{"seed": 1}, {"first": 1}, {"labels": "no"}, {"guidance": 9.0}, {"labels": None}]
        for other in others:
            mels = pipe.sample(**{"labels": "yes", "nfe": 3, **other}).mels
            assert not torch.allclose(mels, start, atol=1e-3)

    def test_seeds_share_no_stream(self, pipe):
        """Batches with the seeds s and s + 1 must not hold the same samples."""
        waves = torch.cat([pipe.sample(None, n=3, seed=s, nfe=2).waves for s in (4, 5)])
        assert len({wave.numpy().tobytes() for wave in waves}) == 6


class TestMeaning:
    def test_equals_the_parts_put_together_by_hand(self, folder, pipe):
        parts = load_parts(folder)
        sigmas = schedule_for("euler_ancestral", 5, parts.sigma)
        noise = NoiseSource([11], [3])
        x = noise(0, (1, 1, 16, 24)) * sigmas[0]
        guidance = Guidance(torch.tensor([2]), torch.tensor([1.5]), (0.1, 9.0))
        drawn = euler_ancestral(pipe.denoiser, x, sigmas, guidance=guidance, noise=noise)
        mels = (drawn.x[:, 0] * SPACE.std + SPACE.mean).clamp_min(math.log(1e-5))
        result = pipe.sample("up", guidance=1.5, nfe=5, seed=11, first=3)
        assert torch.equal(result.mels, mels)
        assert torch.equal(result.waves, vocode(parts.vocoder, mels))

    def test_shapes_labels_and_times(self, pipe):
        result = pipe.sample(["yes", None, "up"], guidance=[1, 2, 0])
        assert result.waves.shape == (3, 24 * 256)
        assert result.waves.dtype == result.mels.dtype == torch.float32
        assert result.mels.shape == (3, 16, 24)
        assert result.sample_rate == 16000
        assert result.labels == ("yes", None, "up")
        assert result.guidance == (1.0, 2.0, 0.0)
        assert result.names == ["yes_000", "unguided_001", "up_002"]
        assert set(result.seconds) == {"sampling", "vocoder"}
        assert min(result.seconds.values()) > 0
        assert result.audio_seconds == pytest.approx(3 * 24 * 256 / 16000)
        assert result.rtf == pytest.approx(sum(result.seconds.values()) / result.audio_seconds)

    def test_mels_are_those_of_sound(self, pipe):
        mels = pipe.sample(None, n=2).mels
        assert mels.min() >= MEL.log_min

    def test_each_sample_gets_its_label_and_strength(self, pipe, calls):
        pipe.sample(MIXED, guidance=GAMMAS, batch_size=7, interval=(0.0, math.inf))
        for _, _, label, gamma in calls:
            # without a label or without strength a sample is unguided
            assert label.tolist() == [-1, 0, 1, -1, 2, -1, 0]
            assert gamma.tolist() == list(GAMMAS)

    def test_default_guidance_and_interval_are_the_presets(self, pipe, calls):
        pipe.sample("yes")
        for _, sigma, label, gamma in calls:
            if 0.1 < sigma <= 9:
                assert (label.tolist(), gamma.tolist()) == ([0], [2.0])
            else:
                assert label is None
                assert gamma is None
        assert {label is None for _, _, label, _ in calls} == {True, False}

    @pytest.mark.parametrize(("labels", "guidance"), [(None, 5.0), ("yes", 0.0), ([None] * 3, 1.0)])
    def test_unguided_asks_for_no_gradient(self, pipe, calls, labels, guidance):
        pipe.sample(labels, guidance=guidance)
        assert calls
        assert all(label is None and gamma is None for _, _, label, gamma in calls)

    def test_numbers_of_numpy_are_numbers(self, pipe):
        numbers = {"n": np.int64(2), "seed": np.int32(3), "steps": np.int64(2)}
        guidance = np.array([1.0, 2.0], dtype=np.float32)
        result = pipe.sample("yes", **numbers, guidance=guidance)
        assert torch.equal(
            result.waves, pipe.sample("yes", n=2, seed=3, steps=2, guidance=[1.0, 2.0]).waves
        )
        json.dumps([result.seed, result.guidance])

    def test_research_use_without_a_preset(self, folder):
        parts = load_parts(folder)
        pipe = Pipeline.from_parts(
            parts.classifier, parts.network, parts.vocoder, space=parts.space, sigma=parts.sigma
        )
        assert pipe.guidance == 3.0
        result = pipe.sample("down", steps=2)
        assert torch.isfinite(result.waves).all()

    def test_float16_storage_keeps_classifier_and_score_together(self, folder, tmp_path):
        from fastscore.checkpoint import load_checkpoint, save_checkpoint

        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        path = tmp_path / "classifier.safetensors"
        stored = load_checkpoint(path)
        save_checkpoint(path, stored.kind, stored.config, stored.tensors, dtype="float16")
        assert path.stat().st_size < 0.7 * (folder / path.name).stat().st_size
        Pipeline.from_pretrained(tmp_path).sample("yes", steps=1)


class TestEffort:
    @pytest.mark.parametrize(
        ("sampler", "options", "expected"),
        [
            (None, {}, 6),
            (None, {"steps": 4}, 4),
            (None, {"nfe": 9}, 9),
            ("heun", {"steps": 4}, 7),
            ("heun", {"nfe": 8}, 7),
            ("dpmpp_2m", {"steps": 3}, 3),
            ("pc_vp", {"nfe": 7}, 7),
            ("euler", {"steps": 1}, 1),
        ],
    )
    def test_nfe_is_what_was_spent(self, pipe, calls, sampler, options, expected):
        result = pipe.sample(["yes", None, "no"], sampler=sampler, batch_size=1, **options)
        assert result.nfe == expected
        # three batches of one
        assert len(calls) == 3 * expected
        assert result.sampler == (sampler or "euler_ancestral")

    def test_callback_sees_every_step(self, pipe):
        seen = []
        result = pipe.sample(["yes"] * 5, steps=3, batch_size=2, first=1, callback=seen.append)
        # numbers 1 and 2, then 3 and 4, then 5
        assert [p.done for p in seen] == [2, 4, 6, 8, 10, 12, 13, 14, 15]
        assert {p.total for p in seen} == {15}
        assert [p.first for p in seen[::3]] == [1, 3, 5]
        assert [len(p.mels) for p in seen[::3]] == [2, 2, 1]
        assert [p.step for p in seen] == [0, 1, 2] * 3
        assert torch.equal(torch.cat([p.mels for p in seen[2::3]]), result.mels)

    def test_callback_may_cancel(self, pipe):
        with pytest.raises(SamplingCancelledError, match="step 2"):
            pipe.sample("yes", steps=5, callback=lambda p: p.step < 2)

    def test_sampler_options_of_the_preset_are_used(self, tmp_path):
        defaults = {"sampler": "euler_ancestral", "nfe": 4}
        plain = write_preset(tmp_path / "plain", defaults=defaults)
        still = write_preset(
            tmp_path / "still", defaults={**defaults, "sampler_options": {"eta": 0.0}}
        )
        euler = Pipeline.from_pretrained(plain).sample("yes", sampler="euler", steps=4).mels
        without_noise = Pipeline.from_pretrained(still).sample("yes").mels
        assert torch.allclose(without_noise, euler, atol=1e-4)
        assert not torch.allclose(Pipeline.from_pretrained(plain).sample("yes").mels, euler)

    def test_options_of_the_sampler_are_taken(self, pipe):
        still = pipe.sample("yes", options={"eta": 0.0}).mels
        assert not torch.allclose(still, pipe.sample("yes").mels, atol=1e-3)
        sharp = pipe.sample("yes", sampler="unipc", options={"variant": "bh1"}).mels
        assert torch.isfinite(sharp).all()
        with pytest.raises(ValueError, match="sampler unipc has no option 'eta'; it has order"):
            pipe.sample("yes", sampler="unipc", options={"eta": 0.5})

    def test_sigma_range_of_the_preset_is_used(self, tmp_path):
        defaults = {"sampler": "euler", "nfe": 4, "sigma_min": 0.1, "sigma_max": 5.0}
        seen = []
        pipe = Pipeline.from_pretrained(write_preset(tmp_path / "p", defaults=defaults))
        pipe.sample("yes", callback=seen.append)
        assert (seen[0].sigma, seen[-1].sigma) == (5.0, 0.1)


class TestHearing:
    def test_classifies_files_and_waves_alike(self, pipe, tmp_path):
        wave = speech_like(7000)
        soundfile.write(tmp_path / "a.wav", wave.numpy(), 16000, subtype="FLOAT")
        heard = [
            pipe.classify(wave),
            pipe.classify(wave.numpy()),
            pipe.classify(tmp_path / "a.wav"),
        ]
        assert heard[0] == heard[1] == heard[2]
        assert sum(heard[0].values()) == pytest.approx(1)
        assert list(heard[0].values()) == sorted(heard[0].values(), reverse=True)
        assert set(heard[0]) == set(LABELS)

    def test_classification_is_that_of_the_network(self, pipe):
        wave = speech_like(4000)
        mel = LogMel(MEL)(fit_length(wave, 24 * 256))
        x = ((mel - SPACE.mean) / SPACE.std)[None, None]
        sigma = pipe.denoiser.sigma_range.min
        c_in = (sigma**2 + SPACE.sigma_data**2) ** -0.5
        logits = pipe.denoiser.classifier(c_in * x, torch.tensor([math.log(sigma) / 4]))
        expected = dict(zip(LABELS, logits.softmax(1)[0].tolist(), strict=True))
        assert pipe.classify(wave) == pytest.approx(expected, abs=1e-5)

    def test_resamples_what_it_hears(self, pipe):
        t = torch.arange(48000) / 48000
        wave = 0.4 * torch.sin(2 * torch.pi * 300 * t)
        low = pipe.classify(wave[::3].clone(), sample_rate=16000)
        assert pipe.classify(wave, sample_rate=48000) == pytest.approx(low, abs=0.05)

    @pytest.mark.parametrize("samples", [200, 3000, 6144, 20011])
    def test_copy_synthesis_keeps_the_length(self, pipe, tmp_path, samples):
        soundfile.write(tmp_path / "a.wav", speech_like(samples).numpy(), 16000)
        wave = pipe.vocode_file(tmp_path / "a.wav")
        assert wave.shape == (samples,)
        assert torch.isfinite(wave).all()

    def test_vocoding_does_not_depend_on_the_batch(self, pipe):
        mels = pipe.sample(None, n=3, steps=2).mels
        waves = pipe.vocode(mels)
        assert torch.equal(waves[1:2], pipe.vocode(mels[1:2]))


class TestInpainting:
    def test_what_is_known_is_kept(self, pipe):
        known = pipe.sample("no", seed=3, n=2).mels
        mask = torch.zeros(16, 24, dtype=torch.bool)
        mask[:, :10] = True
        drawn = pipe.sample(["yes", None], known=known, mask=mask, nfe=4)
        torch.testing.assert_close(drawn.mels[:, mask], known[:, mask], rtol=0, atol=1e-5)
        free = pipe.sample(["yes", None], nfe=4)
        assert not torch.allclose(drawn.mels[:, ~mask], free.mels[:, ~mask], atol=1e-2)
        one = pipe.sample(None, first=1, known=known[1], mask=mask, nfe=4)
        assert torch.equal(one.mels[0], drawn.mels[1])

    def test_a_recording_goes_on(self, pipe, tmp_path):
        wave = speech_like(5000)
        soundfile.write(tmp_path / "a.wav", wave.numpy(), 16000, subtype="FLOAT")
        known, mask = pipe.beginning(tmp_path / "a.wav", 0.16)
        assert (known.shape, mask.shape) == ((16, 24), (16, 24))
        assert mask[:, :10].all()
        assert not mask[:, 10:].any()
        expected = LogMel(MEL)(torch.nn.functional.pad(wave, (0, 24 * 256 - 5000)))
        torch.testing.assert_close(known, expected)
        drawn = pipe.sample("yes", known=known, mask=mask, nfe=3)
        shown = expected.clamp_min(MEL.log_min)[mask]
        torch.testing.assert_close(drawn.mels[0][mask], shown, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("seconds", [0.0, -1.0, 0.004, 0.33, 1.0, float("nan")])
    def test_a_beginning_that_cannot_be(self, pipe, seconds):
        with pytest.raises(ValueError, match=r"beginning of .* cannot be kept; choose a frame"):
            pipe.beginning(speech_like(5000), seconds)

    @pytest.mark.parametrize(
        ("known", "mask", "message"),
        [
            (torch.zeros(16, 24), None, "known and mask belong together"),
            (
                torch.zeros(16, 23),
                torch.ones(16, 24, dtype=torch.bool),
                r"known has shape .* is needed",
            ),
            (torch.zeros(3, 16, 24), torch.ones(16, 24, dtype=torch.bool), "one for each of the 2"),
            (torch.zeros(16, 24), torch.ones(16, 24), "the inpainting mask is torch.float32"),
            (torch.zeros(16, 24), torch.ones(16, 24, dtype=torch.bool), "leaves nothing to draw"),
            (torch.full((16, 24), torch.nan), torch.eye(16, 24) > 0, "known values are not finite"),
        ],
    )
    def test_refused(self, pipe, known, mask, message):
        with pytest.raises(ValueError, match=message):
            pipe.sample("yes", n=2, known=known, mask=mask)


class TestSaving:
    def test_files_hold_the_result(self, pipe, tmp_path):
        result = pipe.sample(["yes", None], first=8)
        paths = pipe.save(result, tmp_path / "new" / "out", plot=True)
        assert [p.name for p in paths] == ["yes_008.wav", "unguided_009.wav", "mels.png"]
        assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)
        for path, wave in zip(paths, result.waves, strict=False):
            data, rate = soundfile.read(path, dtype="int16")
            assert rate == 16000
            expected = (wave.double() * 32768).round().clamp(-32768, 32767).numpy()
            assert np.array_equal(data, expected)

    def test_picture_shows_the_mels(self, pipe, tmp_path):
        from PIL import Image

        quiet, loud = (
            torch.full((16, 24), MEL.log_min),
            torch.linspace(MEL.log_min, 1.0, 16)[:, None].expand(16, 24),
        )
        from fastscore.plot import plot_mels

        plot_mels(tmp_path / "a.png", torch.stack([quiet, loud]), ["quiet", "loud"], MEL)
        pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
        dark = (pixels.sum(2) < 30).mean(axis=0)
        # the left panel is silent from top to bottom; in the right one bands rise upwards
        assert dark[: pixels.shape[1] // 2].max() > 0.6
        column = pixels[:, int(pixels.shape[1] * 0.65)].sum(1)
        assert column[len(column) // 4] > column[len(column) * 3 // 4]

    def test_description_is_json_and_tells_weights_apart(self, pipe, tmp_path):
        other = Pipeline.from_pretrained(write_preset(tmp_path / "other", seed=5))
        one, two = (json.loads(json.dumps(p.describe())) for p in (pipe, other))
        assert one["hashes"]["classifier"] != two["hashes"]["classifier"]
        assert one["mel"] == two["mel"]
        assert one["parameters"]["classifier"] == sum(
            p.numel() for p in pipe.denoiser.classifier.parameters()
        )


IMPORTS = """
import sys, time
before = set(sys.modules)
start = time.process_time()
import fastscore
light = time.process_time() - start
assert not {"torch", "numpy", "soundfile"} & set(sys.modules)
from fastscore import Pipeline
import fastscore.audio, fastscore.results
print(light, time.process_time() - start, "triton" in sys.modules, "torch._dynamo" in sys.modules)
"""


def test_import_is_quick_and_brings_no_compiler():
    """CPU seconds, which other work on the machine does not stretch."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    light, everything, triton, dynamo = done.stdout.split()
    assert float(light) < 0.1
    assert float(everything) < 4
    assert (triton, dynamo) == ("False", "False")


def test_the_public_names():
    import fastscore

    assert {"Pipeline", "__version__"} <= set(dir(fastscore))
    assert fastscore.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="pipline"):
        _ = fastscore.pipline
