"""Marching cubes by scikit-image, as a check on FlexiCubes: no weights, no learned split, sharp edges cut off."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.errors import UserError, require
from fastgen.geometry.flexicubes import corner_means, deformed
from fastgen.geometry.mesh import Mesh


def marching_cubes(sdf: Tensor, deform: Tensor | None = None, attributes: Tensor | None = None) -> Mesh:
    """Zero surface of sdf [R + 1, R + 1, R + 1] (x, y, z; negative inside) at the corners i / R - 0.5.

    deform [R + 1] * 3 + [3] (before its tanh) and attributes [R + 1] * 3 + [6] (colours and normals, each in 0..1) are
    interpolated along the grid edge on which each vertex lies. No zero in it is a UserError.
    """
    measure = require("skimage.measure", extra="3d", purpose="marching cubes")
    resolution = sdf.shape[0] - 1
    if not (sdf.min() < 0 < sdf.max()):
        raise UserError("no surface in the distances: a mesh with no faces")
    field = sdf.detach().cpu().float().numpy()
    found, faces, _, _ = measure.marching_cubes(field, 0.0, gradient_direction="descent")
    place, faces = torch.from_numpy(found.copy()).double(), torch.from_numpy(faces.copy()).long()
    low = place.floor().long()
    high = place.ceil().long()
    share = (place - low).sum(1, keepdim=True).float()  # two of the three are zero

    def along(values: Tensor) -> Tensor:
        values = values.cpu().float()
        return torch.lerp(values[tuple(low.T)], values[tuple(high.T)], share)

    if deform is None:
        vertices = (place / resolution - 0.5).float()
    else:
        index = torch.cartesian_prod(*(torch.arange(resolution + 1) for _ in range(3))).reshape(*sdf.shape, 3)
        vertices = along(deformed(index, deform.cpu().float(), resolution))
    values = None if attributes is None else along(attributes)
    return Mesh(vertices, faces) if values is None else Mesh(vertices, faces, values[:, :3], values[:, 3:6])


def from_features(feats: Tensor, coords: Tensor, resolution: int) -> Mesh:
    """As `flexicubes.from_features`, by marching cubes on the whole grid: (resolution + 1)^3 x 10 numbers in memory."""
    size = resolution + 1
    index, *values = corner_means(feats, coords.long(), resolution)
    grids = [torch.ones(size, size, size), torch.zeros(size, size, size, 3), torch.zeros(size, size, size, 6)]
    for grid, value in zip(grids, values, strict=True):
        grid[tuple(index.cpu().T)] = value.cpu()
    return marching_cubes(grids[0], grids[1], grids[2].sigmoid())
