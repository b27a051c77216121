"""Boxes of grid points around triangles: how the voxeliser, the distances and the rasteriser walk their candidates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def box_pairs(low: Tensor, high: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every (box number [M], integer point [M, 3]) of boxes low .. high [N, D] (inclusive), about `most` at a time.

    Boxes where high < low are empty. A box larger than `most` comes alone.
    """
    extent = (high - low + 1).clamp(min=0)
    volume = extent.prod(1)
    total = volume.cumsum(0)
    start, end = 0, len(volume)
    while start < end:
        before = int(total[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(total, before + most, right=True)))
        rows = torch.arange(start, stop, device=low.device)
        box = rows.repeat_interleave(volume[start:stop])
        rest = torch.arange(len(box), device=low.device) - (total[box] - volume[box] - before)
        axes = []
        for axis in reversed(range(low.shape[1])):
            axes.append(rest % extent[box, axis])
            rest = rest // extent[box, axis]
        if len(box):
            yield box, low[box] + torch.stack(axes[::-1], 1)
        start = stop
