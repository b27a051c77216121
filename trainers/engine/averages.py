"""Slow copies of networks: target networks that a method declares, and evaluation averages that a config asks for."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fastgen.config import Model
from fastgen.errors import UserError


class AverageConfig(Model):
    """An evaluation average of the student.

    constant  decay at every step
    halflife  the weight of a step halves every `halflife` samples; early on every `rampup` of the samples seen (EDM)
    power     the power-function profile of relative width `std` (2312.02696, equations 124-126)
    """

    kind: Literal["constant", "halflife", "power"] = "constant"
    decay: float = Field(default=0.999, ge=0, lt=1)
    halflife: float = Field(default=500_000, gt=0)
    rampup: float | None = Field(default=0.05, gt=0)
    std: float = Field(default=0.1, gt=0)

    @property
    def name(self) -> str:
        value = {"constant": self.decay, "halflife": self.halflife, "power": self.std}[self.kind]
        return f"ema-{self.kind}-{value:g}"

    def decay_at(self, step: int, batch: int) -> float:
        """The decay of the update that ends step number `step` (0-based), with `batch` samples a step."""
        if self.kind == "constant":
            return self.decay
        if self.kind == "halflife":
            seen = (step + 1) * batch
            half = self.halflife if self.rampup is None else min(self.halflife, seen * self.rampup)
            return 0.5 ** (batch / max(half, 1e-8))
        return (1 - 1 / (step + 1)) ** (power_exponent(self.std) + 1)


def power_exponent(std: float) -> float:
    """gamma of the power-function average t^gamma of relative standard deviation std, by its cubic's largest root."""
    if not 0 < std < 0.28867:  # sqrt(1 / 12): the flat average, gamma = 0
        raise UserError(f"ema std={std}: a power-function average has a relative width between 0 and 0.288")
    low, high = 0.0, 1e9
    for _ in range(200):
        gamma = (low + high) / 2
        wide = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > std**2
        low, high = (gamma, high) if wide else (low, gamma)
    return (low + high) / 2


def slow_copy(network: nn.Module) -> nn.Module:
    """A frozen copy in eval mode. Parameters that are frozen already never move, so the copy shares them."""
    frozen = {id(p): p for p in network.parameters() if not p.requires_grad}
    return copy.deepcopy(network, frozen).requires_grad_(False).eval()


class Follower:
    """The tensors of a slow copy beside those they follow, looked up once: a large network has hundreds."""

    def __init__(self, slow: nn.Module, fast: nn.Module) -> None:
        pairs = [(s, f) for s, f in zip(slow.parameters(), fast.parameters(), strict=True) if s is not f]
        self._slow: list[Tensor] = [s for s, _ in pairs]
        self._fast: list[Tensor] = [f for _, f in pairs]
        self._buffers = list(zip(slow.buffers(), fast.buffers(), strict=True))

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """slow <- decay slow + (1 - decay) fast for parameters; buffers are copied."""
        torch._foreach_lerp_(self._slow, self._fast, 1 - decay)
        for old, new in self._buffers:
            old.copy_(new)
