"""The log-Mel front end against numpy, and every way in which an audio file can be wrong."""

import math
import os
import resource
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from fastscore import audio
from fastscore.audio import LogMel, fit_length, load_audio, mel_filterbank, resample, save_wav
from fastscore.config import MelConfig

soundfile = pytest.importorskip("soundfile")
torchaudio = pytest.importorskip("torchaudio")

CONFIGS = {
    "hop256": MelConfig(),
    "win400-hop160": MelConfig(win_length=400, hop_length=160),
    "22kHz": MelConfig(sample_rate=22050),
    "odd": MelConfig(11025, 512, 300, 99, 40, 60.0, 5512.5),
}


def tone(hz: float, seconds: float, rate: int, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def reference_filters(c: MelConfig) -> np.ndarray:
    """Triangle by triangle, from the definition of the slaney scale (Auditory Toolbox, 1998)."""

    def hz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    def mel(f):
        return f * 3 / 200 if f < 1000 else 15 + 27 * math.log(f / 1000, 6.4)

    low, high = mel(c.f_min), mel(c.f_max)
    edges = [hz(low + (high - low) * i / (c.n_mels + 1)) for i in range(c.n_mels + 2)]
    bank = np.zeros((c.n_mels, c.n_fft // 2 + 1))
    for m in range(c.n_mels):
        left, centre, right = edges[m : m + 3]
        for k in range(bank.shape[1]):
            f = k * c.sample_rate / c.n_fft
            up, down = (f - left) / (centre - left), (right - f) / (right - centre)
            bank[m, k] = max(0.0, min(up, down)) * 2 / (right - left)
    return bank


def reference_log_mel(wave: np.ndarray, c: MelConfig) -> np.ndarray:
    left = (c.n_fft - c.hop_length) // 2
    padded = np.pad(wave, (left, c.n_fft - c.hop_length - left), mode="reflect")
    window = np.zeros(c.n_fft)
    start = (c.n_fft - c.win_length) // 2
    steps = np.arange(c.win_length)
    window[start : start + c.win_length] = 0.5 - 0.5 * np.cos(2 * np.pi * steps / c.win_length)
    frames = [
        np.fft.rfft(padded[i : i + c.n_fft] * window)
        for i in range(0, len(padded) - c.n_fft + 1, c.hop_length)
    ]
    spec = np.stack(frames, axis=1)
    magnitude = np.sqrt(spec.real**2 + spec.imag**2 + 1e-9)
    return np.log(np.maximum(reference_filters(c) @ magnitude, c.log_floor))


@pytest.fixture
def speech_like() -> np.ndarray:
    rng = np.random.default_rng(0)
    t = np.arange(16384) / 16000
    chirp = 0.4 * np.sin(2 * np.pi * (100 + 3500 * t) * t)
    loudness = np.minimum(1, np.abs(np.sin(6 * t))) ** 4  # down to silence and back
    return (chirp + 0.05 * rng.standard_normal(t.size)) * loudness


@pytest.mark.parametrize("name", CONFIGS)
def test_log_mel_matches_numpy(name: str, speech_like: np.ndarray) -> None:
    c = CONFIGS[name]
    expected = reference_log_mel(speech_like, c)
    assert expected.shape == (c.n_mels, 16384 // c.hop_length)
    single = LogMel(c)(torch.from_numpy(speech_like).float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=1e-3)
    assert np.abs(single.numpy() - expected).mean() < 1e-5
    double = LogMel(c).double()(torch.from_numpy(speech_like))
    # what is left is the rounding of window and filters to fp32
    np.testing.assert_allclose(double.numpy(), expected, rtol=0, atol=1e-5)


def test_filters_match_torchaudio_and_librosa() -> None:
    for rate, n_fft, bands in [(16000, 1024, 80), (24000, 1024, 100), (44100, 2048, 128)]:
        ours = mel_filterbank(MelConfig(rate, n_fft, n_fft, 256, bands, 0.0, rate / 2))
        theirs = torchaudio.functional.melscale_fbanks(
            n_fft // 2 + 1, 0.0, rate / 2, bands, rate, "slaney", "slaney"
        ).T
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * ours.max().item())
    # printed in the documentation of librosa.filters.mel(sr=22050, n_fft=2048)
    librosa = mel_filterbank(MelConfig(22050, 2048, 2048, 512, 128, 0.0, 11025.0))
    assert librosa[0, :2].tolist() == pytest.approx([0.0, 0.016], abs=5e-4)


def test_log_mel_is_batch_shape_agnostic(speech_like: np.ndarray) -> None:
    transform = LogMel()
    wave = torch.stack([torch.from_numpy(speech_like).float().roll(i * 999) for i in range(6)])
    batched = transform(wave.reshape(2, 3, -1))
    assert batched.shape == (2, 3, 80, 64)
    for i in range(6):
        torch.testing.assert_close(batched[i // 3, i % 3], transform(wave[i]), atol=1e-4, rtol=0)


def test_log_mel_gradient() -> None:
    small = LogMel(MelConfig(n_fft=32, win_length=24, hop_length=9, n_mels=4)).double()
    wave = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(small, wave)
    # silence lies on the floor: the gradient is zero there, not NaN
    silence = torch.zeros(1024, requires_grad=True)
    LogMel()(silence).sum().backward()
    assert silence.grad.eq(0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_frames_are_samples_over_hop(name: str) -> None:
    c = CONFIGS[name]
    shortest = max((c.n_fft - c.hop_length + 1) // 2 + 1, c.hop_length)
    for samples in (shortest, 5 * c.hop_length - 1, 5 * c.hop_length, 7 * c.hop_length + 1):
        assert LogMel(c)(torch.randn(samples)).shape == (c.n_mels, samples // c.hop_length)
    with pytest.raises(ValueError, match=f"{shortest - 1} samples are too few .* {shortest} "):
        LogMel(c)(torch.randn(shortest - 1))


def test_log_mel_stays_fp32_under_autocast(speech_like: np.ndarray) -> None:
    wave = torch.from_numpy(speech_like).float()
    with torch.autocast("cpu", torch.bfloat16):
        mel = LogMel()(wave)
    torch.testing.assert_close(mel, LogMel()(wave), rtol=0, atol=0)
    assert LogMel()(wave.bfloat16()).dtype == torch.float32


def test_state_dict_is_empty() -> None:
    assert LogMel().state_dict() == {}


# loading


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_load_any_format_rate_and_channels(tmp_path: Path, ending: str, rate: int) -> None:
    left = tone(440, 0.5, rate)
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, np.stack([left, np.zeros_like(left)], axis=1), rate)
    wave = load_audio(path)
    assert wave.dtype == torch.float32
    assert wave.shape == (8000,)
    # channels averaged: half of the left one; the ends are cut by the filter and the codec
    expected = tone(440, 0.5, 16000, 0.25)
    inner = slice(800, -800)
    tolerance = 0.01 if ending == "ogg" else 2e-3
    assert np.abs(wave.numpy() - expected)[inner].max() < tolerance


def test_load_keeps_sixteen_bit_samples(tmp_path: Path) -> None:
    pcm = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    soundfile.write(tmp_path / "a.flac", pcm, 16000)
    assert np.array_equal(load_audio(tmp_path / "a.flac").numpy() * 32768, pcm)


def test_resampling_is_band_limited(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(11000, 0.5, 44100), 44100)
    # 11 kHz cannot exist at 16 kHz: it must vanish, not fold to 5 kHz
    assert load_audio(tmp_path / "a.wav")[800:-800].abs().max() < 5e-3


@pytest.mark.parametrize(("source", "target"), [(8000, 16000), (44100, 16000), (16000, 11025)])
def test_direct_resampling_is_torchaudios(source: int, target: int) -> None:
    wave = torch.randn(20001, dtype=torch.float64)
    expected = torchaudio.functional.resample(wave, source, target)
    direct = audio._resample_direct(wave, source, target)
    torch.testing.assert_close(direct, expected, rtol=0, atol=1e-9)


def test_awkward_rates_need_no_table() -> None:
    # gcd 1: torchaudio would tabulate 16000 x 44133 filters of 8 bytes
    wave = torch.from_numpy(tone(440, 1.0, 44099)).float()
    out = resample(wave, 44099, 16000).numpy()
    assert out.shape == (16000,)
    assert np.abs(out - tone(440, 1.0, 16000))[100:-100].max() < 1e-3
    with pytest.raises(ValueError, match="positive whole numbers"):
        resample(wave, 44099, 0)


def broken(path: Path, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_audio(path, **options)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    broken(tmp_path / "no.wav", "no such file")
    broken(tmp_path, "not a file")
    (tmp_path / "a.wav").touch()
    broken(tmp_path / "a.wav", "empty")
    soundfile.write(tmp_path / "b.wav", np.zeros(0), 16000)
    broken(tmp_path / "b.wav", "no samples")
    soundfile.write(tmp_path / "c.ogg", np.zeros(0), 16000)
    broken(tmp_path / "c.ogg", "no samples")


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("share", [0.002, 0.3, 0.6, 0.99, "one byte"])
def test_truncated(tmp_path: Path, ending: str, share) -> None:
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, np.random.default_rng(0).standard_normal(16000) * 0.1, 16000)
    whole = path.read_bytes()
    assert load_audio(path).shape == (16000,)
    path.write_bytes(whole[:-1] if share == "one byte" else whole[: int(share * len(whole))])
    broken(path, "truncated")


def test_ogg_cut_between_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.ogg"
    soundfile.write(path, np.random.default_rng(0).standard_normal(64000) * 0.1, 16000)
    whole = path.read_bytes()
    last = whole.rfind(b"OggS")
    assert whole[last + 5] & 4
    path.write_bytes(whole[:last])
    broken(path, "the page that ends the stream is missing")
    path.write_bytes(whole + b"TAG" + bytes(125))  # what some taggers append
    assert load_audio(path).shape == (64000,)


@pytest.mark.parametrize("ending", ["flac", "ogg"])
def test_damaged(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, np.random.default_rng(0).standard_normal(16000) * 0.1, 16000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)
    broken(path, "damaged")


def test_opus_and_streamed_wav(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.ogg", tone(440, 0.5, 16000), 16000, subtype="OPUS")
    assert load_audio(tmp_path / "a.ogg").shape == (8000,)
    # a writer to a pipe cannot go back to fill in the sizes
    soundfile.write(tmp_path / "a.wav", tone(440, 0.5, 16000), 16000)
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(data[:40] + b"\xff" * 4 + data[44:])
    assert load_audio(tmp_path / "a.wav").shape == (8000,)
    soundfile.write(tmp_path / "a.flac", tone(440, 0.5, 16000), 16000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0  # STREAMINFO: 36 bits of total samples, 0 for unknown
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    broken(tmp_path / "a.flac", "does not say how long")


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.raw", "a"])
def test_not_audio(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("zero one two three " * 100)
    broken(tmp_path / name, "not wav, flac or ogg")


def test_unsupported_format_rate_and_channels(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(440, 0.5, 16000), 16000, format="AIFF")
    broken(tmp_path / "a.wav", "AIFF audio is not supported")
    soundfile.write(tmp_path / "b.wav", np.ones(100), 400)
    broken(tmp_path / "b.wav", "400 Hz")
    soundfile.write(tmp_path / "c.wav", np.ones((100, 9)), 16000)
    broken(tmp_path / "c.wav", "9 channels exceed the limit of 8")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity(tmp_path: Path, value: float) -> None:
    samples = tone(440, 0.1, 16000)
    samples[7] = value
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    broken(tmp_path / "a.wav", "1 samples are NaN or infinite")


def test_wrong_unit(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(440, 0.1, 16000, 3e4), 16000, subtype="FLOAT")
    broken(tmp_path / "a.wav", "full scale is 1")


def test_too_long(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.ones(61 * 1000) * 0.1, 1000)
    broken(path, r"61\.0 s of audio exceed the limit of 60 s; .*max_seconds")
    broken(path, "limit of 2.5 s", max_seconds=2.5)
    assert load_audio(path, sample_rate=1000, max_seconds=None).shape == (61000,)
    assert load_audio(path, sample_rate=1000, max_seconds=61).shape == (61000,)


@pytest.mark.parametrize("kind", ["zeros", "offset", "one bit"])
def test_silence_is_refused_on_request(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.wav"
    waves = {"zeros": np.zeros(8000), "offset": np.full(8000, 0.3)}
    waves["one bit"] = np.random.default_rng(0).integers(0, 2, 8000) / 32768
    soundfile.write(path, waves[kind], 16000)
    assert load_audio(path).shape == (8000,)
    broken(path, "silent", refuse_silence=True)


def test_quiet_speech_is_not_silence(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(200, 0.5, 16000, 0.005), 16000)
    assert load_audio(tmp_path / "a.wav", refuse_silence=True).abs().max() > 0.004


def test_load_shared_recordings(shared_data: Path) -> None:
    for path in ("digits-human/seven/george_nohash_5.flac", "digits-synth/zero/k0000_nohash_0.ogg"):
        wave = load_audio(shared_data / path, refuse_silence=True)
        assert 0.1 * 16000 < len(wave) < 2.5 * 16000
        assert 0.01 < wave.abs().max() < 1.2


# saving


def test_save_and_load_bit_for_bit(tmp_path: Path) -> None:
    pcm = torch.arange(-32768, 32768).float() / 32768
    save_wav(tmp_path / "a.wav", pcm, 16000)
    assert torch.equal(load_audio(tmp_path / "a.wav"), pcm)
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    save_wav(tmp_path / "b.wav", pcm.numpy()[None], 22050)
    assert soundfile.info(tmp_path / "b.wav").samplerate == 22050
    assert (tmp_path / "b.wav").read_bytes()[44:] == (tmp_path / "a.wav").read_bytes()[44:]


def test_save_clips(tmp_path: Path) -> None:
    save_wav(tmp_path / "a.wav", torch.tensor([0.0, 1.0, 1.7, -1.0, -9.0, 1e30]), 16000)
    top = 32767 / 32768
    assert load_audio(tmp_path / "a.wav").tolist() == [0.0, top, top, -1.0, -1.0, top]


def test_save_honours_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_wav(tmp_path / "a.wav", torch.ones(10), 16000)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.wav").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("wave", "rate", "message"),
    [
        (torch.tensor([0.0, math.nan]), 16000, "NaN"),
        (torch.tensor([0.0, math.inf]), 16000, "infinite"),
        (torch.zeros(0), 16000, "one sample or more"),
        (torch.zeros(2, 100), 16000, r"\[2, 100\]"),
        (torch.zeros(100), 0, "sample_rate 0"),
        (torch.zeros(100), 16000.5, "16000.5"),
    ],
)
def test_save_refuses(tmp_path: Path, wave: torch.Tensor, rate, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_wav(tmp_path / "a.wav", wave, rate)
    assert list(tmp_path.iterdir()) == []


def test_save_where_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no/a\.wav: No such file or directory"):
        save_wav(tmp_path / "no" / "a.wav", torch.zeros(10), 16000)
    with pytest.raises(ValueError, match="not a file"):
        save_wav(tmp_path, torch.zeros(10), 16000)
    with pytest.raises(ValueError, match="not a file"):
        save_wav(os.devnull, torch.zeros(10), 16000)
    assert not Path(os.devnull).is_file()


def test_save_on_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    save_wav(path, torch.full((100,), 0.5), 16000)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a real refusal by the kernel, in the midst of writing
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*a\.wav"):
            save_wav(path, torch.zeros(50_000), 16000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# length


def test_fit_length_pads_in_the_middle() -> None:
    assert fit_length(torch.tensor([1.0, 2.0, 3.0]), 6).tolist() == [0, 1, 2, 3, 0, 0]
    assert fit_length(torch.tensor([1.0, 2.0, 3.0]), 3).tolist() == [1, 2, 3]


def test_fit_length_keeps_the_loudest_window() -> None:
    wave = torch.randn(30_000) * 0.01
    wave[21_000:25_000] += torch.randn(4000)
    best = max(range(0, 14_000, 7), key=lambda s: wave[s : s + 16_000].square().sum().item())
    fitted = fit_length(wave, 16_000)
    energy = fitted.square().sum()
    assert energy >= wave[best : best + 16_000].square().sum()
    assert any(torch.equal(fitted, wave[s : s + 16_000]) for s in range(14_001))


def test_fit_length_refuses() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        fit_length(torch.zeros(2, 3), 3)
    with pytest.raises(ValueError, match="samples is 0"):
        fit_length(torch.zeros(3), 0)
