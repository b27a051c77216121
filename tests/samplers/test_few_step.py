"""The few-step rule, step by step against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen.errors import UserError
from fastgen.paths import VP, Pair, RectifiedFlow, TrigFlow
from fastgen.samplers import few_step, ode
from fastgen.student import SamplerSpec
from fastgen.teachers.mixture import Mixture

RF = RectifiedFlow()
Z = torch.tensor([[0.5, -1.0], [2.0, 0.25]])


class Recorder(torch.nn.Module):
    """A denoiser that notes every call and answers with pairs made from it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict] = []

    def forward(self, x, t, cond=None, **options):
        self.calls.append({"x": x, "t": t, "cond": cond, **options})
        return Pair(0.1 * x + t[:, None], 0.7 * x - 1)


def mixture() -> Mixture:
    eye = torch.eye(2, dtype=torch.float64)
    return Mixture(
        torch.tensor([1.0, 2.0]), torch.tensor([[-1.0, 0.5], [1.5, 0.0]]), torch.stack([0.2 * eye, 0.1 * eye])
    )


@pytest.mark.parametrize(
    ("path", "time", "init", "scale"),
    [
        (RF, 0.8, "sigma", 0.8),
        (RF, 0.8, "unit", math.hypot(0.2, 0.8)),
        (TrigFlow(sd=0.5), 1.0, "sigma", 0.5 * math.sin(1.0)),
        (VP(), 999.0, "unit", 1.0),
        (VP(), 999.0, "sigma", 0.9976672),  # sqrt(1 - 0.0046602): Stable Diffusion's last level
    ],
)
def test_the_first_state_has_the_scale_that_the_spec_names(path, time, init, scale):
    spec = SamplerSpec(path=path, times={1: (time,), 2: (time, time / 2)}, init=init)
    for steps in (1, 2):
        torch.testing.assert_close(few_step.initial(spec, Z, steps), scale * Z, atol=1e-6, rtol=0)
    model = Recorder()
    few_step.sample(model, spec, Z, 1)
    torch.testing.assert_close(model.calls[0]["x"], scale * Z, atol=1e-6, rtol=0)


def test_own_eps_between_the_steps():
    spec, model = SamplerSpec(path=RF, times={3: (0.9, 0.6, 0.1)}), Recorder()
    cond = {"label": torch.tensor([3, 4])}
    result = few_step.sample(model, spec, Z, 3, cond)
    x = 0.9 * Z
    for call, time, following in zip(model.calls, (0.9, 0.6, 0.1), (0.6, 0.1, None), strict=True):
        torch.testing.assert_close(call["x"], x)
        torch.testing.assert_close(call["t"], torch.full((2,), time))
        assert call["cond"] is cond and call["on"] == RF and "r" not in call
        x0, eps = 0.1 * x + time, 0.7 * x - 1
        x = x0 if following is None else (1 - following) * x0 + following * eps
    torch.testing.assert_close(result, x)


def test_fresh_noise_between_the_steps():
    spec, model = SamplerSpec(path=TrigFlow(), times={3: (1.5, 1.0, 0.4)}, renoise=True), Recorder()
    asked = []

    def renoise(i: int) -> torch.Tensor:
        asked.append(i)
        return torch.full((2, 2), 10.0 * i)

    few_step.sample(model, spec, Z, 3, renoise=renoise)
    assert asked == [1, 2]
    for i, time in ((1, 1.0), (2, 0.4)):
        before = model.calls[i - 1]
        x0 = 0.1 * before["x"] + before["t"][:, None]
        torch.testing.assert_close(model.calls[i]["x"], math.cos(time) * x0 + math.sin(time) * 10.0 * i)


def test_fresh_noise_has_to_be_given_unless_there_is_one_step():
    spec = SamplerSpec(path=RF, times={1: (1.0,), 2: (1.0, 0.5)}, renoise=True)
    few_step.sample(Recorder(), spec, Z, 1)
    with pytest.raises(ValueError, match="pass renoise"):
        few_step.sample(Recorder(), spec, Z, 2)


def test_a_two_time_network_is_told_where_it_steps_to():
    spec, model = SamplerSpec(path=RF, times={2: (1.0, 0.4)}, two_time=True), Recorder()
    few_step.sample(model, spec, Z, 2)
    torch.testing.assert_close(torch.stack([call["r"] for call in model.calls]), torch.tensor([[0.4, 0.4], [0.0, 0.0]]))


def test_an_average_velocity_as_a_formal_pair_steps_by_it():
    """MeanFlow: x0 = x - t u, eps = x + (1 - t) u, and the rule gives x - (t - r) u for any u."""

    class Average(torch.nn.Module):
        def forward(self, x, t, cond=None, *, on, r):
            u = x.square() + r[:, None]
            return Pair(x - t[:, None] * u, x + (1 - t[:, None]) * u)

    x = Z
    for t, r in ((1.0, 0.7), (0.7, 0.2), (0.2, 0.0)):
        x = x - (t - r) * (x.square() + r)
    spec = SamplerSpec(path=RF, times={3: (1.0, 0.7, 0.2)}, two_time=True)
    torch.testing.assert_close(few_step.sample(Average(), spec, Z, 3), x, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("path", [RF, VP()])
def test_with_own_eps_it_is_the_euler_solver(path):
    z = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spec = SamplerSpec(path=path, times={4: path.grid(4)}, init="unit")
    expected = ode.solve(mixture(), z, steps=4, solver="euler", path=path, init="unit")
    torch.testing.assert_close(few_step.sample(mixture(), spec, z, 4), expected, atol=1e-10, rtol=0)


def test_a_step_count_outside_the_list_is_named():
    spec = SamplerSpec(path=RF, times={1: (1.0,), 4: RF.grid(4)})
    with pytest.raises(UserError, match="made for 1, 4"):
        few_step.sample(Recorder(), spec, Z, 3)


def test_no_gradient_is_kept():
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t, cond=None, *, on=None):
            return Pair(self.weight * x, x)

    assert not few_step.sample(Scale(), SamplerSpec(path=RF, times={1: (1.0,)}), Z, 1).requires_grad
