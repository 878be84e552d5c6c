"""Frozen configurations, named presets, and their strict conversion to and from plain dictionaries.

Imports nothing but the standard library: every other module may depend on this one.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

T = TypeVar("T")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class MelConfig:
    """Log-Mel front end: the convention of 16 kHz HiFi-GAN checkpoints."""

    sample_rate: int = 16000
    n_fft: int = 1024
    win_length: int = 1024
    hop_length: int = 256
    n_mels: int = 80
    f_min: float = 0.0
    f_max: float = 8000.0
    log_floor: float = 1e-5

    def __post_init__(self) -> None:
        _require(
            0 < self.hop_length <= self.win_length <= self.n_fft,
            f"MelConfig: hop_length {self.hop_length} <= win_length {self.win_length} <= n_fft "
            f"{self.n_fft} does not hold; choose them in that order",
        )
        _require(
            0 <= self.f_min < self.f_max <= self.sample_rate / 2,
            f"MelConfig: f_max {self.f_max} Hz must lie above f_min {self.f_min} Hz and at or "
            f"below half of sample_rate {self.sample_rate} Hz",
        )
        _require(self.n_mels > 0, f"MelConfig: n_mels {self.n_mels} must be positive")
        _require(self.log_floor > 0, f"MelConfig: log_floor {self.log_floor} must be positive")

    @property
    def log_min(self) -> float:
        """Smallest value a log-Mel can take: log(log_floor)."""
        return math.log(self.log_floor)


@dataclass(frozen=True)
class MelSpace:
    """Where the diffusion lives: (log-Mel - mean) / std, [B, 1, n_mels, frames]."""

    frames: int = 64
    mean: float = 0.0
    std: float = 1.0
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        _require(self.frames > 0, f"MelSpace: frames {self.frames} must be positive")
        _require(self.std > 0, f"MelSpace: std {self.std} must be positive")
        _require(self.sigma_data > 0, f"MelSpace: sigma_data {self.sigma_data} must be positive")


@dataclass(frozen=True)
class SigmaRange:
    """Noise levels, in units of the normalised log-Mel, on which a network was trained."""

    min: float = 0.01
    max: float = 40.0

    def __post_init__(self) -> None:
        _require(
            0 < self.min < self.max,
            f"SigmaRange: min {self.min} must be positive and below max {self.max}",
        )


@dataclass(frozen=True)
class ClassifierConfig:
    """Noise-conditioned residual classifier; one tap a stage, named ``stage1`` .. ``stageL``."""

    labels: tuple[str, ...] = DIGITS
    n_mels: int = 80
    frames: int = 64
    patch: int = 2
    channels: tuple[int, ...] = (32, 64, 128)
    blocks: tuple[int, ...] = (2, 2, 2)
    groups: int = 8
    emb_dim: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require(
            len(self.labels) >= 2, f"ClassifierConfig: {len(self.labels)} labels, need 2 or more"
        )
        _require(
            len(set(self.labels)) == len(self.labels),
            f"ClassifierConfig: labels repeat: {self.labels}",
        )
        _require(
            len(self.channels) == len(self.blocks) > 0,
            f"ClassifierConfig: channels {self.channels} and blocks {self.blocks} must have one "
            "entry a stage",
        )
        _require(
            all(c % self.groups == 0 for c in self.channels),
            f"ClassifierConfig: channels {self.channels} must be multiples of groups {self.groups}",
        )
        total = self.patch * 2 ** (len(self.channels) - 1)
        _require(
            self.n_mels % total == 0 and self.frames % total == 0,
            f"ClassifierConfig: {self.n_mels}x{self.frames} must be a multiple of {total} on both "
            "sides (patch x 2^(stages - 1))",
        )

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names of the taps, shallowest first."""
        return tuple(f"stage{i + 1}" for i in range(len(self.channels)))


