"""Pictures of log-Mels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastscore.config import MelConfig

# more panels than this cannot be read on one page
MOST = 48
_COLUMNS = 4


def plot_mels(path: Path, mels: Tensor, titles: Sequence[str], mel: MelConfig) -> None:
    """Write a PNG with a panel for each log-Mel [B, n_mels, frames], the first 48 of them.

    Raises ImportError where matplotlib is missing and ValueError where the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'fastscore[plot]', or leave --plot out"
        ) from error

    from fastscore.files import atomic_write

    count = min(len(mels), MOST)
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    # a Figure of its own: pyplot would choose a window system
    figure = Figure(figsize=(3.2 * columns + 1.0, 2.4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    shown = mels[:count].float().cpu().numpy()
    seconds = shown.shape[2] * mel.hop_length / mel.sample_rate
    for ax, values, title in zip(axes, shown, titles, strict=False):
        image = ax.imshow(
            values,
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, mel.n_mels),
            vmin=mel.log_min,
            vmax=float(shown.max()),
            cmap="magma",
        )
        ax.set_title(title, fontsize=9)
    for ax in axes[count:]:
        ax.set_visible(False)
    figure.supxlabel("seconds", fontsize=9)
    figure.supylabel(f"Mel band (0 to {mel.f_max:g} Hz)", fontsize=9)
    figure.colorbar(image, ax=list(axes[:count]), label="log magnitude", shrink=0.8)
    if count < len(mels):
        figure.suptitle(f"the first {count} of {len(mels)}", fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
