"""Parts of data sets: the fixed split of those that come without one, and the two references of a measurement."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen.data import DataConfig, DataSet, open_data
from fastgen.errors import UserError

LEAST_REAL = 16  # images of each part: recall counts neighbours


class Rows:
    """Some rows of a data set, chosen by `_choose`: what `get` gives, their captions, and their identity."""

    def __init__(self, data: DataSet, name: str, count: int, told: str) -> None:
        self.data, self.name, self._count, self._told = data, name, count, told
        self.shape, self.num_classes = data.shape, data.num_classes
        self.captions: Sequence[str] | None = None
        if data.captions is not None:
            self.captions = [data.captions[row] for row in self._choose(torch.arange(count)).tolist()]

    def __len__(self) -> int:
        return self._count

    def get(self, index: Tensor) -> dict[str, Tensor]:
        return self.data.get(self._choose(index))

    @property
    def content_sha256(self) -> str:
        """Which images these are: that of the whole and the rule of the choice. For data that have one: captioned."""
        data: Any = self.data
        return hashlib.sha256(f"{data.content_sha256} {self._told}".encode()).hexdigest()

    def _choose(self, index: Tensor) -> Tensor:
        """The rows of the whole, int64 [B], for index int64 [B] in 0 .. len - 1."""
        raise NotImplementedError


class Part(Rows):
    """The training part of a data set, or its held-out part (rows 0, k, 2k, ...)."""

    def __init__(self, data: DataSet, part: Literal["train", "held_out"], every: int = 5) -> None:
        self.part, self.every = part, every
        held = -(-len(data) // every)
        count = held if part == "held_out" else len(data) - held
        super().__init__(data, f"{data.name}/{part}", count, f"{part} of every {every}")

    def _choose(self, index: Tensor) -> Tensor:
        k = self.every
        return index * k if self.part == "held_out" else index + index // (k - 1) + 1


class Some(Rows):
    """So many rows of a larger data set, evenly spread: folders are sorted by class."""

    def __init__(self, data: DataSet, rows: int) -> None:
        super().__init__(data, data.name, rows, f"{rows} spread rows")

    def _choose(self, index: Tensor) -> Tensor:
        return index * len(self.data) // self._count


def data_part(config: DataConfig, part: Literal["train", "held_out"], every: int) -> DataSet:
    """The training or the held-out part of the data; the digits bring their own split, others give every k-th image."""
    if config.kind == "digits" or (config.kind == "auto" and config.path is None):
        return open_data(config.model_copy(update={"split": part}))
    found = Part(open_data(config), part, every)
    if not len(found):
        raise UserError(f"{found.data.name}: {len(found.data)} images are too few to hold out every {every}th")
    return found


def real_images(config: DataConfig, every: int, rows: int | None = None) -> tuple[DataSet, DataSet]:
    """The training and the held-out part as references of a measurement, with neighbours enough for its recall.

    rows: only so many of each part.
    """
    train, held_out = (
        part if rows is None or len(part) <= rows else Some(part, rows)
        for part in (data_part(config, "train", every), data_part(config, "held_out", every))
    )
    if min(len(train), len(held_out)) < LEAST_REAL:
        told = f"{len(train)} for training and {len(held_out)} held out"
        raise UserError(
            f"{train.name}: {told} are too few to measure against; at least {LEAST_REAL} of each are needed"
        )
    return train, held_out
