"""Laws of the noise level against draws, and on networks that know only some levels."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest

from fastgen.errors import UserError
from fastgen.paths import EDM, VP, RectifiedFlow, TrigFlow
from fastgen.trainers.engine.levels import LevelsConfig, reach


def test_rho_uniform_has_the_values_of_the_note():
    u = torch.tensor([1e-12, 0.25, 0.5, 0.75, 1 - 1e-12]).double()
    sigma = LevelsConfig(kind="rho_uniform", tmax=800).quantile(u, RectifiedFlow())
    expected = torch.tensor([0.002, 0.085087, 0.965417, 5.83895, 24.4083]).double()
    torch.testing.assert_close(sigma, expected, rtol=1e-5, atol=0)


KNOWN = {"RectifiedFlow": (0, math.inf), "TrigFlow": (0, math.inf), "EDM": (0.002, 80), "VP": (0.02917, 14.6146)}
LAWS = [LevelsConfig(kind="rho_uniform", tmax=900), LevelsConfig(kind="log_uniform", low=0.1, high=10)]


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(), EDM(), VP()])
@pytest.mark.parametrize("levels", [*LAWS, LevelsConfig(kind="lognormal"), LevelsConfig(kind="lognormal", mean=2.5)])
def test_levels_keep_their_law_inside_what_the_network_knows(path, levels):
    low, high = KNOWN[type(path).__name__]
    assert reach(path) == pytest.approx((low, high), rel=1e-3)
    sigma = levels.quantile((torch.arange(2000).double() + 0.5) / 2000, path)
    assert (sigma.diff() > 0).all() and sigma[0] >= 0.999 * low and sigma[-1] <= 1.001 * high
    rng = torch.Generator().manual_seed(0)
    if levels.kind == "lognormal":
        free = (levels.mean + levels.std * torch.randn(40000, generator=rng).double()).exp()
    elif levels.kind == "log_uniform":
        free = (math.log(0.1) + math.log(100) * torch.rand(40000, generator=rng).double()).exp()
    else:
        roots = [v ** (1 / 7) for v in (0.002, 80)]
        free = (roots[0] + 0.9 * torch.rand(40000, generator=rng).double() * (roots[1] - roots[0])) ** 7
    inside = free[(free >= low) & (free <= high)]
    assert kstest(inside.numpy(), sigma.numpy()).pvalue > 0.001


def test_levels_by_time_are_a_tables_indices_or_the_paths_own_times():
    u, levels = (torch.arange(500).double() + 0.5) / 500, LevelsConfig(kind="time")
    index = VP().time(torch.ones(500).double(), levels.quantile(u, VP()))
    torch.testing.assert_close(index, 2 * torch.arange(500).double() + 1, atol=1e-6, rtol=0)
    torch.testing.assert_close(levels.quantile(u, RectifiedFlow()), u / (1 - u))


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(), EDM(), VP(), VP(zero_snr=True)])
@pytest.mark.parametrize("kind", ["lognormal", "log_uniform", "rho_uniform", "time"])
def test_levels_of_the_extreme_draws_are_finite(path, kind):
    u = torch.tensor([2.0**-24, 1 - 2.0**-24])
    for mean in (-1.2, 3.0):
        sigma = LevelsConfig(kind=kind, mean=mean).quantile(u, path)
        assert sigma.dtype == torch.float32 and sigma.isfinite().all() and (sigma > 0).all()


def test_levels_that_no_network_knows_are_refused():
    with pytest.raises(UserError, match=r"none of them is among the network's own, sigma = 0.0292 .. 14.6"):
        LevelsConfig(kind="log_uniform", low=20, high=30).quantile(torch.rand(3), VP())
    with pytest.raises(ValueError, match="low=2 must lie below high=1"):
        LevelsConfig(kind="log_uniform", low=2, high=1)
