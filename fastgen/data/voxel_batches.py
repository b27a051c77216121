"""Sets of unequal numbers of voxels in batches of nearly equal ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastgen.data.source import shuffled

OPEN = 4  # batches that still take sets


def by_voxels(counts: Sequence[int], most: int, *, seed: int, epoch: int = 0) -> list[list[int]]:
    """Numbers 0 .. n - 1 in batches whose counts add up to at most `most`, fixed by seed and epoch.

    They come in the epoch's shuffled order and go into the first open batch that has room; a batch is closed when the
    four newest are open, which wastes little and keeps the batches' order close to the shuffled one.
    """
    if not counts or min(counts) < 1 or max(counts) > most:
        raise ValueError(f"{len(counts)} sets of {min(counts, default=0)} to {max(counts, default=0)} for {most}")
    n = len(counts)
    order = shuffled(seed, torch.arange(epoch * n, (epoch + 1) * n).numpy(), n).tolist()
    batches: list[list[int]] = []
    room: list[int] = []
    for number in order:
        first = max(0, len(batches) - OPEN)
        fitting = (i for i in range(first, len(batches)) if counts[number] <= room[i])
        place = next(fitting, len(batches))
        if place == len(batches):
            batches.append([])
            room.append(most)
        batches[place].append(number)
        room[place] -= counts[number]
    return batches
