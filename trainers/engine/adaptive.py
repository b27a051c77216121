"""The adaptive weight of a loss over noise levels: the network u(t) of 2312.02696 (equation 21), on TrigFlow angles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FREQUENCIES = (1.0, 2.0, 4.0)


class LogVariance(nn.Module):
    """t [B], inside (0, pi / 2) -> ln of the loss expected there, [B]; linear in its features, 0 at first.

    In exp(-u) loss + u each level counts alike once u is the logarithm of its loss.
    """

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor(FREQUENCIES), persistent=False)
        self.linear = nn.Linear(2 + 2 * len(FREQUENCIES), 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        phases = t[:, None] * self.frequencies.to(t.dtype)
        level = t.tan().log() / 4  # ln of noise over data: at small angles the loss is a power of it
        features = torch.cat([level[:, None], t[:, None], phases.sin(), phases.cos()], dim=1)
        # Not a call of the layer: under autocast that would be in half precision, which is a percent of the loss.
        return (features.to(self.linear.weight.dtype) * self.linear.weight).sum(1) + self.linear.bias
