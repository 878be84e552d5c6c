"""Small models under names of their own, for tests of what measures them."""

from small_models import CLASSIFIER, SPACE, randomise, small_classifier, small_denoiser

from fastscore.config import SigmaRange, UNetConfig
from fastscore.denoiser import GuidedUNet
from fastscore.unet import UNet

UNET = UNetConfig(
    n_mels=CLASSIFIER.n_mels,
    frames=CLASSIFIER.frames,
    channels=(8, 16),
    blocks=(1, 1),
    attention=(False, True),
    heads=2,
    groups=4,
    emb_dim=16,
)


def small_pair() -> GuidedUNet:
    return GuidedUNet(randomise(UNet(UNET)), small_classifier(), SPACE, SigmaRange()).eval()


SMALL = {"taps": small_denoiser, "pair": small_pair}
