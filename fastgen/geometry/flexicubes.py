"""FlexiCubes (Shen et al., SIGGRAPH 2023) as TRELLIS' mesh decoder uses it: dual marching cubes with learned weights.

Written from its rules, without the quadratic error term, which that variant does not have. Only the cubes that are
handed in are looked at, so work and memory go with the surface; every step is differentiable but the choice of faces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.geometry.flexicubes_table import CORNERS, EDGES, edge_axes, table
from fastgen.geometry.mesh import Mesh

WEIGHT_SCALE = 0.99
# A vertex moves by less than half a cube, so that cubes never turn inside out.
REACH = 1 - 1e-8
# Channels of the mesh decoder: 8 corners of sdf, 8 x 3 of deformation, 21 weights, 8 x 6 of colour and normal.
CHANNELS = {"sdf": 8, "deform": 24, "weights": 21, "colour": 48}


@dataclass(frozen=True)
class Grid:
    """Cubes of a grid of resolution^3, each vertex stored once. Inside is sdf < 0.

    cubes [N, 3] long, each once; corners [N, 8] long: rows of sdf [P], positions [P, 3] and attributes [P, A] or None,
    corner k at (k & 1, k >> 1 & 1, k >> 2). Every cube around an edge whose ends differ in sign must be there.
    Weights after their activations (see `activate`): beta [N, 12] per edge, alpha [N, 8] per corner, gamma [N].
    """

    resolution: int
    cubes: Tensor
    corners: Tensor
    sdf: Tensor
    positions: Tensor
    attributes: Tensor | None
    beta: Tensor
    alpha: Tensor
    gamma: Tensor

    def select(self, rows: Tensor) -> Grid:
        """The grid with some of its cubes, or with all in another order."""
        per_cube = (self.cubes, self.corners, self.beta, self.alpha, self.gamma)
        cubes, corners, beta, alpha, gamma = (v[rows] for v in per_cube)
        return replace(self, cubes=cubes, corners=corners, beta=beta, alpha=alpha, gamma=gamma)


@dataclass(frozen=True)
class Surface:
    """vertices [V, 3], faces [F, 3] long, attributes [V, A] or None.

    deviation, one per pair of a dual vertex and an edge of it: | distance to the edge's zero crossing - its mean over
    that vertex |, the regulariser that keeps dual vertices in the middle. Centre vertices have none.
    """

    vertices: Tensor
    faces: Tensor
    attributes: Tensor | None
    deviation: Tensor


@dataclass(frozen=True)
class _Crossings:
    """Active edges of surface cubes, one row per cube and edge, M in all."""

    vertex: Tensor  # number of the dual vertex
    cube: Tensor
    edge: Tensor
    ends: Tensor  # [M, 2] rows of the grid's vertices, first and second corner


def activate(beta: Tensor, alpha: Tensor, gamma: Tensor, scale: float = WEIGHT_SCALE) -> tuple[Tensor, Tensor, Tensor]:
    """Weights as a network gives them -> beta and alpha in (1 - scale, 1 + scale), gamma in (0, 1)."""
    return scale * beta.tanh() + 1, scale * alpha.tanh() + 1, scale * gamma.sigmoid() + (1 - scale) / 2


def deformed(index: Tensor, deform: Tensor, resolution: int) -> Tensor:
    """Positions in [-0.5, 0.5] of grid vertices `index` [P, 3], each moved by less than half a cube."""
    return index.to(deform) / resolution - 0.5 + REACH / (2 * resolution) * deform.tanh()


def extract(grid: Grid, *, centres: bool = False) -> Surface:
    """The surface of a grid; a grid without one is a surface without faces.

    centres: a vertex in the middle of each quad and four triangles, smooth in gamma, for training; else two triangles.
    """
    order = _flat(grid.cubes, grid.resolution).argsort()
    grid = grid.select(order)
    inside = grid.sdf < 0
    case = _cases(inside[grid.corners])
    surface = ((case > 0) & (case < 255)).nonzero()[:, 0]
    grid = grid.select(surface)
    case = _unambiguous(case[surface], grid)
    crossings, count = _crossings(case, grid)
    vertices, attributes, deviation = _dual_vertices(crossings, count, grid)
    quads, gamma = _quads(crossings, inside, grid)
    if centres:
        vertices, faces, attributes = _with_centres(vertices, attributes, quads, gamma)
    else:
        faces = _split(quads, gamma)
    return Surface(vertices, faces, attributes, deviation)


def _flat(index: Tensor, size: int) -> Tensor:
    """Number of a cube or vertex [..., 3] in a grid of size^3, z fastest."""
    index = index.long()
    return (index[..., 0] * size + index[..., 1]) * size + index[..., 2]


def _cases(inside: Tensor) -> Tensor:
    """[N, 8] -> the sum of 2^k over the corners inside."""
    return (inside.long() << torch.arange(8, device=inside.device)).sum(1)


def _find(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Places of `wanted` in ascending `keys`, and whether they are there at all (else the place means nothing)."""
    if len(keys) == 0:
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return place, keys[place] == wanted


