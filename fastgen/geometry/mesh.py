"""Mesh: triangles with colours, what may be wrong with them, and their repair.

World axes are the voxels': z points up, and an object fills at most [-0.5, 0.5]^3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import UserError, require


@dataclass(frozen=True, eq=False)
class Mesh:
    """vertices [V, 3] float; faces [F, 3] long, counter-clockwise seen from outside; colours [V, 3] in 0..1 or None.

    normals [V, 3] or None: in 0..1 as a normal map stores them, for that is how the mesh decoder predicts them. What
    is rendered or exported takes the normals of the triangles instead.
    """

    vertices: Tensor
    faces: Tensor
    colours: Tensor | None = None
    normals: Tensor | None = None

    def to(self, device: torch.device | str) -> Mesh:
        """The same mesh on another device."""
        return Mesh(*(None if v is None else v.to(device) for v in self.parts))  # type: ignore[arg-type]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.vertices, self.faces, self.colours, self.normals

    @property
    def triangles(self) -> Tensor:
        """Corners of the faces, [F, 3, 3]."""
        return self.vertices[self.faces]

    @property
    def face_normals(self) -> Tensor:
        """Outward normals times twice the area, [F, 3]."""
        a, b, c = self.triangles.unbind(1)
        return torch.linalg.cross(b - a, c - a)

    @property
    def areas(self) -> Tensor:
        return self.face_normals.norm(dim=-1) / 2

    @property
    def vertex_normals(self) -> Tensor:
        """Unit normals [V, 3]: the faces' around each vertex, weighted by area; zero where these cancel out."""
        total = torch.zeros_like(self.vertices)
        for corner in range(3):
            total.index_add_(0, self.faces[:, corner], self.face_normals)
        return torch.nn.functional.normalize(total, dim=-1)

    @property
    def volume(self) -> float:
        """Enclosed volume: negative where the faces are wound inwards, without a meaning for an open mesh."""
        a, b, c = self.triangles.double().unbind(1)
        return float((a * torch.linalg.cross(b, c)).sum() / 6)

    def subset(self, faces: Tensor) -> Mesh:
        """These faces (bool [F] or numbers) and the vertices they use, in their old order."""
        kept = self.faces[faces]
        used, renumbered = torch.unique(kept, return_inverse=True)
        return Mesh(self.vertices[used], renumbered, *(None if v is None else v[used] for v in self.parts[2:]))


def check(mesh: Mesh, name: str = "mesh") -> Mesh:
    """The mesh itself, if it has faces and finite vertices, and its faces name vertices that exist."""
    if len(mesh.faces) == 0:
        raise UserError(f"{name}: a mesh with no faces ({len(mesh.vertices)} vertices); give one with triangles")
    bad = ~torch.isfinite(mesh.vertices).all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise UserError(
            f"{name}: {int(bad.sum())} of {len(bad)} vertices are NaN or infinite (the first is number {first}); "
            "repair or export it again"
        )
    if int(mesh.faces.min()) < 0 or int(mesh.faces.max()) >= len(mesh.vertices):
        raise UserError(f"{name}: a face names a vertex beyond the {len(mesh.vertices)} there are; export it again")
    return mesh


def load(path: str | Path) -> Mesh:
    """Read a mesh file (what trimesh reads: OBJ, PLY, GLB, STL, OFF) as it lies there, seams of textures welded.

    A texture becomes vertex colours.
    """
    trimesh = require("trimesh", extra="3d", purpose=f"reading {path}")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        read = trimesh.load(path, force="mesh", process=False)
    except Exception as error:  # the readers of a dozen formats raise whatever they like
        raise UserError(f"{path}: not readable as a mesh ({error}); convert it to OBJ, PLY or GLB") from error
    if not isinstance(read, trimesh.Trimesh) or len(read.faces) == 0:
        raise UserError(f"{path}: a mesh with no faces; give one with triangles")
    faces, vertices = (torch.from_numpy(v.copy()) for v in (read.faces, read.vertices))
    return weld(check(Mesh(vertices.float(), faces.long(), _colours(read)), str(path)))


def _colours(read: Any) -> Tensor | None:
    """Vertex colours in 0..1 of what trimesh read, or None where the file has none."""
    visual = read.visual
    if visual is None or not visual.defined:
        return None
    if visual.kind == "texture":
        if (
            getattr(visual.material, "image", None) is None
            and getattr(visual.material, "baseColorTexture", None) is None
        ):
            return None
        visual = visual.to_color()
    return torch.from_numpy(visual.vertex_colors[:, :3].copy()).float() / 255


def weld(mesh: Mesh) -> Mesh:
    """Vertices of exactly the same position become one, which takes the attributes of the first of them.

    Faces that then name a vertex twice are dropped, which opens no hole. Slivers of no area between three places stay:
    without them their neighbours would no longer meet.
    """
    vertices, inverse = torch.unique(mesh.vertices + 0.0, dim=0, return_inverse=True)  # + 0: -0.0 becomes 0.0
    first = torch.full((len(vertices),), len(inverse), device=inverse.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(inverse), device=inverse.device), "amin")
    welded = Mesh(vertices, inverse[mesh.faces], *(None if v is None else v[first] for v in mesh.parts[2:]))
    a, b, c = welded.faces.unbind(1)
    return welded.subset((a != b) & (b != c) & (c != a))


