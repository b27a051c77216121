"""A folder of latents as the rows that one of TRELLIS's two flows is trained on: a shape with one of its conditions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastgen.data.shapes import TELL, LatentShapes
from fastgen.errors import UserError

Part = Literal["structure", "latent"]


class ShapeRows:
    """Every shape with every one of its conditions; row r is shape r // V with condition r % V.

    part       structure: x0 is the first stage's, float32 [B, C', R, R, R]; latent: the second's, `Voxels` [B, C]
    condition  what the flow is told, "image" or "text": latents that have none, or the other, are a UserError
    """

    num_classes = None
    captions = None  # they are conditions already

    def __init__(self, shapes: LatentShapes, part: Part, condition: str | None = None) -> None:
        manifest = shapes.manifest
        if manifest.condition is None:
            raise UserError(f"{shapes.folder}: latents without conditions, and a flow needs them; {TELL}")
        if condition not in (None, manifest.condition):
            raise UserError(
                f"{shapes.folder}: its conditions are of the kind '{manifest.condition}', the flow is told "
                f"'{condition}'; make latents with the folder of that flow"
            )
        self.name, self.shapes, self.part = shapes.folder.name, shapes, part
        self._each = manifest.conditions

    def __len__(self) -> int:
        return len(self.shapes) * self._each

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (C', R, R, R), or (C,) of one voxel."""
        manifest = self.shapes.manifest
        return manifest.structure if self.part == "structure" else (len(manifest.mean),)

    @property
    def empty(self) -> Tensor | None:
        """The empty text's encoding, float32 [1, 77, C], for guidance; None for pictures, which have zeros in its
        place."""
        return self.shapes.empty

    def get(self, index: Tensor) -> dict[str, Any]:
        """For index int64 [B]: {"x0": as of `part`, "cond.image" or "cond.text": float32 [B, L, C]}."""
        shape, choice = index // self._each, index % self._each
        x0 = self.shapes.structure(shape) if self.part == "structure" else self.shapes.latent(shape)
        return {"x0": x0, f"cond.{self.shapes.manifest.condition}": self.shapes.condition(shape, choice)}

    def tokens(self, index: Tensor) -> list[int]:
        """How many tokens of each row a flow sees: the voxels of the shape, or all cells of the structure's grid."""
        if self.part == "structure":
            return [int(torch.tensor(self.shape[1:]).prod())] * len(index)
        counts = self.shapes.counts
        return [counts[number] for number in (index // self._each).tolist()]
