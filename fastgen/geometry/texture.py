"""Vertex colours as a texture: charts by xatlas, baked by our own rasteriser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fastgen.errors import UserError, require
from fastgen.geometry.mesh import Mesh
from fastgen.geometry.raster import cover

SIZE = 1024  # as in the original's GLB files
GUTTER = 8  # pixels around each chart that take its colours, so that filtering finds nothing else
NEAREST = 3


@dataclass(frozen=True, eq=False)
class Textured:
    """A mesh cut open along its charts; uv [V, 2] in 0..1, v upwards; image uint8 [S, S, 3], first row on top."""

    mesh: Mesh
    uv: Tensor
    image: Tensor


def bake(mesh: Mesh, size: int = SIZE, source: Mesh | None = None) -> Textured:
    """The colours of `mesh`, or of the vertices of a finer `source` near it, as a texture of size x size pixels."""
    xatlas = require("xatlas", extra="3d", purpose="a texture (vertex colours need no unwrapping)")
    if (source or mesh).colours is None:
        raise UserError("a texture needs colours, and this mesh has none")
    vertices, faces = mesh.vertices.detach().float().cpu(), mesh.faces.cpu()
    first, cut, charts = _unwrap(xatlas, vertices, faces, size)
    opened = Mesh(vertices[first], cut, None if mesh.colours is None else mesh.colours.cpu()[first])
    # The texture's first row is its top, where v is 1; every face lies at the same depth.
    flat = torch.stack([charts[:, 0] * size, (1 - charts[:, 1]) * size, torch.ones(len(charts))], 1)
    fragments = cover(flat, cut, size, size)
    if source is None:
        assert opened.colours is not None
        colours = fragments.interpolate(cut, opened.colours)
    else:
        colours = torch.zeros(size, size, 3)
        colours[fragments.covered] = _nearest(source, fragments.interpolate(cut, opened.vertices)[fragments.covered])
    filled = _spread(colours, fragments.covered)
    return Textured(opened, charts, (filled * 255).round().clamp(0, 255).to(torch.uint8))


def _unwrap(xatlas: Any, vertices: Tensor, faces: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Charts: the old number of each new vertex [V'], the faces among these [F, 3], and their uv [V', 2]."""
    atlas, options = xatlas.Atlas(), xatlas.PackOptions()
    options.padding, options.resolution, options.bilinear = GUTTER // 2, size, True
    atlas.add_mesh(vertices.numpy(), faces.numpy().astype("uint32"))
    atlas.generate(pack_options=options)  # one picture, of about that resolution
    origin, corners, uv = atlas.get_mesh(0)
    return torch.from_numpy(origin.astype("int64")), torch.from_numpy(corners.astype("int64")), torch.from_numpy(uv)


def _nearest(source: Mesh, points: Tensor) -> Tensor:
    """Colours [N, 3] at points [N, 3]: those of the nearest vertices, weighted by their inverse squared distances."""
    require("scipy", extra="3d", purpose="a texture from another mesh")
    from scipy.spatial import cKDTree

    assert source.colours is not None
    tree = cKDTree(source.vertices.detach().cpu().numpy())
    count = min(NEAREST, len(source.vertices))
    distance, place = (torch.from_numpy(v).reshape(len(points), count) for v in tree.query(points.numpy(), k=count))
    weights = distance.float().clamp(min=1e-6) ** -2
    return (source.colours.cpu()[place] * (weights / weights.sum(1, keepdim=True))[..., None]).sum(1)


def _spread(colours: Tensor, covered: Tensor) -> Tensor:
    """Colours [S, S, 3] grown by GUTTER pixels over what is not covered; the rest takes the mean colour."""
    known = covered.float()[None]
    values = colours.movedim(-1, 0) * known
    mean = values.sum((1, 2)) / known.sum().clamp(min=1)
    for _ in range(GUTTER):
        around = avg_pool2d(torch.cat([values, known])[None], 3, 1, 1)[0]
        fresh = (known == 0) & (around[3:] > 0)
        values = torch.where(fresh, around[:3] / around[3:].clamp(min=1e-9), values)
        known = known.maximum(fresh.float())
    return torch.where(known > 0, values, mean[:, None, None]).movedim(0, -1)
