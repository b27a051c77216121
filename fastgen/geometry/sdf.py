"""A mesh as a signed distance on a grid: exact distances near the surface, the sign by generalised winding numbers.

Winding numbers (Jacobson et al., SIGGRAPH 2013) are computed for a few grid points only: two neighbours whose distances
add up to more than the step between them lie on one side, for the balls around them cover the segment between them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastgen.errors import UserError, require
from fastgen.geometry.boxes import box_pairs
from fastgen.geometry.mesh import Mesh, check, edge_counts, is_closed

PAIRS = 1 << 20  # point-triangle pairs looked at in one go
BAND = 2.0  # a cube that the surface meets has its corners within sqrt(3) voxels of it


def signed_distance(
    mesh: Mesh, resolution: int, *, band: float = BAND, open_surface: Literal["refuse", "shell"] = "refuse"
) -> Tensor:
    """Signed distance [R + 1, R + 1, R + 1] (x, y, z) at the corners i / R - 0.5, negative inside, float32.

    The mesh lies in [-0.5, 0.5]^3. Exact within `band` voxels of the surface and cut off there. A mesh with a rim, or
    wound inconsistently, has no inside: it is refused, or becomes a shell that reaches one voxel to either side. (A
    thinner one is porous where it runs diagonally: half of a cube's diagonal is 0.87 voxels.)
    """
    check(mesh)
    if float(mesh.vertices.abs().max()) > 0.5:
        raise UserError("mesh: it reaches beyond [-0.5, 0.5]; scale it first (geometry.mesh.fit)")
    closed = is_closed(mesh)
    if not closed and open_surface == "refuse":
        balance = edge_counts(mesh.faces)[2]
        raise UserError(
            f"mesh: not closed ({int((balance != 0).sum())} of {len(balance)} edges have no counterpart), so it has no "
            "inside; mend its holes and winding, or ask for a shell (open_surface='shell')"
        )
    distance = unsigned_distance(mesh, resolution, band)
    if not closed:
        return distance - 1 / resolution
    return torch.where(_inside(mesh, distance, resolution), -distance, distance)


def unsigned_distance(mesh: Mesh, resolution: int, band: float = BAND) -> Tensor:
    """Distance [R + 1] * 3 of the grid's corners from the nearest triangle, at most `band` voxels."""
    size, limit = resolution + 1, band / resolution
    best = torch.full((size**3,), limit, device=mesh.vertices.device)
    triangles = mesh.triangles.float()
    grid = (triangles + 0.5) * resolution
    low = (grid.amin(1) - band).ceil().clamp(0, resolution).long()
    high = (grid.amax(1) + band).floor().clamp(0, resolution).long()
    for face, index in box_pairs(low, high, PAIRS):
        corners = triangles[face]
        points = index / resolution - 0.5
        near = _off_plane(points, corners) < limit
        face, index, points, corners = face[near], index[near], points[near], corners[near]
        found = point_triangle_distance(points, corners)
        flat = (index[:, 0] * size + index[:, 1]) * size + index[:, 2]
        best.scatter_reduce_(0, flat, found, "amin")
    return best.reshape(size, size, size)


def _off_plane(points: Tensor, triangles: Tensor) -> Tensor:
    """Distance of each point from its triangle's plane, zero where the triangle has none."""
    a, b, c = triangles.unbind(1)
    normal = torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=-1, eps=1e-20)
    return ((points - a) * normal).sum(-1).abs()


def point_triangle_distance(points: Tensor, triangles: Tensor) -> Tensor:
    """Distance of points [M, 3] from triangles [M, 3, 3], one each; degenerate triangles count as their edges."""
    a, b, c = triangles.unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    square = normal.square().sum(-1)
    above = torch.ones_like(square, dtype=torch.bool)
    edges = []
    for start, end in ((a, b), (b, c), (c, a)):
        along, to = end - start, points - start
        above &= (torch.linalg.cross(along, to) * normal).sum(-1) >= 0
        share = ((to * along).sum(-1) / along.square().sum(-1).clamp(min=1e-30)).clamp(0, 1)
        edges.append((to - share[:, None] * along).square().sum(-1))
    nearest = torch.stack(edges).amin(0)
    plane = ((points - a) * normal).sum(-1).square() / square.clamp(min=1e-30)
    return torch.where(above & (square > 1e-30), torch.minimum(plane, nearest), nearest).sqrt()


def winding_number(mesh: Mesh, points: Tensor) -> Tensor:
    """How often the surface goes round each point [M, 3]: 1 inside a closed mesh, 0 outside, a fraction near holes.

    The sum of the triangles' solid angles (van Oosterom and Strackee, 1983) over 4 pi, in float64.
    """
    triangles = mesh.triangles.double()
    rows = max(1, PAIRS // len(triangles))
    parts = []
    for chunk in points.double().split(rows):
        a, b, c = (triangles[None, :, i] - chunk[:, None] for i in range(3))
        la, lb, lc = a.norm(dim=-1), b.norm(dim=-1), c.norm(dim=-1)
        volume = (a * torch.linalg.cross(b, c)).sum(-1)
        dots = (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
        parts.append(torch.atan2(volume, la * lb * lc + dots).sum(1) / (2 * math.pi))
    return torch.cat(parts) if parts else points.new_zeros(0, dtype=torch.float64)


def _inside(mesh: Mesh, distance: Tensor, resolution: int) -> Tensor:
    """Which grid points a closed surface goes round, whichever way it is wound: bool of distance's shape."""
    labels = _same_side(distance, 1 / resolution)
    # Of each group the point farthest from the surface stands for all.
    order = distance.flatten().argsort(stable=True)
    count = int(labels.max()) + 1
    speaker = _last(labels[order], order, count)
    size = distance.shape[0]
    index = torch.stack([speaker // size**2, speaker // size % size, speaker % size], 1)
    inside = winding_number(mesh, index / resolution - 0.5).abs() > 0.5
    return inside[labels].reshape(distance.shape)


def _last(labels: Tensor, values: Tensor, count: int) -> Tensor:
    """For each label the value in its last place."""
    place = torch.zeros(count, dtype=torch.long, device=labels.device)
    place.scatter_reduce_(0, labels, torch.arange(len(labels), device=labels.device), "amax")
    return values[place]


def _same_side(distance: Tensor, step: float) -> Tensor:
    """Groups of grid points that no surface separates, a number for each point, flat."""
    require("scipy", extra="3d", purpose="the sign of a distance")
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    number = torch.arange(distance.numel(), device=distance.device).reshape(distance.shape)
    ends = []
    for axis in range(3):
        length = distance.shape[axis] - 1
        near, far = ((v.narrow(axis, 0, length), v.narrow(axis, 1, length)) for v in (distance, number))
        # Distances are cut off at the band, which lies beyond one step, and rounded: hence not quite 1.
        free = near[0] + near[1] > 1.0001 * step
        ends.append(torch.stack([far[0][free], far[1][free]]))
    rows, columns = torch.cat(ends, 1).cpu().numpy()
    graph = coo_matrix((rows >= 0, (rows, columns)), shape=(distance.numel(),) * 2)
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long().to(distance.device)
