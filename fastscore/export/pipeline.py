"""A pipeline over an exported model: the same samplers, noise and batches, other arithmetic."""

from __future__ import annotations

from typing import Any

from fastscore_kernels import resolve

from fastscore.config import to_dict
from fastscore.devices import BATCH_SIZES
from fastscore.engine import Engine, Model, Options
from fastscore.export.runtime import ExportedModel
from fastscore.pipeline import Pipeline
from fastscore.request import whole
from fastscore.stats import Latencies


class ExportedPipeline(Pipeline):
    """Samples with an `ExportedModel` as a `Pipeline` does with its networks.

    ``batch_size``, ``backend`` (of the solver's update and the noise) and ``engine`` as `Pipeline`
    takes them, except that only the mode "eager" is left: the graphs are compiled already. What an
    exported file does not hold, the classifier's opinion and Mels of other lengths, is refused with
    ValueError.
    """

    # not the initialiser of Pipeline, which prepares networks: there are none
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
        self.model, self.device, self.precision = model, model.device, "fp32"
        self.backend = resolve(backend, self.device.type)
        self.name, self.defaults, self.mel_config = model.name, model.defaults, model.mel_config
        size = min(BATCH_SIZES[self.device.type], model.manifest.max_batch)
        self.batch_size = whole("batch_size", size if batch_size is None else batch_size, 1)
        self.denoiser: Any = model.denoise
        self.vocoder: Any = model.vocode
        self._front_end = None
        shape = (1, self.mel_config.n_mels, self.frames)
        draws = Model(self.denoiser, self.finish, shape, self.device, self.backend)
        self.engine = Engine(draws, options)
        self._latency = Latencies()

    def describe(self) -> dict[str, Any]:
        """JSON-ready provenance: the manifest, device, backend and batch size."""
        return {
            "file": str(self.model.path),
            "device": str(self.device),
            "backend": self.backend,
            "batch_size": self.batch_size,
            **to_dict(self.model.manifest),
        }
