"""TRELLIS's autoencoder of occupied grids (2412.01506, section 3.2), trained from nothing.

    mean, log-variance = E(grid),  z = mean + sigma eps
    L = BCE(D(z), grid) + dice(D(z), grid) + kl KL(q(z | grid) || N(0, 1))      KL: mean over the numbers of z

Dice, 1 - 2 sum(p o) / sum(p + o), looks at full cells alone, of which there are few.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fastgen.trainers.engine.method import Batch, Loss, Method, Turn


class StructureVAE(Method):
    """Networks: the autoencoder (named "student" as every exported network)."""

    class Config(Method.Config):
        name: Literal["structure_vae"] = "structure_vae"
        kl: float = Field(default=0.01, ge=0)

    makes = "teacher"

    def __init__(self, config: Any, student: Any) -> None:
        super().__init__(config, student)
        self.needs = frozenset({"x0"})

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=("student",), loss=self.loss),)

    def loss(self, batch: Batch) -> Loss:
        net: Any = self.student
        grid = batch.x0
        mean, logvar = net.encoder(grid)
        z = mean + (logvar / 2).exp() * batch.normal("posterior", mean.shape[1:])
        logits = net.decoder(z)
        parts = {
            "bce": functional.binary_cross_entropy_with_logits(logits, grid),
            "dice": dice(logits.sigmoid(), grid),
            "kl": divergence(mean, logvar),
        }
        return parts["bce"] + parts["dice"] + self.config.kl * parts["kl"], parts


def dice(share: Tensor, grid: Tensor) -> Tensor:
    """1 - 2 sum(p o) / sum(p + o) of each sample [B, ...], the mean over samples."""
    share, grid = share.flatten(1), grid.flatten(1)
    return (1 - 2 * (share * grid).sum(1) / (share + grid).sum(1)).mean()


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp logvar) || N(0, 1)), the mean over all numbers."""
    return (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
