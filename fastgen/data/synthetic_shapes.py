"""Made-up latents of shapes for smoke runs: shells of voxels in a ball, with features and conditions of noise."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgen import noise
from fastgen.sparse import Voxels

Part = Literal["structure", "latent"]
TOKENS = {"image": 5, "text": 77}
SEED = 0


class SyntheticShapes:
    """`rows` samples of a flow's part as `ShapeRows` gives them, a function of the index alone.

    shape (C, R, R, R), or (C,) of a voxel of a grid of `resolution`^3; conditions [TOKENS, width].
    """

    num_classes = None
    captions = None

    def __init__(
        self, part: Part, shape: tuple[int, ...], resolution: int, condition: str, width: int, rows: int
    ) -> None:
        self.name, self.part, self.shape, self._rows = "synthetic shapes", part, tuple(shape), rows
        self.resolution, self.condition, self._told = resolution, condition, (TOKENS[condition], width)

    def __len__(self) -> int:
        return self._rows

    @property
    def empty(self) -> Tensor | None:
        """The empty text's encoding, [1, 77, C]; None for pictures."""
        return self._noise("empty", torch.zeros(1), self._told) if self.condition == "text" else None

    def get(self, index: Tensor) -> dict[str, Any]:
        """{"x0": Tensor or Voxels, "cond.image" or "cond.text"} for index int64 [B]."""
        told = {f"cond.{self.condition}": self._noise("condition", index, self._told)}
        if self.part == "structure":
            return {"x0": self._noise("structure", index, self.shape), **told}
        shells = [self._shell(i) for i in index.tolist()]
        coords = torch.cat([pad(shell, (1, 0), value=i) for i, shell in enumerate(shells)])
        feats = [
            self._noise("latent", row, (len(s), *self.shape))[0] for row, s in zip(index.split(1), shells, strict=True)
        ]
        return {"x0": Voxels(torch.cat(feats), coords, len(index)), **told}

    def tokens(self, index: Tensor) -> list[int]:
        """Voxels of each row, or cells of the structure's grid."""
        if self.part == "structure":
            return [int(torch.tensor(self.shape[1:]).prod())] * len(index)
        return [len(self._shell(i)) for i in index.tolist()]

    def _noise(self, what: str, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        return noise.normal(SEED, f"synthetic/{what}", index, shape)

    def _shell(self, number: int) -> Tensor:
        """Voxels int32 [N, 3] about half a voxel from a sphere in the middle; three radii in turn."""
        line = torch.arange(self.resolution) + 0.5 - self.resolution / 2
        distance = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).norm(dim=0)
        radius = self.resolution * (0.2 + 0.1 * (number % 3))
        return ((distance - radius).abs() < 0.5).nonzero().int()
