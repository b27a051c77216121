"""Samples of the run's closed-form teacher as training data: what a method that reads data is given on a mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.teachers.mixture import Mixture

SEED = 0


class MixtureSamples:
    """`rows` exact draws, each a function of its index, with labels in turn where the mixture has classes."""

    captions = None

    def __init__(self, mixture: Mixture, rows: int) -> None:
        self.name, self.mixture, self._rows = "closed form", mixture, rows
        self.shape, self.num_classes = mixture.shape, mixture.num_classes

    def __len__(self) -> int:
        return self._rows

    def get(self, index: Tensor) -> dict[str, Tensor]:
        """{"x0": float32 [B, D], "label": int64 [B] where there are classes} for index int64 [B]."""
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self._rows:
            raise IndexError(f"index outside 0 .. {self._rows - 1}")
        cond = None if self.num_classes is None else {"label": index % self.num_classes}
        device = self.mixture.device
        on = None if cond is None else {name: value.to(device) for name, value in cond.items()}
        x0 = self.mixture.sample(SEED, "data", index.to(device), on).to(torch.device("cpu"))
        return {"x0": x0, **(cond or {})}
