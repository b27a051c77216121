"""Solids as distances and as meshes, grids of cubes around them, and an independent look at what comes out."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from fastgen.geometry import flexicubes
from fastgen.geometry.flexicubes_table import CORNERS
from fastgen.geometry.mesh import Mesh


def corners(resolution: int) -> Tensor:
    """Corners of the grid in [-0.5, 0.5]^3, [R + 1, R + 1, R + 1, 3]."""
    axis = torch.arange(resolution + 1) / resolution - 0.5
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)


def sphere(points: Tensor, radius: float = 0.33) -> Tensor:
    return points.norm(dim=-1) - radius


def torus(points: Tensor, radius: float = 0.28, tube: float = 0.11) -> Tensor:
    flat = points[..., :2].norm(dim=-1) - radius
    return torch.hypot(flat, points[..., 2]) - tube


def box(points: Tensor, half: tuple[float, float, float] = (0.31, 0.23, 0.37)) -> Tensor:
    over = points.abs() - torch.tensor(half)
    return over.clamp(min=0).norm(dim=-1) + over.amax(-1).clamp(max=0)


def noise(resolution: int, seed: int) -> Tensor:
    """Random signs inside, +1 on the boundary."""
    sdf = torch.ones(resolution + 1, resolution + 1, resolution + 1)
    inner = (slice(1, -1),) * 3
    sdf[inner] = torch.randn(*(resolution - 1,) * 3, generator=torch.Generator().manual_seed(seed))
    return sdf


def grid(sdf: Tensor, *, weights: int | None = None, attributes: Tensor | None = None) -> flexicubes.Grid:
    """Every cube of a dense grid [R + 1]^3; with a seed, random weights and deformations."""
    size = len(sdf)
    resolution, axis = size - 1, torch.arange(size - 1)
    cubes = torch.cartesian_prod(axis, axis, axis)
    x, y, z = (cubes[:, None] + torch.tensor(CORNERS)).unbind(-1)
    index = torch.cartesian_prod(*(torch.arange(size),) * 3)
    generator = torch.Generator().manual_seed(weights or 0)
    amount = 0.0 if weights is None else 1.5
    random = [amount * torch.randn(len(cubes), n, generator=generator) for n in (12, 8, 1)]
    deform = amount * torch.randn(size**3, 3, generator=generator)
    return flexicubes.Grid(
        resolution,
        cubes,
        (x * size + y) * size + z,
        sdf.flatten(),
        flexicubes.deformed(index, deform, resolution),
        attributes,
        *flexicubes.activate(random[0], random[1], random[2][:, 0]),
    )


def surface(sdf: Tensor, **options) -> Mesh:
    found = flexicubes.extract(grid(sdf, **options))
    return Mesh(found.vertices, found.faces)


def edges(faces: Tensor) -> tuple[Counter, Counter]:
    """How often each undirected and each directed edge occurs, counted by hand."""
    directed = Counter((f[i], f[(i + 1) % 3]) for f in faces.tolist() for i in range(3))
    undirected: Counter = Counter()
    for (a, b), n in directed.items():
        undirected[min(a, b), max(a, b)] += n
    return undirected, directed


def watertight(mesh: Mesh) -> bool:
    """Each edge has two faces, which run along it in opposite directions."""
    undirected, directed = edges(mesh.faces)
    return set(undirected.values()) == {2} and set(directed.values()) == {1}


def euler(mesh: Mesh) -> int:
    return len(mesh.faces.unique()) - len(edges(mesh.faces)[0]) + len(mesh.faces)


def cube(half: float = 0.4) -> Mesh:
    """Eight vertices, twelve faces, wound outwards."""
    vertices = torch.tensor(CORNERS) * 2.0 * half - half
    quads = [(0, 2, 3, 1), (4, 5, 7, 6), (0, 1, 5, 4), (2, 6, 7, 3), (0, 4, 6, 2), (1, 3, 7, 5)]
    faces = [(a, b, c) for a, b, c, d in quads] + [(a, c, d) for a, b, c, d in quads]
    return Mesh(vertices, torch.tensor(faces))


def icosphere(radius: float, subdivisions: int = 3) -> Mesh:
    """An octahedron, its faces split in four again and again, pushed out to the sphere."""
    axes = torch.eye(3)
    vertices = torch.cat([axes, -axes])
    faces = torch.tensor(
        [(0, 1, 2), (1, 3, 2), (3, 4, 2), (4, 0, 2), (1, 0, 5), (3, 1, 5), (4, 3, 5), (0, 4, 5)], dtype=torch.long
    )
    for _ in range(subdivisions):
        ends = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(1).values
        unique, inverse = torch.unique(ends, dim=0, return_inverse=True)
        ab, bc, ca = (inverse + len(vertices)).reshape(3, -1)
        vertices = torch.cat([vertices, torch.nn.functional.normalize(vertices[unique].sum(1), dim=1)])
        a, b, c = faces.unbind(1)
        faces = torch.cat([torch.stack(f, 1) for f in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))])
    return Mesh(vertices * radius, faces)
