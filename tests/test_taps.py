"""Taps and guidance equal autograd and a closed form, and cost no more than they must."""

import pytest
import torch
from small_models import CLASSIFIER, inputs, keep_double, small_classifier
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fastscore.classifier import Classifier
from fastscore.config import ClassifierConfig
from fastscore.layers import set_backend
from fastscore.taps import Taps, read_taps

LABEL_SETS = {
    "labels": [0, 1, 2, 3, 1],
    "mixed": [-1, 3, -1, 0, 2],
    "none": [-1, -1, -1, -1, -1],
}


def by_autograd(classifier: Classifier, x: Tensor, c_noise: Tensor, label: Tensor) -> Taps:
    """The same from the plain forward pass: hooks on the stages, then autograd."""
    taps: list[Tensor] = []
    hooks = [
        stage.register_forward_hook(lambda module, args, out: taps.append(out))
        for stage in classifier.stages
    ]
    x = x.clone().requires_grad_()
    logits = classifier(x, c_noise)
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(logits.logsumexp(dim=1).sum(), taps, retain_graph=True)
    chosen = logits.log_softmax(dim=1).gather(1, label.clamp_min(0)[:, None])[:, 0]
    (guidance,) = torch.autograd.grad((chosen * (label >= 0)).sum(), x)
    return Taps(logits, tuple(taps), gradients, guidance)


