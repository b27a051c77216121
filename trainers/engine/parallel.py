"""The seam for many processes: the loop alone asks it, methods never do. Here is its one-process form."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class Ranks:
    """Which process this is, and what the processes of a run do together."""

    rank = 0
    world = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def rows(self, rows: Tensor) -> Tensor:
        """This process's share of a batch's global rows."""
        return rows[self.rank :: self.world]

    def mean_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over the processes after the last micro-batch: with one process they already are."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process (a signal, a bad loss)."""
        return flag
