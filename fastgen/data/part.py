"""A fixed split for data that come without one: every k-th image is held out, the others are for training."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastgen.data import DataSet


class Part:
    """The training part of a data set, or its held-out part (rows 0, k, 2k, ...)."""

    def __init__(self, data: DataSet, part: Literal["train", "held_out"], every: int = 5) -> None:
        self.data, self.part, self.every = data, part, every
        self.name = f"{data.name}/{part}"
        self.shape, self.num_classes = data.shape, data.num_classes
        self._held = -(-len(data) // every)

    def __len__(self) -> int:
        return self._held if self.part == "held_out" else len(self.data) - self._held

    def get(self, index: Tensor) -> dict[str, Tensor]:
        k = self.every
        return self.data.get(index * k if self.part == "held_out" else index + index // (k - 1) + 1)