@dataclass(frozen=True)
class SubnetConfig:
    """ScoreSubnet: which taps it reads, where it attends, and the width of its decoder."""

    channels: tuple[int, ...] = (32, 80, 128)
    blocks: tuple[int, ...] = (2, 2, 2)
    attention: tuple[bool, ...] = (False, False, True)
    heads: int = 4
    groups: int = 8
    emb_dim: int = 128
    feature_taps: bool = True
    gradient_taps: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require(
            self.feature_taps or self.gradient_taps,
            "SubnetConfig: feature_taps and gradient_taps are both off; switch at least one on",
        )
        _require(
            len(self.channels) == len(self.blocks) == len(self.attention) > 0,
            f"SubnetConfig: channels {self.channels}, blocks {self.blocks} and attention "
            f"{self.attention} must have one entry a scale",
        )
        _require(
            all(c % self.groups == 0 and c % self.heads == 0 for c in self.channels),
            f"SubnetConfig: channels {self.channels} must be multiples of groups {self.groups} and "
            f"heads {self.heads}",
        )


@dataclass(frozen=True)
class UNetConfig:
    """U-Net score network, the usual one: width, residual blocks and attention of every level."""

    n_mels: int = 80
    frames: int = 64
    patch: int = 2
    channels: tuple[int, ...] = (32, 56, 80)
    blocks: tuple[int, ...] = (2, 2, 2)
    attention: tuple[bool, ...] = (False, False, True)
    heads: int = 4
    groups: int = 8
    emb_dim: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require(
            len(self.channels) == len(self.blocks) == len(self.attention) > 0,
            f"UNetConfig: channels {self.channels}, blocks {self.blocks} and attention "
            f"{self.attention} must have one entry a level",
        )
        _require(
            all(c % self.groups == 0 and c % self.heads == 0 for c in self.channels),
            f"UNetConfig: channels {self.channels} must be multiples of groups {self.groups} and "
            f"heads {self.heads}",
        )
        total = self.patch * 2 ** (len(self.channels) - 1)
        _require(
            self.n_mels % total == 0 and self.frames % total == 0,
            f"UNetConfig: {self.n_mels}x{self.frames} must be a multiple of {total} on both "
            "sides (patch x 2^(levels - 1))",
        )


# ``tiny`` trains on a laptop's CPU and ships; ``paper`` has the published model's size and cost
CLASSIFIERS = {
    "tiny": ClassifierConfig(dropout=0.1),
    "paper": ClassifierConfig(channels=(192, 208, 256), blocks=(4, 3, 1), emb_dim=256, dropout=0.1),
}
SUBNETS = {
    "tiny": SubnetConfig(),
    "paper": SubnetConfig(
        channels=(144, 112, 112), blocks=(5, 2, 2), attention=(False, True, True), emb_dim=256
    ),
}
# the baseline with as many parameters as ScoreSubnet, and as classifier and ScoreSubnet together
UNETS = {
    "tiny-equal-trainable": UNetConfig(channels=(32, 48, 56)),
    "tiny-equal-total": UNetConfig(channels=(40, 64, 80)),
    "paper-equal-trainable": UNetConfig(channels=(56, 80, 112), emb_dim=256),
    "paper-equal-total": UNetConfig(channels=(104, 144, 192), emb_dim=256),
}


