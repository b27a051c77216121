"""The voxels that a surface touches: exact overlap of triangles and cubes by separating axes (Akenine-Möller, 2001)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.geometry.boxes import box_pairs
from fastgen.geometry.mesh import Mesh, check

PAIRS = 1 << 20
EDGE = 1e-6  # vertices are kept this far from the faces of the unit cube, as the original's data are


def surface_voxels(mesh: Mesh, resolution: int = 64) -> Tensor:
    """Voxels [N, 3] (int32, ascending) of [-0.5, 0.5]^3 that a triangle touches, their faces and corners included."""
    check(mesh)
    if float(mesh.vertices.abs().max()) > 0.5 + EDGE:
        raise UserError("mesh: it reaches beyond [-0.5, 0.5]; scale it first (geometry.mesh.fit)")
    # In units of voxels and float64: what touches in exact arithmetic touches here.
    vertices = (mesh.vertices.double().clamp(-0.5 + EDGE, 0.5 - EDGE) + 0.5) * resolution
    triangles = vertices[mesh.faces]
    low = (triangles.amin(1).ceil().long() - 1).clamp(min=0)
    high = triangles.amax(1).floor().long().clamp(max=resolution - 1)
    filled = torch.zeros(resolution**3, dtype=torch.bool, device=vertices.device)
    for face, index in box_pairs(low, high, PAIRS):
        index = index[_overlap(triangles[face] - (index + 0.5)[:, None])]
        filled[(index[:, 0] * resolution + index[:, 1]) * resolution + index[:, 2]] = True
    flat = filled.nonzero()[:, 0]
    return torch.stack([flat // resolution**2, flat // resolution % resolution, flat % resolution], 1).int()


def voxel_centres(coords: Tensor, resolution: int = 64) -> Tensor:
    """Centres [N, 3] in the world of voxels [N, 3]."""
    return (coords + 0.5) / resolution - 0.5


def _overlap(triangles: Tensor) -> Tensor:
    """Which triangles [M, 3, 3] touch the cube [-0.5, 0.5]^3: no axis of thirteen separates the two.

    The axes of the cube, the triangle's normal, and their edges' cross products.
    """
    touching = ((triangles.amin(1) <= 0.5) & (triangles.amax(1) >= -0.5)).all(1)
    edges = triangles.roll(-1, 1) - triangles
    normal = torch.linalg.cross(edges[:, 0], edges[:, 1])
    axes = [normal]
    for edge in edges.unbind(1):
        x, y, z = edge.unbind(1)
        zero = torch.zeros_like(x)
        axes += [torch.stack(v, 1) for v in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    for axis in axes:
        along = (triangles * axis[:, None]).sum(-1)
        reach = axis.abs().sum(-1) / 2
        touching &= (along.amin(1) <= reach) & (along.amax(1) >= -reach)
    return touching
