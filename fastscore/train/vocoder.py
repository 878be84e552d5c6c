"""Training task of a vocoder: spectral losses, then discriminators and feature matching as well."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastscore.audio import LogMel, fit_length
from fastscore.config import HifiGanConfig, SpectralVocoderConfig, to_dict
from fastscore.train.discriminators import (
    DiscriminatorConfig,
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)
from fastscore.train.task import LoopConfig
from fastscore.train.vocoder_data import SegmentConfig, Segments
from fastscore.train.vocoder_losses import VocoderLossConfig, pitch_loss, spectral_loss
from fastscore.vocoder import PRESETS as HIFIGAN_SHAPES
from fastscore.vocoder import build_generator, save_vocoder
from fastscore.vocoder.spectral import SpectralGenerator
from fastscore.vocoder.weightnorm import add_weight_norm, fold_weight_norm

if TYPE_CHECKING:
    from fastscore.data import WaveSet


@dataclass(frozen=True)
class VocoderTrainConfig:
    """What is trained and how; the loop has its own settings."""

    segments: SegmentConfig = field(default_factory=SegmentConfig)
    discriminators: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    losses: VocoderLossConfig = field(default_factory=VocoderLossConfig)

    def __post_init__(self) -> None:
        if not self.losses.match_periods and not self.discriminators.resolutions:
            raise ValueError(
                "VocoderTrainConfig: no resolution is named and match_periods is off, so no "
                "features are matched; name a resolution or switch it on"
            )


@dataclass(frozen=True)
class VocoderPreset:
    """A generator and everything its training needs."""

    generator: SpectralVocoderConfig | HifiGanConfig
    settings: VocoderTrainConfig
    loop: LoopConfig


def _hifigan_preset(config: HifiGanConfig) -> VocoderPreset:
    """Sizes, rates and batch of the paper; its 2.5 million steps take days on a GPU."""
    settings = VocoderTrainConfig(
        segments=SegmentConfig(context=0, disturbed=0.0, gain_min=0.9, gain_max=0.9),
        discriminators=DiscriminatorConfig(
            periods=(2, 3, 5, 7, 11),
            period_channels=(32, 128, 512, 1024),
            resolutions=(512, 1024, 2048),
            spectral_channels=32,
        ),
        losses=VocoderLossConfig(mel=15.0, spectrum=0.0, match_periods=True, adversarial_from=0),
    )
    loop = LoopConfig(
        steps=2_500_000,
        batch_size=16,
        lr=2e-4,
        warmup_steps=0,
        betas=(0.8, 0.99),
        clip_norm=None,
        precision="bf16-mixed",
        validate_every=5000,
    )
    return VocoderPreset(config, settings, loop)


# "digits" is what ships: about an hour of one CPU core
PRESETS = {
    "digits": VocoderPreset(
        SpectralVocoderConfig(),
        VocoderTrainConfig(),
        LoopConfig(
            steps=11000,
            batch_size=8,
            lr=6e-4,
            warmup_steps=100,
            final_lr_ratio=0.05,
            weight_decay=0.01,
            betas=(0.8, 0.99),
            ema_decay=0.999,
            clip_norm=5.0,
            precision="bf16-mixed",
            validate_every=500,
            checkpoint_minutes=4.0,
            accelerator="cpu",
            num_threads=1,
        ),
    ),
    **{f"hifigan-{name}": _hifigan_preset(config) for name, config in HIFIGAN_SHAPES.items()},
}


class Renderer(nn.Module):
    """A generator as the loop calls it: Mel and random sources to the wave and pitch logits."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(
        self, mel: Tensor, phase: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Wave [B, T * hop], and logits [B, T, bins] where the generator has a pitch head."""
        if not isinstance(self.generator, SpectralGenerator):
            return self.generator(mel), None
        logits = self.generator.pitch_logits(mel)
        # the pulse train's phase sums over frequencies: labels teach better than its gradient
        f0 = self.generator.pitch.frequency(logits.detach())
        return self.generator.render(mel, f0, phase, noise), logits


class VocoderTask:
    """Adversarial training of a generator (HiFi-GAN's recipe, with relative feature matching)."""

    name = "vocoder"
    ema = ("generator",)

    def __init__(
        self,
        config: SpectralVocoderConfig | HifiGanConfig,
        train: WaveSet,
        validation: WaveSet,
        batch_size: int,
        settings: VocoderTrainConfig | None = None,
    ) -> None:
        self.settings = settings or VocoderTrainConfig()
        self.batch_size, self.mel = batch_size, config.mel
        generator = build_generator(config)
        self.spectral = isinstance(generator, SpectralGenerator)
        if not self.spectral:
            add_weight_norm(generator)
        self.model_config = config
        self.margin = config.n_fft - config.hop_length if self.spectral else 0
        self.train = Segments(train, config.mel, self.settings.segments, pitch=self.spectral)
        self.held_out = _clips(validation, config.mel.hop_length, 64)
        self.transform = LogMel(config.mel)
        self.trained: dict[str, nn.Module] = {
            "discriminator": Discriminators(self.settings.discriminators),
            "generator": Renderer(generator),
        }
        self.config: dict[str, Any] = {
            "generator": to_dict(config),
            "settings": to_dict(self.settings),
            "clips": len(train),
        }

    def setup(self, device: torch.device, autocast: Any) -> None:
        """Move the Mel front end to the training device."""
        self.transform.to(device)

    def batch(self, step: int, rng: torch.Generator, rank: int, world: int) -> dict[str, Any]:
        """Segments, and the random phase and noise of a spectral generator's sources."""
        batch: dict[str, Any] = self.train.draw(self.batch_size, rng)
        if self.spectral:
            samples = batch["wave"].shape[1] + self.margin
            batch["phase"] = torch.rand(self.batch_size, generator=rng, dtype=torch.float64)
            batch["noise"] = torch.randn(self.batch_size, samples, generator=rng)
        batch["adversarial"] = step >= self.settings.losses.adversarial_from
        return batch

    def loss(
        self, name: str, modules: dict[str, nn.Module], batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the discriminators, which render the batch, or of the generator."""
        if name == "discriminator":
            render = modules["generator"]
            fake, logits = render(batch["mel"], batch.get("phase"), batch.get("noise"))
            batch["fake"], batch["logits"] = fake.float(), logits
            return self._discriminator(modules[name], batch), {}
        return self._generator(modules["discriminator"], batch)

    def _discriminator(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        real = self._judged(batch["wave"])
        if not batch["adversarial"]:
            # nothing to learn yet, but every process must run every module in every step
            return sum(score.float().sum() for score, _ in model(real[:1])) * 0.0
        fake = self._judged(batch["fake"]).detach()
        return discriminator_loss(model(real), model(fake))

    def _generator(
        self, discriminators: nn.Module, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.settings.losses
        fake, real = batch["fake"], batch["wave"]
        mel = (self.transform(fake) - self.transform(real)).abs()
        edge, context = self.train.edge, self.settings.segments.context
        cut = max(edge, context)
        parts = {"mel": mel[..., cut : mel.shape[-1] - cut].mean()}
        fake, real = self._judged(fake), self._judged(real)
        parts["spectrum"] = spectral_loss(fake, real, weights.resolutions)
        total = weights.mel * parts["mel"] + weights.spectrum * parts["spectrum"]
        if batch["logits"] is not None:
            pitch = self.trained["generator"].generator.pitch
            parts["pitch"] = pitch_loss(
                batch["logits"], batch["f0"], batch["voiced"], pitch.log_centres
            )
            total = total + weights.pitch * parts["pitch"]
        if batch["adversarial"]:
            with torch.no_grad():
                wanted = discriminators(real, weights.match_periods)
            judged = discriminators(fake)
            parts["adversarial"] = adversarial_loss(judged)
            parts["features"] = feature_loss(wanted, judged)
            total = total + weights.adversarial * parts["adversarial"]
            total = total + weights.features * parts["features"]
        return total, parts

    def _judged(self, wave: Tensor) -> Tensor:
        cut = self.settings.segments.context * self.mel.hop_length
        return wave[:, cut : wave.shape[1] - cut]

    def validate(self, modules: dict[str, nn.Module]) -> dict[str, float]:
        """Mel distance (nats) of copy-synthesis on held-out clips."""
        generator = modules["generator"].generator
        device = next(generator.parameters()).device
        errors = []
        for waves in self.held_out.split(16):
            mel = self.transform(waves.to(device))
            errors.append((self.transform(generator(mel).float()) - mel).abs().mean(dim=(1, 2)))
        return {"mel": torch.cat(errors).mean().item()}

    def export(self, modules: dict[str, nn.Module], path: Path) -> None:
        """Write the averaged generator, weight normalisation folded, in half precision."""
        plain = build_generator(self.model_config)
        plain.load_state_dict(fold_weight_norm(modules["generator"].generator.state_dict()))
        save_vocoder(path, plain, dtype="float16")


def _clips(waves: WaveSet, hop: int, frames: int, limit: int = 96) -> Tensor:
    """Up to ``limit`` clips spread over the set, each fitted to frames * hop samples."""
    index = torch.linspace(0, len(waves) - 1, min(limit, len(waves))).long().unique().tolist()
    return torch.stack([fit_length(waves.wave(i), frames * hop) for i in index])
