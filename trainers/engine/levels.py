"""Laws of the noise level sigma (noise over signal, as on the path x_t = x0 + sigma eps), each by its quantiles."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.config import Model
from fastgen.errors import UserError
from fastgen.paths import VP, Path


class LevelsConfig(Model):
    """How noise levels are drawn.

    lognormal    ln sigma ~ N(mean, std^2) (2206.00364, table 1)
    log_uniform  ln sigma uniform from ln low to ln high
    rho_uniform  sigma^(1/rho) uniform: EDM's grid from `low` to `high` in 1000 places, of which 0 .. tmax (2404.04057)
    time         the network's own time uniform, whole indices of a VP table

    Always given the levels that the network's path reaches: a table's ends get no more than their share.
    """

    kind: Literal["lognormal", "log_uniform", "rho_uniform", "time"]
    mean: float = -1.2
    std: float = Field(default=1.2, gt=0)
    low: float = Field(default=0.002, gt=0)
    high: float = Field(default=80.0, gt=0)
    rho: float = Field(default=7.0, gt=0)
    tmax: float = Field(default=1000.0, gt=0, le=1000)

    @model_validator(mode="after")
    def _ordered(self) -> LevelsConfig:
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must lie below high={self.high:g}")
        return self

    def quantile(self, u: Tensor, path: Path) -> Tensor:
        """The level below which a share u of (0, 1) lies, [B] to [B]; `path` is the network's own."""
        if self.kind == "time":
            alpha, sigma = path.levels(_times(u, path))
            return sigma / alpha
        below, above = (self._share(level) for level in reach(path))
        if below >= above:
            known = " .. ".join(f"{level:.3g}" for level in reach(path))
            raise UserError(f"levels of kind {self.kind}: none of them is among the network's own, sigma = {known}")
        return self._level(below + (above - below) * u)

    def _share(self, level: float) -> float:
        """The share of the law below a level, all of it from 0 to infinity."""
        if level in (0.0, math.inf):
            return float(level > 0)
        if self.kind == "lognormal":
            return 0.5 * (1 + math.erf((math.log(level) - self.mean) / (self.std * math.sqrt(2))))
        low, high = self._ends()
        place = math.log(level) if self.kind == "log_uniform" else level ** (1 / self.rho)
        return min(max((place - low) / (high - low), 0.0), 1.0)

    def _level(self, share: Tensor) -> Tensor:
        if self.kind == "lognormal":
            # In float32 the largest u may end as a share of exactly 1, whose level is infinite.
            return (self.mean + self.std * torch.special.ndtri(share.clamp(1e-7, 1 - 1e-7))).exp()
        low, high = self._ends()
        place = low + (high - low) * share
        return place.exp() if self.kind == "log_uniform" else place**self.rho

    def _ends(self) -> tuple[float, float]:
        """Where the uniform place of a level begins and ends."""
        if self.kind == "log_uniform":
            return math.log(self.low), math.log(self.high)
        low, high = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        return low, low + self.tmax / 1000 * (high - low)


def reach(path: Path) -> tuple[float, float]:
    """The least and the greatest noise level of a path; 0 and infinity where it has no end."""
    alpha, sigma = path.levels(torch.tensor([path.end, path.start], dtype=torch.float64))
    low, high = (sigma / alpha).tolist()
    return low, high


def _times(u: Tensor, path: Path) -> Tensor:
    if isinstance(path, VP):  # a network with a table was trained on whole indices; at zero SNR the last has no level
        known = path.n - 1 if path.zero_snr else path.n
        return (u * known).floor().clamp_max(known - 1)
    return path.end + (path.start - path.end) * u
