"""Parts of data sets: the fixed split of those that come without one, and the two references of a measurement."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastgen.data import DataConfig, DataSet, open_data
from fastgen.errors import UserError

LEAST_REAL = 16  # images of each part: recall counts neighbours


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


class Some:
    """So many rows of a larger data set, evenly spread: folders are sorted by class."""

    def __init__(self, data: DataSet, rows: int) -> None:
        self.name, self.shape, self.num_classes = data.name, data.shape, data.num_classes
        self._data, self._rows = data, rows

    def __len__(self) -> int:
        return self._rows

    def get(self, index: Tensor) -> dict[str, Tensor]:
        return self._data.get(index * len(self._data) // self._rows)


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
