"""Laws of the span (t, r) of an average velocity: from time t down to r <= t, on [0, 1] with 1 noise."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen.config import Model
from fastgen.paths import shift_time
from fastgen.trainers.engine.method import Batch


class SpansConfig(Model):
    """How t and r are drawn.

    kind    uniform on (0, 1), or logit_normal, sigmoid(N(mean, std^2))
    r_mean  with r_std: a logit-normal law of r alone (py-meanflow's CIFAR-10 v1: -4.0, 1.6)
    order   sort: t is the greater of two draws, r the lesser; clip: r becomes min(t, r), so that t keeps its law
    equal   share of rows with r = t, where the average velocity is the velocity ("data_proportion" in JAX; FastGen's
            "r_sample_ratio" is 1 minus it)
    to_end  share of rows with r = 0, the spans of one-step samples ("consistency_ratio" in FastGen)
    shift   t becomes s t / (1 + (s - 1) t), and r likewise (MF-RAE: sqrt(dimensions / 4096))
    """

    kind: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = -0.4
    std: float = Field(default=1.0, gt=0)
    r_mean: float | None = None
    r_std: float | None = Field(default=None, gt=0)
    order: Literal["sort", "clip"] = "sort"
    equal: float = Field(default=0.75, ge=0, lt=1)
    to_end: float = Field(default=0.0, ge=0, le=1)
    shift: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _sensible(self) -> SpansConfig:
        if (self.r_mean is None) != (self.r_std is None):
            raise ValueError("r_mean and r_std: give both, the law of r, or neither")
        if self.r_mean is not None and self.kind == "uniform":
            raise ValueError("kind=uniform has no law of r alone: leave out r_mean and r_std")
        if self.equal + self.to_end > 1:
            raise ValueError(f"equal={self.equal:g} and to_end={self.to_end:g} are more than all rows")
        return self

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, r), each [B], 0 <= r <= t <= 1. The shares are drawn row by row, apart from any other draw."""
        t, r = (shift_time(self._time(batch, name), self.shift) for name in ("t", "r"))
        if self.order == "sort":
            t, r = torch.maximum(t, r), torch.minimum(t, r)
        else:
            r = torch.minimum(t, r)
        share = batch.uniform("span")
        r = torch.where(share < self.equal, t, r)
        return t, torch.where(share >= 1 - self.to_end, 0, r)

    def _time(self, batch: Batch, name: str) -> Tensor:
        if self.kind == "uniform":
            return batch.uniform(name)
        own = name == "r" and self.r_mean is not None
        mean, std = (self.r_mean, self.r_std) if own else (self.mean, self.std)
        return (mean + std * batch.normal(name, ())).sigmoid()  # type: ignore[operator]
