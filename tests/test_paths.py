"""Paths against formulas written out again, diffusers' tables, and their own inverses and derivatives."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch

from fastgen.paths import (
    EDM,
    VP,
    Path,
    RectifiedFlow,
    TrigFlow,
    carry,
    path_from_dict,
    path_to_dict,
    shift_time,
)

DOUBLE = torch.float64
SD = VP()
ZERO_SNR = VP(zero_snr=True)
PATHS = {
    "rf": RectifiedFlow(),
    "trellis": RectifiedFlow(sigma_min=1e-5),
    "trig": TrigFlow(),
    "trig_sd05": TrigFlow(sd=0.5),
    "edm": EDM(),
    "sd": SD,
    "zero_snr": ZERO_SNR,
    "ddpm": VP(schedule="linear", beta_start=1e-4, beta_end=0.02),
    "cosine": VP(schedule="squaredcos_cap_v2"),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def tensor(*values: float, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def times(path: Path, n: int = 41, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    """From one end of the path to the other, both included."""
    return torch.linspace(path.end, path.start, n, dtype=DOUBLE).to(dtype)


def derivative(function, t: float, step: float) -> torch.Tensor:
    """Third-order one-sided difference; a negative step looks backwards."""
    f = [function(tensor(t + k * step)) for k in range(4)]
    return (-11 * f[0] + 18 * f[1] - 9 * f[2] + 2 * f[3]) / (6 * step)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_time_inverts_levels_at_any_scale(path: Path, dtype: torch.dtype) -> None:
    t = times(path, dtype=dtype)
    alpha, sigma = path.levels(t)
    assert alpha.dtype == sigma.dtype == dtype
    tolerance = path.start * (1e-12 if dtype == DOUBLE else 2e-6)
    for scale in (1.0, 0.01, 30.0):
        assert (path.time(scale * alpha, scale * sigma) - t).abs().max() <= tolerance


@every_path
def test_time_is_clamped_to_the_path(path: Path) -> None:
    found = path.time(tensor(1.0, 0.0, 1e-30), tensor(0.0, 1.0, 1.0))
    assert found.tolist() == [path.end, path.start, path.start]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_levels_at_the_ends_are_exact(dtype: torch.dtype) -> None:
    def levels(path: Path, t: float) -> list[float]:
        return torch.cat(path.levels(tensor(t, dtype=dtype))).tolist()

    assert levels(RectifiedFlow(), 0.0) == [1, 0]
    assert levels(RectifiedFlow(), 1.0) == [0, 1]
    assert levels(TrigFlow(sd=0.5), 0.0) == [1, 0]
    assert levels(TrigFlow(sd=0.5), math.pi / 2) == [0, 0.5]  # cos(pi / 2) is -4e-8 in float32
    assert levels(ZERO_SNR, 999.0) == [0, 1]
    assert levels(EDM(), 80.0) == [1, 80]


def test_levels_match_their_formulas() -> None:
    t, m = tensor(0.3), 1e-5
    assert torch.cat(RectifiedFlow(sigma_min=m).levels(t)).tolist() == pytest.approx(
        [0.7, m + (1 - m) * 0.3], rel=1e-14
    )
    assert torch.cat(TrigFlow(sd=0.5).levels(t)).tolist() == pytest.approx(
        [math.cos(0.3), 0.5 * math.sin(0.3)], rel=1e-14
    )
    # Stable Diffusion's sigma / alpha at indices 0, 1, 500, 999 (k-diffusion's table).
    alpha, sigma = SD.levels(tensor(0, 1, 500, 999))
    assert (sigma / alpha).tolist() == pytest.approx([0.0291672, 0.0413144, 1.61828, 14.6146], rel=3e-6)
    assert (alpha**2 + sigma**2).tolist() == pytest.approx([1] * 4, rel=1e-14)


@pytest.fixture(scope="module")
def stock() -> type:
    from diffusers import DDIMScheduler

    return DDIMScheduler


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables_and_grids_are_those_of_diffusers(stock, schedule: str, zero_snr: bool) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012}
    scheduler = stock(**betas, beta_schedule=schedule, rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing")
    path = VP(**betas, schedule=schedule, zero_snr=zero_snr)
    alpha, sigma = path.table()
    assert (alpha**2 - scheduler.alphas_cumprod.double()).abs().max() < 2e-6  # diffusers' product is in float32
    assert torch.allclose(alpha, path.levels(torch.arange(1000, dtype=DOUBLE))[0], rtol=1e-13, atol=0)
    assert torch.allclose(sigma, path.levels(torch.arange(1000, dtype=DOUBLE))[1], rtol=1e-13, atol=0)
    for n in (1, 2, 3, 4, 6, 8, 16, 25, 30, 50):
        scheduler.set_timesteps(n)
        assert path.grid(n) == tuple(float(t) for t in scheduler.timesteps)


def test_fractional_indices_interpolate_the_logarithm() -> None:
    alpha, sigma = SD.levels(tensor(400, 400.25, 401))
    log = (sigma / alpha).log()
    assert log[1].item() == pytest.approx((0.75 * log[0] + 0.25 * log[2]).item(), rel=1e-13)
    # Zero SNR: the floor 2^-12 stands for the alpha of index 999, but only inside the last interval.
    alpha, sigma = ZERO_SNR.levels(tensor(998, 998.5))
    log, end = (sigma / alpha).log(), math.log(math.sqrt(1 - 2.0**-24) / 2.0**-12)
    assert log[1].item() == pytest.approx((log[0].item() + end) / 2, rel=1e-12)


def test_a_cosine_table_has_no_step_at_its_last_level() -> None:
    """Its last alpha, 4.9e-5, lies below the floor that is meant for zero-SNR tables alone."""
    alpha, _ = PATHS["cosine"].levels(tensor(999 - 1e-9, 999))
    assert alpha[0].item() == pytest.approx(alpha[1].item(), rel=1e-6)
    assert alpha[1].item() == pytest.approx(4.92825e-5, rel=1e-5)


@every_path
def test_derivatives_at_both_ends_and_inside(path: Path) -> None:
    """One-sided at the ends: a student that starts at the last level needs the tangent there."""
    step = min(1e-4 * (path.start - path.end), 0.001)  # a table is smooth only inside an interval
    for t, direction in ((path.start, -step), (path.end, step), (0.4123 * path.start, step)):
        if path is ZERO_SNR and t == path.start:
            continue  # a jump on purpose: 0 at the last level, 2^-12 just before
        for index in (0, 1):
            _, tangent = torch.func.jvp(lambda t, i=index: path.levels(t)[i], (tensor(t),), (tensor(1.0),))
            expected = derivative(lambda t, i=index: path.levels(t)[i], t, direction)
            assert tangent.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-12)
        _, tangent = torch.func.jvp(lambda t: path.time(*path.levels(t)), (tensor(t),), (tensor(1.0),))
        assert tangent.item() == pytest.approx(1.0, rel=1e-9)


def test_the_last_level_of_zero_snr_keeps_the_tangent_of_its_interval() -> None:
    alpha = [torch.func.jvp(lambda t: ZERO_SNR.levels(t)[0], (tensor(t),), (tensor(1.0),)) for t in (999, 999 - 1e-9)]
    assert alpha[0][0].item() == 0
    assert alpha[0][1].item() == pytest.approx(alpha[1][1].item(), rel=1e-6)
    assert alpha[0][1].item() < -1e-4


@every_path
def test_gradcheck_of_levels_and_time(path: Path) -> None:
    inside = path.end + (path.start - path.end) * tensor(0.123, 0.456, 0.7891)
    assert torch.autograd.gradcheck(
        lambda t: torch.stack(path.levels(t)), inside.requires_grad_(), check_forward_ad=True
    )
    levels = tuple(v.detach().requires_grad_() for v in path.levels(inside))
    assert torch.autograd.gradcheck(path.time, levels, check_forward_ad=True)


@every_path
@pytest.mark.parametrize("other", PATHS.values(), ids=PATHS.keys())
def test_carried_gradients_are_finite_everywhere(path: Path, other: Path) -> None:
    """alpha = 0 makes sigma / alpha infinite: a clamp after the division would turn the gradient into NaN."""
    for dtype in (torch.float32, DOUBLE):
        t = torch.cat([times(other, 9, dtype), tensor(other.start * (1 - 1e-7), dtype=dtype)]).requires_grad_()
        x, t_there = carry(torch.ones(len(t), 3, dtype=dtype), t, other, path)
        gradient = torch.autograd.grad(x.sum() + t_there.sum(), t)[0]
        assert x.dtype == t_there.dtype == dtype
        assert torch.isfinite(x).all() and torch.isfinite(gradient).all()
        _, (dx, dt) = torch.func.jvp(
            lambda t, dtype=dtype: carry(torch.ones(len(t), 3, dtype=dtype), t, other, path),
            (t.detach(),),
            (torch.ones_like(t),),
        )
        assert torch.isfinite(dx).all() and torch.isfinite(dt).all()


def test_tables_do_not_remember_the_mode_of_their_first_caller() -> None:
    t = tensor(10.5)
    callers = {
        "inference": lambda path: torch.inference_mode()(path.levels)(t),
        "jvp": lambda path: torch.func.jvp(path.levels, (t,), (t,)),
        "vmap": lambda path: torch.func.vmap(path.levels)(t[None]),
    }
    for number, first in enumerate(callers.values()):
        path = VP(n=100 + number)
        first(path)
        leaf = t.clone().requires_grad_()
        assert torch.isfinite(torch.autograd.grad(path.levels(leaf)[0].sum(), leaf)[0]).all()
    path = VP(n=200)
    with torch.device("meta"):
        path.levels(t)
    assert path.levels(t)[0].device.type == "cpu"
    path.table()[0].zero_()
    assert path.table()[0].min() > 0


def test_half_precision_and_integer_times_are_refused() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        with pytest.raises(TypeError, match="float32 or float64"):
            SD.levels(torch.tensor([999], dtype=dtype))


def test_impossible_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown beta schedule 'sigmoid'"):
        VP(schedule="sigmoid")
    with pytest.raises(ValueError, match="n=1"):
        VP(n=1)


@every_path
def test_paths_survive_json_and_hashing(path: Path) -> None:
    again = path_from_dict(json.loads(json.dumps(path_to_dict(path))))
    assert again == path and hash(again) == hash(path)
    assert len({path, again, RectifiedFlow(sigma_min=0.5)}) == 2


def test_path_from_dict_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="unknown path 'Cosine'; known: RectifiedFlow"):
        path_from_dict({"name": "Cosine"})
    with pytest.raises(ValueError, match="unknown path None"):
        path_from_dict({})
    with pytest.raises(ValueError, match=r"RectifiedFlow.*sigma_max"):
        path_from_dict({"name": "RectifiedFlow", "sigma_max": 1.0})
    with pytest.raises(TypeError):
        TrigFlow(0.5)  # positional parameters would fall on the wrong field of a subclass


def test_shift_multiplies_the_odds() -> None:
    t = tensor(0.0, 0.05, 0.5, 0.95, 1.0)
    assert shift_time(0.5, 3) == 0.75
    for k in (1.0, 3.0, 6.0):
        shifted = shift_time(t, k)
        assert shifted[[0, -1]].tolist() == [0, 1]
        assert torch.allclose(shifted[:-1] / (1 - shifted[:-1]), k * t[:-1] / (1 - t[:-1]), rtol=1e-13)
        assert torch.allclose(shift_time(shifted, 1 / k), t, rtol=1e-13)
        before, after = (TrigFlow().time(*RectifiedFlow().levels(v[:-1])) for v in (t, shifted))
        assert torch.allclose(after.tan(), k * before.tan(), rtol=1e-12)


@every_path
def test_grids_fall_from_the_start_and_stay_on_the_path(path: Path) -> None:
    for n in (1, 2, 4, 25):
        grid = path.grid(n)
        assert len(grid) == n and grid[0] == pytest.approx(path.start, rel=1e-15)
        assert all(a > b for a, b in pairwise(grid))
        assert path.end <= grid[-1] and grid[0] <= path.start


def test_grids_match_their_formulas() -> None:
    assert RectifiedFlow().grid(4) == (1.0, 0.75, 0.5, 0.25)
    karras = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert EDM().grid(18) == pytest.approx(karras, rel=1e-12)
    odd = EDM(start=14.6146, end=0.0292)  # powers of roots come out a rounding beside the ends
    assert odd.end <= odd.grid(5)[-1] and odd.grid(5)[0] <= odd.start
