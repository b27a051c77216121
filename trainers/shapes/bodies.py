"""What the autoencoders are shown of solids: the voxels that a solid fills, and the distances inside these.

TRELLIS's voxels are those of the surface, and its mesh decoder takes all beyond them for outside: its meshes have a
second wall within, which the original removes by looking from outside. Here a solid's inner voxels are full as well, so
that what is extracted is its surface and nothing else.

A voxel of structured latents is four fine voxels of the mesh decoder wide. Its features are the signed distances at the
5^3 corners of those, and its solid's colour: all that the decoder has to give back. Distances are in widths of a voxel
and cut off at two, so that voxels deep inside are all alike; colours are spread over the same range, for three numbers
among 128 are overlooked otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastgen.data.solids import Solid, solids
from fastgen.geometry.flexicubes_table import CORNERS
from fastgen.geometry.voxelise import voxel_centres
from fastgen.sparse import Voxels
from fastgen.teachers.trellis.mesh_decoder import FINER

SIDE = FINER + 1
LATTICE = SIDE**3
CHANNELS = LATTICE + 3
CUT = 2.0  # the corners of a voxel that the surface meets lie within sqrt(3)


def body(solid: Solid, resolution: int) -> tuple[Tensor, Tensor]:
    """The voxels that a solid reaches into, int32 [N, 3] ascending, and the distances in them, as of `lattice`.

    A voxel is full if any of its 5^3 corners lies inside, so that a mesh extracted from the voxels is closed.
    """
    cells = torch.cartesian_prod(*[torch.arange(resolution)] * 3).int()
    centre = solid.distance(voxel_centres(cells, resolution)) * resolution
    cells = cells[centre < math.sqrt(3) / 2]  # of the others no corner can be inside
    found = lattice(solid, cells, resolution)
    full = (found < 0).any(1)
    return cells[full], found[full]


def lattice(solid: Solid, coords: Tensor, resolution: int) -> Tensor:
    """Signed distances [N, 5^3] (z fastest) in voxels [N, 3], in their widths, negative inside."""
    inside = torch.cartesian_prod(*[torch.arange(SIDE)] * 3) / FINER
    return solid.distance((coords[:, None] + inside) / resolution - 0.5) * resolution


def occupancy(coords: Tensor, resolution: int) -> Tensor:
    """1 at the voxels [N, 3], else 0: float32 [1, R, R, R]."""
    grid = torch.zeros(1, *[resolution] * 3)
    grid[0][tuple(coords.long().T)] = 1
    return grid


def fine_corners() -> Tensor:
    """Where in a lattice the corners of each fine voxel lie: long [4^3, 8], fine voxels in the decoder's order."""
    octants = torch.cartesian_prod(*[torch.arange(2)] * 3)
    place = (2 * octants[:, None] + octants).reshape(-1, 1, 3) + torch.tensor(CORNERS)
    return (place * torch.tensor([SIDE**2, SIDE, 1])).sum(-1)


def voxels(coords: Sequence[Tensor], feats: Sequence[Tensor]) -> Voxels:
    """Samples of coords int32 [N, 3] and features [N, C] as a batch."""
    numbered = [functional.pad(one, (1, 0), value=i) for i, one in enumerate(coords)]
    return Voxels(torch.cat(list(feats)), torch.cat(numbered), len(numbered))


class Bodies:
    """The solids of numbers first .. first + rows - 1, voxelised once; rows for `source.Source`.

    part "structure": {"x0": float32 [B, 1, R, R, R]}, 1 where a voxel is full; "latent": {"x0": Voxels [B, CHANNELS]}.
    """

    num_classes, captions = None, None

    def __init__(self, rows: int, resolution: int, part: str, *, seed: int, first: int = 0) -> None:
        self.name, self.resolution, self.part = f"solids/{rows}", resolution, part
        self.shape = (1, *[resolution] * 3) if part == "structure" else (CHANNELS,)
        self.solids = solids(torch.arange(first, first + rows), seed=seed)
        self.coords: list[Tensor] = []
        self._kept: list[Tensor] = []
        for solid in self.solids:
            coords, distances = body(solid, resolution)
            self.coords.append(coords)
            # Half precision, a thousandth of a voxel: a solid has hundreds of voxels with 125 numbers each.
            cut = distances.clamp(-CUT, CUT).half()
            self._kept.append(occupancy(coords, resolution).bool() if part == "structure" else cut)

    def __len__(self) -> int:
        return len(self.solids)

    def get(self, index: Tensor) -> dict[str, Any]:
        picked = index.tolist()
        if self.part == "structure":
            return {"x0": torch.stack([self._kept[i] for i in picked]).float()}
        return {"x0": voxels([self.coords[i] for i in picked], [self.features(i) for i in picked])}

    def features(self, i: int) -> Tensor:
        """What the encoder of structured latents is given of a solid, float32 [N, CHANNELS]."""
        colour = CUT * (2 * torch.tensor(self.solids[i].colour) - 1)
        return torch.cat([self._kept[i].float(), colour.expand(len(self.coords[i]), 3)], dim=1)