def _unambiguous(case: Tensor, grid: Grid) -> Tensor:
    """Cases [N] with both of two problematic neighbours turned inside out, as their common face asks for."""
    tables, device = table(), case.device
    rows = tables.problematic.to(device)[case].nonzero()[:, 0]
    beyond = grid.cubes[rows] + tables.direction.to(device)[case[rows]]
    within = ((beyond >= 0) & (beyond < grid.resolution)).all(1)
    # The rows lie in the order of the cubes.
    _, found = _find(_flat(grid.cubes[rows], grid.resolution), _flat(beyond, grid.resolution))
    turned = case.clone()
    turned[rows[found & within]] = 255 - case[rows[found & within]]
    return turned


def _crossings(case: Tensor, grid: Grid) -> tuple[_Crossings, int]:
    """Every active edge of every cube, in the order of the cubes, and the number of dual vertices."""
    tables, device = table(), case.device
    group = tables.group.to(device)[case]
    count = tables.count.to(device)[case]
    first = count.cumsum(0) - count
    cube, edge = (group >= 0).nonzero(as_tuple=True)
    ends = grid.corners[cube[:, None], torch.tensor(EDGES, device=device)[edge]]
    return _Crossings(first[cube] + group[cube, edge], cube, edge, ends), int(count.sum())


def _mean(values: Tensor, weights: Tensor, vertex: Tensor, count: int) -> Tensor:
    """Weighted mean over the edges of each dual vertex: [M, A], [M, 1] -> [count, A]."""
    total = values.new_zeros(count, values.shape[1]).index_add_(0, vertex, values * weights)
    return total / values.new_zeros(count, 1).index_add_(0, vertex, weights)


def _dual_vertices(crossings: _Crossings, count: int, grid: Grid) -> tuple[Tensor, Tensor | None, Tensor]:
    """Positions, attributes and deviations of the dual vertices."""
    vertex, ends = crossings.vertex, crossings.ends
    sdf = grid.sdf[ends]
    corners = torch.tensor(EDGES, device=vertex.device)[crossings.edge]
    scaled = sdf * grid.alpha[crossings.cube[:, None], corners]
    # With one end below zero and the other not, the difference is never zero.
    share = (scaled[:, 1] / (scaled[:, 1] - scaled[:, 0]))[:, None]
    beta = grid.beta[crossings.cube, crossings.edge][:, None]

    def at(values: Tensor, share: Tensor) -> Tensor:
        return values[ends[:, 0]] * share + values[ends[:, 1]] * (1 - share)

    vertices = _mean(at(grid.positions, share), beta, vertex, count)
    attributes = None if grid.attributes is None else _mean(at(grid.attributes, share), beta, vertex, count)
    crossing = at(grid.positions, (sdf[:, 1] / (sdf[:, 1] - sdf[:, 0]))[:, None])
    distance = (crossing - vertices[vertex]).norm(dim=1, keepdim=True)
    deviation = (distance - _mean(distance, torch.ones_like(distance), vertex, count)[vertex]).abs()[:, 0]
    return vertices, attributes, deviation


