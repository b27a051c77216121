"""Pairs of noise levels for consistency methods: a growing grid (iCT, CD) or continuous levels (ECT, TCM).

Levels are those of x = x0 + s z, float64: at N = 1281 the first interval is 3.9e-5 wide. k counts steps of a run of K.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.config import Model
from fastgen.paths import EDM
from fastgen.trainers.engine.levels import LevelsConfig

LEAST = 1e-6  # between two continuous levels, where r_min lies above t
Weighting = Literal["inv_ds", "sqrt", "c_out", "c_out_sq", "sigma_sq", "one"]


class GridConfig(Model):
    """N levels s_1 < ... < s_N, even in sigma^(1 / rho), of which one interval is drawn.

    n            a constant N; None: it grows from s0 + 1 to s1 + 1
    growth       exponential, doubling in equal parts of the run (2310.14189, section 3.4), or sqrt (2303.01469)
    bins         lognormal: interval i has the share of N(p_mean, p_std^2) between ln s_i and ln s_{i+1}; uniform
    """

    n: int | None = Field(default=None, ge=2)
    s0: int = Field(default=10, ge=1)
    s1: int = Field(default=1280, ge=1)
    growth: Literal["exponential", "sqrt"] = "exponential"
    rho: float = Field(default=7.0, gt=0)
    bins: Literal["lognormal", "uniform"] = "lognormal"
    p_mean: float = -1.1
    p_std: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _grows(self) -> GridConfig:
        if self.s1 < self.s0:
            raise ValueError(f"s1={self.s1} must not lie below s0={self.s0}")
        return self

    def count(self, k: int, steps: int) -> int:
        """N at step k of K = `steps`."""
        if self.n is not None:
            return self.n
        if self.growth == "sqrt":
            grown = k / steps * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2
            return math.ceil(math.sqrt(grown) - 1) + 1
        # No shift by more than the doublings there are: k may be any large number.
        doublings = min(k // self.stage_length(steps), self.s1.bit_length())
        return min(self.s0 << doublings, self.s1) + 1

    def stage_length(self, steps: int) -> int:
        """K' = floor(K / (log2 floor(s1 / s0) + 1)), the steps between two doublings of N - 1."""
        return max(math.floor(steps / (math.log2(self.s1 // self.s0) + 1)), 1)

    def levels(self, n: int, low: float, high: float) -> Tensor:
        """s_1 .. s_n from `low` to `high`, float64 [n]."""
        ends = low ** (1 / self.rho), high ** (1 / self.rho)
        ramp = torch.arange(n, dtype=torch.float64) / (n - 1)
        return (ends[0] + ramp * (ends[1] - ends[0])) ** self.rho

    def shares(self, levels: Tensor) -> Tensor:
        """p(i), the probability of each interval of `levels` [n]: float64 [n - 1]."""
        if self.bins == "uniform":
            return torch.full_like(levels[1:], 1 / (len(levels) - 1))
        mass = torch.special.erf((levels.log() - self.p_mean) / (self.p_std * math.sqrt(2))).diff()
        return mass / mass.sum()

    def draw(self, u: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(s_i, s_{i+1}) for u uniform in (0, 1): float64 [B] each."""
        edges = self.shares(levels).cumsum(0).to(u.device)
        i = torch.searchsorted(edges, u.double()).clamp_max(len(edges) - 1)
        levels = levels.to(u.device)
        return levels[i], levels[i + 1]


class TimesConfig(Model):
    """A level t drawn anew for every sample, and r < t by ECT's mapping (2406.14548, section 3.3).

    law        of ln t: normal (p_mean, p_std), or Student's t with `df` degrees of freedom, for TCM
    q, doubling  r / t tends to 1 - 1 / q^(stage + 1) at high t, with stage = k // doubling; None: stage 0 for good
    k, b       the gap is (1 + k sigmoid(-b t)) times as wide, relative to t
    cap        no ratio beyond this one
    r_min      0: where r would be negative it is 0, and the clean image the target; FastGen's code has 0.002
    """

    law: Literal["lognormal", "log_student_t"] = "lognormal"
    p_mean: float = -1.1
    p_std: float = Field(default=2.0, gt=0)
    df: float = Field(default=0.01, gt=0)
    q: float = Field(default=2.0, gt=1)
    doubling: int | None = Field(default=None, ge=1)
    k: float = Field(default=8.0, ge=0)
    b: float = Field(default=1.0, ge=0)
    cap: float | None = Field(default=None, gt=0, lt=1)
    r_min: float = Field(default=0.0, ge=0)

    def ratio(self, step: int) -> float:
        """r / t where t is large."""
        stage = 0 if self.doubling is None else step // self.doubling
        ratio = 1 - self.q ** -(stage + 1.0)
        return ratio if self.cap is None else min(ratio, self.cap)

    def quantile(self, u: Tensor, low: float, high: float) -> Tensor:
        """t of the law between two levels, by its share: u in (0, 1) to float64 [B]."""
        if self.law == "lognormal":
            law = LevelsConfig(kind="lognormal", mean=self.p_mean, std=self.p_std)
            return law.quantile(u.double(), EDM(start=high, end=low))
        first, last = ((math.log(level) - self.p_mean) / self.p_std for level in (low, high))
        return (self.p_mean + self.p_std * student_t(u, self.df, first, last)).exp()

    def pair(self, t: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """(r, t) with r < t, float64 [B]; t moves only where it lies at r_min or below."""
        r = mapped(t, ratio, self.k, self.b).clamp_min(self.r_min)
        return r, torch.maximum(t, r + LEAST)


def mapped(t: Tensor, ratio: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """r(t) = max(0, t (1 - (1 - ratio) (1 + k sigmoid(-b t)))), float64."""
    t = t.double()
    return (t * (1 - (1 + k * torch.sigmoid(-b * t)) * (1 - ratio))).clamp_min(0)


def student_t(u: Tensor, df: float, low: float, high: float, places: int = 20_001) -> Tensor:
    """Student's t between `low` and `high` by its share u: float64 [B].

    By a table: torch has no quantile of it, and with df = 0.01 the tails are so heavy that nearly all draws without
    bounds would lie outside.
    """
    scale = math.sqrt(df)
    ends = math.asinh(low / scale), math.asinh(high / scale)
    place = torch.linspace(*ends, places, dtype=torch.float64).sinh() * scale
    # The density over d place, times d place / d (even grid), which is sqrt(df + place^2).
    weight = (1 + place**2 / df) ** (-(df + 1) / 2) * (df + place**2).sqrt()
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), (weight[1:] + weight[:-1]).cumsum(0)])
    mass, place, u = (mass / mass[-1]).to(u.device), place.to(u.device), u.double()
    i = torch.searchsorted(mass, u).clamp(1, places - 1)
    return torch.lerp(place[i - 1], place[i], (u - mass[i - 1]) / (mass[i] - mass[i - 1]))


def weights(kind: Weighting, low: Tensor, high: Tensor, sd: float) -> Tensor:
    """lambda of each pair of levels, float64 [B]; c_out = sd t / sqrt(t^2 + sd^2) at the upper one."""
    c_out = sd * high / torch.hypot(high, torch.full_like(high, sd))
    match kind:
        case "inv_ds":
            return 1 / (high - low)
        case "sqrt":
            return 1 / (high - low).sqrt()
        case "c_out":
            return 1 / c_out
        case "c_out_sq":
            return 1 / c_out**2
        case "sigma_sq":
            return 1 / high**2
        case "one":
            return torch.ones_like(high)


def huber_c(n: int) -> float:
    """c of the pseudo-Huber distance of samples of n coordinates (2310.14189, section 3.3)."""
    return 0.00054 * math.sqrt(n)
