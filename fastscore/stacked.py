"""FiLM layers of a network stacked into one matrix product, for inference on a GPU.

At batch 1 a step on a GPU is bound by how many kernels follow one another, and some seventeen of
them are FiLM layers that read the same embedding. Stacked, their weights are rows of one matrix.
The layers' own weights become views of it, so nothing is held twice, and what is written into them
(a checkpoint loaded, say) is in the product at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastscore.layers import Condition, Conditioned, FilmRows, Linear, NormAct


def stack(module: nn.Module) -> int:
    """Stack the FiLM layers of every network inside ``module``; returns how many layers there are.

    Weights keep their values and their names in the state. With a gradient wanted of them the
    layers compute one by one. Weights that are moved afterwards, to another device or type, make
    the next call a ValueError until they are stacked again, or `unstack` is called. A copy of a
    stacked model is not stacked. ValueError where layers of one network differ in type or device.
    """
    networks = [m for m in module.modules() if isinstance(m, Conditioned)]
    for network in networks:
        network.stacked = StackedFilms(network)
    return sum(len(_films(network)) for network in networks)


def unstack(module: nn.Module) -> None:
    """Let every norm inside ``module`` compute its FiLM rows itself again."""
    for network in module.modules():
        if isinstance(network, Conditioned):
            network.stacked = None


class StackedFilms:
    """One matrix product for all FiLM layers of ``network``: emb [B, E] to their rows."""

    def __init__(self, network: Conditioned) -> None:
        norms = [m for m in network.modules() if isinstance(m, NormAct) and m.film is not None]
        self._layers = _films(network)
        kinds = sorted({f"{p.dtype} on {p.device}" for p in self._parameters()})
        if len(kinds) > 1:
            raise ValueError(
                f"FiLM layers cannot be stacked: their weights are {' and '.join(kinds)}; bring "
                "them to one type and device"
            )
        with torch.no_grad():
            self._weight = torch.cat([layer.weight for layer in self._layers])
            self._bias = torch.cat([layer.bias for layer in self._layers])
        start = 0
        for norm, layer in zip(norms, self._layers, strict=True):
            norm.place = slice(start, start + layer.out_features)
            for name, whole in (("weight", self._weight), ("bias", self._bias)):
                wanted = getattr(layer, name).requires_grad
                setattr(layer, name, nn.Parameter(whole[norm.place], requires_grad=wanted))
            start = norm.place.stop

    def __call__(self, emb: Tensor) -> Condition:
        """Rows of every norm; emb itself where a weight's gradient is wanted.

        ValueError where a layer's weight no longer lies in the stack.
        """
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters()):
            return emb
        # a compiler cannot ask where a tensor lies; it has compiled for weights that stay
        if not is_compiling() and not self._whole():
            raise ValueError(
                "a FiLM layer's weight has been moved or replaced since it was stacked; call "
                "fastscore.stacked.stack again, or unstack"
            )
        return FilmRows(F.linear(emb, self._weight, self._bias))

    def _parameters(self) -> list[nn.Parameter]:
        return [p for layer in self._layers for p in (layer.weight, layer.bias)]

    def _whole(self) -> bool:
        places = {t.untyped_storage()._cdata for t in (self._weight, self._bias)}
        return all(p.untyped_storage()._cdata in places for p in self._parameters())

    def __deepcopy__(self, memo: dict) -> None:
        """Nothing: copied weights are other weights, to be stacked themselves."""

    def __reduce__(self) -> tuple:
        return _nothing, ()


def _films(network: Conditioned) -> list[Linear]:
    norms = [m for m in network.modules() if isinstance(m, NormAct)]
    return [norm.film for norm in norms if norm.film is not None]


def _nothing() -> None:
    return None
