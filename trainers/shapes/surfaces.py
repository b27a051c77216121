"""What the autoencoders are shown of solids: which voxels their surface passes, and the distances inside these.

A voxel of structured latents is four fine voxels of the mesh decoder wide. Its features are the signed distances at the
5^3 corners of those, in widths of fine voxels, and its solid's colour: all that the decoder has to give back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastgen.data.solids import Solid, solids, surface
from fastgen.geometry.flexicubes_table import CORNERS
from fastgen.sparse import Voxels
from fastgen.teachers.trellis.mesh_decoder import FINER

SIDE = FINER + 1
LATTICE = SIDE**3
CHANNELS = LATTICE + 3


def lattice(solid: Solid, coords: Tensor, resolution: int) -> Tensor:
    """Signed distances [N, 5^3] (z fastest) in voxels [N, 3], in widths of fine voxels, negative inside."""
    inside = torch.cartesian_prod(*[torch.arange(SIDE)] * 3)
    fine = resolution * FINER
    return solid.distance((coords[:, None] * FINER + inside) / fine - 0.5) * fine


def features(solid: Solid, coords: Tensor, resolution: int) -> Tensor:
    """What the encoder of structured latents is given of voxels [N, 3]: float32 [N, CHANNELS]."""
    colour = torch.tensor(solid.colour).expand(len(coords), 3)
    return torch.cat([lattice(solid, coords, resolution), colour], dim=1)


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


class Grids:
    """The solids of numbers first .. first + rows - 1 as occupied grids, {"x0": float32 [B, 1, R, R, R]}."""

    num_classes, captions = None, None

    def __init__(self, rows: int, resolution: int, *, seed: int, first: int = 0) -> None:
        self.name = f"solids/{rows}"
        self.resolution, self.shape = resolution, (1, *[resolution] * 3)
        self.solids = solids(torch.arange(first, first + rows), seed=seed)
        self.coords = [surface(solid, resolution) for solid in self.solids]
        self._grids = torch.stack([occupancy(coords, resolution).bool() for coords in self.coords])

    def __len__(self) -> int:
        return len(self.solids)

    def get(self, index: Tensor) -> dict[str, Tensor]:
        return {"x0": self._grids[index].float()}


class SurfaceVoxels:
    """The same solids as the voxels of their surfaces, {"x0": Voxels [B, CHANNELS]}; see `features`."""

    num_classes, captions = None, None

    def __init__(self, rows: int, resolution: int, *, seed: int, first: int = 0) -> None:
        self.name = f"solids/{rows}"
        self.resolution, self.shape = resolution, (CHANNELS,)
        self.solids = solids(torch.arange(first, first + rows), seed=seed)
        self.coords = [surface(solid, resolution) for solid in self.solids]
        # In half precision, a thousandth of a fine voxel: a few hundred voxels of 128 numbers for every solid.
        self._feats = [features(*pair, resolution).half() for pair in zip(self.solids, self.coords, strict=True)]

    def __len__(self) -> int:
        return len(self.solids)

    def get(self, index: Tensor) -> dict[str, Voxels]:
        picked = index.tolist()
        return {"x0": voxels([self.coords[i] for i in picked], [self._feats[i].float() for i in picked])}


def voxels(coords: Sequence[Tensor], feats: Sequence[Tensor]) -> Voxels:
    """Samples of coords int32 [N, 3] and features [N, C] as a batch."""
    numbered = [functional.pad(one, (1, 0), value=i) for i, one in enumerate(coords)]
    return Voxels(torch.cat(list(feats)), torch.cat(numbered), len(numbered))
