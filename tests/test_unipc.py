"""UniPC as one linear update a step, against its published two: predictor, then corrector."""

import itertools
import math

import pytest
import torch
from oracles.mixture import three_classes

from fastscore.plans import Step, unipc_plan
from fastscore.sde import exponential_sigmas, karras_sigmas

LOW, HIGH = 0.05, 10.0
MIXTURE = three_classes()
ORDERS = [(order, variant) for order in (1, 2) for variant in ("bh1", "bh2")]


def curved(x, sigma):
    """A denoiser that is no affine map."""
    return (0.4 * x + sigma**2 * torch.sin(x / (1 + sigma))) / (0.4 + sigma**2)


def mixture(x, sigma):
    return MIXTURE(x, torch.full((len(x),), sigma, dtype=torch.float64), None, None)


def guided(x, sigma):
    label, gamma = torch.arange(len(x)) % 4 - 1, torch.linspace(0, 4, len(x))
    return MIXTURE(x, torch.full((len(x),), sigma, dtype=torch.float64), label, gamma)


def follow(plan, denoise, x, sigmas):
    """The plan's updates, as `fastscore.plans.Step` states them."""
    old = older = torch.zeros_like(x)
    for step, sigma in zip(plan, sigmas[:-1], strict=True):
        x0 = denoise(x, sigma)
        x = step.keep * x + step.pull * x0 + step.pull_old * old + step.pull_older * older
        old, older = x0, old
    return x


def published(denoise, x, sigmas, order, variant):
    """Zhao et al. 2023, algorithms 1 and 2 in data prediction, on x_t of the VP process.

    UniP-p, UniC-p with the simplified coefficient 1/2 that the paper sets for UniP-2 and UniC-1,
    lower orders at the start and the end; at sigma 0 the state is the last answer.
    """
    alphas = [1 / math.sqrt(1 + sigma**2) for sigma in sigmas]
    scales = [alpha * sigma for alpha, sigma in zip(alphas, sigmas, strict=True)]
    lambdas = [math.log(a / s) for a, s in zip(alphas[:-1], scales[:-1], strict=True)]
    steps = len(sigmas) - 1
    x, answers, base, used = x * alphas[0], [], None, 0
    for i in range(steps):
        answers.append(denoise(x / alphas[i], sigmas[i]))
        if i:
            # the corrector starts where the predictor of this step started
            x = base + update(answers[:-1], lambdas[: i + 1], alphas[i], used, variant, answers)
        if i == steps - 1:
            return answers[-1]
        used = min(order, i + 1, steps - i)
        h = lambdas[i + 1] - lambdas[i]
        base = scales[i + 1] / scales[i] * x - alphas[i + 1] * math.expm1(-h) * answers[-1]
        x = base + update(answers, lambdas[: i + 2], alphas[i + 1], used, variant, None)


def update(answers, lambdas, alpha, order, variant, corrected):
    """-alpha B(h) sum of a_m D_m / r_m, eqs. 3 and 5; with the new answer where correcting."""
    h = lambdas[-1] - lambdas[-2]
    big_b = -h if variant == "bh1" else math.expm1(-h)
    ratios = [(lambdas[-2 - m] - lambdas[-2]) / h for m in range(1, order)]
    moves = [answers[-1 - m] - answers[-1] for m in range(1, order)]
    if corrected is not None:
        ratios.append(1.0)
        moves.append(corrected[-1] - answers[-1])
    count = len(ratios)
    if not count:
        return 0.0
    # phi_{k+1}(-h) = (phi_k(-h) - 1/k!) / -h, phi_0 = e^-h; g_k = k! phi_{k+1}(-h) (-h)
    phi, wanted = math.exp(-h), []
    for k in range(count + 1):
        phi = (phi - 1 / math.factorial(k)) / -h
        if k:
            wanted.append(math.factorial(k) * phi * -h / big_b)
    if count == 1:
        weights = [0.5]
    else:
        matrix = torch.tensor([[r**k for r in ratios] for k in range(count)], dtype=torch.float64)
        weights = torch.linalg.solve(matrix, torch.tensor(wanted, dtype=torch.float64)).tolist()
    parts = zip(weights, ratios, moves, strict=True)
    return -alpha * big_b * sum(a / r * move for a, r, move in parts)


@pytest.mark.parametrize("schedule", [karras_sigmas, exponential_sigmas])
@pytest.mark.parametrize(("order", "variant"), ORDERS)
@pytest.mark.parametrize("n", [2, 3, 4, 9, 30])
def test_equals_predictor_and_corrector_of_the_paper(schedule, order, variant, n):
    sigmas = schedule(n, LOW, HIGH)
    x = torch.randn(5, 4, dtype=torch.float64) * HIGH
    for denoise in (curved, mixture):
        ours = follow(unipc_plan(sigmas, order, variant), denoise, x, sigmas)
        theirs = published(denoise, x, sigmas, order, variant)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


# UniPCMultistepScheduler of diffusers 0.35.2 in float64 on `curved`, from the start below and
# karras_sigmas(n, 0.03, 20): prediction_type "sample", final_sigmas_type "zero"
START = (20.0, -7.0, 3.0, 0.5)
DIFFUSERS = {
    (1, "bh2", 5): [1.21161829599323, -0.47924742079289, 0.208645747658434, 0.0348960420355094],
    (2, "bh1", 6): [1.83653334829225, -0.73888361705173, 0.323299665124039, 0.0541374594024985],
    (2, "bh2", 2): [0.862444563199209, -0.343823716566953, 0.149497744529736, 0.024994927023167],
    (2, "bh2", 6): [1.48483834872407, -0.591412566618836, 0.258069184555087, 0.043186148550576],
    (2, "bh2", 15): [1.46155693851073, -0.585419839551379, 0.255700339199486, 0.0427996255263969],
}


