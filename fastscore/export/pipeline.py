"""A pipeline over an exported model: the same samplers, noise and batches, other arithmetic."""

from __future__ import annotations

from typing import Any

from fastscore.config import to_dict
from fastscore.devices import BATCH_SIZES
from fastscore.engine import Options
from fastscore.export.runtime import ExportedModel
from fastscore.pipeline import Pipeline


class ExportedPipeline(Pipeline):
    """Samples with an `ExportedModel` as a `Pipeline` does with its networks.

    ``batch_size``, ``backend`` (of the solver's update and the noise) and ``engine`` as `Pipeline`
    takes them, except that only the mode "eager" is left: the graphs are compiled already. What an
    exported file does not hold, the classifier's opinion and Mels of other lengths, is refused with
    ValueError.
    """

    def __init__(
        self,
        model: ExportedModel,
        *,
        batch_size: int | None = None,
        backend: str | None = None,
        engine: Options | None = None,
    ) -> None:
        options = engine or Options()
        if options.mode != "eager":
            raise ValueError(
                f'mode "{options.mode}" compiles networks, and {model.path} is compiled already; '
                'choose mode "eager"'
            )
        self.model = model
        size = min(BATCH_SIZES[model.device.type], model.manifest.max_batch)
        denoise: Any = model.denoise
        vocode: Any = model.vocode
        super().__init__(
            denoise,
            vocode,
            defaults=model.defaults,
            name=model.name,
            device=model.device,
            batch_size=size if batch_size is None else batch_size,
            backend=backend,
            engine=options,
        )

    def describe(self) -> dict[str, Any]:
        """JSON-ready provenance: the manifest, device, backend and batch size."""
        return {
            "file": str(self.model.path),
            "device": str(self.device),
            "backend": self.backend,
            "batch_size": self.batch_size,
            **to_dict(self.model.manifest),
        }
