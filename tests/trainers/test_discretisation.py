"""Levels of consistency training against numbers of the papers and of scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from fastgen.trainers.engine.discretisation import (
    GridConfig,
    TimesConfig,
    huber_c,
    mapped,
    student_t,
    weights,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}
U = torch.linspace(0.5e-5, 1 - 0.5e-5, 100_000, dtype=torch.float64)


def test_levels_double_in_equal_parts_of_the_run():
    grid = GridConfig()
    assert grid.stage_length(400_000) == 50_000
    assert [grid.count(50_000 * k - 1, 400_000) for k in range(1, 8)] == [11, 21, 41, 81, 161, 321, 641]
    assert [grid.count(50_000 * k, 400_000) for k in range(1, 8)] == [21, 41, 81, 161, 321, 641, 1281]
    assert grid.count(10**9, 400_000) == 1281


def test_another_budget_is_another_schedule():
    grid = GridConfig(s0=10, s1=160)
    assert [grid.count(400, steps) for steps in (500, 1000, 2000)] == [161, 41, 21]


def test_budgets_shorter_than_the_stages_run_through_them_all():
    assert [GridConfig().count(k, 6) for k in range(6)] == [11, 21, 41, 81, 161, 321]


def test_square_root_growth_and_a_constant_number():
    grid = GridConfig(s0=2, s1=150, growth="sqrt")
    assert [grid.count(k, 1000) for k in (0, 1000)] == [2, 151]
    assert grid.count(250, 1000) == math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1
    assert GridConfig(n=18).count(7, 10) == 18


def test_levels_of_eleven_points():
    """Numbers of the golden file, so that a clone without it sees them too."""
    grid = GridConfig()
    levels = grid.levels(11, 0.002, 80)
    shares = grid.shares(levels)
    weight = weights("inv_ds", levels[:-1], levels[1:], 0.5)
    assert (float(weight[0]), float(weight[-1])) == pytest.approx((67.93130650562206, 0.028829854506932862), rel=1e-10)
    assert (float(shares[0]), float(shares[-1])) == pytest.approx((0.0626329925062612, 0.003979612214311477), rel=1e-10)
    assert int(shares.argmax()) == 2 and float(shares.max()) == pytest.approx(0.24550142196717029, rel=1e-10)


def test_a_positive_p_mean_is_another_law():
    """A public port shipped +1.1: it hardly shows in a small run, but in the shares of the intervals."""
    levels = GridConfig().levels(11, 0.002, 80)
    right, wrong = GridConfig().shares(levels), GridConfig(p_mean=1.1).shares(levels)
    assert int(wrong.argmax()) == 4 and float((wrong - right).abs().max()) > 0.1
    assert GridConfig().p_mean == TimesConfig().p_mean == -1.1


def test_intervals_come_as_often_as_their_share():
    grid = GridConfig()
    levels = grid.levels(21, 0.002, 80)
    low, high = grid.draw(U, levels)
    counts = torch.bincount(torch.searchsorted(levels, low), minlength=20) / len(U)
    torch.testing.assert_close(counts, grid.shares(levels).float(), atol=1e-4, rtol=0)
    assert torch.equal(torch.searchsorted(levels, high), torch.searchsorted(levels, low) + 1)
    low, _ = GridConfig(bins="uniform").draw(U, levels)
    assert torch.bincount(torch.searchsorted(levels, low)).tolist() == [5000] * 20


def test_the_finest_grid_keeps_its_first_interval():
    levels = GridConfig().levels(1281, 0.002, 80)
    gaps = levels.diff()
    assert float(gaps[0]) == pytest.approx(3.9086e-5, rel=1e-4) and float(1 / gaps[-1]) == pytest.approx(
        2.936, rel=1e-3
    )
    assert levels.dtype == torch.float64 and bool((gaps > 0).all())
    assert float(1 / gaps[0]) == pytest.approx(25584.7, rel=1e-5)


def test_mapping_of_ect():
    t = torch.tensor([0.5, 80.0])
    torch.testing.assert_close(
        mapped(t, 1 - 1 / 256), torch.tensor([0.492147802050029, 79.6875], dtype=torch.float64), **EXACT
    )
    assert mapped(t, 0.5).tolist() == pytest.approx([0, 40])


def test_ratio_doubles_and_is_capped():
    times = TimesConfig(q=2, doubling=100)
    assert [times.ratio(k) for k in (0, 99, 100, 250, 900)] == [0.5, 0.5, 0.75, 0.875, 1 - 2**-10]
    assert TimesConfig(q=256).ratio(10**6) == 1 - 1 / 256
    assert TimesConfig(q=2, doubling=1, cap=0.999).ratio(50) == 0.999


@pytest.mark.parametrize("r_min", [0.0, 0.002])
def test_the_lower_level_lies_below(r_min):
    t = torch.tensor([0.0005, 0.0020000001, 0.01, 1.0, 80.0], dtype=torch.float64)
    r, moved = TimesConfig(r_min=r_min).pair(t, 1 - 2**-10)
    assert bool((r < moved).all()) and bool((r >= r_min).all())
    torch.testing.assert_close(moved[2:], t[2:], **EXACT)


def test_lognormal_levels_within_their_bounds():
    t = TimesConfig().quantile(U, 0.002, 80).numpy()
    law = stats.norm(-1.1, 2.0)
    inside = law.cdf(math.log(80)) - law.cdf(math.log(0.002))
    for level in (0.01, 0.3, 5.0):
        expected = (law.cdf(math.log(level)) - law.cdf(math.log(0.002))) / inside
        assert (t < level).mean() == pytest.approx(expected, abs=1e-4)
    assert t.min() >= 0.002 and t.max() <= 80


@pytest.mark.parametrize(("df", "low", "high"), [(0.01, 0.0, 21.9), (3.0, -1.0, 2.0), (0.5, -8.0, 0.3)])
def test_students_t_between_bounds_is_scipys(df, low, high):
    found, law = student_t(U, df, low, high).numpy(), stats.t(df)
    inside = law.cdf(high) - law.cdf(low)
    for place in np.linspace(low, high, 7)[1:-1]:
        assert (found < place).mean() == pytest.approx((law.cdf(place) - law.cdf(low)) / inside, abs=1e-4)


def test_levels_of_tcm_begin_at_t_prime():
    times = TimesConfig(law="log_student_t", p_mean=0.0, p_std=0.2, df=0.01)
    t = times.quantile(U, 1.0, 80.0)
    assert 1 <= float(t.min()) < 1.001 and 79 < float(t.max()) <= 80 * (1 + 1e-9)
    law, end = stats.t(0.01), math.log(80) / 0.2
    share = (law.cdf(math.log(2) / 0.2) - 0.5) / (law.cdf(end) - 0.5)
    assert float((t < 2).double().mean()) == pytest.approx(share, abs=1e-4)


def test_weights():
    low, high = torch.tensor([0.25]).double(), torch.tensor([0.5]).double()
    c_out = 0.5 * 0.5 / math.sqrt(0.5)
    expected = {"inv_ds": 4, "sqrt": 2, "c_out": 1 / c_out, "c_out_sq": c_out**-2, "sigma_sq": 4, "one": 1}
    for kind, value in expected.items():
        torch.testing.assert_close(weights(kind, low, high, 0.5), torch.tensor([value], dtype=torch.float64), **EXACT)


def test_c_of_the_distance():
    assert [huber_c(n) for n in (3072, 12288)] == pytest.approx([0.029930, 0.059860], abs=1e-6)


def test_a_shrinking_schedule_is_refused():
    with pytest.raises(ValidationError, match="s1=5 must not lie below s0=10"):
        GridConfig(s1=5)
