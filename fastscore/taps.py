"""Feature taps, gradient taps and the guidance gradient by vector-Jacobian products.

Our classifier pulls cotangents back itself (`linearize_lower`, `linearize_upper`); for any other
the products are derived by torch.func.vjp. Either way no autograd graph is held, the classifier's
parameters receive no gradient, and nothing below the shallowest tap is differentiated unless
guidance asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from fastscore_kernels import class_cotangents
from torch import Tensor

from fastscore.classifier import Classifier, PullTaps
from fastscore.layers import Pull


class Taps(NamedTuple):
    """What one forward pass and one or two vector-Jacobian products of a classifier yield.

    logits [B, K]; features and gradients, one [B, C_l, H_l, W_l] a tap, shallowest first;
    guidance = grad_x log p(y|x) [B, 1, n_mels, frames], None when unguided.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    guidance: Tensor | None


def read_taps(
    classifier: Classifier, x: Tensor, c_noise: Tensor, label: Tensor | None = None
) -> Taps:
    """Read all taps of ``classifier`` at scaled inputs x [B, 1, n_mels, frames], c_noise [B].

    Gradient taps are g_l = d logsumexp(f) / d h_l = J_l^T softmax(f) (Grathwohl et al. 2020, JEM).
    With ``label`` [B] int64 the guidance gradient J_x^T (e_y - softmax(f)) is computed from the
    same forward pass, with respect to the scaled input; a label of -1 yields zero for its sample.
    Both cotangents of all samples go back in one batched pass down to the shallowest tap, so
    gradient taps of a guided batch are those of an unguided one up to rounding, not to the bit.
    """
    emb = classifier.embed(c_noise)
    lower, upper = _linearized(classifier)
    pull_lower = None
    if label is None:
        h = classifier.lower(x, emb)
    else:
        h, pull_lower = lower(x, emb)
    logits, features, pull_upper = upper(h, emb)
    if label is None or pull_lower is None:
        p = logits.float().softmax(dim=1)
        return Taps(logits, features, pull_upper(p.to(logits.dtype)), None)
    both = pull_upper(class_cotangents(logits, label, getattr(classifier, "backend", None)))
    # with it goes what the upper stages held for it
    del pull_upper
    b = x.shape[0]
    # the shallowest tap carries the whole cotangent of the class
    return Taps(logits, features, tuple(t[:b] for t in both), pull_lower(both[0][b:]))


def class_gradient(classifier: Classifier, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
    """grad_x log p(y|x) of ``classifier`` alone, shaped as the scaled input x.

    One forward pass and one vector-Jacobian product; arguments as those of `read_taps`, and the
    same numbers as its ``guidance``.
    """
    emb = classifier.embed(c_noise)
    lower, upper = _linearized(classifier)
    h, pull_lower = lower(x, emb)
    logits, _, pull_upper = upper(h, emb)
    both = class_cotangents(logits, label, getattr(classifier, "backend", None))
    shallowest = pull_upper(both[x.shape[0] :])[0]
    # with it goes what the upper stages held for it
    del pull_upper
    return pull_lower(shallowest)


def _linearized(classifier: Classifier) -> tuple[Callable, Callable]:
    """``linearize_lower`` and ``linearize_upper``: the classifier's own or derived ones."""
    if hasattr(classifier, "linearize_lower") and hasattr(classifier, "linearize_upper"):
        return classifier.linearize_lower, classifier.linearize_upper
    return _transform_lower(classifier), _transform_upper(classifier)


def _transform_lower(classifier: Classifier) -> Callable:
    """``linearize_lower`` of any classifier, by torch.func.vjp."""

    def linearize(x: Tensor, emb: Tensor) -> tuple[Tensor, Pull]:
        h, pull = torch.func.vjp(lambda t: classifier.lower(t, emb), x)
        return h, lambda grad: pull(grad)[0]

    return linearize


def _transform_upper(classifier: Classifier) -> Callable:
    """``linearize_upper`` of any classifier, by torch.func.vjp with respect to perturbations."""

    def linearize(h: Tensor, emb: Tensor) -> tuple[Tensor, tuple[Tensor, ...], PullTaps]:
        zeros = _zero_perturbations(classifier, h)
        logits, pull, features = torch.func.vjp(
            lambda *perturb: classifier.upper(h, emb, perturb), *zeros, has_aux=True
        )

        def pull_rows(grad: Tensor) -> tuple[Tensor, ...]:
            # a pull-back of PyTorch's takes one cotangent of each sample
            found = [pull(rows) for rows in grad.split(h.shape[0])]
            return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))

        return logits, features, pull_rows

    return linearize


def _zero_perturbations(classifier: Classifier, h: Tensor) -> list[Tensor]:
    """Zeros of every tap's shape, given the shallowest tap h."""
    b, _, height, width = h.shape
    return [
        torch.zeros(b, c, height >> i, width >> i, dtype=h.dtype, device=h.device).to(
            memory_format=torch.channels_last
        )
        for i, c in enumerate(classifier.config.channels)
    ]