@pytest.mark.parametrize(("order", "variant", "n"), list(DIFFUSERS))
def test_equals_another_implementation(order, variant, n):
    sigmas = karras_sigmas(n, 0.03, 20.0)
    x = torch.tensor(START, dtype=torch.float64)
    ours = follow(unipc_plan(sigmas, order, variant), curved, x, sigmas)
    assert ours.tolist() == pytest.approx(DIFFUSERS[order, variant, n], rel=1e-11)


def exact(denoise, x, n=400):
    """Runge-Kutta of fourth order in log sigma, then the last denoising."""
    h = math.log(HIGH / LOW) / n
    for i in range(n):
        high, low = (HIGH * math.exp(-h * k) for k in (i, i + 1))
        middle = math.sqrt(high * low)
        a = denoise(x, high) - x
        b_at = x + h / 2 * a
        b = denoise(b_at, middle) - b_at
        c_at = x + h / 2 * b
        c = denoise(c_at, middle) - c_at
        d_at = x + h * c
        d = denoise(d_at, low) - d_at
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return denoise(x, LOW)


@pytest.fixture(scope="module", params=[mixture, guided], ids=["unguided", "guided"])
def problem(request):
    x = MIXTURE.draw(24, HIGH, torch.Generator().manual_seed(1))
    return request.param, x, exact(request.param, x)


@pytest.mark.parametrize(("order", "variant"), ORDERS)
def test_gains_one_order_by_the_corrector(problem, order, variant):
    denoise, x, reference = problem
    errors = []
    for n in (65, 129, 257):
        sigmas = karras_sigmas(n, LOW, HIGH)
        ours = follow(unipc_plan(sigmas, order, variant), denoise, x, sigmas)
        errors.append(float((ours - reference).square().mean().sqrt()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(slopes) > order + 1 - 0.2, slopes
    assert max(slopes) < order + 1 + 0.4, slopes
    assert errors[-1] < (1e-3 if order == 1 else 2e-5)


def test_a_gaussian_s_solution_is_known():
    # the standardised deviation from the mean is kept
    mean, variance = 0.7, 0.3
    x = torch.tensor([-9.0, 0.0, 3.0, 20.0], dtype=torch.float64)[:, None]

    def gaussian(x, sigma):
        return (variance * x + sigma**2 * mean) / (variance + sigma**2)

    shrink = math.sqrt((variance + LOW**2) / (variance + HIGH**2))
    reference = gaussian(mean + (x - mean) * shrink, LOW)
    errors = []
    for n in (33, 65, 129):
        sigmas = karras_sigmas(n, LOW, HIGH)
        errors.append(float((follow(unipc_plan(sigmas), gaussian, x, sigmas) - reference).norm()))
    assert all(7 < a / b < 10.5 for a, b in itertools.pairwise(errors)), errors


@pytest.mark.parametrize(("order", "variant"), ORDERS)
@pytest.mark.parametrize("n", [2, 7])
def test_a_known_answer_is_followed_exactly(order, variant, n):
    """Where x0 never changes the solution is x0 + sigma eps, at every step of every order."""
    sigmas = exponential_sigmas(n, LOW, HIGH)
    x0, eps = 0.3, -1.7
    for step, high, low in zip(
        unipc_plan(sigmas, order, variant), sigmas[:-2], sigmas[1:-1], strict=False
    ):
        moved = step.keep * (x0 + high * eps) + (step.pull + step.pull_old + step.pull_older) * x0
        assert moved == pytest.approx(x0 + low * eps, rel=1e-12)


def test_one_step_is_one_denoising():
    assert unipc_plan((40.0, 0.0)) == unipc_plan((40.0, 0.0), order=1) == (Step(0.0, 1.0),)
    sigmas = karras_sigmas(2, LOW, HIGH)
    assert unipc_plan(sigmas) == unipc_plan(sigmas, order=2)


def test_looks_back_no_further_than_there_are_answers():
    first, second, third, *_ = unipc_plan(karras_sigmas(6, LOW, HIGH))
    assert first.pull_old == first.pull_older == second.pull_older == 0
    assert second.pull_old != 0
    assert third.pull_older != 0
    assert all(step.pull_older == 0 for step in unipc_plan(karras_sigmas(6, LOW, HIGH), order=1))


@pytest.mark.parametrize(
    ("sigmas", "options", "message"),
    [
        ((1.0, 0.0), {"order": 2}, "1 step is below the order 2 of UniPC; take 2 steps or order 1"),
        ((2.0, 1.0, 0.0), {"order": 3}, "order 3 of UniPC is not offered.*choose 1 or 2"),
        ((2.0, 1.0, 0.0), {"order": 0}, "order 0 of UniPC"),
        ((2.0, 1.0, 0.0), {"order": True}, "order True of UniPC"),
        ((2.0, 1.0, 0.0), {"variant": "bh3"}, "variant 'bh3' is unknown; choose bh1 or bh2"),
        ((0.0,), {}, "steps 0 is below 1"),
        ((1.0, 2.0, 0.0), {}, "from 1 to 2 at step 0"),
    ],
)
def test_unfit_calls(sigmas, options, message):
    with pytest.raises(ValueError, match=message):
        unipc_plan(sigmas, **options)
