"""Schedules and averages against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastgen.errors import UserError
from fastgen.trainers.engine.averages import AverageConfig, Follower, power_exponent
from fastgen.trainers.engine.loop import by_tokens
from fastgen.trainers.engine.optim import ClipConfig, ClipLimit, ScheduleConfig


def test_schedule_warms_up_and_decays():
    linear = ScheduleConfig(warmup=4, decay="linear", final=0.1)
    assert [linear.factor(s, 14) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert linear.factor(9, 14) == pytest.approx(0.1 + 0.9 * 0.5)
    cosine = ScheduleConfig(decay="cosine")
    assert cosine.factor(25, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert ScheduleConfig().factor(99, 100) == 1


def run(config: AverageConfig, n: int, batch: int) -> float:
    slow, fast = nn.Linear(1, 1, bias=False).requires_grad_(False), nn.Linear(1, 1, bias=False).requires_grad_(False)
    slow.weight.zero_()
    for step in range(n):
        fast.weight.fill_(step + 1)
        Follower(slow, fast).update(config.decay_at(step, batch))
    return float(slow.weight)


def test_constant_average_of_a_ramp():
    d, n = 0.9, 30  # slow_n = n - d (1 - d^n) / (1 - d) for fast_k = k
    assert run(AverageConfig(decay=d), n, 8) == pytest.approx(n - d * (1 - d**n) / (1 - d), rel=1e-5)


def test_halflife_average_halves_in_its_samples():
    config = AverageConfig(kind="halflife", halflife=80, rampup=None)
    assert math.prod(config.decay_at(step, 8) for step in range(10)) == pytest.approx(0.5)


def test_halflife_ramps_up_with_the_samples_seen():
    config = AverageConfig(kind="halflife", halflife=1e9, rampup=0.05)
    assert config.decay_at(9, 8) == pytest.approx(0.5 ** (8 / (0.05 * 80)))


def test_power_average_of_a_ramp_has_its_centre_where_theory_says():
    # Weights t^gamma on (0, n] have mean n (gamma + 1) / (gamma + 2) and relative width std (2312.02696, appendix C).
    for std in (0.05, 0.1, 0.2):
        gamma = power_exponent(std)
        assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(std, rel=1e-6)
        n = 4000
        expected = n * (gamma + 1) / (gamma + 2)
        assert run(AverageConfig(kind="power", std=std), n, 8) == pytest.approx(expected, rel=2e-3)
    assert power_exponent(0.1) == pytest.approx(6.94, abs=0.01)  # EDM2's sigma_rel = 0.10


def test_width_of_a_power_average_is_bounded():
    with pytest.raises(UserError, match="relative width"):
        power_exponent(0.3)


def test_buffers_are_copied():
    slow, fast = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    fast(torch.randn(8, 2))
    Follower(slow, fast).update(0.99)
    assert torch.equal(slow.running_mean, fast.running_mean)
    assert slow.num_batches_tracked == 1


def test_limit_of_gradients_follows_the_norms_that_were_seen():
    fixed, none, following = ClipLimit(2.5), ClipLimit(None), ClipLimit(ClipConfig(most=1.0, percentile=50, window=3))
    assert (fixed.value, none.value, following.value) == (2.5, math.inf, 1.0)
    for norm in (0.2, math.nan, 0.4, math.inf):  # what is not finite is no measure
        following.see(norm)
    assert following.value == 1.0
    for norm, median in ((0.6, 0.4), (0.9, 0.6), (5.0, 0.9), (6.0, 1.0)):
        following.see(norm)
        assert following.value == pytest.approx(median)


def test_rows_are_cut_by_their_tokens():
    pieces = [piece.tolist() for piece in by_tokens(torch.arange(5), [3, 3, 1, 5, 2], 6)]
    assert pieces == [[0, 1], [2, 3], [4]]
    with pytest.raises(UserError, match=r"micro_tokens=4: row 3 alone has 5 voxels"):
        list(by_tokens(torch.arange(5), [3, 3, 1, 5, 2], 4))
