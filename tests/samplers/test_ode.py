"""ODE solvers: orders of convergence on every path, and step by step against stock schedulers and Karras' algorithm."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import EDM, VP, Path, Prediction, RectifiedFlow, TrigFlow
from fastgen.samplers import ode
from fastgen.teacher import Teacher
from fastgen.teachers.mixture import Mixture

RF = RectifiedFlow()
PATHS = [
    RF,
    TrigFlow(),
    TrigFlow(sd=0.5),
    VP(),
    VP(zero_snr=True, schedule="linear", beta_start=1e-4, beta_end=0.02),
    EDM(),
]
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mixture(labels: Tensor | None = None) -> Mixture:
    eye = torch.eye(2, dtype=torch.float64)
    means = torch.tensor([[-1.0, 0.5], [1.5, 0.0], [0.0, -1.0]])
    return Mixture(torch.tensor([1.0, 2.0, 1.0]), means, torch.stack([0.3 * eye, 0.2 * eye, 0.5 * eye]), labels)


class Stub(Denoiser):
    """A fixed smooth "network", to be given to a stock scheduler too."""

    def __init__(self, path: Path, kind: str, time_scale: float = 1.0) -> None:
        super().__init__(None, path, Prediction(kind=kind), shape=(3, 4, 4), time_scale=time_scale)

    def raw(self, x, time, cond, extra):
        return network(x, time)


def network(x: Tensor, time: Tensor) -> Tensor:
    return torch.sin(2 * x + x.roll(1, -1)) - 0.3 * x + torch.cos(time / 300).reshape(-1, 1, 1, 1)


def rmse(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


def even_times(path: Path, n: int, last: float) -> list[float]:
    """n times even in the path's own time (EDM: in its seventh root) from its start, the (n + 1)-th being `last`."""
    if isinstance(path, EDM):
        return list(EDM(start=path.start, end=last).grid(n + 1))[:-1]
    return [path.start + (last - path.start) * i / n for i in range(n)]


@cache
def truth(start: float, last: float = 0.0) -> Tensor:
    """What 48 noises become on the mixture between two times of a rectified flow."""
    times = [start + (last - start) * i / 400 for i in range(400)]
    return ode.solve(mixture(), normal(48, 2), times=times, path=RF, final=(1 - last, last))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2), ("unipc", 2)])
def test_order_of_convergence(path, solver, order):
    """Down to the level of RF t = 0.1, the same map on every path: halving the steps divides the error by 2^order."""
    z, model = normal(48, 2), mixture()
    level = (0.9, 0.1)
    last = path.time(*torch.tensor(level, dtype=torch.float64)).item()
    final = tuple(v.item() for v in path.levels(torch.tensor(last, dtype=torch.float64)))
    start = RF.time(*path.levels(torch.tensor(path.start, dtype=torch.float64))).item()
    errors = []
    for n in (20, 40, 80):
        end = ode.solve(model, z, times=even_times(path, n, last), path=path, solver=solver, final=final, init="sigma")
        errors.append(rmse(end / sum(final), truth(start, level[1])))
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert order - 0.35 < rates[-1] < order + 0.8, (errors, rates)
    assert errors[-1] < (0.1 if order == 1 else 0.02)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_all_paths_and_solvers_end_on_the_same_clean_points(path):
    z, model = normal(48, 2), mixture()
    start = RF.time(*path.levels(torch.tensor(path.start, dtype=torch.float64))).item()
    # VP's own grid ends well above its first level, from where a single Euler step is too long to compare.
    times = path.grid(100) if not isinstance(path, VP) else [path.start * (1 - i / 99) ** 2 for i in range(100)]
    for solver in ("heun", "dpm++", "unipc"):
        end = ode.solve(model, z, times=times, path=path, solver=solver, init="sigma")
        assert rmse(end, truth(start)) < 0.002, solver


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize("final", ["clean", "first level"])
def test_euler_on_vp_is_ddim(steps, final):
    """Where the steps divide the table: elsewhere DDIM steps to t - n // steps, a level at which it never evaluates."""
    scheduler = DDIMScheduler(
        **SD_BETAS, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=final == "clean"
    )
    scheduler.set_timesteps(steps)
    model, x = Stub(VP(), "eps"), normal(2, 3, 4, 4, dtype=torch.float32)
    assert scheduler.timesteps.tolist() == list(VP().grid(steps))
    alpha, sigma = VP().table()
    levels = (1.0, 0.0) if final == "clean" else (alpha[0].item(), sigma[0].item())
    ours = list(ode.trajectory(model, x, steps=steps, solver="euler", init="unit", final=levels))
    assert len(ours) == steps + 1
    for i, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(ours[i], x, atol=2e-4, rtol=2e-5)
        x = scheduler.step(network(x, t.float()), t, x).prev_sample
    torch.testing.assert_close(ours[-1], x, atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_euler_on_a_rectified_flow_is_flow_match_euler(steps):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=list(RF.grid(steps)))
    model, x = Stub(RF, "flow", time_scale=1000), normal(2, 3, 4, 4, dtype=torch.float32)
    ours = list(ode.trajectory(model, x, steps=steps, solver="euler"))
    for i, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(ours[i], x, atol=1e-5, rtol=1e-5)
        x = scheduler.step(network(x, t), t, x).prev_sample
    torch.testing.assert_close(ours[-1], x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 6, 20])
