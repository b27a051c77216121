"""Sets of active voxels, and what is worked out from their coordinates once: lengths, neighbours, windows, halves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Sites:
    """The active voxels of a batch, int32 [N, 4] = (sample, x, y, z), and what has been worked out from them.

    coords  rows of one sample are contiguous and samples ascend; a sample may be empty; no voxel occurs twice (seen
            where neighbours are looked up)
    batch   the number of samples
    finer   the sites whose halves these are, where `spatial.downsample` made them
    """

    def __init__(self, coords: Tensor, batch: int, *, finer: Sites | None = None) -> None:
        if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype != torch.int32:
            raise ValueError(f"coords are int32 [N, 4], not {coords.dtype} {list(coords.shape)}")
        rows = coords[:, 0]
        if len(rows) and (rows[0] < 0 or rows[-1] >= batch or (rows[1:] < rows[:-1]).any()):
            raise ValueError(f"samples (the first column of coords) must ascend from 0 to at most {batch - 1}")
        self.coords, self.batch, self.finer = coords, batch, finer
        self._known: dict[Hashable, Any] = {}

    def under(self, finer: Sites) -> Sites:
        """These sites and all that is known of them, as the halves of finer ones. (A link kept in what the finer ones
        know would close a circle, and hold memory until the garbage collector comes.)"""
        made = copy.copy(self)
        made.finer = finer
        return made

    def to(self, device: torch.device) -> Sites:
        """The coordinates on another device; nothing else goes along."""
        made = object.__new__(Sites)
        made.coords, made.batch, made.finer, made._known = self.coords.to(device), self.batch, None, {}
        return made

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, worked out at the first call. Kept tensors are ordinary ones, whatever mode is on."""
        if key not in self._known:
            with torch.inference_mode(False), torch.no_grad():
                self._known[key] = make()
        return self._known[key]

    @property
    def lengths(self) -> Tensor:
        """Voxels per sample, long [B]."""
        return self.once("lengths", lambda: torch.bincount(self.coords[:, 0], minlength=self.batch))

    @property
    def sizes(self) -> tuple[int, ...]:
        """`lengths` on the host."""
        return self.once("sizes", lambda: tuple(self.lengths.tolist()))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The rows of each sample."""
        ends = list(accumulate(self.sizes, initial=0))
        return tuple(slice(low, high) for low, high in pairwise(ends))

    def __len__(self) -> int:
        return len(self.coords)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sites):
            return NotImplemented
        if self.coords is other.coords:
            return self.batch == other.batch
        alike = self.batch == other.batch and self.coords.shape == other.coords.shape
        return alike and self.coords.device == other.coords.device and torch.equal(self.coords, other.coords)

    def __hash__(self) -> int:
        return hash((len(self), self.batch))

    def __repr__(self) -> str:
        return f"Sites({len(self)} voxels, batch={self.batch})"


def keys(coords: Tensor, batch: int, margin: int) -> tuple[Tensor, tuple[int, int, int]]:
    """One int64 number per voxel that orders as (sample, x, y, z), and what a step along each axis adds to it; voxels
    outside by up to `margin` have numbers of their own."""
    low, high = (edge.tolist() for edge in torch.aminmax(coords[:, 1:], dim=0))
    size = [b - a + 1 + 2 * margin for a, b in zip(low, high, strict=True)]
    if batch * math.prod(size) >= 2**63:
        raise ValueError(f"a grid of {batch} x {size} voxels is too large for 64-bit keys; move its parts together")
    steps = (size[1] * size[2], size[2], 1)
    found = coords[:, 0].long() * (size[0] * size[1] * size[2])
    for axis in range(3):
        found += (coords[:, axis + 1].long() - (low[axis] - margin)) * steps[axis]
    return found, steps