def _quads(crossings: _Crossings, inside: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Dual vertices [Q, 4] around each grid edge with four cubes, wound outwards, and these cubes' gamma [Q, 4]."""
    device = inside.device
    axes, low = (torch.tensor(v, device=device) for v in edge_axes())
    corner = torch.tensor(CORNERS, device=device)[low][crossings.edge]
    start = _flat(grid.cubes[crossings.cube] + corner, grid.resolution + 1)
    # A stable sort keeps the cubes around an edge in their own order.
    key, order = (start * 3 + axes[crossings.edge]).sort(stable=True)
    _, counts = torch.unique_consecutive(key, return_counts=True)
    first = (counts.cumsum(0) - counts)[counts == 4]
    rows = order[first[:, None] + torch.arange(4, device=device)]
    # An sdf of exactly zero counts as outside everywhere, here as well.
    outwards = ~inside[crossings.ends[rows[:, 0], 0]][:, None]
    rows = torch.where(outwards, rows[:, [0, 1, 3, 2]], rows[:, [2, 3, 1, 0]])
    return crossings.vertex[rows], grid.gamma[crossings.cube[rows]]


def _split(quads: Tensor, gamma: Tensor) -> Tensor:
    """Two triangles per quad [Q, 4], cut along the diagonal whose cubes have the larger product of gammas."""
    along = (gamma[:, 0] * gamma[:, 2] > gamma[:, 1] * gamma[:, 3])[:, None]
    return torch.where(along, quads[:, [0, 1, 2, 0, 2, 3]], quads[:, [0, 1, 3, 3, 1, 2]]).reshape(-1, 3)


def _with_centres(
    vertices: Tensor, attributes: Tensor | None, quads: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quads cut into four triangles around a centre between the middles of both diagonals."""
    one, other = gamma[:, 0] * gamma[:, 2], gamma[:, 1] * gamma[:, 3]
    # The weights are divided by what is 1e-8 more than their sum, as in the original.
    weights = torch.stack([one, other], 1) / (one + other + 1e-8)[:, None]

    def extended(values: Tensor) -> Tensor:
        corner = values[quads]
        middles = torch.stack([corner[:, 0] + corner[:, 2], corner[:, 1] + corner[:, 3]], 1) / 2
        return torch.cat([values, (middles * weights[..., None]).sum(1)])

    centre = torch.arange(len(quads), device=quads.device) + len(vertices)
    fan = [torch.stack([quads[:, i], quads[:, (i + 1) % 4], centre], 1) for i in range(4)]
    faces = torch.stack(fan, 1).reshape(-1, 3)
    return extended(vertices), faces, None if attributes is None else extended(attributes)


def from_features(feats: Tensor, coords: Tensor, resolution: int) -> Mesh:
    """The mesh decoder's output on voxels -> a mesh with colours and normals.

    feats [N, 101] (`CHANNELS`, corner k at (k & 1, k >> 1 & 1, k >> 2)), coords [N, 3] in 0 .. resolution - 1, each
    once. Corners that voxels share are averaged; beyond the voxels all is outside. Equal, up to the order of vertices,
    to the extraction from the dense grid; memory goes with N. Without a surface it is a mesh without faces, which
    `mesh.check` and all that writes or draws meshes refuse: one empty shape must not lose the others of its batch.
    """
    if feats.shape[1:] != (sum(CHANNELS.values()),) or coords.shape != (len(feats), 3):
        raise ValueError(f"features {tuple(feats.shape)} at {tuple(coords.shape)}: [N, 101] at [N, 3] is needed")
    surface = extract(_grid(feats, coords.long(), resolution))
    assert surface.attributes is not None
    return Mesh(surface.vertices, surface.faces, surface.attributes[:, :3], surface.attributes[:, 3:6])


def from_sdf(sdf: Tensor) -> Mesh:
    """Signed distances [R + 1, R + 1, R + 1] (x, y, z; negative inside) at i / R - 0.5 -> a mesh, all weights equal."""
    size = len(sdf)
    inside = (sdf < 0).long()
    corners = [inside[x : size - 1 + x, y : size - 1 + y, z : size - 1 + z] for x, y, z in CORNERS]
    count = torch.stack(corners).sum(0)
    cubes = ((count > 0) & (count < 8)).nonzero()
    offsets = torch.tensor(CORNERS, device=sdf.device)
    keys, rows = torch.unique(_flat(cubes[:, None] + offsets, size), return_inverse=True)
    position = _index(keys, size).to(sdf) / (size - 1) - 0.5
    ones = [sdf.new_ones(len(cubes), 12), sdf.new_ones(len(cubes), 8), sdf.new_ones(len(cubes))]
    found = extract(Grid(size - 1, cubes, rows, sdf.flatten()[keys], position, None, *ones))
    if len(found.faces) == 0:
        raise UserError(f"no surface in the distances on {size}^3 points: a mesh with no faces")
    return Mesh(found.vertices, found.faces)


def _mean_at(rows: Tensor, count: int, values: Tensor) -> Tensor:
    """Mean of values [M, A] over equal rows [M], [count, A]; zero where there are none."""
    total = values.new_zeros(count, values.shape[1]).index_add_(0, rows, values)
    return total / torch.bincount(rows, minlength=count).clamp(min=1)[:, None]


def _grid(feats: Tensor, coords: Tensor, resolution: int) -> Grid:
    """The cubes that the surface can meet, with their vertices' averages and their own weights."""
    offsets = torch.tensor(CORNERS, device=coords.device)
    keys, inverse = torch.unique(_flat(coords[:, None] + offsets, resolution + 1), return_inverse=True)
    sdf, deform, weights, colour = feats.split(list(CHANNELS.values()), dim=1)
    # The bias of one cube's width makes thin parts a little thicker.
    shared = _mean_at(inverse.flatten(), len(keys), sdf.float().reshape(-1, 1) - 1 / resolution)[:, 0]

    crossed = _cases(shared[inverse] < 0)
    active = ((crossed > 0) & (crossed < 255)).nonzero()[:, 0]
    rim = _rim(coords, keys, inverse, shared, resolution)
    cubes = torch.cat([coords[active], rim])
    wanted, corners = torch.unique(_flat(cubes[:, None] + offsets, resolution + 1), return_inverse=True)
    place, known = _find(keys, wanted)
    needed = torch.full((len(keys),), -1, device=keys.device)
    needed[place[known]] = known.nonzero()[:, 0]
    here = needed[inverse]  # rows of `wanted` for each voxel's corners, -1 where the surface does not come near
    used = here >= 0

    def at(channels: Tensor, width: int) -> Tensor:
        return _mean_at(here[used], len(wanted), channels.reshape(-1, 8, width)[used].float())

    values = torch.where(known, shared[place], 1.0)
    own = torch.cat([weights[active].float(), weights.new_zeros(len(rim), 21, dtype=torch.float32)])
    return Grid(
        resolution,
        cubes,
        corners,
        values,
        deformed(_index(wanted, resolution + 1), at(deform, 3), resolution),
        at(colour, 6).sigmoid(),
        *activate(own[:, :12], own[:, 12:20], own[:, 20]),
    )


def corner_means(feats: Tensor, coords: Tensor, resolution: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index [P, 3] of every corner of the voxels, and there the mean sdf [P], deformation [P, 3] and colour [P, 6]."""
    keys, inverse = torch.unique(
        _flat(coords[:, None] + torch.tensor(CORNERS, device=coords.device), resolution + 1), return_inverse=True
    )
    sdf, deform, _, colour = feats.split(list(CHANNELS.values()), dim=1)
    shared = _mean_at(inverse.flatten(), len(keys), sdf.float().reshape(-1, 1) - 1 / resolution)[:, 0]
    moved = _mean_at(inverse.flatten(), len(keys), deform.float().reshape(-1, 3))
    coloured = _mean_at(inverse.flatten(), len(keys), colour.float().reshape(-1, 6))
    return _index(keys, resolution + 1), shared, moved, coloured


def _index(flat: Tensor, size: int) -> Tensor:
    """The inverse of `_flat`: [N] -> [N, 3]."""
    return torch.stack([flat // size**2, flat // size % size, flat % size], 1)


def _rim(coords: Tensor, keys: Tensor, inverse: Tensor, shared: Tensor, resolution: int) -> Tensor:
    """Cubes [M, 3] that are no voxels but touch a vertex inside: there the surface leaves the voxels."""
    lonely = (torch.bincount(inverse.flatten(), minlength=len(keys)) < 8) & (shared < 0)
    around = (_index(keys[lonely], resolution + 1)[:, None] - torch.tensor(CORNERS, device=coords.device)).reshape(
        -1, 3
    )
    around = around[((around >= 0) & (around < resolution)).all(1)]
    flat = torch.unique(_flat(around, resolution))
    flat = flat[~_find(_flat(coords, resolution).sort().values, flat)[1]]
    return _index(flat, resolution)
