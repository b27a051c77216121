"""The tokens of voxels: features [N, C], whose rows belong to the samples of a batch of `Voxels`."""

from __future__ import annotations

from torch import Tensor

from fastgen.sparse import Voxels, attention


class Ragged:
    """See `blocks.Tokens`. like: the voxels whose rows the tokens are."""

    def __init__(self, like: Voxels) -> None:
        self.like = like

    def spread(self, rows: Tensor) -> Tensor:
        return self.like.rows(rows)

    def full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.full(q, k, v, self.like)

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.cross(q, k, v, self.like)

    def windowed(self, q: Tensor, k: Tensor, v: Tensor, *, window: int, shift: int) -> Tensor:
        """Attention among the voxels of one sample inside one cube of `window`^3, the cubes' corner at -shift."""
        return attention.windowed(q, k, v, self.like, window, shift)