def assert_taps_close(actual: Taps, expected: Taps, tolerance: float) -> None:
    """Largest difference relative to the largest value, for each tensor and each sample."""
    pairs = [(actual.logits, expected.logits), (actual.guidance, expected.guidance)]
    pairs += zip(actual.features, expected.features, strict=True)
    pairs += zip(actual.gradients, expected.gradients, strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        error = (a - b).abs().flatten(1).amax(dim=1)
        scale = b.abs().flatten(1).amax(dim=1)
        assert (error <= tolerance * scale).all(), f"{error / scale} beyond {tolerance}"


@pytest.mark.parametrize("labels", LABEL_SETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_taps_and_guidance_equal_autograd(labels, dtype, tolerance, monkeypatch):
    keep_double(monkeypatch)
    classifier = small_classifier().to(dtype)
    x, sigma = inputs(5)
    x, c_noise, label = x.to(dtype), sigma.log().to(dtype) / 4, torch.tensor(LABEL_SETS[labels])
    actual = read_taps(classifier, x, c_noise, label)
    expected = by_autograd(classifier, x, c_noise, label)
    assert all(t.dtype == dtype for t in (actual.logits, *actual.features, *actual.gradients))
    assert all(g.abs().amax() > 1e-6 for g in expected.gradients)
    assert_taps_close(actual, expected, tolerance)
    assert (actual.guidance[label < 0] == 0).all()
    assert (actual.guidance[label >= 0].abs().amax(dim=(1, 2, 3)) > 1e-6).all()


def test_labels_change_nothing_but_the_guidance():
    classifier = small_classifier()
    x, sigma = inputs(3)
    unguided = read_taps(classifier, x, sigma)
    guided = read_taps(classifier, x, sigma, torch.tensor([2, -1, 0]))
    assert unguided.guidance is None
    assert guided.guidance.shape == x.shape
    assert torch.equal(unguided.logits, guided.logits)
    for a, b in zip(
        (*unguided.features, *unguided.gradients),
        (*guided.features, *guided.gradients),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=float(1e-5 * b.detach().abs().max()))


class Linear(nn.Module):
    """Two taps and all derivatives in closed form: h1 = a x, h2 = b h1, f = W mean(h2)."""

    config = ClassifierConfig(
        labels=("a", "b", "c"),
        n_mels=4,
        frames=4,
        patch=1,
        channels=(1, 1),
        blocks=(1, 1),
        groups=1,
    )

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)

    def embed(self, c_noise):
        return c_noise

    def lower(self, x, emb):
        return 3.0 * x

    def upper(self, h, emb, perturb=None):
        h1 = h if perturb is None else h + perturb[0]
        h2 = nn.functional.avg_pool2d(-0.5 * h1, 2)
        h2 = h2 if perturb is None else h2 + perturb[1]
        return h2.mean(dim=(2, 3)) @ self.weight.T, (h1, h2)


def test_a_classifier_of_another_kind_in_closed_form(monkeypatch):
    keep_double(monkeypatch)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    label = torch.tensor([1, 2])
    taps = read_taps(Linear(), x, torch.zeros(2, dtype=torch.float64), label)
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    p = (-1.5 * x.mean(dim=(1, 2, 3))[:, None] * w).softmax(dim=1)
    slope = (p * w).sum(dim=1)[:, None, None, None]
    ones = torch.ones(2, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(taps.features[1], nn.functional.avg_pool2d(-1.5 * x, 2))
    torch.testing.assert_close(taps.gradients[0], -0.5 * slope * ones / 16)
    torch.testing.assert_close(taps.gradients[1], slope * ones[..., :2, :2] / 4)
    expected = -1.5 * (w[label][:, None, None, None] - slope) * ones / 16
    torch.testing.assert_close(taps.guidance, expected)


def test_gradient_taps_need_no_derivative_below_the_shallowest_tap(monkeypatch):
    classifier = small_classifier()
    x, sigma = inputs(2)
    expected = read_taps(classifier, x, sigma)

    def refuse(x, emb):
        raise RuntimeError("differentiated below the shallowest tap")

    monkeypatch.setattr(classifier, "linearize_lower", refuse)
    actual = read_taps(classifier, x, sigma)
    assert all(map(torch.equal, actual.gradients, expected.gradients))
    with pytest.raises(RuntimeError, match="below the shallowest"):
        read_taps(classifier, x, sigma, torch.tensor([0, 1]))


class Transformed(nn.Module):
    """A classifier that does not know its own derivatives."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.config, self.embed = classifier.config, classifier.embed
        self.lower, self.upper = classifier.lower, classifier.upper


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_own_derivatives_equal_the_transforms_of_pytorch(dtype, monkeypatch):
    keep_double(monkeypatch)
    classifier = small_classifier().to(dtype)
    x, sigma = inputs(5)
    x, c_noise, label = x.to(dtype), sigma.log().to(dtype) / 4, torch.tensor(LABEL_SETS["mixed"])
    actual = read_taps(classifier, x, c_noise, label)
    expected = read_taps(Transformed(classifier), x, c_noise, label)
    assert_taps_close(actual, expected, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("backend", ["reference", None])
def test_two_cotangents_of_each_sample_go_back_in_one_pass(backend, layout):
    classifier = small_classifier().to(memory_format=layout)
    set_backend(classifier, backend)
    x, sigma = inputs(3)
    emb = classifier.embed(sigma.log() / 4)
    h, pull_lower = classifier.linearize_lower(x, emb)
    logits, _, pull_upper = classifier.linearize_upper(h, emb)
    first, second = torch.randn_like(logits), torch.randn_like(logits)
    both = pull_upper(torch.cat((first, second)))
    for together, *apart in zip(both, pull_upper(first), pull_upper(second), strict=True):
        torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-6)
    together = pull_lower(both[0])
    apart = [pull_lower(pull_upper(c)[0]) for c in (first, second)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-6)


def test_cost_is_one_forward_and_one_or_two_vjps():
    """Convolutions of the forward pass, again for each cotangent, and never for a weight."""
    ops = torch.ops.aten
    classifier = small_classifier().requires_grad_(False)
    x, sigma = inputs(2)
    emb = classifier.embed(sigma)
    h = classifier.lower(x, emb)

    def flops(f, *args):
        with FlopCounterMode(display=False) as counter:
            f(*args)
        counts = counter.get_flop_counts()["Global"]
        assert ops.convolution_backward not in counts
        return counts[ops.convolution]

    forward, upper = flops(classifier, x, sigma), flops(classifier.upper, h, emb)
    lower = forward - upper
    # a transposed convolution multiplies as often as the convolution that it belongs to
    for label, expected in ((None, upper), (torch.tensor([1, 2]), 2 * upper + lower)):
        assert flops(read_taps, classifier, x, sigma, label) == forward + expected


def test_no_graph_is_held_and_no_parameter_gets_a_gradient():
    classifier = small_classifier().requires_grad_(False)
    x, sigma = inputs(2)
    taps = read_taps(classifier, x, sigma, torch.tensor([0, 1]))
    for t in (taps.logits, *taps.features, *taps.gradients, taps.guidance):
        assert not t.requires_grad
        assert t.grad_fn is None
    assert all(p.grad is None for p in classifier.parameters())


def test_samples_do_not_see_each_other():
    classifier = small_classifier()
    x, sigma = inputs(4)
    label = torch.tensor([0, -1, 2, 3])
    together = read_taps(classifier, x, sigma, label)
    for i in range(4):
        alone = read_taps(classifier, x[i : i + 1], sigma[i : i + 1], label[i : i + 1])
        for a, b in (
            (together.guidance, alone.guidance),
            *zip(together.gradients, alone.gradients, strict=True),
        ):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guided", [False, True])
def test_traces_to_one_flat_graph(guided):
    classifier = small_classifier().requires_grad_(False)

    def read(x, c_noise, label):
        taps = read_taps(classifier, x, c_noise, label if guided else None)
        return [*taps.features, *taps.gradients, *([taps.guidance] if guided else [])]

    x, sigma = inputs(3)
    graph = make_fx(read)(x, sigma, torch.tensor([0, 1, 2]))
    kinds = {node.op for node in graph.graph.nodes}
    assert kinds <= {"placeholder", "get_attr", "call_function", "output"}
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    # nothing but aten: no autograd function, no nested graph, no Python call
    assert all(isinstance(t, torch._ops.OpOverload) for t in calls if "getitem" not in str(t))
    other, sigma = inputs(3, seed=7)
    args = (other, sigma.flip(0), torch.tensor([-1, 3, 1]))
    for a, b in zip(graph(*args), read(*args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_taps_follow_other_lengths():
    classifier = small_classifier()
    x, sigma = inputs(2, frames=40)
    taps = read_taps(classifier, x, sigma, torch.tensor([0, 1]))
    shapes = [(2, c, 8 >> i, 20 >> i) for i, c in enumerate(CLASSIFIER.channels)]
    assert [tuple(t.shape) for t in taps.features] == shapes
    assert [tuple(t.shape) for t in taps.gradients] == shapes
    assert taps.guidance.shape == x.shape
