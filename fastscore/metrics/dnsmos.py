"""DNSMOS (Reddy et al. 2022): predicted quality of speech, from the package speechmos."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 16000
SAMPLES = int(9.01 * SAMPLE_RATE)
SCORES = ("sig", "bak", "ovrl", "p808")


def check_installed() -> None:
    """Raise ImportError, naming the extra, when speechmos cannot be imported."""
    _load()


def _load():
    try:
        from speechmos import dnsmos
    except ImportError as error:
        raise ImportError(
            f"DNSMOS needs the package speechmos ({error}): pip install 'fastscore[metrics]'"
        ) from error
    return dnsmos


def dnsmos(
    waves: Tensor | Sequence[Tensor],
    sample_rate: int = SAMPLE_RATE,
    progress: Callable[[int], object] = lambda done: None,
) -> np.ndarray:
    """DNSMOS of clips [samples] each -> float64 [N, 4]: signal, background, overall, P.808.

    The network hears 9.01 s; as its own protocol repeats shorter clips, each clip is repeated to
    exactly that length and heard once. Clips are brought to a peak of 0.7, so that loudness, which
    the score depends on, is not what differs. Raises ValueError at another sample rate, for
    silence or values that are not finite, and ImportError without speechmos.
    """
    if sample_rate != SAMPLE_RATE:
        raise ValueError(f"DNSMOS hears {SAMPLE_RATE} Hz, not {sample_rate} Hz; resample first")
    module = _load()
    rows = []
    for index, wave in enumerate(waves):
        clip = torch.as_tensor(wave, dtype=torch.float32).cpu().numpy()
        peak = np.abs(clip).max() if clip.size else 0.0
        if not np.isfinite(peak) or peak <= 0:
            raise ValueError(f"DNSMOS: clip {index} is empty, silent or not finite")
        tiled = np.resize(0.7 * clip / peak, SAMPLES)
        scores = module.run(tiled, sr=SAMPLE_RATE)
        rows.append([float(scores[f"{name}_mos"]) for name in SCORES])
        progress(1)
    return np.array(rows, dtype=np.float64).reshape(-1, len(SCORES))
