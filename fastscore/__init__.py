"""Guided speech diffusion from a frozen classifier: it classifies, generates and guides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastscore.pipeline import Pipeline

    __version__: str

__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    # imported on first use, so that importing the package costs nothing
    if name == "Pipeline":
        from fastscore.pipeline import Pipeline

        return Pipeline
    if name == "__version__":
        from importlib.metadata import version

        return version("fastscore")
    raise AttributeError(f"module 'fastscore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