@dataclass(frozen=True)
class HifiGanConfig:
    """HiFi-GAN generator (Kong et al. 2020), with the field names of the upstream config.json."""

    mel: MelConfig = MelConfig()
    resblock: str = "1"
    upsample_rates: tuple[int, ...] = (8, 8, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (16, 16, 4, 4)
    upsample_initial_channel: int = 512
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    # SpeechT5HifiGan normalises its input Mel by per-band mean and scale held in the checkpoint.
    normalize_before: bool = False
    leaky_relu_slope: float = 0.1

    def __post_init__(self) -> None:
        _require(
            self.resblock in ("1", "2"),
            f"HifiGanConfig: resblock {self.resblock!r} must be '1' or '2'",
        )
        _require(
            len(self.upsample_rates) == len(self.upsample_kernel_sizes),
            f"HifiGanConfig: upsample_rates {self.upsample_rates} and upsample_kernel_sizes "
            f"{self.upsample_kernel_sizes} must have the same length",
        )
        _require(
            math.prod(self.upsample_rates) == self.mel.hop_length,
            f"HifiGanConfig: upsample_rates {self.upsample_rates} multiply to "
            f"{math.prod(self.upsample_rates)}, but the Mel hop_length is {self.mel.hop_length}",
        )
        _require(
            all(
                k >= r > 0
                for k, r in zip(self.upsample_kernel_sizes, self.upsample_rates, strict=True)
            ),
            f"HifiGanConfig: upsample_kernel_sizes {self.upsample_kernel_sizes} must not be below "
            f"upsample_rates {self.upsample_rates}",
        )
        _require(
            len(self.resblock_kernel_sizes) == len(self.resblock_dilation_sizes) > 0,
            f"HifiGanConfig: resblock_kernel_sizes {self.resblock_kernel_sizes} and "
            f"resblock_dilation_sizes {self.resblock_dilation_sizes} must have the same length",
        )
        _require(
            all(k > 0 and k % 2 == 1 for k in self.resblock_kernel_sizes)
            and all(d > 0 for dilations in self.resblock_dilation_sizes for d in dilations),
            f"HifiGanConfig: resblock_kernel_sizes {self.resblock_kernel_sizes} must be odd and "
            f"resblock_dilation_sizes {self.resblock_dilation_sizes} positive",
        )
        _require(
            self.upsample_initial_channel >> len(self.upsample_rates) > 0,
            f"HifiGanConfig: upsample_initial_channel {self.upsample_initial_channel} cannot be "
            f"halved {len(self.upsample_rates)} times",
        )


@dataclass(frozen=True)
class SpectralVocoderConfig:
    """Compact generator: ConvNeXt blocks, an inverse-STFT head, two sources (after Vocos)."""

    mel: MelConfig = MelConfig()
    dim: int = 192
    hidden: int = 576
    blocks: int = 3
    kernel_size: int = 7
    # blocks at the head's frame rate
    fine_dim: int = 160
    fine_hidden: int = 320
    fine_blocks: int = 3
    # short-time spectrum of the head
    n_fft: int = 512
    hop_length: int = 128
    # fundamental frequency, in Hz, as a choice among log-spaced bins
    pitch_dim: int = 96
    pitch_bins: int = 96
    pitch_min: float = 50.0
    pitch_max: float = 550.0

    def __post_init__(self) -> None:
        _require(
            self.hop_length > 0 and self.mel.hop_length % self.hop_length == 0,
            f"SpectralVocoderConfig: Mel hop_length {self.mel.hop_length} must be a multiple of "
            f"the head's hop_length {self.hop_length}",
        )
        _require(
            self.n_fft % (2 * self.hop_length) == 0,
            f"SpectralVocoderConfig: n_fft {self.n_fft} must be a multiple of twice the head's "
            f"hop_length {self.hop_length}",
        )
        _require(
            self.kernel_size % 2 == 1,
            f"SpectralVocoderConfig: kernel_size {self.kernel_size} must be odd",
        )
        _require(
            0 < self.pitch_min < self.pitch_max < self.mel.sample_rate / 4,
            f"SpectralVocoderConfig: pitch_min {self.pitch_min} Hz and pitch_max {self.pitch_max} "
            f"Hz must rise, be positive and below a quarter of {self.mel.sample_rate} Hz",
        )
        _require(
            self.pitch_bins >= 8,
            f"SpectralVocoderConfig: pitch_bins {self.pitch_bins}, need 8 or more",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """Plain, JSON-ready dictionary of a configuration dataclass (tuples become lists)."""
    if not dataclasses.is_dataclass(config):
        raise ValueError(f"to_dict: {type(config).__name__} is not a configuration dataclass")
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(cls: type[T], values: Any) -> T:
    """Configuration of type ``cls`` from a dictionary.

    Raises ValueError on an unknown key, a missing key without a default, or a wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__}: expected a dictionary, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(
            f"{cls.__name__}: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}"
        )
    hints = typing.get_type_hints(cls)
    built = {k: _typed(hints[k], v, f"{cls.__name__}.{k}") for k, v in values.items()}
    try:
        return cls(**built)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Check ``value`` against a type hint and convert lists to tuples and ints to floats."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = [h for h in typing.get_args(hint) if h is not type(None)]
        return _typed(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_typed(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (
        not isinstance(value, hint) or (hint is int and isinstance(value, bool))
    ):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
