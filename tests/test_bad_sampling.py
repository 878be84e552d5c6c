"""What samplers refuse: guidance, schedules and arguments that do not fit."""

import math

import pytest
import torch
from oracles.plain import Plain

from fastscore.config import SigmaRange
from fastscore.samplers import (
    SCHEDULES,
    Churn,
    Guidance,
    Precision,
    dpmpp_2m_sde,
    dpmpp_3m_sde,
    euler,
    euler_ancestral,
    euler_maruyama,
    heun,
    predictor_corrector,
    sampler_named,
    schedule_for,
    unipc,
)
from fastscore.sde import VP, cosine_sigmas, uniform_sigmas

RANGE = SigmaRange(0.01, 40.0)
LABEL = torch.tensor([1, 2])


def test_names_of_the_schedules():
    levels = {name: make(9, 0.01, 40.0) for name, make in SCHEDULES.items()}
    assert levels["uniform_vp"] == levels["vp_linear"] == uniform_sigmas(9, 0.01, 40.0, VP())
    assert levels["cosine"] == cosine_sigmas(9, 0.01, 40.0)
    assert len(set(levels.values())) == len(levels) - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": LABEL[:1]}, r"label is torch.int64 of shape \(1,\); a batch of 2 needs"),
        ({"label": LABEL.int()}, "label is torch.int32"),
        ({"label": LABEL - 4}, "label -3 is below -1"),
        ({"label": LABEL, "gamma": torch.ones(3)}, r"gamma is torch.float32 of shape \(3,\)"),
        ({"label": LABEL, "gamma": LABEL}, "gamma is torch.int64"),
        ({"label": LABEL, "gamma": torch.tensor([1.0, math.nan])}, "gamma nan must be finite"),
        ({"label": LABEL, "gamma": math.nan}, "gamma nan must be finite"),
        ({"label": LABEL, "gamma": math.inf}, "gamma inf must be finite"),
        ({"label": LABEL, "gamma": -0.5}, "gamma -0.5 must be finite and not negative"),
        ({"interval": (2.0, 1.0)}, "interval 2.0 .. 1.0"),
        ({"interval": (math.nan, 1.0)}, "interval nan"),
    ],
)
def test_unfit_guidance(options, message):
    with pytest.raises(ValueError, match=message):
        euler(Plain(), torch.ones(2, 1, 2, 2), (1.0, 0.0), guidance=Guidance(**options))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: euler(Plain(), x[0, 0, 0], (1.0, 0.0)), r"pass floats \[batch"),
        (lambda x: euler(Plain(), x.long(), (1.0, 0.0)), "torch.int64"),
        (lambda x: euler(Plain(), x, (0.0,)), "steps 0 is below 1"),
        (lambda x: euler(Plain(), x, (80.0, 0.0)), "sigma 80 is outside the range 0.01 to 40"),
        (lambda x: heun(Plain(), x, (1.0, 0.001, 0.0)), "sigma 0.001 is outside"),
        (lambda x: euler(lambda *a: a[0][:1], x, (1.0, 0.0)), "must keep shape and dtype"),
        (lambda x: euler(lambda *a: a[0].double(), x, (1.0, 0.0)), "must keep shape and dtype"),
        (
            lambda x: euler(Plain(), x, (1.0, 0.0), precision=Precision(torch.float16)),
            "precision torch.float16 is not offered",
        ),
        (lambda x: heun(Plain(), x, (1.0, 0.0), sde=VP(), churn=Churn()), "churn is defined"),
        (lambda x: Churn(amount=-1.0), "churn amount -1.0"),
        (lambda x: Churn(sigma_min=3.0, sigma_max=1.0), "churn sigma_min 3.0"),
        (lambda x: euler_ancestral(Plain(), x, (1.0, 0.0), eta=2.0), "eta 2.0"),
        (lambda x: dpmpp_2m_sde(Plain(), x, (1.0, 0.0)), "stochastic"),
        (lambda x: dpmpp_3m_sde(Plain(), x, (1.0, 0.0)), "stochastic"),
        (lambda x: unipc(Plain(), x, (1.0, 0.0), order=2), "1 step is below the order 2"),
        (lambda x: euler_maruyama(Plain(), x, (1.0, 0.5), sde=VP()), "append a 0"),
        (
            lambda x: predictor_corrector(Plain(), x, (1.0, 0.0), sde=VP(), predictor="ddim"),
            "predictor 'ddim' is unknown; choose one of reverse_diffusion, ancestral",
        ),
        (
            lambda x: predictor_corrector(Plain(), x, (1.0, 0.0), sde=VP(), snr=0.0),
            "snr 0.0 must be positive",
        ),
        (lambda x: sampler_named("ddim"), "sampler 'ddim' is unknown; choose one of euler, heun"),
        (lambda x: schedule_for("heun", 0, RANGE), "steps 0 must be a whole number"),
        (lambda x: schedule_for("heun", -5, RANGE), "steps -5"),
        (lambda x: schedule_for("heun", 2.5, RANGE), "steps 2.5"),
        (lambda x: schedule_for("heun", 9, RANGE, schedule="linear"), "choose one of karras"),
        (lambda x: schedule_for("heun", 9, RANGE, sigma_max=80.0), "sigma 80 is outside"),
        (lambda x: schedule_for("em_vp", 9, SigmaRange(0.01, 900.0)), "vp: sigma 900 is above"),
    ],
)
def test_unfit_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 1, 2, 2))