@pytest.mark.parametrize(
    ("solver", "kind"), [("dpm++", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)]
)
def test_multistep_solvers_on_vp_are_the_stock_ones(solver, kind, steps):
    scheduler = kind(**SD_BETAS, timestep_spacing="trailing", final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    x = normal(2, 3, 4, 4, dtype=torch.float32)
    ours = ode.solve(Stub(VP(), "eps"), x, steps=steps, solver=solver, init="unit")
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.float()), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("solver", "kind"), [("dpm++", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)]
)
def test_multistep_solvers_on_a_rectified_flow_are_the_stock_ones(solver, kind):
    scheduler = kind(use_flow_sigmas=True, prediction_type="flow_prediction", final_sigmas_type="zero")
    scheduler.set_timesteps(8)
    x = normal(2, 3, 4, 4, dtype=torch.float32)
    times = scheduler.sigmas[:-1].tolist()
    ours = ode.solve(Stub(RF, "flow", time_scale=1000), x, times=times, solver=solver, init="unit")
    x = x * math.hypot(times[0], 1 - times[0])
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(network(x, 1000 * sigma), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_heun_on_edm_is_algorithm_1(steps):
    model, z = mixture(), normal(32, 2)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return model(x, torch.full((len(x),), sigma, dtype=x.dtype), on=EDM()).x0

    # 2206.00364, algorithm 1 with equation 5, written from the paper.
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    t = [(high + i / max(steps - 1, 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    x = 80 * z
    for i in range(steps):
        d = (x - denoise(x, t[i])) / t[i]
        ahead = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_ahead = (ahead - denoise(ahead, t[i + 1])) / t[i + 1]
            ahead = x + (t[i + 1] - t[i]) * (d / 2 + d_ahead / 2)
        x = ahead
    torch.testing.assert_close(ode.solve(model, z, steps=steps, path=EDM()), x, atol=1e-9, rtol=1e-9)


def test_straightness_of_a_gaussian_is_the_closed_form():
    """S = (2 - pi / 2) trace(S^(1/2)): along an eigen-direction a trajectory is z sqrt(t^2 + (1 - t)^2 s^2)."""
    sd = torch.tensor([1.0, 0.5], dtype=torch.float64)
    model = Mixture(torch.ones(1), torch.tensor([[3.0, -1.0]]), torch.diag(sd**2)[None])
    z = normal(200, 2)
    z = z / z.square().mean(0).sqrt()  # unit second moments, so that the population's figure is met
    expected = (2 - math.pi / 2) * sd.sum().item()
    assert ode.straightness(model, z, steps=400) == pytest.approx(expected, rel=0.01)
    assert (2 - math.pi / 2) * 2 == pytest.approx(0.858407, abs=1e-6)


def test_straightness_is_its_definition_on_the_euler_run():
    model, z = mixture(), normal(32, 2)
    states = list(ode.trajectory(model, z, steps=10, solver="euler", path=RF))
    speeds = [(a - b) * 10 for a, b in pairwise(states)]
    chord = states[0] - states[-1]
    expected = sum((v - chord).square().sum(1) for v in speeds).mean().item() / 10
    assert ode.straightness(model, z, steps=10) == pytest.approx(expected, rel=1e-6)


def test_a_straight_flow_has_straightness_zero():
    """All mass at one point: every trajectory is a line."""
    model = Mixture(torch.ones(1), torch.tensor([[1.0, 2.0]]), 1e-12 * torch.eye(2)[None])
    assert ode.straightness(model, normal(16, 2), steps=50) < 1e-9


class Counted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.calls, self.path = mixture(), 0, RF

    def forward(self, *args, **options):
        self.calls += 1
        return self.model(*args, **options)


@pytest.mark.parametrize("solver", ode.SOLVERS)
@pytest.mark.parametrize("steps", [1, 5])
def test_nfe_counts_the_calls(solver, steps):
    model = Counted()
    states = list(ode.trajectory(model, normal(4, 2), steps=steps, solver=solver))
    assert model.calls == ode.nfe(solver, steps) and len(states) == steps + 1
    torch.testing.assert_close(ode.solve(model, normal(4, 2), steps=steps, solver=solver), states[-1])


def test_guidance_and_conditions_reach_the_teacher():
    model = mixture(torch.tensor([0, 1, 1]))
    z, cond = normal(6, 2), {"label": torch.tensor([0, 1, 0, 1, 0, 1])}
    ends = {}
    for w in (0.0, 1.0, 3.0):
        ends[w] = ode.solve(Teacher(model, guidance=7.0), z, steps=10, cond=cond, guidance=w)
    torch.testing.assert_close(ends[0.0], ode.solve(model, z, steps=10))
    torch.testing.assert_close(ends[1.0], ode.solve(model, z, steps=10, cond=cond))
    mixed = ode.solve(Teacher(model), z, steps=10, cond=cond, guidance=torch.tensor([0.0, 1.0, 3.0, 0.0, 1.0, 3.0]))
    for i, w in enumerate((0.0, 1.0, 3.0, 0.0, 1.0, 3.0)):
        torch.testing.assert_close(mixed[i], ends[w][i])
    assert rmse(ends[3.0], ends[1.0]) > 0.05
    assert ode.straightness(Teacher(model), z, steps=5, cond=cond, guidance=3.0) != ode.straightness(model, z, steps=5)


def test_gradients_are_off_inside_and_untouched_outside():
    model = Stub(RF, "flow")
    weight = torch.nn.Parameter(torch.ones(()))
    model.raw = lambda x, time, cond, r: weight * x
    run = ode.trajectory(model, normal(1, 3, 4, 4), steps=3, solver="euler")
    for x in run:
        assert torch.is_grad_enabled() and not x.requires_grad


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"steps": 4, "solver": "hein"}, UserError, "did you mean 'heun'"),
        ({"steps": 0}, UserError, "at least 1"),
        ({"times": [0.5, 0.5]}, UserError, "must fall"),
        ({"times": []}, UserError, "must fall"),
        ({"steps": 1001, "path": VP()}, UserError, "steps=1001: more than"),
        ({"times": [1.5, 0.5]}, UserError, "inside 1.0 .. 0.0"),
        ({"times": [float("nan")]}, UserError, "must fall"),
        ({}, ValueError, "either steps or times"),
        ({"steps": 1, "times": [1.0]}, ValueError, "either steps or times"),
        ({"steps": 1, "guidance": 2.0}, ValueError, "needs a Teacher"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_the_first_call(options, kind, message):
    model = Counted()
    with pytest.raises(kind, match=message):
        ode.solve(model, normal(2, 2), **options)
    assert model.calls == 0


def test_the_state_is_kept_in_float32_for_half_precision_noise():
    z = normal(8, 2, dtype=torch.float32).bfloat16()
    low = ode.solve(Teacher(Stub(RF, "flow")), z.reshape(1, 4, 2, 2), steps=10)
    wide = ode.solve(Teacher(Stub(RF, "flow")), z.float().reshape(1, 4, 2, 2), steps=10)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, wide, atol=0.03, rtol=0.03)
