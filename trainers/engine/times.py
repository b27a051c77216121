"""The law of a flow's training times: which levels of noise a loss sees how often.

    uniform        r ~ U(0, 1)
    logit_normal   r = sigmoid(N(mean, std^2)): mean 0 is SD3's (2403.03206), 1 is TRELLIS's, nearer to pure noise

A mean squared velocity error is worth t^2 as much in clean samples, so uniform times spend a network of few steps on
detail; what a sample is to be is settled at high noise.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fastgen.config import Model
from fastgen.trainers.engine.method import Batch


class TimesConfig(Model):
    """r in (0, 1), which a method stretches over the times that it can ask for."""

    kind: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 1.0
    std: float = Field(default=1.0, gt=0)

    def draw(self, batch: Batch) -> Tensor:
        """r [B]"""
        if self.kind == "uniform":
            return batch.uniform("t")
        return (self.mean + self.std * batch.normal("t", ())).sigmoid()
