"""Weight normalisation (Salimans and Kingma 2016): folding it into plain weights, and adding it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# names of magnitude and direction: the old hooks of PyTorch, and its parametrizations
_PAIRS = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


def fold_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict with every magnitude g and direction v replaced by the weight g v / |v|.

    |v| is taken over all but the first dimension, PyTorch's default, and in fp64. Raises ValueError
    where one of a pair is missing or the shapes do not fit.
    """
    folded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for magnitude, direction in _PAIRS:
            if name.endswith("." + magnitude):
                prefix = name[: -len(magnitude)]
                if prefix + direction not in tensors:
                    raise ValueError(f"{name} has no {direction} beside it")
                folded[prefix + "weight"] = _fold(tensor, tensors[prefix + direction], name)
                break
            if name.endswith("." + direction):
                if name[: -len(direction)] + magnitude not in tensors:
                    raise ValueError(f"{name} has no {magnitude} beside it")
                break
        else:
            folded[name] = tensor
    return folded


def _fold(magnitude: Tensor, direction: Tensor, name: str) -> Tensor:
    expected = (direction.shape[0], *[1] * (direction.ndim - 1))
    if tuple(magnitude.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(magnitude.shape)}, but its direction of shape "
            f"{tuple(direction.shape)} needs {expected}"
        )
    v = direction.double()
    norm = torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)
    return (magnitude.double() * v / norm).to(direction.dtype)


def add_weight_norm(module: nn.Module) -> nn.Module:
    """Put weight normalisation on every convolution of ``module``, in place, for training."""
    for child in module.modules():
        if isinstance(child, (nn.Conv1d, nn.ConvTranspose1d)):
            nn.utils.parametrizations.weight_norm(child)
    return module