def fit(mesh: Mesh, half: float = 0.5) -> Mesh:
    """The mesh moved and scaled so that its bounding box is centred and its longest side reaches from -half to half."""
    low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
    extent = float((high - low).max())
    if extent == 0:
        raise UserError("mesh: all its vertices lie in one point; give one with an extent")
    return replace(mesh, vertices=(mesh.vertices - (low + high) / 2) * (2 * half / extent))


def directed_edges(faces: Tensor) -> Tensor:
    """The three edges of each face, [3 F, 2], in the direction of its winding."""
    return torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])


def edge_counts(faces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Undirected edges [E, 2], faces at each [E], and how often it is run forwards less backwards [E]."""
    directed = directed_edges(faces)
    ascending = directed[:, 0] < directed[:, 1]
    edges, inverse, counts = torch.unique(directed.sort(1).values, dim=0, return_inverse=True, return_counts=True)
    balance = torch.zeros(len(edges), dtype=torch.long, device=faces.device)
    balance.index_add_(0, inverse, ascending.long() * 2 - 1)
    return edges, counts, balance


def is_closed(mesh: Mesh) -> bool:
    """Whether each edge is run as often one way as the other: no rim, one orientation, so whole winding numbers."""
    return bool((edge_counts(mesh.faces)[2] == 0).all())


def component_labels(mesh: Mesh) -> Tensor:
    """The number of the connected part of each face, long [F]; parts hang together by vertices."""
    require("scipy", extra="3d", purpose="finding the parts of a mesh")
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ends = directed_edges(mesh.faces.cpu()).numpy()
    count = len(mesh.vertices)
    graph = coo_matrix((torch.ones(len(ends)).numpy(), (ends[:, 0], ends[:, 1])), shape=(count, count))
    labels = torch.from_numpy(connected_components(graph, directed=False)[1]).long()[mesh.faces[:, 0].cpu()]
    return torch.unique(labels, return_inverse=True)[1].to(mesh.faces.device)


def drop_small_parts(mesh: Mesh, share: float) -> Mesh:
    """Without the connected parts that hold less than `share` of the whole area; the largest always stays."""
    labels = component_labels(mesh)
    area = torch.zeros(int(labels.max()) + 1, device=labels.device).index_add_(0, labels, mesh.areas.float())
    keep = area >= share * area.sum()
    keep[area.argmax()] = True
    return mesh.subset(keep[labels])


def boundary_loops(mesh: Mesh) -> list[list[int]]:
    """Closed walks along the rim, each a list of vertices with the surface on its left.

    Rims that touch in a vertex are left out: which way they go on there is not known.
    """
    edges, _, balance = edge_counts(mesh.faces)
    rim = torch.where((balance > 0)[:, None], edges, edges.flip(1))[balance.abs() == 1].tolist()
    following: dict[int, list[int]] = {}
    for start, end in rim:
        following.setdefault(start, []).append(end)
    loops, seen = [], set()
    for start in following:
        walk, here = [], start
        while here not in seen and len(following.get(here, ())) == 1:
            seen.add(here)
            walk.append(here)
            here = following[here][0]
        if walk and here == walk[0]:
            loops.append(walk)
    return loops


def fill_holes(mesh: Mesh, longest: int) -> Mesh:
    """Close each rim of at most `longest` edges by a fan around the mean of its vertices (attributes: the mean too)."""
    loops = [loop for loop in boundary_loops(mesh) if len(loop) <= longest]
    if not loops:
        return mesh
    rims = [torch.tensor(loop, device=mesh.faces.device) for loop in loops]
    fans = [
        torch.stack([rim.roll(-1), rim, torch.full_like(rim, len(mesh.vertices) + number)], 1)  # against the rim's run
        for number, rim in enumerate(rims)
    ]

    def extended(values: Tensor) -> Tensor:
        return torch.cat([values, torch.stack([values[rim].mean(0) for rim in rims])])

    attributes = (None if v is None else extended(v) for v in mesh.parts[2:])
    return Mesh(extended(mesh.vertices), torch.cat([mesh.faces, *fans]), *attributes)


def simplify(mesh: Mesh, faces: int) -> Mesh:
    """About `faces` faces, by quadric edge collapse through trimesh; attributes come from the nearest old vertices."""
    if faces >= len(mesh.faces):
        return mesh
    if faces < 4:
        raise UserError(f"simplify to {faces} faces: no solid has fewer than 4")
    trimesh = require("trimesh", extra="3d", purpose="simplifying a mesh")
    require("fast_simplification", extra="3d", purpose="simplifying a mesh")
    from scipy.spatial import cKDTree

    old = trimesh.Trimesh(mesh.vertices.detach().cpu().numpy(), mesh.faces.cpu().numpy(), process=False)
    new = old.simplify_quadric_decimation(face_count=faces)
    nearest = torch.from_numpy(cKDTree(old.vertices).query(new.vertices)[1]).to(mesh.faces.device)
    vertices = torch.from_numpy(new.vertices.copy()).to(mesh.vertices)
    simple = torch.from_numpy(new.faces.copy()).to(mesh.faces)
    return Mesh(vertices, simple, *(None if v is None else v[nearest] for v in mesh.parts[2:]))


def clean(mesh: Mesh, *, smallest_part: float = 0.0, largest_hole: int = 0, faces: int | None = None) -> Mesh:
    """Checked, welded, without parts below a share of the area, holes filled, simplified to `faces`."""
    mesh = weld(check(mesh))
    if smallest_part > 0:
        mesh = drop_small_parts(mesh, smallest_part)
    if largest_hole > 0:
        mesh = fill_holes(mesh, largest_hole)
    return check(mesh if faces is None else simplify(mesh, faces))
